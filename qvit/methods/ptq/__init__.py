"""Post-training quantization and its parts, a file each."""
