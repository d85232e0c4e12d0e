"""Uniform quantization as tensor maths: the only place that spells out rounding, clipping and their gradients.

With scale `s`, offset `β` (in float; 0 for a symmetric grid) and bit-width `b`,

    u = (x - β) / s        q = round(clamp(u, quant_min, quant_max))        x̂ = s·q + β      (Q-ViT eq. 8; LSQ+ eq. 1)

    signed:   quant_min = -2^(b-1),  quant_max = 2^(b-1) - 1            unsigned:  quant_min = 0,  quant_max = 2^b - 1

Rounding is half to even and passes its gradient straight through. The derivatives follow from the graph (LSQ eq. 3;
LSQ+ eq. 4-5); writing `inside` for quant_min ≤ u ≤ quant_max:

    ∂x̂/∂x = 1[inside]        ∂x̂/∂s = q - u·1[inside]        ∂x̂/∂β = 1 - 1[inside]
    ∂x̂/∂b = s·ln2·2^(b-1)·(1[u > quant_max] - 1[u < quant_min])  (signed)        s·ln2·2^b·1[u > quant_max]  (unsigned)

so a bit-width feels the task only through clipped elements. LSQ multiplies the gradient of `s` by g =
1/sqrt(n·quant_max), n being the number of elements that share the scale.

`fake_quantize` spells this out and lets autograd differentiate it, `switchable_fake_quantize` adds the choice of the
scale by the width: the reference of the fast forms in `kernels/`. Every scale, offset and width broadcasts against `x`;
arithmetic is at least float32, the result has the dtype of `x`.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

#: No scale is used below this value: a smaller step is a scale that has collapsed.
SMALLEST_SCALE = 1e-8


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, values: Tensor) -> Tensor:
        return values.view_as(values)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


def straight_through(x: Float[Tensor, "..."], values: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """Returns `values`, of the shape and dtype of `x`; the gradient goes to `x`, unchanged and everywhere."""
    return _StraightThrough.apply(x, values)


def round_ste(x: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """Rounds half to even; the gradient passes unchanged (straight-through estimator, Bengio et al. 2013)."""
    return straight_through(x, x.detach().round())


class _ScaleGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: Tensor | float) -> Tensor:
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0] * ctx.factor, None


def scale_gradient(x: Float[Tensor, "..."], factor: Tensor | float) -> Float[Tensor, "..."]:
    """Returns `x`; its gradient is multiplied by `factor` (LSQ, section 2.2)."""
    return _ScaleGradient.apply(x, factor)


class _ClampInward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, low: float, high: float) -> Tensor:
        ctx.save_for_backward(x)
        ctx.low, ctx.high = low, high
        return x.clamp(low, high)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (x,) = ctx.saved_tensors
        return inward(x, grads[0], ctx.low, ctx.high), None, None


def inward(x: Tensor, grad: Tensor, low: float, high: float) -> Tensor:
    """`grad` without what would push `x` further beyond a limit that it has reached."""
    return torch.where(torch.where(grad < 0, x < high, x > low), grad, 0.0)


def clamp_inward(x: Float[Tensor, "..."], low: float, high: float) -> Float[Tensor, "..."]:
    """Clamps to [low, high]; at and beyond a limit only a gradient whose descent step leads back inside passes.

    An ordinary clamp has no gradient outside its limits, so a width that overshoots 8 would stay there whatever the
    budget says; a projection of the parameter inside forward would write to it behind the optimizer's back. This is the
    projected gradient, in the graph.
    """
    return _ClampInward.apply(x, low, high)


def integer_range(bit_width: Tensor | int, signed: bool) -> tuple[Any, Any]:
    """The smallest and largest integer of a grid: `(quant_min, quant_max)`.

    Numbers for a number, tensors for a tensor.

    Args:
        bit_width: Integer-valued widths, any shape.
        signed: Two's complement range if true, else 0 … 2^b - 1.
    """
    if isinstance(bit_width, Tensor):
        levels = torch.exp2(bit_width)
        return (-levels / 2, levels / 2 - 1) if signed else (torch.zeros_like(levels), levels - 1)
    levels = 2**bit_width
    return (-levels // 2, levels // 2 - 1) if signed else (0, levels - 1)


def wide(x: Tensor) -> Tensor:
    """At least float32: half-precision types cannot hold the grid of 8 bits and a scale."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def quantize(
    x: Float[Tensor, "..."],
    scale: Float[Tensor, "..."],
    bit_width: Tensor | int,
    signed: bool,
    offset: Float[Tensor, "..."] | None = None,
) -> Int[Tensor, "..."]:
    """The integers q of `x`, int32, in [quant_min, quant_max]. Not differentiable."""
    quant_min, quant_max = integer_range(bit_width, signed)
    shifted = wide(x) if offset is None else wide(x) - offset
    return torch.round(torch.clamp(shifted / scale, quant_min, quant_max)).to(torch.int32)


def dequantize(
    q: Int[Tensor, "..."], scale: Float[Tensor, "..."], offset: Float[Tensor, "..."] | None = None
) -> Float[Tensor, "..."]:
    """The grid points s·q + β of the integers `q`, in the dtype of `scale`."""
    values = q.to(scale.dtype) * scale
    return values if offset is None else values + offset


