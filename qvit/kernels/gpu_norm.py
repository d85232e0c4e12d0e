"""A norm and the quantizer behind it in one kernel forward and one backward, for CUDA, in training.

    y = (x - mean)·γ/sqrt(var + ε) + β        or, as RmsNorm, y = x·γ/sqrt(mean(x²) + ε)        x̂ = q(y)

Neither y nor the rows' statistics are kept: backward makes them again from x, which is in registers then. With g the
gradient of x̂ and g' what of it passes through the grid (`fake_quantize.py`), n = (x - mean)/sqrt(var + ε) and C
channels,

    ∂γ = Σ g'·n        ∂β = Σ g'        ∂x = (g'γ - mean(g'γ) - n·mean(g'γ·n))/sqrt(var + ε)

without the second term for RmsNorm; the sums of the grid, or of both, are those of every fake quantizer. A program
deals with some rows after another and keeps its part of all sums, so nothing is added atomically and a run repeats
itself.

Values are those of the norm and the quantizer one after the other, up to the rounding of a row's mean and variance: a
value on the edge between two integers may fall on the other side. How fast the kernels are has not been measured:
`QVIT_GPU_FUSED=norm` turns them on.
"""

from __future__ import annotations

import importlib.util
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from qvit.kernels.fake_quantize import Learned
from qvit.kernels.gpu import nine
from qvit.kernels.shapes import numbers_of_groups
from qvit.kernels.switches import forms_on

if importlib.util.find_spec("triton") is not None:
    import triton.language as tl

    from qvit.kernels import gpu_norm_kernels as kernels

ENABLED = "norm" in forms_on()
#: Channels that a row may have.
MOST_COLUMNS = 4096
#: Elements of a tile, and programs that share the rows in backward: four for each multiprocessor of an H100.
_TILE, _PROGRAMS = 2048, 528


class Norm(NamedTuple):
    """A LayerNorm or RmsNorm over the last axis."""

    weight: Tensor
    bias: Tensor | None
    epsilon: float
    rms: bool
    #: Of y, which is rounded to it before it is quantized.
    dtype: torch.dtype


def handles(x: Tensor, norm: Norm, learned: Learned) -> bool:
    """Whether the kernels take the norm of this tensor and the quantizer `learned` behind it: on a GPU, if they fit."""
    return ENABLED and x.is_cuda and fits(x, norm, learned)


def fits(x: Tensor, norm: Norm, learned: Learned) -> bool:
    """`handles`, wherever the tensor is: one scale and one width, which is not learned by differences: those need y."""
    types = (torch.float32, torch.float16, torch.bfloat16)
    if x.dtype not in types or norm.dtype not in types or not 1 < x.shape[-1] <= MOST_COLUMNS or not x.numel():
        return False
    one_grid = learned.scales.shape[:-1].numel() == learned.bit_width.numel() == 1
    return one_grid and (learned.meta.limits is None or learned.meta.gradient != "difference")


def forward(x: Tensor, norm: Norm, grid: tuple[Tensor | None, ...], dtype: torch.dtype) -> Tensor:
    """x̂ of the norm of `x` (..., C), in `dtype`, contiguous."""
    x = x.contiguous()
    out = torch.empty(x.shape, dtype=dtype, device=x.device)
    call = _Call(x, norm, grid)
    launch: Any = kernels.forward_kernel
    launch[(call.tiles,)](x, *call.parameters, out, *call.numbers, *call.sizes, norm.epsilon, **call.constants)
    return out


def backward(
    grad: Tensor, x: Tensor, norm: Norm, grid: tuple[Tensor | None, ...]
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """The gradient of `x`, the sums of the grid as `gpu.backward` returns them, and the gradients of γ and β."""
    x, grad = x.contiguous(), grad.contiguous()
    call, columns = _Call(x, norm, grid), x.shape[-1]
    programs = min(call.tiles, _PROGRAMS)
    out = torch.empty_like(x)
    partial = torch.empty(7 if call.mixed else 3, programs, dtype=torch.float32, device=x.device)
    of_channels = torch.empty(2, programs, columns, dtype=torch.float32, device=x.device)
    launch: Any = kernels.backward_kernel
    launch[(programs,)](
        grad, x, *call.parameters, out, partial, of_channels, *call.numbers, *call.sizes, norm.epsilon, call.tiles,
        programs, **call.constants,
    )  # fmt: skip
    to_weight, to_bias = of_channels.sum(1)
    sums = partial.sum(1).reshape(-1, *(1,) * x.dim())
    own = None if norm.bias is None else to_bias.to(norm.bias.dtype)
    return out, sums, to_weight.to(norm.weight.dtype), own


class _Call:
    """What both kernels take."""

    def __init__(self, x: Tensor, norm: Norm, grid: tuple[Tensor | None, ...]) -> None:
        columns = x.shape[-1]
        block = max(16, 1 << (columns - 1).bit_length())
        rows = max(1, _TILE // block)
        self.sizes = (x.numel() // columns, columns)
        self.tiles = math.ceil(self.sizes[0] / rows)
        self.parameters = [norm.weight, norm.weight if norm.bias is None else norm.bias]
        numbers = numbers_of_groups(grid)[0]
        self.numbers, self.mixed = nine(numbers), len(numbers) > 4
        kind = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}.get(norm.dtype, tl.float32)
        self.constants: dict[str, Any] = {"RMS": norm.rms, "SHIFT": norm.bias is not None}
        self.constants |= {
            "SHIFTED": numbers[1] is not None,
            "MIXED": self.mixed,
            "KIND": kind,
            "ROWS": rows,
            "BLOCK": block,
        }
        self.constants |= {"num_warps": 8 if block > _TILE else 4, "enable_fp_fusion": False}
