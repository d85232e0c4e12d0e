"""Attention with quantized probabilities as Triton kernels, for CUDA: probabilities never leave the chip.

A program holds all keys of one head and a block of queries: ViTs attend to a few hundred tokens. So softmax sees whole
rows, exactly as in the plain form, before its result is quantized:

    forward     s = left·rightᵀ        p = softmax(s)        out = p̂·values
    backward    the same again, then   dp̂ = grad·valuesᵀ     ds = p·(dp - Σ dp·p)     dleft = ds·right
                                       dvalues = p̂ᵀ·grad     dright = dsᵀ·left

`left` is q̂ times the factor of the scores, `right` k̂, `values` v̂. Backward is one program for each head of an image,
which goes through the blocks of queries: gradients of keys and values add up in registers, the sums for the gradients
of the probabilities' grid come out one per program, and nothing is added atomically.

As in `gpu.py`, the kernels are tried beside the plain form before their first use and give way where they differ. They
have been tested in Triton's interpreter and compiled for compute capability 9.0; no GPU was at hand.
"""

# Types of Triton's language are not those of the Python in which it is written.
# pyright: reportArgumentType=false, reportOperatorIssue=false, reportCallIssue=false, reportIndexIssue=false
from __future__ import annotations

import functools
import importlib.util
import logging
from typing import Any

import torch
from torch import Tensor

from qvit.kernels.gpu import first_line
from qvit.kernels.shapes import numbers_of_groups

log = logging.getLogger(__name__)
#: Keys that fit on a chip beside their values.
MOST_KEYS = 256
_ROWS = 16
_Grid = tuple[Tensor | None, ...]

if importlib.util.find_spec("triton") is not None:
    import triton
    import triton.language as tl

    @triton.jit
    def _probabilities(  # type: ignore[no-untyped-def]
        left, right, n, keys, s, shift, lo, hi, SHIFTED: tl.constexpr
    ):
        """p, u, clamp(u) and p̂ of a block of queries; keys beyond the end have p = p̂ = 0."""
        scores = tl.dot(left, tl.trans(right), input_precision="ieee")
        real = (n < keys)[None, :]
        scores = tl.where(real, scores, float("-inf"))
        e = tl.exp(scores - tl.max(scores, 1)[:, None])
        p = tl.div_rn(e, tl.broadcast_to(tl.sum(e, 1)[:, None], e.shape))
        u = tl.div_rn(p - shift, tl.zeros_like(p) + s)
        c = tl.where(u < lo, lo, u)
        c = tl.where(c > hi, hi, c)
        q = (c + 12582912.0) - 12582912.0
        values = q * s + shift if SHIFTED else q * s
        return p, u, c, tl.where(real, values, 0.0)

    @triton.jit
    def _forward_kernel(  # type: ignore[no-untyped-def]
        left, right, values, out, scale, offset, low, high, queries, keys, dim, heads,
        SHIFTED: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, DIM: tl.constexpr,
    ):  # fmt: skip
        m = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
        image = tl.program_id(1).to(tl.int64)
        group = image % heads
        n, d = tl.arange(0, KEYS), tl.arange(0, DIM)
        rows = image * queries * dim + m[:, None] * dim + d[None, :]
        columns = image * keys * dim + n[:, None] * dim + d[None, :]
        of_rows = (m < queries)[:, None] & (d < dim)[None, :]
        of_keys = (n < keys)[:, None] & (d < dim)[None, :]
        shift = tl.load(offset + group) if SHIFTED else 0.0
        _, _, _, quantized = _probabilities(
            tl.load(left + rows, mask=of_rows, other=0.0), tl.load(right + columns, mask=of_keys, other=0.0),
            n, keys, tl.load(scale + group), shift, tl.load(low + group), tl.load(high + group), SHIFTED,
        )  # fmt: skip
        v = tl.load(values + columns, mask=of_keys, other=0.0)
        result = tl.dot(quantized.to(v.dtype), v, input_precision="ieee")
        tl.store(out + rows, result.to(out.dtype.element_ty), mask=of_rows)

    @triton.jit
    def _backward_kernel(  # type: ignore[no-untyped-def]
        grad, left, right, values, d_left, d_right, d_values, partial, scale, offset, low, high, queries, keys, dim,
        heads, SHIFTED: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, DIM: tl.constexpr,
    ):  # fmt: skip
        image = tl.program_id(0).to(tl.int64)
        group = image % heads
        n, d = tl.arange(0, KEYS), tl.arange(0, DIM)
        columns = image * keys * dim + n[:, None] * dim + d[None, :]
        of_keys = (n < keys)[:, None] & (d < dim)[None, :]
        k = tl.load(right + columns, mask=of_keys, other=0.0)
        v = tl.load(values + columns, mask=of_keys, other=0.0)
        s, lo, hi = tl.load(scale + group), tl.load(low + group), tl.load(high + group)
        shift = tl.load(offset + group) if SHIFTED else 0.0
        for_keys = tl.zeros((KEYS, DIM), dtype=tl.float32)
        for_values = tl.zeros((KEYS, DIM), dtype=tl.float32)
        rounding, clipped, outside = 0.0, 0.0, 0.0
        for start in range(0, queries, ROWS):
            m = start + tl.arange(0, ROWS)
            rows = image * queries * dim + m[:, None] * dim + d[None, :]
            of_rows = (m < queries)[:, None] & (d < dim)[None, :]
            own = tl.load(left + rows, mask=of_rows, other=0.0)
            g = tl.load(grad + rows, mask=of_rows, other=0.0)
            p, u, c, quantized = _probabilities(own, k, n, keys, s, shift, lo, hi, SHIFTED)
            for_values += tl.dot(tl.trans(quantized.to(g.dtype)), g, input_precision="ieee")
            towards = tl.dot(g, tl.trans(v), input_precision="ieee")
            towards = tl.where((m < queries)[:, None] & (n < keys)[None, :], towards, 0.0)
            cut = tl.where(u != c, towards, 0.0)
            rounding += tl.sum(((c + 12582912.0) - 12582912.0 - c) * towards)
            clipped += tl.sum(cut * c)
            outside += tl.sum(cut)
            towards = towards - cut
            d_scores = p * (towards - tl.sum(towards * p, 1)[:, None])
            d_scores = d_scores.to(k.dtype)
            result = tl.dot(d_scores, k, input_precision="ieee")
            tl.store(d_left + rows, result.to(d_left.dtype.element_ty), mask=of_rows)
            for_keys += tl.dot(tl.trans(d_scores), own, input_precision="ieee")
        tl.store(d_right + columns, for_keys.to(d_right.dtype.element_ty), mask=of_keys)
        tl.store(d_values + columns, for_values.to(d_values.dtype.element_ty), mask=of_keys)
        tl.store(partial + image * 3, rounding)
        tl.store(partial + image * 3 + 1, clipped)
        tl.store(partial + image * 3 + 2, outside)