def fake_quantize(
    x: Float[Tensor, "..."],
    scale: Float[Tensor, "..."],
    bit_width: Tensor,
    signed: bool,
    offset: Float[Tensor, "..."] | None = None,
    elements_per_scale: Tensor | int | None = None,
) -> Float[Tensor, "..."]:
    """Quantizes and dequantizes `x`: the plain reference, differentiated by autograd.

    Args:
        x: What is quantized.
        scale: Positive, broadcasts against `x`.
        bit_width: Integer-valued, float dtype, broadcasts against `x`; gradient flows to it through the clipping limits
            (Q-ViT).
        signed: See `integer_range`.
        offset: LSQ+'s β in float units; None for a grid that contains zero.
        elements_per_scale: n of LSQ's gradient factor 1/sqrt(n·quant_max), a number or one for each scale; None leaves
            the gradient of `scale` as it is.
    """
    # Parameters of half precision, too: their gradients are sums over all elements, and the parts of a sum cancel.
    scale, bit_width, offset = wide(scale), wide(bit_width), None if offset is None else wide(offset)
    quant_min, quant_max = integer_range(bit_width, signed)
    if elements_per_scale is not None:
        factor = torch.rsqrt(elements_per_scale * quant_max.detach())
        scale = scale_gradient(scale.expand(torch.broadcast_shapes(scale.shape, factor.shape)), factor)
    scale = scale.clamp_min(SMALLEST_SCALE)
    shifted = wide(x) if offset is None else wide(x) - offset
    u = shifted / scale
    clamped = torch.where(u > quant_max, quant_max, torch.where(u < quant_min, quant_min, u))
    rounded = round_ste(clamped)
    values = rounded * scale
    return (values if offset is None else values + offset).to(x.dtype)


def log_quantize(
    x: Float[Tensor, "..."], scale: Float[Tensor, "..."], bit_width: Tensor, steps: int
) -> tuple[Float[Tensor, "..."], Float[Tensor, "..."]]:
    """The codes of `x` on a logarithmic grid, integer-valued in the dtype of the computation, and u before rounding.

        u = -steps·log2(x / s)        q = round(clamp(u, 0, 2^b - 1))        (FQ-ViT, Lin et al. 2022)

    Args:
        x: Not negative; where it is 0, q is the largest code.
        scale: The value of code 0.
        bit_width: Integer-valued, broadcasts against `x`.
        steps: Codes per factor of two.
    """
    quant_min, quant_max = integer_range(bit_width, signed=False)
    u = torch.log2(wide(x) / scale) * -steps
    return torch.round(torch.clamp(u, quant_min, quant_max)), u


def log_dequantize(
    q: Float[Tensor, "..."], scale: Float[Tensor, "..."], bit_width: Tensor, steps: int
) -> Float[Tensor, "..."]:
    """The values of logarithmic codes: s·2^(-q/steps), and 0 for the largest code."""
    _, quant_max = integer_range(bit_width, signed=False)
    return torch.where(q >= quant_max, torch.zeros_like(scale), torch.exp2(q / -steps) * scale)


class LogFakeQuantize(torch.autograd.Function):
    """Quantizes and dequantizes on a logarithmic grid, with straight-through gradients.

    Inside the grid ∂x̂/∂x = 1 and ∂x̂/∂s = 0: x̂ follows x whatever the scale. For x > s it is the other way round. Below
    the smallest level, where x̂ = 0, neither has a gradient.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, bit_width: Tensor, steps: int) -> Tensor:
        q, u = log_quantize(x, scale, bit_width, steps)
        above = u < 0
        _, quant_max = integer_range(bit_width, signed=False)
        ctx.save_for_backward(above, (q < quant_max) & ~above)
        ctx.scale_shape = scale.shape
        return log_dequantize(q, scale, bit_width, steps).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        above, inside = ctx.saved_tensors
        grad_scale = (wide(grads[0]) * above).sum_to_size(ctx.scale_shape)
        return grads[0] * inside, grad_scale, None, None


def pick_column(
    bank: Float[Tensor, "... W"], bit_width: Tensor, candidates: Float[Tensor, " W"]
) -> Float[Tensor, "..."]:
    """The entry of a bank of scales (or offsets) that belongs to each width.

    A one-hot product, so the other entries get a gradient of exactly zero.

    Args:
        bank: One column per candidate width; a bank of one column serves all widths.
        bit_width: Integer-valued, broadcasts against the bank's leading dimensions.
        candidates: The width of each column.
    """
    if bank.shape[-1] == 1:
        return bank[..., 0]
    return (bank * (bit_width.detach().unsqueeze(-1) == candidates)).sum(-1)


def switchable_fake_quantize(
    x: Float[Tensor, "..."],
    scales: Float[Tensor, "... W"],
    offsets: Float[Tensor, "... W"] | None,
    bit_width: Tensor,
    candidates: Float[Tensor, " W"],
    limits: tuple[int, int] | None,
    signed: bool,
    elements_per_scale: Tensor | int | None,
) -> Float[Tensor, "..."]:
    """`fake_quantize` with the scale of the current width (Q-ViT section 3.3).

    The plain reference of `kernels.fake_quantize.FakeQuantize`.

    Args:
        x: What is quantized.
        scales, offsets: Banks, see `pick_column`; offsets None on a symmetric grid.
        bit_width: Real-valued width b̃ where `limits` are given, else integer-valued.
        candidates: Widths of the banks' columns.
        limits: Range of a learned width, clamped and rounded here (Q-ViT eq. 7); None for a fixed one.
        signed, elements_per_scale: See `fake_quantize`.
    """
    width = bit_width
    if limits is not None:  # a gradient beyond them counts in the sum over a batch: it is judged there (optimizer.py)
        width = straight_through(bit_width, bit_width.detach().clamp(*limits).round())
    offset = None if offsets is None else pick_column(offsets, width, candidates)
    return fake_quantize(x, pick_column(scales, width, candidates), width, signed, offset, elements_per_scale)
