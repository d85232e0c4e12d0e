"""The Triton kernels of `gpu_attention.py`, which launches them and says what they do; this module needs Triton."""

# pyright: reportArgumentType=false, reportCallIssue=false, reportOperatorIssue=false
# Triton's types are those of Python's builtins here and there.

from __future__ import annotations

import triton
import triton.language as tl

from qvit.kernels.gpu_kernels import _steps, _through


@triton.jit
def _on(value, scale, offset, low, high, at, ON: tl.constexpr, SHIFTED: tl.constexpr):  # type: ignore[no-untyped-def]
    """x̂ of values on the grid at `at`, or the values of an operand in float."""
    if ON:
        _, _, _, value = _steps(value, scale, offset, low, high, at, True, SHIFTED)
    return value


@triton.jit
def _back(  # type: ignore[no-untyped-def]
    grad, value, scale, offset, low, high, at, partial, programs, inside, ON: tl.constexpr, SHIFTED: tl.constexpr,
):  # fmt: skip
    """What passes through a grid of the gradient of x̂; the program's part of the three sums goes to `partial`."""
    if ON:
        u, clamped, q, _ = _steps(value, scale, offset, low, high, at, True, SHIFTED)
        grad = _through(grad, u, clamped, q, partial, programs, inside)
    return grad


