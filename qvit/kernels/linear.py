"""A linear layer and the quantizer of its input as one function: only the raw input is kept for backward.

Alone, the quantizer would keep x and the layer x̂. Here x̂ is made again in backward, a pass over memory beside two
products. The weight comes quantized already, so it may have any quantizer.

    y = x̂·Ŵᵀ + bias

*On integers*: given the codes r of Ŵ = t·r, the product is one of codes in int8 with 32-bit sums, exact, and several
times as fast as in float32 on processors with VNNI. With stored codes c = q - z (z = 128 for unsigned grids),

    y_j = s·t_j·(Σ_k c_k·r_jk + z·R_j) + β·t_j·R_j + bias_j        R_j = Σ_k r_jk

differs from the simulated product by the rounding of float sums alone. Backward is the same for both, in float.

*Behind a norm*: x is what the norm gets, and x̂ is made of it by one kernel, where there is such a form (`gpu_norm.py`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from qvit.kernels import cpu, gpu_norm
from qvit.kernels.fake_quantize import (
    Grid,
    Learned,
    Meta,
    Mixed,
    backward_on,
    codes_on,
    packed,
    parameter_gradients,
    quantize_on,
    resolve,
    unpacked,
    width_slope,
)
from qvit.kernels.gpu_norm import Norm

Codes = tuple[Tensor, Tensor]


def quantized_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, learned: Learned, codes: Codes | None = None,
    norm: Norm | None = None,
) -> Tensor:  # fmt: skip
    """x̂·Ŵᵀ + bias, differentiable in everything.

    Args:
        x: (..., in), or (B, H, N, d) with H·d = in: heads that are concatenated to (B, N, in) once they are quantized.
        weight: Ŵ, (out, in).
        bias: (out,) or None.
        learned: The quantizer of `x`.
        codes: r of Ŵ, int8 (out, in), and t, (out,): the product runs on integers. Then `x` has one scale. Not while
            a width is learned by interpolation: x̂ is not on one grid.
        norm: Of `x`, comes before the quantizer; one that `gpu_norm.handles`, without `codes`.
    """
    own = (None, None, None) if norm is None else (norm.weight, norm.bias, norm[2:])
    return _QuantizedLinear.apply(x, weight, bias, *learned, codes, *own)


class _QuantizedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        scales: Tensor,
        offsets: Tensor | None,
        bit_width: Tensor,
        meta: Meta,
        codes: Codes | None,
        gain: Tensor | None,
        shift: Tensor | None,
        about_norm: tuple[float, bool, torch.dtype] | None,
    ) -> Tensor:
        grid, width = resolve(scales, offsets, bit_width, meta)
        dtype = working_type(x)
        weight = weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
        ctx.meta, ctx.heads, ctx.has_bias = meta, x.shape[-1] != weight.shape[-1], bias is not None
        ctx.about_norm, norm = about_norm, _norm(gain, shift, about_norm)
        ctx.save_for_backward(x, weight, scales, offsets, bit_width, gain, shift, *packed(grid, width))
        if codes is not None and isinstance(grid, Grid):
            return _on_integers(x, bias, grid, codes, meta.signed, dtype)
        return F.linear(_tokens(x, grid, weight.shape[-1], dtype, norm), weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        x, weight, scales, offsets, bit_width, gain, shift, *parts = ctx.saved_tensors
        grid, width = unpacked(parts)
        norm = _norm(gain, shift, ctx.about_norm)
        grad = grads[0].to(weight.dtype).flatten(0, -2)
        needs_x, needs_weight, needs_bias, needs_scales = ctx.needs_input_grad[:4]
        grad_x = grad_weight = grad_gain = grad_shift = None
        of_grid: tuple[Tensor | None, ...] = (None, None, None)
        if needs_weight:
            grad_weight = grad.t() @ _tokens(x, grid, weight.shape[-1], weight.dtype, norm).flatten(0, -2)
        if needs_x or needs_scales or any(ctx.needs_input_grad[8:10]):
            towards = grad @ weight
            if ctx.heads:
                batch, heads, tokens, dim = x.shape
                towards = towards.view(batch, tokens, heads, dim).transpose(1, 2)
            else:
                towards = towards.view(x.shape)
            in_place = not ctx.heads and towards.dtype == x.dtype
            slope = width_slope(towards, x, width, scales, offsets, ctx.meta)
            if norm is not None:
                grad_x, sums, grad_gain, grad_shift = gpu_norm.backward(towards, x, norm, grid.numbers())
            else:
                grad_x, sums = backward_on(towards, x, grid, towards if in_place else None)
            of_grid = parameter_gradients(sums, grid, width, scales, offsets, bit_width, ctx.meta, slope)
        grad_bias = grad.sum(0) if needs_bias and ctx.has_bias else None
        return grad_x, grad_weight, grad_bias, *of_grid, None, None, grad_gain, grad_shift, None


def working_type(x: Tensor) -> torch.dtype:
    """The type in which autocast lets a product of `x` run."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def _norm(gain: Tensor | None, shift: Tensor | None, about: tuple[float, bool, torch.dtype] | None) -> Norm | None:
    return None if gain is None or about is None else Norm(gain, shift, *about)


def _tokens(x: Tensor, grid: Grid | Mixed, inputs: int, dtype: torch.dtype, norm: Norm | None = None) -> Tensor:
    """x̂ as tokens of `inputs` numbers; used up before the next call."""
    if norm is not None:
        return gpu_norm.forward(x, norm, grid.numbers(), dtype)
    heads = x.shape[-1] != inputs
    source = x.transpose(1, 2) if heads else x
    values = quantize_on(source, grid.heads_last() if heads else grid, dtype, scratch="tokens")
    return values.flatten(2) if heads else values


def _on_integers(x: Tensor, bias: Tensor | None, grid: Grid, codes: Codes, signed: bool, dtype: torch.dtype) -> Tensor:
    """The layer's output from integers."""
    weight, weight_scale = codes
    zero = 0 if signed else 128
    own = codes_on(x, grid, zero)
    sums = torch._int_mm(own.flatten(0, -2), weight.t())
    of_rows = weight.sum(1, dtype=torch.int32)
    factor = (grid.scale.flatten() * weight_scale).float()
    rest = torch.zeros_like(factor) if grid.offset is None else grid.offset.flatten() * weight_scale * of_rows
    rest = rest if bias is None else rest + bias.float()
    if cpu.handles(x):
        out = cpu.scale_sums(sums, of_rows * zero, factor, rest, dtype)
    else:
        out = torch.addcmul(rest, (sums + of_rows * zero).float(), factor).to(dtype)
    return out.unflatten(0, x.shape[:-1])
