"""Attention with quantized q, k, v and probabilities as one function: only the raw q, k, v are kept for backward.

    p = softmax(q̂·k̂ᵀ·factor + bias)        out = p̂·v̂

Scores and probabilities are (heads, tokens, tokens) per image, more than all else in a block; made one after another
for a few images at a time they stay in the processor's cache, and backward makes them again. Softmax runs on whole
rows before its result is quantized, so values are those of the plain form (`layers.AttentionSites`), up to the rounding
of products over batches of another size. On CUDA kernels can take the whole of it (`gpu_attention.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from qvit.kernels import cpu, gpu_attention
from qvit.kernels.fake_quantize import (
    Grid,
    Learned,
    Meta,
    Mixed,
    backward_on,
    packed,
    parameter_gradients,
    quantize_on,
    resolve,
    unpacked,
    width_slope,
)
from qvit.kernels.linear import working_type

#: Scores that are made at a time: 4 MiB in float32.
SCORES = 2**20
_NONE = (None, None, None, None)


def quantized_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    factor: float | Tensor,
    bias: Tensor | None,
    learned: Sequence[Learned | None],
) -> Tensor:
    """softmax(q̂·k̂ᵀ·factor + bias)·v̂, (B, H, N, d).

    Args:
        q: (B, H, N, d).
        k, v: (B, H, M, d).
        factor: A number, or one per head (H, 1, 1) without a gradient.
        bias: Broadcasts to (B, H, N, M), or None.
        learned: The quantizers of q, k, v and the probabilities; None for an operand in float.
    """
    flat = [part for one in learned for part in (_NONE[:3] if one is None else one[:3])]
    metas = tuple(None if one is None else one.meta for one in learned)
    return _QuantizedAttention.apply(q, k, v, bias, factor, metas, *flat)


class _QuantizedAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        bias: Tensor | None,
        factor: float | Tensor,
        metas: tuple[Meta | None, ...],
        *learned: Tensor | None,
    ) -> Tensor:
        grids = [
            None if meta is None else resolve(*learned[3 * i : 3 * i + 3], meta)  # type: ignore[arg-type]
            for i, meta in enumerate(metas)
        ]
        ctx.metas, ctx.factor, ctx.dtype = metas, factor, working_type(q)
        kept = [() if one is None else packed(*one) for one in grids]
        ctx.lengths = tuple(map(len, kept))
        ctx.save_for_backward(q, k, v, bias, *learned, *(part for parts in kept for part in parts))
        own = [None if one is None else one[0] for one in grids]
        ctx.softmax = None
        by_slope = any(meta is not None and meta.limits and meta.gradient == "difference" for meta in metas)
        ctx.in_one = not by_slope and gpu_attention.handles(q, k, bias, own, ctx.dtype)
        if ctx.in_one:
            return gpu_attention.forward(q, k, v, bias, factor, own, ctx.dtype)  # type: ignore[arg-type]
        out = torch.empty(*q.shape[:-1], v.shape[-1], dtype=ctx.dtype, device=q.device)
        for images in _chunks(q, k):
            left, right, values = _operands(q, k, v, factor, own, images, ctx.dtype)
            probs = _probabilities(left, right, bias, images, ctx.softmax)
            ctx.softmax = probs.dtype
            torch.matmul(_on("scores", probs, own[3], ctx.dtype), values, out=out[images])
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        q, k, v, bias, *rest = ctx.saved_tensors
        learned, kept = rest[:12], rest[12:]
        own: list[Grid | Mixed | None] = []
        widths: list[Tensor | None] = []
        for length in ctx.lengths:
            grid, width = unpacked(kept[:length]) if length else (None, None)
            own.append(grid)
            widths.append(width)
            kept = kept[length:]
        outputs = _gradients_of(q, k, v)
        sums: list[Any] = [None] * 4
        slopes: list[Any] = [None] * 4
        grad_bias: Any = 0

        def through(i: int, grad: Tensor, x: Tensor, out: Tensor) -> Tensor:
            """Writes the gradient of operand `i`, from that of its quantized values, to `out`."""
            grid, width, meta = own[i], widths[i], ctx.metas[i]
            if grid is None or width is None:
                return out.copy_(grad)
            slope = width_slope(grad, x, width, learned[3 * i], learned[3 * i + 1], meta)
            slopes[i] = slope if slopes[i] is None or slope is None else slopes[i] + slope
            _, more = backward_on(grad, x, grid, out)
            sums[i] = more if sums[i] is None else sums[i] + more
            return out

        if ctx.in_one:
            sums = gpu_attention.backward(grads[0], q, k, v, bias, ctx.factor, own, ctx.dtype, outputs)  # type: ignore
        for images in () if ctx.in_one else _chunks(q, k):
            left, right, values = _operands(q, k, v, ctx.factor, own, images, ctx.dtype)
            probs = _probabilities(left, right, bias, images, ctx.softmax)
            grad = grads[0][images].to(ctx.dtype)
            rows = _product("tokens", _on("scores", probs, own[3], ctx.dtype).transpose(-2, -1), grad)
            through(2, rows, v[images], outputs[2][images])
            towards = _product("scores", grad, values.transpose(-2, -1))
            towards = through(3, towards, probs, towards if towards.dtype == probs.dtype else torch.empty_like(probs))
            scores = torch._softmax_backward_data(towards, probs, -1, probs.dtype)
            if bias is not None and ctx.needs_input_grad[3]:
                grad_bias = _add_bias(grad_bias, scores, bias, images)
            scores = scores.to(ctx.dtype)
            rows = _product("tokens", scores, right).mul_(ctx.factor)
            through(0, rows, q[images], outputs[0][images])
            rows = _product("tokens", scores.transpose(-2, -1), left)
            through(1, rows, k[images], outputs[1][images])
        of_grids: list[Tensor | None] = []
        for i, (meta, grid, width) in enumerate(zip(ctx.metas, own, widths, strict=True)):
            if meta is None or grid is None or width is None:
                of_grids += _NONE[:3]
            else:
                scales, offsets, bit_width = learned[3 * i : 3 * i + 3]
                of_grids += parameter_gradients(sums[i], grid, width, scales, offsets, bit_width, meta, slopes[i])
        bias_result = grad_bias if bias is not None and ctx.needs_input_grad[3] else None
        return *outputs, bias_result, None, None, *of_grids


def split_heads(qkv: Tensor, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v, each (B, H, N, d), as views of a projection (B, N, 3·H·d).

    Its backward takes the gradients that attention has written side by side as they are, where others are stacked.
    """
    return _SplitHeads.apply(qkv, heads)


