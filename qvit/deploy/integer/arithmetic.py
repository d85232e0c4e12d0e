"""How integers are made and multiplied: grids read once, operands, and the reference arithmetic that all others equal.

An operand is x̂ = s·(q - z) + β with integers q. The reference multiplies them in int32, one operation after the other;
others (`torch.py`, `export/onnx.py`) use another unit or write a graph, and override as little as that takes. Scales
are applied after each sum, in one order everywhere:

    linear    Σ q_x q_w · (s_x·s_w)                matmul    Σ q_l q_r · (s_l·factor·s_r)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from qvit.functional import quantize
from qvit.plan.spec import PerPosition
from qvit.quantizers import Quantizer

if TYPE_CHECKING:
    from qvit.deploy.integer.reference import IntegerLinear


class Grid(nn.Module):
    """The grid of a frozen quantizer, read once, with plain numbers for what decides how a graph is built.

    Attributes:
        quantizer: Whose grid it is.
        scale, offset: Buffers, as `Quantizer.grid` returns them.
        low, high: Buffers, smallest and largest code, shaped like the widths.
        step: The scale as a number, where there is a single one.
        limits: Smallest and largest code as numbers, where all heads have the same.
        largest: The largest integer that is multiplied, without its sign.
        unit: What its codes are multiplied in, as the arithmetic decided in `prepare`.
        is_right: Whether it is the right operand of a product of two activations.
    """

    scale: Tensor
    offset: Tensor | None
    low: Tensor
    high: Tensor

    def __init__(self, quantizer: Quantizer) -> None:
        super().__init__()
        self.quantizer, self.signed, self.unit = quantizer, quantizer.spec.signed, "int32"
        self.is_right = False
        scale, offset = quantizer.grid()
        low, high = quantizer.quant_range()
        self.register_buffer("scale", scale.detach().clone())
        self.register_buffer("offset", None if offset is None else offset.detach().clone())
        self.register_buffer("low", low.detach().clone())
        self.register_buffer("high", high.detach().clone())
        self.step = float(scale) if scale.numel() == 1 else None
        same = bool((high == high.flatten()[0]).all())
        self.largest = quantizer.largest_multiple()
        self.limits = (int(low.flatten()[0]), int(high.flatten()[0])) if same else None

    @property
    def splits_tokens(self) -> bool:
        """Whether tokens differ in width."""
        return self.quantizer.spec.token_bit_width is not None

    @property
    def differs_by_token(self) -> bool:
        """Whether scales and offsets are those of rows: of tokens of several widths, or of each position."""
        return self.splits_tokens or isinstance(self.quantizer.spec.granularity, PerPosition)

    @property
    def ranks_tokens(self) -> bool:
        """Whether that follows the image."""
        return self.quantizer.spec.ranks_tokens


@dataclass(frozen=True)
class Operand:
    """Integers on their grid: x̂ = scale·(codes - zero) + offset; scale and offset broadcast against the codes.

    `largest` is the largest |code| that its grid has.
    """

    codes: Tensor
    scale: Tensor
    offset: Tensor | None = None
    zero: int = 0
    largest: int = 255


class Arithmetic:
    """Products of integers in int32, one operation after the other: the reference.

    Where a device has no products in int32 (CUDA), they are computed in float64, which is exact up to 2^53.

    Others override how codes are kept (`encode`, `encode_tokens`, `weight_form`) and multiplied (`linear`,
    `matmul`), or whole products (`project`, `product`).
    """

    #: Whether `project_codes` is there, so that the quantization of q, k, v becomes part of their projection.
    projects_codes = False

    def project_codes(self, operand: Operand, layer: IntegerLinear, grids: tuple[Grid, ...]) -> tuple[Tensor, int]:
        """The codes of a layer's output (..., out), equal parts of which have a grid each, and their zero point."""
        raise NotImplementedError

    def encode(self, grid: Grid, x: Tensor) -> Operand:
        """The integers of an activation, with scale and offset."""
        return Operand(grid.quantizer.multiples(x), grid.scale, grid.offset)

    def operand(self, grid: Grid, x: Tensor, rank: Tensor | None = None) -> Operand:
        """The same for tokens that may differ in width, by their ranking where that decides."""
        if not grid.splits_tokens:
            return self.encode(grid, x)
        return self.encode_tokens(grid, x, grid.quantizer.token_bit_width(x, rank))

    def encode_tokens(self, grid: Grid, x: Tensor, width: Tensor) -> Operand:
        """The integers of tokens that have these widths."""
        scale, offset = grid.quantizer.grid(width)
        return Operand(quantize(grid.quantizer.rectify(x), scale, width, grid.signed, offset), scale, offset)

    def prepare(self, grids: tuple[Grid, ...], weight: Tensor | None = None) -> None:
        """Told of every product before it is built: the grids of its activations, and the integers of its weight."""

    def weight_form(self, codes: Tensor, grid: Grid) -> Tensor:
        """How the integers (out, K) of a weight, or of a block of its columns, are kept."""
        return codes.to(torch.int32)

    def linear(self, operand: Operand, weight: Tensor, weight_scale: Tensor) -> Tensor:
        """The product (..., out) of integers (..., K) and those of a weight, scaled, as float32."""
        return exact_product(operand.codes, weight.t()) * (operand.scale * weight_scale)

    def matmul(self, left: Operand, right: Operand, factor: float | Tensor) -> Tensor:
        """The product (..., N, M) of integers (..., N, K) and (..., K, M), scaled, as float32."""
        return exact_product(left.codes, right.codes) * (left.scale * factor * right.scale)

    def total(self, operand: Operand, dim: int) -> Tensor:
        """Sums of integers, as float32."""
        return operand.codes.sum(dim, keepdim=True).float()

    def project(self, operand: Operand, layer: IntegerLinear) -> Tensor:
        """The output (..., out) of a layer."""
        if layer.segments == 1:
            return self._segment(operand, layer, 0) + self.bias_form(layer.bias)
        blocks, total = operand.codes.chunk(layer.segments, dim=-1), self.bias_form(layer.bias)
        for index, codes in enumerate(blocks):
            scale = operand.scale[index] if operand.scale.dim() >= 2 else operand.scale
            total = total + self._segment(Operand(codes, scale, zero=operand.zero), layer, index)
        return total

    def bias_form(self, bias: Tensor) -> Tensor:
        """How a bias (out,) is added."""
        return bias

    def _segment(self, operand: Operand, layer: IntegerLinear, index: int) -> Tensor:
        row = index if len(layer.weight_scale) > 1 else 0
        y = self.linear(operand, getattr(layer, f"weight_{index}"), layer.weight_scale[row])
        if layer.weight_offset is not None:
            y = y + self.total(operand, -1) * operand.scale * layer.weight_offset[row]
        if operand.offset is not None and not layer.offset_in_bias:
            y = y + operand.offset * layer.weight_sum
        return y

    def product(self, left: Operand, right: Operand, factor: float | Tensor = 1.0) -> Tensor:
        """The product (..., N, M) of two activations, scales constant along the summed axis, times `factor`."""
        y = self.matmul(left, right, factor)
        if right.offset is not None:
            y = y + self.total(left, -1) * left.scale * (right.offset * factor)
        if left.offset is not None:
            y = y + self.total(right, -2) * right.scale * (left.offset * factor)
            if right.offset is not None:
                y = y + left.offset * right.offset * (factor * left.codes.shape[-1])
        return y


def exact_product(left: Tensor, right: Tensor) -> Tensor:
    """The product of integers, whatever their dtype, rounded once to float32.

    In int64 where one of them is: multiples of twin grids may have more bits than int32 has room for.
    """
    wide = torch.int64 in (left.dtype, right.dtype)
    unit = torch.float64 if left.is_cuda else torch.int64 if wide else torch.int32
    return (left.to(unit) @ right.to(unit)).float()
