"""I-BERT (Kim et al., ICML 2021, https://arxiv.org/abs/2101.01321): second-order polynomials, and Newton's square root.

    exp     x = p - z·ln 2, p in (-ln 2, 0]:  exp(x) = 2^-z·(0.3585·(p + 1.353)² + 0.344)                  Algorithm 3
    erf     sgn(x)·(-0.2888·(min(|x|, 1.769) - 1.769)² + 1);  GELU(x) = x·(1 + erf(x/√2))/2                Algorithm 2
    norm    (x - mean) / floor(√var), the root by Newton's iteration until it stops falling                Algorithm 4

The constants in fixed point, each rounded once:

    10 fraction bits    ln 2 → 710        1.353 → 1385        1.769·√2 → 2562
    20 fraction bits    0.344/0.3585 → 1006166                1/(0.2888/2) → 7261607

Worst errors over all codes: exp 0.002 of the largest value, GELU 0.0183, the root none. As in the paper's code, the
epsilon of LayerNorm is left out; a row of equal values gives zeros. The mean is rounded to a code there and here.
"""

from __future__ import annotations

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

_LN2, _EXP_B, _EXP_C = 710, 1385, 1006166
_ERF_B, _ERF_ONE = 2562, 7261607
_STEPS = 8


def exponential(x: Int[Tensor, "..."]) -> Int[Tensor, "..."]:
    """exp for x in [-2^15, 0], 10 fraction bits: in [0, 32663], where 32663 is exp(0); about 15 fraction bits.

        z = (-x) // 710        p = x + 710·z        e = (((p + 1385)² + 1006166)·183) >> (14 + z)

    The factor 183·2^-14 stands for 0.3585·2^-5 and is the same for a whole row, so a softmax does not see its error.
    All products are below 2^30; z ≤ 46.
    """
    z = quotient(-x, _LN2)
    p = x + _LN2 * z
    return (((p + _EXP_B).square() + _EXP_C) * 183) >> (14 + z)


@SOFTMAX.register("i-bert")
def softmax(scores: Int[Tensor, "... M"]) -> Int[Tensor, "... M"]:
    """`normalized(exponential(scores - max))`."""
    return normalized(exponential(exponential_input(scores)))


def gate(x: Int[Tensor, "..."]) -> Int[Tensor, "..."]:
    """(1 + erf(x/√2))/2 with 15 fraction bits, in [0, 2^15].

        d = min(|x|, 2562) - 2562        v = 7261607 + sgn(x)·(7261607 - d²)        gate = (v·2^14) // 7261607

    v lies in [0, 2^24); sgn(0) = 0.
    """
    d = x.abs().clamp_max(_ERF_B) - _ERF_B
    return quotient((_ERF_ONE + x.sign() * (_ERF_ONE - d.square())) << 14, _ERF_ONE)


@GELU.register("i-bert")
def gelu(x: Int[Tensor, "..."]) -> Int[Tensor, "..."]:
    """`gated(x, gate(x))`."""
    return gated(x, gate(x))


def square_root(n: Int[Tensor, "..."]) -> Int[Tensor, "..."]:
    """floor(√n), exactly, for 0 ≤ n < 2^62.

    From r = 2^ceil(L/2), where n has L bits, at least the root: r ← (r + n // r) >> 1 as long as it falls. Eight steps
    are enough for every n.
    """
    root = torch.ones_like(n) << ((bit_length(n) + 1) >> 1)
    for _ in range(_STEPS):
        root = torch.minimum(root, (root + n // root.clamp_min(1)) >> 1)
    return root


@LAYERNORM.register("i-bert")
def layer_norm(x: Int[Tensor, "... C"]) -> Int[Tensor, "... C"]:
    """(x - mean)/std with 10 fraction bits: y = deviations(x), std = max(√(Σy² // C), 1), divided(y, std, 2^14, 4)."""
    y = deviations(x)
    root = square_root(y.square().sum(-1, keepdim=True) // x.shape[-1])
    return divided(y, root.clamp_min(1), 1 << 14, 4)
