"""A float timm model in, a quantized model out.

create      from a name to a float model with weights
families/   what each kind of model consists of: quantized classes, sites, costs
convert     `quantize`, `freeze`, `plan_of`
calibrate   scales and offsets from images
layers      linear layers and convolutions whose tensors are quantized
"""