def handles(q: Tensor, k: Tensor, bias: Tensor | None, grid: _Grid, dtype: torch.dtype) -> bool:
    """Whether the kernels take this attention: on CUDA, without a bias, with a grid that is constant within a head.

    `dtype` is that of the products.
    """
    if not q.is_cuda or bias is not None or k.shape[2] > MOST_KEYS or q.shape[3] > 128:
        return False
    if any(part is not None and part.dim() > 1 and part.shape[-2:].numel() > 1 for part in grid):
        return False
    blocks = _blocks(k)
    return _works(q.device, dtype, blocks["KEYS"], blocks["DIM"])


def forward(left: Tensor, right: Tensor, values: Tensor, grid: _Grid) -> Tensor:
    """p̂·values, (B, H, N, d), for left (B, H, N, d), right and values (B, H, M, d) in one type."""
    left, right, values = left.contiguous(), right.contiguous(), values.contiguous()
    batch, heads, queries, dim = left.shape
    scale, offset, low, high = _per_head(grid, heads)
    out = torch.empty_like(left)
    launch: Any = _forward_kernel
    launch[(-(-queries // _ROWS), batch * heads)](
        left, right, values, out, scale, scale if offset is None else offset, low, high,
        queries, right.shape[2], dim, heads, SHIFTED=offset is not None, **_blocks(right), enable_fp_fusion=False,
    )  # fmt: skip
    return out


def backward(
    grad: Tensor, left: Tensor, right: Tensor, values: Tensor, grid: _Grid
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of left, right and values, and the sums (3, *groups) of the probabilities' grid."""
    grad, left, right, values = (x.contiguous() for x in (grad, left, right, values))
    batch, heads, queries, dim = left.shape
    scale, offset, low, high = _per_head(grid, heads)
    found = torch.empty_like(left), torch.empty_like(right), torch.empty_like(values)
    partial = torch.empty(batch, heads, 3, dtype=torch.float32, device=left.device)
    launch: Any = _backward_kernel
    launch[(batch * heads,)](
        grad, left, right, values, *found, partial, scale, scale if offset is None else offset, low, high,
        queries, right.shape[2], dim, heads, SHIFTED=offset is not None, **_blocks(right), enable_fp_fusion=False,
    )  # fmt: skip
    sums = partial.sum(0)
    groups = numbers_of_groups(grid)[1]
    sums = sums if heads > 1 and heads in groups else sums.sum(0, keepdim=True)
    return *found, sums.t().reshape(3, *(1,) * (4 - len(groups)), *groups)


def _per_head(grid: _Grid, heads: int) -> list[Tensor | None]:
    """Every part of the grid as one number per head."""
    return [None if part is None else part.flatten().expand(heads).contiguous() for part in numbers_of_groups(grid)[0]]


def _blocks(right: Tensor) -> dict[str, int]:
    """Sizes that a chip multiplies: powers of two, from 16 on."""
    keys, dim = (max(16, 1 << (size - 1).bit_length()) for size in right.shape[2:])
    return {"ROWS": _ROWS, "KEYS": keys, "DIM": dim}


@functools.cache
def _works(device: torch.device, dtype: torch.dtype, keys: int, dim: int) -> bool:
    """Whether the kernels agree with the plain form, with blocks of these sizes: a chip may be too small for them."""
    from qvit.kernels.attention import plain_attention
    from qvit.kernels.fake_quantize import Grid

    try:
        left, grad = (torch.randn(2, 3, 37, dim, device=device, dtype=dtype) for _ in range(2))
        right, values = (torch.randn(2, 3, keys - 3, dim, device=device, dtype=dtype) for _ in range(2))
        scale = torch.tensor([0.02, 0.05, 0.1], device=device).view(3, 1, 1)
        grid = Grid(scale, None, torch.zeros_like(scale), torch.full_like(scale, 7))
        expected = plain_attention(*(x.float() for x in (grad, left, right, values)), grid)
        found = forward(left, right, values, grid), *backward(grad, left, right, values, grid)
        share = 0.01 if dtype == torch.float32 else 0.1
        if all(
            (own.float() - other).norm() <= share * other.norm() for own, other in zip(found, expected, strict=True)
        ):
            return True
        log.warning("Triton's attention does not compute what it should on %s: the plain form takes its place", device)
    except Exception as error:  # a compiler of another version, a driver, a device that Triton does not know
        log.warning("no Triton attention on %s: %s", device, first_line(error))
    return False
