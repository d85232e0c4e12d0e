"""The engine `native`: a packed Vision Transformer in C++, from images to logits, without a product in float.

    kernels.h    products of unsigned and signed bytes with exact sums, for AVX-512 VNNI, AVX2 and plain C++
    vit.cpp      the model around them: normalisation, softmax, activation, codes, threads; its C interface
    library.py   compiles both once (`qvit/kernels/build.py`) and names their functions
    vit.py       the integer form of a model as numbers for that interface, and what it refuses

What is computed is what `deploy/integer/reference.py` computes: the same integers, the same exact sums. Normalisation,
softmax and activation are in float32 there and here; their last digits differ, so a value that lies within about 1e-6
of the edge between two integers may fall on the other side. Logarithmic probabilities, which other engines simulate,
are powers of two here, and exact: their products are sums of integers, too.
"""