class _SplitHeads(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, qkv: Tensor, heads: int) -> tuple[Tensor, Tensor, Tensor]:
        ctx.shape = qkv.shape
        q, k, v = qkv.unflatten(2, (3, heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        return q, k, v

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        first, (_, tokens, width) = grads[0], ctx.shape
        heads, dim = first.shape[1], first.shape[3]
        beside = (tokens * width, dim, width, 1)
        together = all(
            grad.stride() == beside
            and grad.storage_offset() == i * heads * dim
            and grad.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
            for i, grad in enumerate(grads)
        )
        if together and first.untyped_storage().nbytes() == ctx.shape.numel() * first.element_size():
            return first.as_strided(ctx.shape, (tokens * width, width, 1), 0), None
        return torch.stack(grads).permute(1, 3, 0, 2, 4).reshape(ctx.shape), None


def _gradients_of(q: Tensor, k: Tensor, v: Tensor) -> list[Tensor]:
    """Memory for the gradients, side by side as q, k, v are in a projection if they have the same shape."""
    if not q.shape == k.shape == v.shape:
        return [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v)]
    batch, heads, tokens, dim = q.shape
    memory = torch.empty(batch, tokens, 3, heads, dim, dtype=q.dtype, device=q.device)
    return list(memory.permute(2, 0, 3, 1, 4).unbind(0))


def _chunks(q: Tensor, k: Tensor) -> list[slice]:
    """The images of a batch, a few at a time; on CUDA, whose caches are small beside its memory, all at once."""
    if q.is_cuda:
        return [slice(None)]
    count = max(1, SCORES // max(1, q.shape[1] * q.shape[2] * k.shape[2]))
    return [slice(start, min(start + count, len(q))) for start in range(0, len(q), count)]


def _on(name: str, x: Tensor, grid: Grid | Mixed | None, dtype: torch.dtype) -> Tensor:
    return x.to(dtype) if grid is None else quantize_on(x, grid, dtype, scratch=name)


def _product(name: str, left: Tensor, right: Tensor) -> Tensor:
    """left·right in the memory of that name."""
    shape = (*left.shape[:-1], right.shape[-1])
    return torch.matmul(left, right, out=cpu.scratch(name, shape, left.dtype, left))


def _operands(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    factor: float | Tensor,
    grids: list[Grid | Mixed | None],
    images: slice,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """q̂·factor, k̂ and v̂ of some images."""
    own = q[images]
    if grids[0] is None:
        left = (own * factor).to(dtype)
    else:
        left = quantize_on(own, grids[0], scratch="left").mul_(factor).to(dtype)
    return left, _on("right", k[images], grids[1], dtype), _on("values", v[images], grids[2], dtype)


def _probabilities(
    left: Tensor, right: Tensor, bias: Tensor | None, images: slice, softmax: torch.dtype | None
) -> Tensor:
    """The probabilities of some images before they are quantized."""
    scores = _product("scores", left, right.transpose(-2, -1))
    if bias is not None:
        scores = scores + (bias[images] if bias.dim() == 4 and len(bias) > 1 else bias)
    if softmax is None:
        return scores.softmax(dim=-1)
    return torch.softmax(scores, -1, softmax, out=cpu.scratch("probs", scores.shape, softmax, scores))


def _add_bias(so_far: Any, scores: Tensor, bias: Tensor, images: slice) -> Tensor:
    """The gradient of the bias with that of some images' scores added."""
    if bias.dim() == 4 and len(bias) > 1:
        if not isinstance(so_far, Tensor):
            so_far = torch.zeros_like(bias)
        so_far[images] = scores.sum_to_size(bias[images].shape)
        return so_far
    return so_far + scores.sum_to_size(bias.shape).to(bias.dtype)
