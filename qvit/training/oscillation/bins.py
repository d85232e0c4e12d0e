"""The oscillation-aware bin regularizer of VVTQ (Huang et al. 2023, arXiv 2307.00331), on integer codes.

A bin holds the weights of one grid point. With w_c = clamp(w/s, quant_min, quant_max)·s and w_q its grid point,

    L = mean((w_q - w_c)²) + Σ over bins of n ≥ 2 weights  Σ_bin (w_c - mean_bin(w_c))² / (n - 1)

so weights are drawn to the middle of their bin, away from the boundaries at which they oscillate. w_q is a constant;
the gradient reaches w inside the range, and s through the clipped weights (w_c = s·quant_min or s·quant_max there).

With the code q, the remainder e = w_c/s - q in [-1/2, 1/2], and ē its mean over a bin, everything follows from two sums
per bin, n and Σe, because s and q are constants there and L is quadratic in e:

    g = ∂L/∂w_c = 2s·(e/N + (e - ē)/(n - 1)) = a·e + b, with a and b looked up by code        L = ½ Σ s·e·g

So forward scatters twice and gathers twice, and it computes the gradients along the way: backward multiplies
them by a number. There is no loop over bins and no comparison of floats with grid points.

A grid point is a pair of scale and code: where a weight has several scales (per head, per channel), each has its own
bins. With one scale per matrix, as in the paper, these are the paper's bins. The mean is over the whole weight.

Scatters go to up to 16 tables, which are then added: threads share the work, float32 sums stay exact enough, and the
additions of a GPU rarely meet at one address. (On a GPU their order, and so the last digit, is not reproducible.)
"""

from __future__ import annotations

import math
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from qvit.functional import integer_range

TABLES = 16


class _BinRegularizer(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, w: Tensor, scale: Tensor, bit_width: Tensor, signed: bool, bins: int) -> Tensor:
        dtype = torch.promote_types(w.dtype, torch.float32)
        step = scale.to(dtype)
        quant_min, quant_max = integer_range(bit_width, signed)
        u = w.to(dtype) / step
        clamped = torch.minimum(torch.maximum(u, quant_min), quant_max)
        codes = clamped.round()
        remainder = clamped - codes
        index = _bin_index(codes.sub_(quant_min), scale, bins)
        a, b = _coefficients(index, remainder, step, bins)
        gradient = a.view(w.shape).mul_(remainder).add_(b.view(w.shape))
        weighted = remainder.mul_(gradient)
        shape = (1,) * (w.dim() - scale.dim()) + tuple(scale.shape)
        loss = (weighted.sum_to_size(shape) * step).sum() / 2
        clipped = u.ne_(clamped).mul_(gradient)
        grad_scale = clamped.mul_(clipped).sum_to_size(scale.shape)
        ctx.save_for_backward(gradient.sub_(clipped).to(w.dtype), grad_scale.to(scale.dtype))
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad_w, grad_scale = ctx.saved_tensors
        return grad_w * grads[0], grad_scale * grads[0], None, None, None


def bin_regularizer(
    w: Float[Tensor, "..."], scale: Float[Tensor, "..."], bit_width: Tensor, signed: bool, bins: int
) -> Float[Tensor, ""]:
    """L of one weight, at least float32.

    Args:
        w: The weight, viewed so that `scale` broadcasts against it.
        scale: Positive; each of its entries has bins of its own.
        bit_width: Integer-valued, float dtype, broadcasts against `w`.
        signed: See `integer_range`.
        bins: At least 2 to the largest width: the number of codes, which the device is not asked for.
    """
    return _BinRegularizer.apply(w, scale, bit_width, signed, bins)


def _bin_index(codes: Tensor, scale: Tensor, bins: int) -> Tensor:
    """The bin of every weight, (tables, weights): its code from 0 on, and `bins` for every scale before its own.

    A weight that is no number has no code; in a bin it makes the loss NaN, which ends the run with a sentence.
    """
    codes = codes.nan_to_num_(0.0)
    if scale.numel() > 1:
        before = torch.arange(0, scale.numel() * bins, bins, device=codes.device, dtype=codes.dtype)
        codes = codes + before.view(scale.shape)
    return codes.to(torch.int64).view(math.gcd(codes.numel(), TABLES), -1)


def _coefficients(index: Tensor, remainder: Tensor, step: Tensor, bins: int) -> tuple[Tensor, Tensor]:
    """a and b of every weight, each (tables, weights)."""
    remainder = remainder.view(index.shape)
    empty = remainder.new_zeros(len(index), step.numel() * bins)
    count = empty.scatter_add(1, index, torch.ones_like(remainder)).sum(0)
    mean = empty.scatter_add_(1, index, remainder).sum(0) / count.clamp_min(1)
    twice = 2 * step.reshape(-1, 1).expand(-1, bins).reshape(-1)
    spread = twice * (count > 1) / (count - 1).clamp_min(1)
    pair = (spread + twice / remainder.numel(), -spread * mean)
    a, b = (values.expand(len(index), -1).gather(1, index) for values in pair)
    return a, b
