"""Packed models without PyTorch: a C++ library with a C interface (`qvit.h`), and NumPy arrays in and out.

    from qvit.deploy.native import load

    model = load("packed.safetensors")
    logits = model(images)  # float32 (B, channels, height, width) -> (B, classes)
"""

from qvit.deploy.native.model import NativeModel, load

__all__ = ["NativeModel", "load"]
