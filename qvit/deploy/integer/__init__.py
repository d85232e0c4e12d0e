"""Packed models on integers: exact sums as NumPy would compute them, and PyTorch's fast products."""