@triton.jit
def _rows(x, rows, count, dim, stride, DIM: tl.constexpr):  # type: ignore[no-untyped-def]
    """Rows of a head as float32, zero where there are none."""
    d = tl.arange(0, DIM)
    inside = (rows < count)[:, None] & (d < dim)[None, :]
    return tl.load(x + rows[:, None] * stride + d[None, :], mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _place(heads, blocks):  # type: ignore[no-untyped-def]
    """Image, head and block of this program."""
    program = tl.program_id(0)
    of_head = program // blocks
    return (of_head // heads).to(tl.int64), of_head % heads, program % blocks


@triton.jit
def _probabilities(  # type: ignore[no-untyped-def]
    q, k, bias, factor, q_scale, q_offset, q_low, q_high, q_at, k_scale, k_offset, k_low, k_high, k_at, i, j,
    queries, keys, dim, q2, k2, b2, b3, Q: tl.constexpr, K: tl.constexpr, Q_SHIFTED: tl.constexpr,
    K_SHIFTED: tl.constexpr, BIAS: tl.constexpr, HALF: tl.constexpr, DIM: tl.constexpr,
):  # fmt: skip
    """Of a head, with all keys: q of the rows i, k̂, the largest score of each row, its sum of exponentials, and p."""
    raw = _rows(q, i, queries, dim, q2, DIM)
    left = (_on(raw, q_scale, q_offset, q_low, q_high, q_at, Q, Q_SHIFTED) * factor).to(HALF)
    right = _on(_rows(k, j, keys, dim, k2, DIM), k_scale, k_offset, k_low, k_high, k_at, K, K_SHIFTED).to(HALF)
    s = tl.dot(left, tl.trans(right), input_precision="ieee")
    if BIAS:
        there = (i < queries)[:, None] & (j < keys)[None, :]
        s += tl.load(bias + i[:, None] * b2 + j[None, :] * b3, mask=there, other=0.0).to(tl.float32)
    s = tl.where((j < keys)[None, :], s, float("-inf"))
    top = tl.max(s, 1)
    e = tl.exp(s - top[:, None])
    total = tl.sum(e, 1)
    return raw, right, top, total, tl.div_rn(e, total[:, None] + tl.zeros_like(e))


@triton.jit
def forward_kernel(  # type: ignore[no-untyped-def]
    q, k, v, bias, factors, out, q_scale, q_offset, q_low, q_high, k_scale, k_offset, k_low, k_high,
    v_scale, v_offset, v_low, v_high, p_scale, p_offset, p_low, p_high, factor, heads, blocks, queries, keys, dim,
    q0, q1, q2, k0, k1, k2, v0, v1, v2, o0, o1, o2, b0, b1, b2, b3, q_heads, k_heads, v_heads, p_heads,
    Q: tl.constexpr, K: tl.constexpr, V: tl.constexpr, P: tl.constexpr, Q_SHIFTED: tl.constexpr,
    K_SHIFTED: tl.constexpr, V_SHIFTED: tl.constexpr, P_SHIFTED: tl.constexpr, BIAS: tl.constexpr,
    FACTORS: tl.constexpr, HALF: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr, DIM: tl.constexpr,
):  # fmt: skip
    """The output of a head for a block of queries; all keys at once."""
    b, h, block = _place(heads, blocks)
    i, j, d = block * QUERIES + tl.arange(0, QUERIES), tl.arange(0, KEYS), tl.arange(0, DIM)
    own = tl.load(factors + h) if FACTORS else factor
    _, _, _, _, p = _probabilities(
        q + b * q0 + h * q1, k + b * k0 + h * k1, bias + b * b0 + h * b1, own, q_scale, q_offset, q_low, q_high,
        h * q_heads, k_scale, k_offset, k_low, k_high, h * k_heads, i, j, queries, keys, dim, q2, k2, b2, b3,
        Q, K, Q_SHIFTED, K_SHIFTED, BIAS, HALF, DIM,
    )  # fmt: skip
    p = _on(p, p_scale, p_offset, p_low, p_high, h * p_heads, P, P_SHIFTED)
    p = tl.where((j < keys)[None, :], p, 0.0).to(HALF)
    values = _rows(v + b * v0 + h * v1, j, keys, dim, v2, DIM)
    values = _on(values, v_scale, v_offset, v_low, v_high, h * v_heads, V, V_SHIFTED).to(HALF)
    y = tl.dot(p, values, input_precision="ieee")
    place = out + b * o0 + h * o1 + i[:, None] * o2 + d[None, :]
    tl.store(place, y.to(out.dtype.element_ty), mask=(i < queries)[:, None] & (d < dim)[None, :])


@triton.jit
def queries_kernel(  # type: ignore[no-untyped-def]
    grad, q, k, v, bias, factors, grad_q, rows, partial, q_scale, q_offset, q_low, q_high,
    k_scale, k_offset, k_low, k_high, v_scale, v_offset, v_low, v_high, p_scale, p_offset, p_low, p_high,
    factor, heads, blocks, queries, keys, dim, programs,
    g0, g1, g2, q0, q1, q2, k0, k1, k2, v0, v1, v2, o0, o1, o2, b0, b1, b2, b3, q_heads, k_heads, v_heads, p_heads,
    Q: tl.constexpr, K: tl.constexpr, V: tl.constexpr, P: tl.constexpr, Q_SHIFTED: tl.constexpr,
    K_SHIFTED: tl.constexpr, V_SHIFTED: tl.constexpr, P_SHIFTED: tl.constexpr, BIAS: tl.constexpr,
    FACTORS: tl.constexpr, HALF: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr, DIM: tl.constexpr,
):  # fmt: skip
    """The gradient of a block of queries, sums of q and of the probabilities; three numbers of each row to `rows`."""
    b, h, block = _place(heads, blocks)
    i, j, d = block * QUERIES + tl.arange(0, QUERIES), tl.arange(0, KEYS), tl.arange(0, DIM)
    there = (i < queries)[:, None] & (j < keys)[None, :]
    own = tl.load(factors + h) if FACTORS else factor
    raw, right, top, total, p = _probabilities(
        q + b * q0 + h * q1, k + b * k0 + h * k1, bias + b * b0 + h * b1, own, q_scale, q_offset, q_low, q_high,
        h * q_heads, k_scale, k_offset, k_low, k_high, h * k_heads, i, j, queries, keys, dim, q2, k2, b2, b3,
        Q, K, Q_SHIFTED, K_SHIFTED, BIAS, HALF, DIM,
    )  # fmt: skip
    values = _rows(v + b * v0 + h * v1, j, keys, dim, v2, DIM)
    values = _on(values, v_scale, v_offset, v_low, v_high, h * v_heads, V, V_SHIFTED).to(HALF)
    towards = _rows(grad + b * g0 + h * g1, i, queries, dim, g2, DIM).to(HALF)
    t = tl.dot(towards, tl.trans(values), input_precision="ieee")
    t = _back(
        t, p, p_scale, p_offset, p_low, p_high, h * p_heads, partial + 3 * programs, programs, there, P, P_SHIFTED,
    )  # fmt: skip
    share = tl.sum(tl.where(there, p * t, 0.0), 1)
    s = tl.where(there, p * (t - share[:, None]), 0.0).to(HALF)
    t = tl.dot(s, right, input_precision="ieee") * own
    inside = (i < queries)[:, None] & (d < dim)[None, :]
    t = _back(t, raw, q_scale, q_offset, q_low, q_high, h * q_heads, partial, programs, inside, Q, Q_SHIFTED)
    tl.store(grad_q + b * o0 + h * o1 + i[:, None] * o2 + d[None, :], t.to(grad_q.dtype.element_ty), mask=inside)
    every = programs // blocks * queries
    row = rows + (b * heads + h) * queries + i
    tl.store(row, top, mask=i < queries)
    tl.store(row + every, total, mask=i < queries)
    tl.store(row + 2 * every, share, mask=i < queries)


@triton.jit
def keys_kernel(  # type: ignore[no-untyped-def]
    grad, q, k, v, bias, factors, grad_k, grad_v, rows, partial, q_scale, q_offset, q_low, q_high,
    k_scale, k_offset, k_low, k_high, v_scale, v_offset, v_low, v_high, p_scale, p_offset, p_low, p_high,
    factor, heads, blocks, queries, keys, dim, programs,
    g0, g1, g2, q0, q1, q2, k0, k1, k2, v0, v1, v2, m0, m1, m2, n0, n1, n2, b0, b1, b2, b3,
    q_heads, k_heads, v_heads, p_heads,
    Q: tl.constexpr, K: tl.constexpr, V: tl.constexpr, P: tl.constexpr, Q_SHIFTED: tl.constexpr,
    K_SHIFTED: tl.constexpr, V_SHIFTED: tl.constexpr, P_SHIFTED: tl.constexpr, BIAS: tl.constexpr,
    FACTORS: tl.constexpr, HALF: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr, DIM: tl.constexpr,
):  # fmt: skip
    """The gradients of a block of keys and values, and their sums; queries come a block at a time."""
    b, h, block = _place(heads, blocks)
    j, d = block * KEYS + tl.arange(0, KEYS), tl.arange(0, DIM)
    own = tl.load(factors + h) if FACTORS else factor
    raw_k = _rows(k + b * k0 + h * k1, j, keys, dim, k2, DIM)
    right = _on(raw_k, k_scale, k_offset, k_low, k_high, h * k_heads, K, K_SHIFTED).to(HALF)
    raw_v = _rows(v + b * v0 + h * v1, j, keys, dim, v2, DIM)
    values = _on(raw_v, v_scale, v_offset, v_low, v_high, h * v_heads, V, V_SHIFTED).to(HALF)
    of_k = tl.zeros((KEYS, DIM), tl.float32)
    of_v = tl.zeros((KEYS, DIM), tl.float32)
    every = programs // blocks * queries
    row = rows + (b * heads + h) * queries
    for start in range(0, queries, QUERIES):
        i = start + tl.arange(0, QUERIES)
        there = (j < keys)[:, None] & (i < queries)[None, :]
        left = _rows(q + b * q0 + h * q1, i, queries, dim, q2, DIM)
        left = (_on(left, q_scale, q_offset, q_low, q_high, h * q_heads, Q, Q_SHIFTED) * own).to(HALF)
        s = tl.dot(right, tl.trans(left), input_precision="ieee")
        if BIAS:
            at = bias + b * b0 + h * b1 + i[None, :] * b2 + j[:, None] * b3
            s += tl.load(at, mask=there, other=0.0).to(tl.float32)
        top = tl.load(row + i, mask=i < queries, other=0.0)
        total = tl.load(row + every + i, mask=i < queries, other=1.0)
        share = tl.load(row + 2 * every + i, mask=i < queries, other=0.0)
        p = tl.div_rn(tl.exp(s - top[None, :]), total[None, :] + tl.zeros_like(s))
        p = tl.where(there, p, 0.0)
        towards = _rows(grad + b * g0 + h * g1, i, queries, dim, g2, DIM).to(HALF)
        t = tl.dot(values, tl.trans(towards), input_precision="ieee")
        weights = p
        if P:
            u, clamped, _, weights = _steps(p, p_scale, p_offset, p_low, p_high, h * p_heads, True, P_SHIFTED)
            t = tl.where(u != clamped, 0.0, t)
        weights = tl.where(there, weights, 0.0).to(HALF)
        of_v = tl.dot(weights, towards, of_v, input_precision="ieee")
        s = tl.where(there, p * (t - share[None, :]), 0.0).to(HALF)
        of_k = tl.dot(s, left, of_k, input_precision="ieee")
    inside = (j < keys)[:, None] & (d < dim)[None, :]
    of_k = _back(of_k, raw_k, k_scale, k_offset, k_low, k_high, h * k_heads, partial, programs, inside, K, K_SHIFTED)
    partial += 3 * programs
    of_v = _back(of_v, raw_v, v_scale, v_offset, v_low, v_high, h * v_heads, partial, programs, inside, V, V_SHIFTED)
    tl.store(grad_k + b * m0 + h * m1 + j[:, None] * m2 + d[None, :], of_k.to(grad_k.dtype.element_ty), mask=inside)
    tl.store(grad_v + b * n0 + h * n1 + j[:, None] * n2 + d[None, :], of_v.to(grad_v.dtype.element_ty), mask=inside)
