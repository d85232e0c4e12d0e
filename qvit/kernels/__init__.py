"""Fast forms of what `functional.py` spells out, and of what surrounds it in a layer: same values, fewer passes.

fake_quantize.py     the operator with its derivatives: `torch.ops.qvit.fake_quantize`, `FakeQuantize`
linear.py            a linear layer and the quantizer of its input, simulated or on integers
attention.py         attention and the quantizers of q, k, v and the probabilities
cpu.py, cpu.cpp      compiled loops for CPUs
gpu.py               the operator, and a quantizer's numbers, in Triton
shapes.py            any tensor as four axes
"""
