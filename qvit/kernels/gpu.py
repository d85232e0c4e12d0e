"""The operators of `fake_quantize.py` as Triton kernels, for CUDA: one pass forward, one backward.

Elements are numbered in the order of the output and found in x by four sizes and strides, as in `cpu.cpp`; a program
takes a block of them that shares its group, so backward reduces in registers and writes one partial sum per program:
no atomic additions, the same numbers on every run. Groups that change from element to element (per channel) have the
formulas in backward.

Division is the rounded one, and products and sums are not contracted: an approximate quotient would put values on the
edge between two integers on the wrong side. What a GPU computes is tried beside the formulas before the first use;
where it differs, or Triton is not there, the formulas run and the log says so. The kernels have been tested in Triton's
interpreter and compiled for compute capability 9.0; no GPU was at hand.
"""

from __future__ import annotations

import functools
import importlib.util
import logging
import math
from typing import Any

import torch
from torch import Tensor

from qvit.kernels.shapes import Axes, axes_of, numbers_of_groups

log = logging.getLogger(__name__)
_BLOCK = 1024
_Grid = tuple[Tensor | None, ...]

if importlib.util.find_spec("triton") is not None:
    import triton
    import triton.language as tl

    @triton.jit
    def _forward_kernel(  # type: ignore[no-untyped-def]
        x, out, scale, offset, low, high, columns, s2, b_count, x0, x1, x2, x3, g0, g1, g2, g3, total,
        SHIFTED: tl.constexpr, BLOCK: tl.constexpr,
    ):  # fmt: skip
        i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        inside = i < total
        d = i % columns
        c = (i // columns) % s2
        b = (i // (columns * s2)) % b_count
        a = i // (columns * s2 * b_count)
        group = a * g0 + b * g1 + c * g2 + d * g3
        value = tl.load(x + a * x0 + b * x1 + c * x2 + d * x3, mask=inside, other=0.0).to(tl.float32)
        s = tl.load(scale + group, mask=inside, other=1.0)
        shift = tl.load(offset + group, mask=inside, other=0.0) if SHIFTED else 0.0
        u = tl.div_rn(value - shift, s)
        lo = tl.load(low + group, mask=inside, other=0.0)
        hi = tl.load(high + group, mask=inside, other=0.0)
        u = tl.where(u < lo, lo, u)
        u = tl.where(u > hi, hi, u)
        q = (u + 12582912.0) - 12582912.0
        result = q * s + shift if SHIFTED else q * s
        tl.store(out + i, result.to(out.dtype.element_ty), mask=inside)

    @triton.jit
    def _backward_kernel(  # type: ignore[no-untyped-def]
        grad, x, grad_x, partial, scale, offset, low, high, columns, rows, b_count, x0, x1, x2, x3, y0, y1, y2, y3,
        g0, g1, chunks, SHIFTED: tl.constexpr, BLOCK: tl.constexpr,
    ):  # fmt: skip
        program = tl.program_id(0).to(tl.int64)
        chunk = program % chunks
        tile = program // chunks
        b = tile % b_count
        a = tile // b_count
        i = chunk * BLOCK + tl.arange(0, BLOCK)
        inside = i < rows * columns
        d = i % columns
        c = i // columns
        group = a * g0 + b * g1
        s, lo, hi = tl.load(scale + group), tl.load(low + group), tl.load(high + group)
        value = tl.load(x + a * x0 + b * x1 + c * x2 + d * x3, mask=inside, other=0.0).to(tl.float32)
        g = tl.load(grad + a * y0 + b * y1 + c * y2 + d * y3, mask=inside, other=0.0).to(tl.float32)
        shift = tl.load(offset + group) if SHIFTED else 0.0
        u = tl.div_rn(value - shift, s)
        clamped = tl.where(u < lo, lo, u)
        clamped = tl.where(clamped > hi, hi, clamped)
        cut = tl.where(u != clamped, g, 0.0)
        q = (clamped + 12582912.0) - 12582912.0
        tl.store(grad_x + tile * rows * columns + i, (g - cut).to(grad_x.dtype.element_ty), mask=inside)
        zero = tl.zeros_like(g)
        tl.store(partial + program * 3, tl.sum(tl.where(inside, (q - clamped) * g, zero)))
        tl.store(partial + program * 3 + 1, tl.sum(tl.where(inside, cut * clamped, zero)))
        tl.store(partial + program * 3 + 2, tl.sum(tl.where(inside, cut, zero)))


def handles(*tensors: Tensor) -> bool:
    """Whether the kernels take these tensors: on a CUDA device, in float32, float16 or bfloat16."""
    types = (torch.float32, torch.float16, torch.bfloat16)
    return all(x.is_cuda and x.dtype in types for x in tensors) and _works(tensors[0].device)


def forward(x: Tensor, grid: _Grid, dtype: torch.dtype) -> Tensor | None:
    """x̂ in `dtype`, contiguous; None for a tensor of more than four separate axes."""
    flat, groups = numbers_of_groups(grid)
    axes = axes_of(tuple(x.shape), (x.stride(),), groups)
    if axes is None:
        x = x.contiguous()
        axes = axes_of(tuple(x.shape), (x.stride(),), groups)
    if axes is None:
        return None
    out = torch.empty(x.shape, dtype=dtype, device=x.device)
    if not x.numel():
        return out
    scale, offset, low, high = flat
    blocks = (math.ceil(x.numel() / _BLOCK),)
    launch: Any = _forward_kernel
    launch[blocks](
        x, out, scale, scale if offset is None else offset, low, high, axes.size[3], axes.size[2], axes.size[1],
        *axes.strides[0], *axes.group, x.numel(), SHIFTED=offset is not None, BLOCK=_BLOCK, enable_fp_fusion=False,
    )  # fmt: skip
    return out


def backward(grad: Tensor, x: Tensor, grid: _Grid) -> tuple[Tensor, Tensor] | None:
    """The gradient of `x` and (3, groups) sums; None where groups change within a row."""
    flat, groups = numbers_of_groups(grid)
    axes = axes_of(tuple(x.shape), (x.stride(), grad.stride()), groups)
    if axes is None:
        x, grad = x.contiguous(), grad.contiguous()
        axes = axes_of(tuple(x.shape), (x.stride(), grad.stride()), groups)
    if axes is None or axes.group[3] or not x.numel():
        return None
    if axes.group[2] and axes.size[0] == 1:
        size, group, out, strides = axes
        axes = Axes(_one_row(size, 1), _one_row(group), _one_row(out), tuple(map(_one_row, strides)))
    if axes.group[2]:
        return None
    a, b, rows, columns = axes.size
    chunks = math.ceil(rows * columns / _BLOCK)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    partial = torch.empty(a, b, chunks, 3, dtype=torch.float32, device=x.device)
    scale, offset, low, high = flat
    launch: Any = _backward_kernel
    launch[(a * b * chunks,)](
        grad, x, out, partial, scale, scale if offset is None else offset, low, high, columns, rows, b,
        *axes.strides[0], *axes.strides[1], axes.group[0], axes.group[1], chunks,
        SHIFTED=offset is not None, BLOCK=_BLOCK, enable_fp_fusion=False,
    )  # fmt: skip
    sums = partial.sum(2)
    sums = sums if axes.group[0] else sums.sum(0, keepdim=True)
    sums = sums if axes.group[1] else sums.sum(1, keepdim=True)
    return out, sums.permute(2, 0, 1).reshape(3, *(1,) * (x.dim() - len(groups)), *groups)


def _one_row(numbers: tuple[int, ...], row: int = 0) -> tuple[int, ...]:
    """The axes after a first one of size 1, with one row before the columns; `row` is its size or stride."""
    return *numbers[1:3], row, numbers[3]


@functools.cache
def _works(device: torch.device) -> bool:
    """Whether the kernels compute what the formulas do on this device."""
    from qvit.kernels.fake_quantize import Grid, _backward, _forward

    if importlib.util.find_spec("triton") is None:
        log.warning("no Triton, so quantization on %s takes many passes", device)
        return False
    try:
        x = torch.linspace(-2, 2, 3 * 1200, device=device).view(1, 3, 40, 30)
        scale = torch.tensor([0.11, 0.3, 0.07], device=device).view(3, 1, 1)
        grid = Grid(scale, scale / 3, torch.full_like(scale, -8), torch.full_like(scale, 7))
        values, found = forward(x, grid, x.dtype), backward(x, x, grid)
        expected, sums = _backward(x, x, *grid)
        if values is not None and found is not None:
            same = torch.equal(values, _forward(x, *grid)) and torch.equal(found[0], expected)
            if same and torch.allclose(found[1], sums, rtol=1e-3, atol=1e-2):
                return True
        log.warning("the Triton kernels do not compute what they should on %s: formulas take their place", device)
    except Exception as error:  # a compiler of another version, a driver, a device that Triton does not know
        log.warning("no Triton kernels on %s, so quantization takes many passes: %s", device, first_line(error))
    return False


def first_line(error: Exception) -> str:
    """What went wrong, in a line."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
