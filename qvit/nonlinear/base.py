"""What all integer forms of LayerNorm, softmax and GELU share: their registries, fixed point, sums and roots.

A form is a function of int64 tensors alone. Its inputs and outputs are numbers in fixed point: a code q with f fraction
bits means q·2^-f.

    operation    input                                    output
    softmax      10 fraction bits, |q| ≤ 2^20             15 fraction bits, 0 ≤ q ≤ 2^15
    gelu         10 fraction bits, |q| < 2^17             14 fraction bits, |q| ≤ 2^21
    layernorm    12 fraction bits, |q| < 2^24             10 fraction bits before the affine part, see `affine`

The papers fold the scale of an 8-bit operand into each layer's constants, and round these to its coarse steps. Here
the 32-bit sum of a product is taken to fixed point first, so that constants are the same for all layers and no error
but the papers' approximation is left. That is ours; so is the width of the fractions.

An implementation that is to agree bit for bit needs: `>>` on negative numbers rounds towards minus infinity; `//` below
does, too, and where both operands are not negative it is the division of C; ranges are such that int64 never overflows.
Floats have no part in it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from jaxtyping import Int
from torch import Tensor

from qvit.registry import Registry

Form = Callable[[Tensor], Tensor]
_PACKAGE = "qvit.nonlinear"
LAYERNORM: Registry[str, Form] = Registry("integer LayerNorm", _PACKAGE)
SOFTMAX: Registry[str, Form] = Registry("integer softmax", _PACKAGE)
GELU: Registry[str, Form] = Registry("integer GELU", _PACKAGE)
#: The operations by name, each with its forms.
OPERATIONS: Mapping[str, Registry[str, Form]] = {"layernorm": LAYERNORM, "softmax": SOFTMAX, "gelu": GELU}

#: Fraction bits of inputs, and the largest code without its sign.
INPUT_BITS = {"layernorm": 12, "softmax": 10, "gelu": 10}
LARGEST = {"layernorm": 2**24 - 1, "softmax": 2**20, "gelu": 2**17 - 1}
#: Fraction bits of outputs; those of LayerNorm before its affine part.
OUTPUT_BITS = {"layernorm": 10, "softmax": 15, "gelu": 14}
#: More channels could overflow the sum of LayerNorm's squares.
MOST_CHANNELS = 4096
_AFFINE_SHIFT, _LARGEST_BIAS, _LARGEST_OUTPUT = 8, 2**40, 2**23


def bit_length(n: Int[Tensor, "..."]) -> Int[Tensor, "..."]:
    """How many bits `n` ≥ 0 has: the least L with n < 2^L; 0 for 0."""
    found = torch.zeros_like(n)
    for step in (32, 16, 8, 4, 2, 1):
        more = n >= 1 << step
        found, n = found + step * more, torch.where(more, n >> step, n)
    return found + (n > 0)


def quotient(n: Int[Tensor, "..."], d: Int[Tensor, "..."] | int) -> Int[Tensor, "..."]:
    """n // d for 0 ≤ n < 2^53 and d ≥ 1, exactly, in a fifth of the time that PyTorch takes for integers.

    The quotient of two doubles is within n/d·2^-53 < 1/d of n/d, and n/d is at least 1/d below the next integer.
    """
    return (n.double() / d).floor().long()


def shifted(n: Int[Tensor, "..."], bits: Int[Tensor, "..."]) -> Int[Tensor, "..."]:
    """n·2^-bits, rounded to nearest, half up; `bits` ≥ 1."""
    return (n + (1 << (bits - 1))) >> bits


def exponential_input(scores: Int[Tensor, "... M"]) -> Int[Tensor, "... M"]:
    """Scores less the largest of their row, 10 fraction bits, in [-2^15, 0]: below, the exponential is 0 anyway."""
    return (scores - scores.amax(-1, keepdim=True)).clamp_min(-(1 << 15))


def normalized(e: Int[Tensor, "... M"]) -> Int[Tensor, "... M"]:
    """Exponentials over their row's sum, with 15 fraction bits.

    With one division a row, where the sum t has L bits:

        factor = 2^(L+15) // t        q = (e·factor + 2^(L-1)) >> L        factor in [2^15, 2^16], products below 2^32

    Args:
        e: In [0, 2^15], the row's largest at least 2^14; M ≤ 2^24.
    """
    total = e.sum(-1, keepdim=True)
    length = bit_length(total)
    return shifted(e * ((1 << (length + 15)) // total), length)


def gated(x: Int[Tensor, "..."], gate: Int[Tensor, "..."]) -> Int[Tensor, "..."]:
    """x·gate for x with 10 and a gate in [0, 2^15] with 15 fraction bits: (x·gate + 2^10) >> 11, 14 fraction bits."""
    return (x * gate + (1 << 10)) >> 11


def deviations(x: Int[Tensor, "... C"]) -> Int[Tensor, "... C"]:
    """x less the mean of its row, itself rounded half up: (2·Σx + C) // 2C."""
    channels = x.shape[-1]
    return x - torch.div(2 * x.sum(-1, keepdim=True) + channels, 2 * channels, rounding_mode="floor")


def divided(y: Int[Tensor, "... C"], root: Int[Tensor, "... 1"], one: int, bits: int) -> Int[Tensor, "... C"]:
    """y·one / (root·2^bits), rounded, with one division a row, where the root ≥ 1 has L bits.

    factor = (one·2^L) // root        n = (y·factor + 2^(L+bits-1)) >> (L + bits)        one ≤ factor ≤ 2·one < 2^18
    """
    length = bit_length(root)
    return shifted(y * ((one << length) // root), length + bits)


def affine(n: Int[Tensor, "... C"], weight: Tensor | None, bias: Tensor | None) -> tuple[Int[Tensor, "... C"], Tensor]:
    """n·weight + bias for normalised values with 10 fraction bits: codes, |q| ≤ 2^23, and the power of two they count.

    Constants, made once, in double precision, rounded half to even:

        s = 15 - e, where max|weight| = m·2^e, ½ ≤ m < 1 (e = 0 for no weight, or for zeros)
        g = round(weight·2^s), |g| ≤ 2^15        b = round(bias·2^(s+10)), clamped to ±2^40

    Every element takes a product, an addition and a shift: q = clamp((n·g + b + 2^7) >> 8, ±2^23), which means
    q·2^-(s+2).
    """
    weight = n.new_ones((), dtype=torch.float64) if weight is None else weight.detach().double()
    shift = 15 - torch.frexp(weight.abs().max())[1]
    total = n * torch.ldexp(weight, shift).round().long()
    if bias is not None:
        own = torch.ldexp(bias.detach().double(), shift + OUTPUT_BITS["layernorm"]).round()
        total = total + own.clamp(-_LARGEST_BIAS, _LARGEST_BIAS).long()
    codes = ((total + (1 << (_AFFINE_SHIFT - 1))) >> _AFFINE_SHIFT).clamp(-_LARGEST_OUTPUT, _LARGEST_OUTPUT)
    unit = torch.ldexp(torch.ones_like(weight.flatten()[0]), _AFFINE_SHIFT - OUTPUT_BITS["layernorm"] - shift)
    return codes, unit
