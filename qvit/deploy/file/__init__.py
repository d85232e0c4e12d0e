"""The packed file: integers at their bit-widths, scales, and all that is needed to run the model again."""
