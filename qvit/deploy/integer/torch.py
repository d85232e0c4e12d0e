"""The integer form with the fastest exact products that PyTorch brings: the arithmetic of the engine `torch`.

Two units compute exact sums of products of integers:

    int8       `torch._int_mm` (oneDNN, on CPU): int8 or uint8 × int8, 32-bit accumulators
    float32    the ordinary product of codes kept as floats: exact in any order while no partial sum reaches 2^24,
               that is while max|x|·Σ|w| < 2^24, which is checked for every layer from its weights

The first is taken for linear layers where the processor has instructions for it, the second elsewhere and for the
products of attention, whose sums (255·128·N for the weighted values) stay below the limit up to 514 tokens. Where
neither is exact, float64 is, up to 2^53: faster than products in int32, for which no library has kernels. No choice
changes a result: all are equal to the reference bit for bit.

Codes never leave the dtype that their product takes, weights are transposed once, and the rest (LayerNorm, softmax,
GELU, scaling, rounding) is left to `torch.compile` to fuse.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from qvit.deploy.integer.arithmetic import Arithmetic, Grid, Operand
from qvit.kernels.cpu import has_int8_dot_products

EXACT_BELOW = 2**24
UNITS = {"int8": torch.int8, "float32": torch.float32, "float64": torch.float64}


class TorchArithmetic(Arithmetic):
    """Exact products by int8 kernels or by float32 units, whichever fits.

    Args:
        int8: Whether linear layers use `torch._int_mm`; None: where the processor has 8-bit dot products.
    """

    def __init__(self, int8: bool | None = None) -> None:
        self.int8 = has_int8_dot_products() if int8 is None else int8

    def prepare(self, grids: tuple[Grid, ...], weight: Tensor | None = None) -> None:
        if weight is not None:
            below = grids[0].largest * int(weight.abs().sum(1, dtype=torch.int64).max()) < EXACT_BELOW
            fits = int(weight.min()) >= -128 and int(weight.max()) <= 127 and not grids[0].ranks_tokens
            fits = fits and not grids[0].quantizer.has_multiples
            grids[0].unit = "int8" if self.int8 and fits else "float32" if below else "float64"
            return
        for grid in grids:
            grid.unit = "float32"

    def encode(self, grid: Grid, x: Tensor) -> Operand:
        if grid.quantizer.has_multiples:
            n = grid.quantizer.multiples(x)
            return Operand(n.to(_unit_of(grid)), grid.scale, grid.offset, largest=grid.largest)
        x = grid.quantizer.rectify(x).float()
        x = (x if grid.offset is None else x - grid.offset) / grid.scale
        codes = (
            x.clamp(*grid.limits) if grid.limits is not None else torch.minimum(torch.maximum(x, grid.low), grid.high)
        )
        return Operand(codes.round().to(_unit_of(grid)), grid.scale, grid.offset, largest=grid.largest)

    def encode_tokens(self, grid: Grid, x: Tensor, width: Tensor) -> Operand:
        found = super().encode_tokens(grid, x, width)
        return replace(found, codes=found.codes.to(_unit_of(grid)), largest=grid.largest)

    def weight_form(self, codes: Tensor, grid: Grid) -> Tensor:
        return codes.to(UNITS[grid.unit]).t().contiguous()

    def linear(self, operand: Operand, weight: Tensor, weight_scale: Tensor) -> Tensor:
        codes = operand.codes
        if weight.dtype is not torch.int8:
            sums = codes @ weight
        elif codes.is_cuda:
            sums = codes.double() @ weight.double()
        else:
            sums = torch._int_mm(codes.reshape(-1, codes.shape[-1]), weight).view(*codes.shape[:-1], -1)
        return sums.float() * (operand.scale * weight_scale)

    def matmul(self, left: Operand, right: Operand, factor: float | Tensor) -> Tensor:
        x, y = left.codes, right.codes
        if x.shape[-1] * left.largest * right.largest >= EXACT_BELOW:
            x, y = x.double(), y.double()
        return (x @ y).float() * (left.scale * factor * right.scale)


def _unit_of(grid: Grid) -> torch.dtype:
    """The dtype of an activation's codes."""
    return UNITS[grid.unit] if grid.unit != "int8" or grid.signed else torch.uint8
