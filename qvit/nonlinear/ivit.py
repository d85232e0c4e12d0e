"""I-ViT (Li and Gu, ICCV 2023, https://arxiv.org/abs/2207.01405): exponentials by shifts, and ten steps to a root.

    ShiftExp    exp(x) = 2^t, t = x + (x >> 1) - (x >> 4);  t = -z - r, r in [0, 1):  2^-z·(1 - r/2)
    Shiftmax    ShiftExp(x - max) over its sum
    ShiftGELU   x·σ(1.702·x), σ by ShiftExp, 1.702·x = x + (x >> 1) + (x >> 3) + (x >> 4)
    norm        (x - mean)·√C / √Σ(x - mean)², the root by ten steps r ← (r + n // r) >> 1

Where this differs: the paper subtracts the largest value of a row within σ, too, and divides exp(x - max) by exp(x -
max) + exp(-max). Here it is the larger one of x and 0, element by element, which loses no digits of small values and
makes a GELU a function of one number. The public code starts the root from 2^16; here as in the paper. Worst errors
over all codes: exp 0.0443 of the largest value, GELU 0.0255; the root is exact or one too large.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Int
from torch import Tensor

from qvit.nonlinear.base import (
    GELU,
    LAYERNORM,
    SOFTMAX,
    bit_length,
    deviations,
    divided,
    exponential_input,
    gated,
    normalized,
    quotient,
)

_ONE, _FRACTION = 1 << 10, 10
_STEPS = 10


def _power_of_two(t: Int[Tensor, "..."]) -> Int[Tensor, "..."]:
    """2^t for t in [-2^16, 0], 10 fraction bits: z = -t >> 10, r = -t & 1023, ((1024 + (-r >> 1)) << 5) >> z."""
    z, r = -t >> _FRACTION, -t & (_ONE - 1)
    return ((_ONE + (-r >> 1)) << 5) >> z


def exponential(x: Int[Tensor, "..."]) -> Int[Tensor, "..."]:
    """exp for x in [-2^15, 0], 10 fraction bits: in [0, 2^15], 15 fraction bits."""
    return _power_of_two(x + (x >> 1) - (x >> 4))


@SOFTMAX.register("i-vit")
def softmax(scores: Int[Tensor, "... M"]) -> Int[Tensor, "... M"]:
    """`normalized(exponential(scores - max))`."""
    return normalized(exponential(exponential_input(scores)))


def gate(x: Int[Tensor, "..."]) -> Int[Tensor, "..."]:
    """σ(1.702·x) with 15 fraction bits, in [0, 2^15].

    With a = -min(|x|, 2^14) and e = exponential(a + (a >> 1) + (a >> 3) + (a >> 4)): 2^30 // (2^15 + e) for x ≥ 0, else
    (e·2^15) // (2^15 + e).
    """
    a = -(x.abs().clamp_max(1 << 14))
    e = exponential(a + (a >> 1) + (a >> 3) + (a >> 4))
    return quotient(torch.where(x >= 0, 1 << 15, e) << 15, (1 << 15) + e)


@GELU.register("i-vit")
def gelu(x: Int[Tensor, "..."]) -> Int[Tensor, "..."]:
    """`gated(x, gate(x))`."""
    return gated(x, gate(x))


def square_root(n: Int[Tensor, "..."]) -> Int[Tensor, "..."]:
    """floor(√n) or one more, for 1 ≤ n < 2^62: from 2^floor(L/2), where n has L bits, exactly ten steps."""
    root = torch.ones_like(n) << (bit_length(n) >> 1)
    for _ in range(_STEPS):
        root = (root + n // root) >> 1
    return root


@LAYERNORM.register("i-vit")
def layer_norm(x: Int[Tensor, "... C"]) -> Int[Tensor, "... C"]:
    """(x - mean)·√C/√Σy² with 10 fraction bits: y = deviations(x), divided(y, √max(Σy², 1), round(√C·2^10), 0)."""
    y = deviations(x)
    root = square_root(y.square().sum(-1, keepdim=True).clamp_min(1))
    return divided(y, root, round(math.sqrt(x.shape[-1]) * _ONE), 0)
