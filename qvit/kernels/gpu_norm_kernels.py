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
def _passed(part, y, scale, offset, low, high, SHIFTED: tl.constexpr):  # type: ignore[no-untyped-def]
    """What of a gradient passes through a grid, each row's part of the three sums, and x̂."""
    u, clamped, q, value = _steps(y, scale, offset, low, high, 0, True, SHIFTED)
    cut = tl.where(u != clamped, part, 0.0)
    return part - cut, tl.sum((q - clamped) * part, 1), tl.sum(cut * clamped, 1), tl.sum(cut, 1), value


@triton.jit
def forward_kernel(  # type: ignore[no-untyped-def]
    x, weight, bias, out, scale, offset, low, high, scale2, offset2, low2, high2, share, rows, columns, epsilon,
    RMS: tl.constexpr, SHIFT: tl.constexpr, SHIFTED: tl.constexpr, MIXED: tl.constexpr, KIND: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """x̂ of a tile of rows."""
    tile = tl.program_id(0)
    place, inside, _, _, _, y = _normalized(
        x, weight, bias, tile, rows, columns, epsilon, RMS, SHIFT, KIND, ROWS, BLOCK,
    )  # fmt: skip
    _, _, _, value = _steps(y, scale, offset, low, high, 0, True, SHIFTED)
    if MIXED:
        _, _, _, above = _steps(y, scale2, offset2, low2, high2, 0, True, SHIFTED)
        value += tl.load(share) * (above - value)
    tl.store(out + place, value.to(out.dtype.element_ty), mask=inside)


@triton.jit
def backward_kernel(  # type: ignore[no-untyped-def]
    grad, x, weight, bias, grad_x, partial, of_channels, scale, offset, low, high, scale2, offset2, low2, high2, share,
    rows, columns, epsilon, tiles, programs, RMS: tl.constexpr, SHIFT: tl.constexpr, SHIFTED: tl.constexpr,
    MIXED: tl.constexpr, KIND: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The gradient of some tiles of rows, and their part of all sums: of the grids, of γ and of β."""
    program, c = tl.program_id(0), tl.arange(0, BLOCK)
    to_weight, to_bias = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
    rounding, clipped = tl.zeros((ROWS,), tl.float32), tl.zeros((ROWS,), tl.float32)
    total, rounding2 = tl.zeros((ROWS,), tl.float32), tl.zeros((ROWS,), tl.float32)
    clipped2, total2 = tl.zeros((ROWS,), tl.float32), tl.zeros((ROWS,), tl.float32)
    moved = tl.zeros((ROWS,), tl.float32)
    count = columns.to(tl.float32)
    for tile in range(program, tiles, programs):
        place, inside, value, factor, gain, y = _normalized(
            x, weight, bias, tile, rows, columns, epsilon, RMS, SHIFT, KIND, ROWS, BLOCK,
        )  # fmt: skip
        g = tl.load(grad + place, mask=inside, other=0.0).to(tl.float32)
        part = g * (1.0 - tl.load(share)) if MIXED else g
        passed, more, cut, cuts, below = _passed(part, y, scale, offset, low, high, SHIFTED)
        rounding, clipped, total = rounding + more, clipped + cut, total + cuts
        if MIXED:
            part = g * tl.load(share)
            also, more, cut, cuts, above = _passed(part, y, scale2, offset2, low2, high2, SHIFTED)
            passed += also
            rounding2, clipped2, total2 = rounding2 + more, clipped2 + cut, total2 + cuts
            moved += tl.sum((above - below) * g, 1)
        to_weight += tl.sum(passed * value, 0)
        to_bias += tl.sum(passed, 0)
        passed *= gain
        result = passed - value * _mean(passed * value, count)
        if not RMS:
            result -= _mean(passed, count)
        tl.store(grad_x + place, (result * factor).to(grad_x.dtype.element_ty), mask=inside)
    own = partial + program
    tl.store(own, tl.sum(rounding))
    tl.store(own + programs, tl.sum(clipped))
    tl.store(own + 2 * programs, tl.sum(total))
    if MIXED:
        tl.store(own + 3 * programs, tl.sum(rounding2))
        tl.store(own + 4 * programs, tl.sum(clipped2))
        tl.store(own + 5 * programs, tl.sum(total2))
        tl.store(own + 6 * programs, tl.sum(moved))
    own = of_channels + program * columns + c
    tl.store(own, to_weight, mask=c < columns)
    tl.store(own + programs * columns, to_bias, mask=c < columns)
