"""The Triton kernels of `gpu_weights.py`, which launches them and says what they do; this module needs Triton.

A program takes a block of a group's elements. What it has to know of the group is a row of `table`, see `_row`.
"""

# pyright: reportArgumentType=false, reportCallIssue=false, reportOperatorIssue=false
# Triton's types are those of Python's builtins here and there.

from __future__ import annotations

import triton
import triton.language as tl

from qvit.kernels.gpu_kernels import _laid, _through


@triton.jit
def _grid(row, scales, offsets, widths, smallest, SHIFTED: tl.constexpr):  # type: ignore[no-untyped-def]
    """The column of a group's width, and its scale, offset and limits."""
    w = tl.load(widths + tl.load(row + 7))
    bits = w.to(tl.int32)
    columns = tl.load(row + 6).to(tl.int32)
    column = tl.where(columns > 1, bits - tl.load(row + 8).to(tl.int32), 0)
    known = (column >= 0) & (column < columns)
    s = tl.load(scales + tl.load(row + 5) + column, mask=known, other=0.0)
    s = tl.where(s < smallest, smallest, s)
    shift = 0.0
    if SHIFTED:
        place = tl.load(row + 10)
        shift = tl.load(offsets + place + column, mask=known & (place >= 0), other=0.0)
    bits = tl.where(bits < 0, 0, tl.where(bits > 30, 30, bits))
    levels = (tl.full((), 1, tl.int32) << bits).to(tl.float32) + (w - w)  # of a width that is no number: neither
    signed = tl.load(row + 9) > 0
    return (
        column,
        s,
        shift,
        tl.where(signed, levels * -0.5, levels * 0.0),
        tl.where(signed, levels * 0.5 - 1.0, levels - 1.0),
    )


@triton.jit
def _elements(row, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Places of the elements of this program among those of all tensors, and which of them there are."""
    j = (tl.program_id(0) - tl.load(row + 4)).to(tl.int32) * BLOCK + tl.arange(0, BLOCK)
    inner = tl.load(row + 1).to(tl.int32)
    run = j // inner
    place = tl.load(row) + run.to(tl.int64) * tl.load(row + 2) + (j - run * inner)
    return place, j < tl.load(row + 3)


@triton.jit
def forward_kernel(  # type: ignore[no-untyped-def]
    x, out, owners, table, scales, offsets, widths, smallest, FIELDS: tl.constexpr, SHIFTED: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """x̂ of a block of a group's elements."""
    row = table + tl.load(owners + tl.program_id(0)).to(tl.int64) * FIELDS
    _, s, shift, lo, hi = _grid(row, scales, offsets, widths, smallest, SHIFTED)
    place, inside = _elements(row, BLOCK)
    value = tl.load(x + place, mask=inside, other=0.0)
    _, _, _, value = _laid(value, s, shift, lo, hi, SHIFTED)
    tl.store(out + place, value, mask=inside)


@triton.jit
def backward_kernel(  # type: ignore[no-untyped-def]
    grad, x, grad_x, partial, owners, table, scales, offsets, widths, smallest, programs, FIELDS: tl.constexpr,
    SHIFTED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The gradient of a block of a group's elements, and its part of the group's sums."""
    row = table + tl.load(owners + tl.program_id(0)).to(tl.int64) * FIELDS
    _, s, shift, lo, hi = _grid(row, scales, offsets, widths, smallest, SHIFTED)
    place, inside = _elements(row, BLOCK)
    value = tl.load(x + place, mask=inside, other=0.0)
    g = tl.load(grad + place, mask=inside, other=0.0)
    u, clamped, q, _ = _laid(value, s, shift, lo, hi, SHIFTED)
    g = _through(g, u, clamped, q, partial, programs, inside)
    tl.store(grad_x + place, g, mask=inside)


@triton.jit
def gradients_kernel(  # type: ignore[no-untyped-def]
    partial, to_scales, to_offsets, table, scales, offsets, widths, smallest, programs, FIELDS: tl.constexpr,
    SHIFTED: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The gradients of a group's scales and offsets from its sums; of the columns of other widths they are zero."""
    row = table + tl.program_id(0).to(tl.int64) * FIELDS
    column, _, _, _, hi = _grid(row, scales, offsets, widths, smallest, SHIFTED)
    first, count = tl.load(row + 4), tl.load(row + 11)
    for_scale = tl.zeros((BLOCK,), tl.float32)
    for_offset = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, count, BLOCK):
        i = start + tl.arange(0, BLOCK)
        own = partial + first + i
        for_scale += tl.load(own, mask=i < count, other=0.0) + tl.load(own + programs, mask=i < count, other=0.0)
        if SHIFTED:
            for_offset += tl.load(own + 2 * programs, mask=i < count, other=0.0)
    of_scale = tl.div_rn(tl.sum(for_scale), tl.sqrt_rn(hi * tl.load(row + 12).to(tl.float32)))
    c = tl.arange(0, COLUMNS)
    columns = tl.load(row + 6)
    tl.store(to_scales + tl.load(row + 5) + c, tl.where(c == column, of_scale, 0.0), mask=c < columns)
    if SHIFTED:
        place = tl.load(row + 10)
        values = tl.where(c == column, tl.sum(for_offset), 0.0)
        tl.store(to_offsets + place + c, values, mask=c < tl.where(place >= 0, columns, 0))
