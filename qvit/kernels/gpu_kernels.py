"""The Triton kernels of `gpu.py`, which launches them and says what they do; this module needs Triton.

A program takes a block of a tile, or all numbers of a quantizer. `MIXED`: x̂ is between two grids.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _read(tensor, a, b, c, d, i, s0, s1, s2, s3, inside, COLUMNS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Elements i of tile (a, b), which lie at rows c and columns d, or one after another if COLUMNS is 0."""
    start = tensor + a * s0 + b * s1
    place = start + c * s2 + d * s3 if COLUMNS > 0 else start + i
    return tl.load(place, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _laid(value, s, shift, lo, hi, SHIFTED: tl.constexpr):  # type: ignore[no-untyped-def]
    """u, clamp(u), q and x̂ of values on the grid of these numbers."""
    u = tl.div_rn(value - shift, s + tl.zeros_like(value))
    clamped = tl.where(u < lo, lo, u)
    clamped = tl.where(clamped > hi, hi, clamped)
    q = (clamped + 12582912.0) - 12582912.0
    return u, clamped, q, q * s + shift if SHIFTED else q * s


@triton.jit
def _steps(value, scale, offset, low, high, at, inside, SHIFTED: tl.constexpr):  # type: ignore[no-untyped-def]
    """`_laid` of values whose numbers lie at `at`."""
    s = tl.load(scale + at, mask=inside, other=1.0)
    shift = tl.load(offset + at, mask=inside, other=0.0) if SHIFTED else 0.0
    lo, hi = tl.load(low + at, mask=inside, other=0.0), tl.load(high + at, mask=inside, other=0.0)
    return _laid(value, s, shift, lo, hi, SHIFTED)


@triton.jit
def _elements(chunks, b_count, size, COLUMNS: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """The tile (a, b) of this program, rows, columns and numbers of its elements, and which of them there are."""
    program = tl.program_id(0)
    tile = program // chunks
    i = (program % chunks) * BLOCK + tl.arange(0, BLOCK)
    d, c = i % COLUMNS if COLUMNS > 0 else i, i // COLUMNS if COLUMNS > 0 else tl.zeros_like(i)
    return (tile // b_count).to(tl.int64), (tile % b_count).to(tl.int64), c, d, i, i < size


@triton.jit
def _through(part, u, clamped, q, sums, programs, inside):  # type: ignore[no-untyped-def]
    """What of a gradient passes through a grid; this program's part of the three sums goes to `sums`."""
    cut = tl.where(u != clamped, part, 0.0)
    zero = tl.zeros_like(part)
    own = sums + tl.program_id(0)
    tl.store(own, tl.sum(tl.where(inside, (q - clamped) * part, zero)))
    tl.store(own + programs, tl.sum(tl.where(inside, cut * clamped, zero)))
    tl.store(own + 2 * programs, tl.sum(tl.where(inside, cut, zero)))
    return part - cut


@triton.jit
def forward_kernel(  # type: ignore[no-untyped-def]
    x, out, scale, offset, low, high, scale2, offset2, low2, high2, share, chunks, b_count, size,
    x0, x1, x2, x3, g0, g1, g2, g3,
    COLUMNS: tl.constexpr, VARIES: tl.constexpr, SHIFTED: tl.constexpr, MIXED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """x̂ of a block of elements."""
    a, b, c, d, i, inside = _elements(chunks, b_count, size, COLUMNS, BLOCK)
    value = _read(x, a, b, c, d, i, x0, x1, x2, x3, inside, COLUMNS)
    at = a * g0 + b * g1 + c * g2 + d * g3 if VARIES else a * g0 + b * g1
    known = inside if VARIES else True
    _, _, _, result = _steps(value, scale, offset, low, high, at, known, SHIFTED)
    if MIXED:
        _, _, _, above = _steps(value, scale2, offset2, low2, high2, at, known, SHIFTED)
        result += tl.load(share + at, mask=known, other=0.0) * (above - result)
    tl.store(out + (a * b_count + b) * size + i, result.to(out.dtype.element_ty), mask=inside)


@triton.jit
def backward_kernel(  # type: ignore[no-untyped-def]
    grad, x, grad_x, partial, scale, offset, low, high, scale2, offset2, low2, high2, share, chunks, b_count, size,
    x0, x1, x2, x3, y0, y1, y2, y3, o0, o1, o2, o3, g0, g1, programs,
    COLUMNS: tl.constexpr, SHIFTED: tl.constexpr, MIXED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The gradient of a block of elements, and its part of the sums."""
    a, b, c, d, i, inside = _elements(chunks, b_count, size, COLUMNS, BLOCK)
    value = _read(x, a, b, c, d, i, x0, x1, x2, x3, inside, COLUMNS)
    g = _read(grad, a, b, c, d, i, y0, y1, y2, y3, inside, COLUMNS)
    at = a * g0 + b * g1
    u, clamped, q, below = _steps(value, scale, offset, low, high, at, True, SHIFTED)
    part = g * (1.0 - tl.load(share + at)) if MIXED else g
    passed = _through(part, u, clamped, q, partial, programs, inside)
    if MIXED:
        u, clamped, q, above = _steps(value, scale2, offset2, low2, high2, at, True, SHIFTED)
        part = g * tl.load(share + at)
        passed += _through(part, u, clamped, q, partial + 3 * programs, programs, inside)
        moved = tl.sum(tl.where(inside, (above - below) * g, tl.zeros_like(g)))
        tl.store(partial + 6 * programs + tl.program_id(0), moved)
    of_out = grad_x + a * o0 + b * o1
    of_out += c * o2 + d * o3 if COLUMNS > 0 else i
    tl.store(of_out, passed.to(grad_x.dtype.element_ty), mask=inside)


@triton.jit
def difference_kernel(  # type: ignore[no-untyped-def]
    grad, x, partial, scale, offset, low, high, scale2, offset2, low2, high2, chunks, b_count, size,
    x0, x1, x2, x3, y0, y1, y2, y3, g0, g1,
    COLUMNS: tl.constexpr, SHIFTED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A block's part of the sums of grad times x̂ on one grid less x̂ on another."""
    a, b, c, d, i, inside = _elements(chunks, b_count, size, COLUMNS, BLOCK)
    value = _read(x, a, b, c, d, i, x0, x1, x2, x3, inside, COLUMNS)
    g = _read(grad, a, b, c, d, i, y0, y1, y2, y3, inside, COLUMNS)
    at = a * g0 + b * g1
    _, _, _, above = _steps(value, scale, offset, low, high, at, True, SHIFTED)
    _, _, _, below = _steps(value, scale2, offset2, low2, high2, at, True, SHIFTED)
    tl.store(partial + tl.program_id(0), tl.sum(tl.where(inside, (above - below) * g, tl.zeros_like(value))))


@triton.jit
def resolve_kernel(  # type: ignore[no-untyped-def]
    scales, offsets, widths, out, count, first, least, most, smallest, OF_SCALE: tl.constexpr,
    OF_WIDTH: tl.constexpr, COLUMNS: tl.constexpr, SIGNED: tl.constexpr, SHIFTED: tl.constexpr,
    LIMITED: tl.constexpr, MIXED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Scale, offset, limits and width of all groups; with `MIXED` a program for each of both grids, and the share."""
    g = tl.arange(0, BLOCK)
    inside = g < count
    w = tl.load(widths + g * OF_WIDTH, mask=inside, other=2.0).to(tl.float32)
    if LIMITED:
        w = tl.where(w < least, least, w)
        w = tl.where(w > most, most, w)
    if MIXED:  # a program for each of both grids
        lower = tl.floor(w)
        lower = tl.where(lower > most - 1.0, tl.where(most - 1.0 < least, least, most - 1.0), lower)
        tl.store(out + 10 * count + g, w - lower, mask=inside)
        upper = tl.where(lower + 1.0 > most, most, lower + 1.0)
        w = tl.where(tl.program_id(0) == 0, lower, upper)
        out += tl.program_id(0) * 5 * count
    elif LIMITED:
        w = (w + 12582912.0) - 12582912.0
    bits = w.to(tl.int32)
    column = bits - first if COLUMNS > 1 else tl.zeros_like(bits)
    known = inside & (column >= 0) & (column < COLUMNS)
    s = tl.load(scales + g * OF_SCALE * COLUMNS + column, mask=known, other=0.0).to(tl.float32)
    tl.store(out + g, tl.where(s < smallest, smallest, s), mask=inside)
    if SHIFTED:
        shift = tl.load(offsets + g * OF_SCALE * COLUMNS + column, mask=known, other=0.0).to(tl.float32)
        tl.store(out + count + g, shift, mask=inside)
    bits = tl.where(bits < 0, 0, tl.where(bits > 30, 30, bits))
    levels = ((tl.zeros_like(bits) + 1) << bits).to(tl.float32) + (w - w)  # of a width that is no number: neither
    tl.store(out + 2 * count + g, levels * -0.5 if SIGNED else levels * 0.0, mask=inside)
    tl.store(out + 3 * count + g, levels * 0.5 - 1.0 if SIGNED else levels - 1.0, mask=inside)
    tl.store(out + 4 * count + g, w, mask=inside)


@triton.jit
def gradients_kernel(  # type: ignore[no-untyped-def]
    sums, grid, elements, to_scales, to_offsets, to_width, count, of_elements, number, first,
    OF_SCALE: tl.constexpr, OF_WIDTH: tl.constexpr, COLUMNS: tl.constexpr, PADDED: tl.constexpr,
    SIGNED: tl.constexpr, SHIFTED: tl.constexpr, LIMITED: tl.constexpr, MIXED: tl.constexpr, SCALED: tl.constexpr,
    LINEAR: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The gradients of banks and widths from the sums."""
    g = tl.arange(0, BLOCK)
    inside = g < count
    c = tl.arange(0, PADDED)
    for_scales = tl.zeros((BLOCK, PADDED), dtype=tl.float32)
    for_offsets = tl.zeros((BLOCK, PADDED), dtype=tl.float32)
    for side in tl.static_range(2 if MIXED else 1):  # type: ignore[attr-defined]
        own = grid + side * 5 * count
        rounding = tl.load(sums + 3 * side * count + g, mask=inside, other=0.0)
        clipped = tl.load(sums + (3 * side + 1) * count + g, mask=inside, other=0.0)
        total = tl.load(sums + (3 * side + 2) * count + g, mask=inside, other=0.0)
        lo = tl.load(own + 2 * count + g, mask=inside, other=0.0)
        hi = tl.load(own + 3 * count + g, mask=inside, other=1.0)
        s = tl.load(own + g, mask=inside, other=0.0)
        w = tl.load(own + 4 * count + g, mask=inside, other=0.0)
        for_scale = rounding + clipped
        if SCALED > 0:
            per_scale = tl.zeros_like(hi) + number
            if SCALED == 2:
                per_scale = tl.load(elements + g * of_elements, mask=inside, other=1.0).to(tl.float32)
            if LINEAR:
                per_scale *= hi
            for_scale = tl.div_rn(for_scale, tl.sqrt_rn(hi * per_scale))
        column = w.to(tl.int32) - first if COLUMNS > 1 else tl.zeros_like(w).to(tl.int32)
        here = (column[:, None] == c[None, :]) & inside[:, None]
        for_scales += tl.where(here, for_scale[:, None], 0.0)
        for_offsets += tl.where(here, total[:, None], 0.0)
    place = g[:, None] * COLUMNS + c[None, :]
    writes = inside[:, None] & (c < COLUMNS)[None, :]
    if OF_SCALE == 0:
        tl.store(to_scales + c, tl.sum(for_scales, 0), mask=c < COLUMNS)
    else:
        tl.store(to_scales + place, for_scales, mask=writes)
    if SHIFTED:
        if OF_SCALE == 0:
            tl.store(to_offsets + c, tl.sum(for_offsets, 0), mask=c < COLUMNS)
        else:
            tl.store(to_offsets + place, for_offsets, mask=writes)
    if MIXED:
        for_width = tl.load(sums + 6 * count + g, mask=inside, other=0.0)
        if OF_WIDTH == 0:
            tl.store(to_width, tl.sum(for_width, 0))
        else:
            tl.store(to_width + g, for_width, mask=inside)
    elif LIMITED:
        above = tl.div_rn(clipped - lo * total, hi - lo)  # type: ignore[operator]
        outward = 2.0 * above - total if SIGNED else above
        for_width = tl.where(inside, outward * (s * (hi + 1.0) * 0.6931471805599453), 0.0)  # type: ignore[operator]
        if OF_WIDTH == 0:
            tl.store(to_width, tl.sum(for_width, 0))
        else:
            tl.store(to_width + g, for_width, mask=inside)
