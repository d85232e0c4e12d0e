"""The engine `cuda`: the integer form of a packed model as Triton kernels, for NVIDIA GPUs."""
