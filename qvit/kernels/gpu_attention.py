"""Attention with quantized operands in training as Triton kernels: one forward, two backward, for CUDA.

    forward     a block of queries, all keys: x̂ of q, k and v, scores, softmax, p̂, out; nothing of it is kept
    queries     the same again, then the gradients of p̂, of the scores and of q, with the sums of both quantizers
    keys        a block of keys, the queries a block at a time: the gradients of k and v, with their sums

Backward is two kernels because its accumulators for all keys of a head do not fit in registers. What the second one
has to know of a row (the largest score, the sum of exponentials, Σ p·∂p) comes from the first.

Products are of x̂ in the precision of training, with sums in float32, as in `attention.py`, whose values and gradients
these are up to the rounding of sums. On a GPU they take half precision alone: compiled for float32, which has no exact
form on tensor cores, they would need several times the registers there are. How fast they are has not been measured:
`QVIT_GPU_FUSED=attention` turns them on.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from qvit.kernels.shapes import numbers_of_groups
from qvit.kernels.switches import forms_on

if importlib.util.find_spec("triton") is not None:
    import triton.language as tl

    from qvit.kernels import gpu_attention_kernels as kernels

#: Keys and channels of a head that fit on the chip.
MOST_KEYS, WIDEST = 256, 128
ENABLED = "attention" in forms_on()
_Numbers = tuple[Tensor | None, ...]


def handles(q: Tensor, k: Tensor, bias: Tensor | None, grids: Sequence[Any], dtype: torch.dtype) -> bool:
    """Whether the kernels take this attention: (B, H, N, d) and (B, H, M, d) on a GPU, each grid that of its heads.

    Args:
        q, k: Raw.
        bias: Without a gradient.
        grids: `Grid` or None for q, k, v and the probabilities; others are left to the plain form.
        dtype: Of products.
    """
    if dtype == torch.float32 or not (ENABLED and q.is_cuda) or k.shape[2] > MOST_KEYS or q.shape[-1] > WIDEST:
        return False
    return not (bias is not None and bias.requires_grad) and all(_by_heads(own, q.shape[1]) for own in grids)


def _by_heads(grid: Any, heads: int) -> bool:
    """Whether a grid has four parts, with a number for each head or one for all."""
    if grid is None:
        return True
    return len(grid) == 4 and math.prod(numbers_of_groups(tuple(grid))[1]) in (1, heads)


def forward(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, factor: float | Tensor, grids: Sequence[_Numbers | None],
    dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """softmax(q̂·k̂ᵀ·factor + bias)·v̂ in `dtype`, (B, H, N, d), laid out as (B, N, H, d)."""
    batch, heads, queries, dim = q.shape
    out = torch.empty(batch, queries, heads, dim, dtype=dtype, device=q.device).transpose(1, 2)
    call = _Call(q, k, v, bias, factor, grids, dtype)
    blocks = math.ceil(queries / call.rows)
    launch: Any = kernels.forward_kernel
    launch[(batch * heads * blocks,)](
        *call.inputs, call.bias, call.factors, out, *call.numbers, call.factor, heads, blocks, queries, k.shape[2], dim,
        *call.strides, *out.stride()[:3], *call.bias_strides, *call.of_heads, **call.constants, QUERIES=call.rows,
        KEYS=max(16, _power_of_two(k.shape[2])), num_warps=8, enable_fp_fusion=False,
    )  # fmt: skip
    return out


def backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, factor: float | Tensor,
    grids: Sequence[_Numbers | None], dtype: torch.dtype, outputs: Sequence[Tensor],
) -> list[Tensor | None]:  # fmt: skip
    """Writes the gradients of q, k, v to `outputs`; returns the sums of the four quantizers, as `gpu.backward` does."""
    batch, heads, queries, dim = q.shape
    keys = k.shape[2]
    grad = grad if grad.stride(-1) == 1 else grad.contiguous()
    call = _Call(q, k, v, bias, factor, grids, dtype)
    rows = torch.empty(3, batch * heads * queries, dtype=torch.float32, device=q.device)
    sums: list[Tensor] = []
    for kernel, length, given, block in (
        (kernels.queries_kernel, queries, outputs[:1], call.rows),
        (kernels.keys_kernel, keys, outputs[1:], 64 if keys > 32 else 32),
    ):
        blocks = math.ceil(length / block)
        programs = batch * heads * blocks
        partial = torch.zeros(6, batch, heads, blocks, dtype=torch.float32, device=q.device)
        sizes = {"QUERIES": call.rows, "KEYS": max(16, _power_of_two(keys))}
        sizes |= {"QUERIES": 32, "KEYS": block} if len(given) > 1 else {}
        launch: Any = kernel
        launch[(programs,)](
            grad, *call.inputs, call.bias, call.factors, *given, rows, partial, *call.numbers, call.factor,
            heads, blocks, queries, keys, dim, programs, *grad.stride()[:3], *call.strides,
            *(step for own in given for step in own.stride()[:3]), *call.bias_strides, *call.of_heads,
            **call.constants, **sizes, num_warps=8, enable_fp_fusion=False,
        )  # fmt: skip
        sums += partial.sum((1, 3)).split(3)
    order = (0, 2, 3, 1)  # q and p come from the first kernel, k and v from the second
    return [None if own is None else _by_group(sums[at], own) for at, own in zip(order, grids, strict=True)]


def _by_group(sums: Tensor, grid: _Numbers) -> Tensor:
    """(3, heads) sums as (3, 1, *groups), with four axes of groups."""
    groups = numbers_of_groups(grid)[1]
    sums = sums if math.prod(groups) > 1 else sums.sum(1, keepdim=True)
    return sums.reshape(3, *(1,) * (4 - len(groups)), *groups)


class _Call:
    """What all three kernels take."""

    def __init__(
        self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, factor: float | Tensor,
        grids: Sequence[_Numbers | None], dtype: torch.dtype,
    ) -> None:  # fmt: skip
        self.inputs = [x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v)]
        self.strides = [step for x in self.inputs for step in x.stride()[:3]]
        shape = (*q.shape[:3], k.shape[2])
        own = None if bias is None else bias.expand(shape)
        self.bias, self.bias_strides = (q, (0,) * 4) if own is None else (own, own.stride())
        by_head = isinstance(factor, Tensor)
        self.factors = factor.detach().float().contiguous() if isinstance(factor, Tensor) else q
        self.factor = 0.0 if isinstance(factor, Tensor) else float(factor)
        numbers = [(None,) * 4 if grid is None else numbers_of_groups(grid)[0] for grid in grids]
        self.numbers = [self.factors if part is None else part for own in numbers for part in own]
        counts = [1 if own[0] is None else own[0].numel() for own in numbers]
        self.of_heads = [int(count > 1) for count in counts]
        self.rows = 16 if q.shape[2] <= 16 else 32
        self.constants: dict[str, Any] = {name: grid is not None for name, grid in zip("QKVP", grids, strict=True)}
        self.constants |= {f"{name}_SHIFTED": own[1] is not None for name, own in zip("QKVP", numbers, strict=True)}
        half = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}.get(dtype, tl.float32)
        self.constants |= {"BIAS": bias is not None, "FACTORS": by_head, "HALF": half}
        self.constants["DIM"] = max(16, _power_of_two(q.shape[3]))


def _power_of_two(count: int) -> int:
    return 1 << (count - 1).bit_length()
