"""What becomes of a quantized model after training: files, engines that run it, and how fast they are."""
