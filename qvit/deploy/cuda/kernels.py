"""The Triton kernels of the engine `cuda`; `operators.py` launches them and says what they compute. Needs Triton.

Products are of int8 with 32-bit sums. An unsigned grid of 8 bits is stored less 128 (its *zero*), and what that leaves
out is added to the sums as integers. Every division is the rounded one and nothing is contracted, so numbers between
two integers round as in the reference.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _codes(value, scale, offset, low, high, zero, OFFSET: tl.constexpr):  # type: ignore[no-untyped-def]
    """round(clamp((value - offset) / scale)) - zero, int8."""
    u = tl.div_rn(value - offset, scale) if OFFSET else tl.div_rn(value, scale)
    u = tl.where(u < low, low, u)
    u = tl.where(u > high, high, u)
    return ((u + 12582912.0) - 12582912.0 - zero).to(tl.int8)


@triton.jit
def _activated(y, ACTIVATION: tl.constexpr):  # type: ignore[no-untyped-def]
    if ACTIVATION == "gelu":
        return y * 0.5 * (1.0 + tl.erf(y * 0.7071067811865476))
    if ACTIVATION == "gelu-tanh":
        return y * tl.sigmoid(1.5957691216057308 * (y + 0.044715 * y * y * y))
    if ACTIVATION == "quick-gelu":
        return y * tl.sigmoid(1.702 * y)
    if ACTIVATION == "silu":
        return y * tl.sigmoid(y)
    if ACTIVATION == "relu":
        return tl.where(y < 0.0, 0.0, y)
    return y


@triton.jit
def linear_kernel(  # type: ignore[no-untyped-def]
    x, weight, scale, bias, correction, residual, gain, to_scale, to_offset, to_low, to_high, out,
    rows, outputs, length, stored, zero,
    SEGMENTS: tl.constexpr, PACKED: tl.constexpr, CORRECTED: tl.constexpr, ACTIVATION: tl.constexpr,
    RESIDUAL: tl.constexpr, GAIN: tl.constexpr, CODES: tl.constexpr, OFFSET: tl.constexpr,
    ROWS: tl.constexpr, OUTPUTS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """A tile of a layer's output. The weight is the left operand, so that it can be unpacked in registers."""
    m = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    n = tl.program_id(1) * OUTPUTS + tl.arange(0, OUTPUTS)
    in_rows, in_outputs, row = m < rows, n < outputs, m.to(tl.int64)
    x_row, w_row = row * (SEGMENTS * length), n.to(tl.int64) * (SEGMENTS * stored)
    y = tl.zeros((OUTPUTS, ROWS), tl.float32) + tl.load(bias + n, mask=in_outputs, other=0.0)[:, None]
    for segment in range(SEGMENTS):
        sums = tl.zeros((OUTPUTS, ROWS), tl.int32)
        for start in range(0, stored, DEPTH):
            k = start + tl.arange(0, DEPTH)
            held = tl.load(
                weight + w_row[:, None] + segment * stored + k[None, :],
                mask=in_outputs[:, None] & (k < stored)[None, :], other=0,
            )  # fmt: skip
            place = x + x_row[None, :] + segment * length + k[:, None]
            first = tl.load(place, mask=in_rows[None, :] & (k < stored)[:, None], other=0)
            if PACKED:  # the low halves of bytes are the weights of the first half of a segment
                second = tl.load(place + stored, mask=in_rows[None, :] & (k < length - stored)[:, None], other=0)
                sums = tl.dot(((held << 4).to(tl.int8) >> 4).to(tl.int8), first, sums, out_dtype=tl.int32)
                sums = tl.dot((held >> 4).to(tl.int8), second, sums, out_dtype=tl.int32)
            else:
                sums = tl.dot(held, first, sums, out_dtype=tl.int32)
        at = segment * outputs + n
        if CORRECTED:
            sums += tl.load(correction + at, mask=in_outputs, other=0)[:, None]
        y += sums.to(tl.float32) * tl.load(scale + at, mask=in_outputs, other=0.0)[:, None]
    y = _activated(y, ACTIVATION)
    place = row[None, :] * outputs + n[:, None]
    inside = in_rows[None, :] & in_outputs[:, None]
    if CODES:
        step = tl.load(to_scale + n, mask=in_outputs, other=1.0)[:, None]
        shift = tl.load(to_offset + n, mask=in_outputs, other=0.0)[:, None] if OFFSET else 0.0
        low = tl.load(to_low + n, mask=in_outputs, other=0.0)[:, None]
        high = tl.load(to_high + n, mask=in_outputs, other=0.0)[:, None]
        tl.store(out + place, _codes(y, step, shift, low, high, zero, OFFSET), mask=inside)
    else:
        if GAIN:
            y *= tl.load(gain + n, mask=in_outputs, other=0.0)[:, None]
        if RESIDUAL:
            y = tl.load(residual + place, mask=inside, other=0.0) + y
        tl.store(out + place, y, mask=inside)


