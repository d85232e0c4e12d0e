"""Packed models without PyTorch: a C++ library with a C interface (`qvit.h`), and NumPy arrays in and out.

    from qvit.deploy.native import load

    model = load("packed.safetensors")
    answers = model(images)  # float32 (B, channels, height, width) -> (B, classes); features, where it has no classes

What is computed is what `deploy/integer/reference.py` computes: the same integers, the same exact sums. Normalisation,
softmax and activation are in float32 there and here; their last digits differ, so a value that lies within about 1e-6
of the edge between two integers may fall on the other side. Logarithmic probabilities, which other engines simulate,
are powers of two here, and exact: their products are sums of integers, too. engine.cpp lists the files.
"""

from qvit.deploy.native.model import NativeModel, load

__all__ = ["NativeModel", "load"]
