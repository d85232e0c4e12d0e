"""The Triton kernels of `gpu_norm.py`, which launches them and says what they do; this module needs Triton."""

# pyright: reportArgumentType=false, reportCallIssue=false, reportOperatorIssue=false
# Triton's types are those of Python's builtins here and there.

from __future__ import annotations

import triton
import triton.language as tl

from qvit.kernels.gpu_kernels import _steps


@triton.jit
def _mean(rows, count):  # type: ignore[no-untyped-def]
    """The mean of each row, as a column."""
    total = tl.sum(rows, 1)
    return tl.div_rn(total, tl.zeros_like(total) + count)[:, None]


@triton.jit
def _normalized(  # type: ignore[no-untyped-def]
    x, weight, bias, tile, rows, columns, epsilon, RMS: tl.constexpr, SHIFT: tl.constexpr, KIND: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Places of a tile's elements and which of them there are, n, 1/sqrt(var + ε) of each row, γ and y."""
    r, c = tile * ROWS + tl.arange(0, ROWS), tl.arange(0, BLOCK)
    inside = (r < rows)[:, None] & (c < columns)[None, :]
    place = r.to(tl.int64)[:, None] * columns + c[None, :]
    value = tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
    count = columns.to(tl.float32)
    if not RMS:
        value = tl.where(inside, value - _mean(value, count), 0.0)
    spread = tl.sqrt_rn(_mean(value * value, count) + epsilon)
    factor = tl.div_rn(tl.zeros_like(spread) + 1.0, spread)
    value *= factor
    gain = tl.load(weight + c, mask=c < columns, other=0.0).to(tl.float32)[None, :]
    y = value * gain
    if SHIFT:
        y += tl.load(bias + c, mask=c < columns, other=0.0).to(tl.float32)[None, :]
    return place, inside, value, factor, gain, y.to(KIND).to(tl.float32)


@triton.jit
def forward_kernel(  # type: ignore[no-untyped-def]
    x, weight, bias, out, scale, offset, low, high, rows, columns, epsilon, RMS: tl.constexpr, SHIFT: tl.constexpr,
    SHIFTED: tl.constexpr, KIND: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """x̂ of a tile of rows."""
    tile = tl.program_id(0)
    place, inside, _, _, _, y = _normalized(
        x, weight, bias, tile, rows, columns, epsilon, RMS, SHIFT, KIND, ROWS, BLOCK,
    )  # fmt: skip
    _, _, _, y = _steps(y, scale, offset, low, high, 0, True, SHIFTED)
    tl.store(out + place, y.to(out.dtype.element_ty), mask=inside)


@triton.jit
def backward_kernel(  # type: ignore[no-untyped-def]
    grad, x, weight, bias, grad_x, partial, of_channels, scale, offset, low, high, rows, columns, epsilon, tiles,
    programs, RMS: tl.constexpr, SHIFT: tl.constexpr, SHIFTED: tl.constexpr, KIND: tl.constexpr, ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """The gradient of some tiles of rows, and their part of all sums: of the grid, of γ and of β."""
    program, c = tl.program_id(0), tl.arange(0, BLOCK)
    to_weight, to_bias = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
    rounding, clipped = tl.zeros((ROWS,), tl.float32), tl.zeros((ROWS,), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    for tile in range(program, tiles, programs):
        place, inside, value, factor, gain, y = _normalized(
            x, weight, bias, tile, rows, columns, epsilon, RMS, SHIFT, KIND, ROWS, BLOCK,
        )  # fmt: skip
        u, clamped, q, _ = _steps(y, scale, offset, low, high, 0, True, SHIFTED)
        g = tl.load(grad + place, mask=inside, other=0.0).to(tl.float32)
        cut = tl.where(u != clamped, g, 0.0)
        rounding += tl.sum((q - clamped) * g, 1)
        clipped += tl.sum(cut * clamped, 1)
        total += tl.sum(cut, 1)
        g -= cut
        to_weight += tl.sum(g * value, 0)
        to_bias += tl.sum(g, 0)
        g *= gain
        count = columns.to(tl.float32)
        moved = g - value * _mean(g * value, count)
        if not RMS:
            moved -= _mean(g, count)
        tl.store(grad_x + place, (moved * factor).to(grad_x.dtype.element_ty), mask=inside)
    tl.store(partial + program, tl.sum(rounding))
    tl.store(partial + programs + program, tl.sum(clipped))
    tl.store(partial + 2 * programs + program, tl.sum(total))
    own = of_channels + program * columns + c
    tl.store(own, to_weight, mask=c < columns)
    tl.store(own + programs * columns, to_bias, mask=c < columns)