@triton.jit
def norm_kernel(  # type: ignore[no-untyped-def]
    x, gain, shift, to_scale, to_offset, to_low, to_high, out, columns, epsilon, zero,
    RMS: tl.constexpr, SHIFT: tl.constexpr, OFFSET: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A row, normalised, as codes."""
    c = tl.arange(0, BLOCK)
    inside, start = c < columns, tl.program_id(0).to(tl.int64) * columns
    value = tl.load(x + start + c, mask=inside, other=0.0)
    if not RMS:
        value = tl.where(inside, value - tl.div_rn(tl.sum(value), columns.to(tl.float32)), 0.0)
    variance = tl.div_rn(tl.sum(value * value), columns.to(tl.float32))
    y = value * tl.div_rn(1.0, tl.sqrt_rn(variance + epsilon)) * tl.load(gain + c, mask=inside, other=0.0)
    if SHIFT:
        y += tl.load(shift + c, mask=inside, other=0.0)
    offset = tl.load(to_offset) if OFFSET else 0.0
    codes = _codes(y, tl.load(to_scale), offset, tl.load(to_low), tl.load(to_high), zero, OFFSET)
    tl.store(out + start + c, codes, mask=inside)


@triton.jit
def _scores(  # type: ignore[no-untyped-def]
    q, key, bias, number, j, queries, keys, dim, k2, i, Q_ZERO: tl.constexpr, K_ZERO: tl.constexpr,
    Q_OFFSET: tl.constexpr, K_OFFSET: tl.constexpr, BIAS: tl.constexpr, DIM: tl.constexpr,
):  # fmt: skip
    """Scores of a block of queries and one of keys, -inf where there is no key."""
    d = tl.arange(0, DIM)
    k = tl.load(key + j[None, :] * k2 + d[:, None], mask=(j < keys)[None, :] & (d < dim)[:, None], other=0)
    sums = tl.dot(q, k, out_dtype=tl.int32)
    of_q = tl.sum(q.to(tl.int32), 1)[:, None]  # type: ignore[reportArgumentType]
    of_k = tl.sum(k.to(tl.int32), 0)[None, :]  # type: ignore[reportArgumentType]
    if K_ZERO != 0:
        sums += K_ZERO * of_q
    if Q_ZERO != 0:
        sums += Q_ZERO * of_k + Q_ZERO * K_ZERO * dim
    y = sums.to(tl.float32) * tl.load(number)
    if K_OFFSET:
        y += (of_q + Q_ZERO * dim).to(tl.float32) * tl.load(number + 1) * tl.load(number + 2)
    if Q_OFFSET:
        y += (of_k + K_ZERO * dim).to(tl.float32) * tl.load(number + 3) * tl.load(number + 4)
        if K_OFFSET:
            y += tl.load(number + 5)
    if BIAS:
        y += tl.load(
            bias + i[:, None] * keys + j[None, :], mask=(i < queries)[:, None] & (j < keys)[None, :], other=0.0
        )
    return tl.where((j < keys)[None, :], y, float("-inf"))


@triton.jit
def _probability_codes(p, number, there, LOG: tl.constexpr, P_ZERO: tl.constexpr):  # type: ignore[no-untyped-def]
    """Codes of probabilities as int8; on a logarithmic grid two tensors of which at most one is not zero: -2^n."""
    step, high = tl.load(number + 6), tl.load(number + 7)
    u = tl.div_rn(p, step)
    if LOG > 0:
        u = tl.log2(u) * -LOG
    u = tl.where(u < 0.0, 0.0, u)
    u = tl.where(u > high, high, u)
    codes = ((u + 12582912.0) - 12582912.0).to(tl.int32)
    if LOG == 0:
        codes = tl.where(there, codes - P_ZERO, 0).to(tl.int8)
        return codes, codes
    valued = there & (codes < high.to(tl.int32))  # the largest code is zero
    second = codes >= 8 if LOG == 1 else (codes & 1) == 1
    exponent = 7 - (codes & 7 if LOG == 1 else codes >> 1)
    level = -(tl.full(codes.shape, 1, tl.int32) << exponent)
    return tl.where(valued & (second == 0), level, 0).to(tl.int8), tl.where(valued & second, level, 0).to(tl.int8)


@triton.jit
def attention_kernel(  # type: ignore[no-untyped-def]
    q, k, v, bias, out, numbers, heads, queries, keys, dim, biases, zero,
    q0, q1, q2, k0, k1, k2, v0, v1, v2,
    Q_ZERO: tl.constexpr, K_ZERO: tl.constexpr, V_ZERO: tl.constexpr, P_ZERO: tl.constexpr,
    Q_OFFSET: tl.constexpr, K_OFFSET: tl.constexpr, V_OFFSET: tl.constexpr, BIAS: tl.constexpr, LOG: tl.constexpr,
    CODES: tl.constexpr, OFFSET: tl.constexpr,
    NUMBERS: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr, DIM: tl.constexpr,
):  # fmt: skip
    """The output of a head for a block of queries.

    Two passes over the keys: the largest score of a row and the sum of its exponentials have to be known before a
    probability is rounded. Scores are made twice, which takes less than keeping them: registers suffice for any length.
    """
    h, b = tl.program_id(1) % heads, (tl.program_id(1) // heads).to(tl.int64)
    number = numbers + h * NUMBERS
    i, d = tl.program_id(0) * QUERIES + tl.arange(0, QUERIES), tl.arange(0, DIM)
    query = q + b * q0 + h * q1 + i[:, None] * q2 + d[None, :]
    left = tl.load(query, mask=(i < queries)[:, None] & (d < dim)[None, :], other=0)
    key, value = k + b * k0 + h * k1, v + b * v0 + h * v1
    own = bias + ((b % biases) * heads + h) * queries * keys
    top = tl.full((QUERIES,), float("-inf"), tl.float32)
    total = tl.zeros((QUERIES,), tl.float32)
    j = tl.arange(0, KEYS)
    for start in range(0, keys, KEYS):
        s = _scores(
            left, key, own, number, start + j, queries, keys, dim, k2, i, Q_ZERO, K_ZERO, Q_OFFSET, K_OFFSET, BIAS, DIM,
        )  # fmt: skip
        most = tl.maximum(top, tl.max(s, 1))
        total = total * tl.exp(top - most) + tl.sum(tl.exp(s - most[:, None]), 1)
        top = most
    sums = tl.zeros((QUERIES, DIM), tl.int32)
    more = tl.zeros((QUERIES, DIM), tl.int32)
    of_v = tl.zeros((DIM,), tl.int32)
    of_p = tl.zeros((QUERIES,), tl.int32)
    of_more = tl.zeros((QUERIES,), tl.int32)
    for start in range(0, keys, KEYS):
        at = start + j
        s = _scores(
            left, key, own, number, at, queries, keys, dim, k2, i, Q_ZERO, K_ZERO, Q_OFFSET, K_OFFSET, BIAS, DIM,
        )  # fmt: skip
        p = tl.div_rn(tl.exp(s - top[:, None]), total[:, None] + tl.zeros_like(s))
        there = (at < keys)[None, :] & (i < queries)[:, None]
        codes, others = _probability_codes(p, number, there, LOG, P_ZERO)
        right = tl.load(value + at[:, None] * v2 + d[None, :], mask=(at < keys)[:, None] & (d < dim)[None, :], other=0)
        sums = tl.dot(codes, right, sums, out_dtype=tl.int32)
        of_p += tl.sum(codes.to(tl.int32), 1)
        if LOG > 0:
            more = tl.dot(others, right, more, out_dtype=tl.int32)
            of_more += tl.sum(others.to(tl.int32), 1)
        elif P_ZERO != 0:
            of_v += tl.sum(right.to(tl.int32), 0)
    if V_ZERO != 0:
        sums += V_ZERO * of_p[:, None]
        more += V_ZERO * of_more[:, None]
    if P_ZERO != 0:
        sums += P_ZERO * of_v[None, :] + P_ZERO * V_ZERO * keys
        of_p += P_ZERO * keys
    weighed, whole = sums.to(tl.float32), of_p.to(tl.float32)
    if LOG > 0:
        share = tl.where(LOG == 1, 0.00390625, 0.7071067811865476)
        weighed = (weighed + more.to(tl.float32) * share) * -0.0078125
        whole = (whole + of_more.to(tl.float32) * share) * -0.0078125
    y = weighed * tl.load(number + 8)
    if V_OFFSET:
        y += (whole * tl.load(number + 6) * tl.load(number + 9))[:, None]
    place = out + ((b * queries + i[:, None]) * heads + h) * dim + d[None, :]
    inside = (i < queries)[:, None] & (d < dim)[None, :]
    if CODES:
        limits = (tl.load(number + 12), tl.load(number + 13))
        y = _codes(y, tl.load(number + 10), tl.load(number + 11), limits[0], limits[1], zero, OFFSET)
    tl.store(place, y, mask=inside)
