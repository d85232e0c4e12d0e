"""Scales kept in a bank: one for all widths, or one for each of them (Q-ViT, section 3.3: switchable scales).

`scale` and `offset` are banks of shape `scale_shape + (W,)`: W = 7 for switchable scales of widths 2…8, else 1. The
column of the current width is picked by a one-hot product, in the graph, so that a width can move without recompiling
and without asking the GPU; the columns of other widths get a gradient of exactly zero. After freezing, the bank stays
as it is (the optimizer's state stays valid) and one column of it is read.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor, nn

from qvit.functional import SMALLEST_SCALE, pick_column
from qvit.plan.options import Options, ScaleOptions
from qvit.plan.spec import Layout, TensorSpec
from qvit.quantizers.base import Quantizer


class BankQuantizer(Quantizer):
    """Base class of quantizers with learned scales, and offsets where the spec is asymmetric.

    Attributes:
        scale: Parameter, `scale_shape + (W,)`, positive; NaN until calibrated.
        offset: Parameter of the same shape, or None on a symmetric grid.
        candidates: Buffer, the width of each column; empty where one column serves all widths.
    """

    Options: ClassVar[type[Options]] = ScaleOptions
    options: ScaleOptions
    candidates: Tensor

    def __init__(self, spec: TensorSpec, layout: Layout) -> None:
        super().__init__(spec, layout)
        low, high = spec.bit_width_range
        self.bank_widths = tuple(range(low, high + 1)) if self.options.switchable_scale else ()
        self.register_buffer("candidates", torch.tensor(self.bank_widths, dtype=torch.float32), persistent=False)
        shape = (*self.scale_shape, max(1, len(self.bank_widths)))
        self.scale = nn.Parameter(torch.full(shape, math.nan))
        self.offset = None if spec.symmetric else nn.Parameter(torch.zeros(shape))

    def active_scale(self) -> Tensor:
        return self._scale_at(self.integer_bit_width())

    @torch.no_grad()
    def grid(self, bit_width: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        width = self.integer_bit_width() if bit_width is None else bit_width
        offset = None if self.offset is None else pick_column(self.offset, width, self.candidates)
        return self._scale_at(width), offset

    def _scale_at(self, width: Tensor) -> Tensor:
        return pick_column(self.scale, width, self.candidates).clamp_min(SMALLEST_SCALE)

    @torch.no_grad()
    def restore(self, values: Mapping[str, Tensor]) -> None:
        """Every number goes to the column of its width; the others, which nothing reads, repeat the largest."""
        for name, bank in (("scale", self.scale), ("offset", self.offset)):
            if name not in values or bank is None:
                continue
            active = values[name]
            if bank.shape[-1] == 1:
                bank.copy_(active.unsqueeze(-1))
                continue
            places = bank.shape[:-1]
            width = self.integer_bit_width().expand(self.groups)
            bank.copy_(_largest(active, places).unsqueeze(-1).expand_as(bank))
            split = self.spec.token_bit_width
            lower = {} if split is None else {split.high: f"high_{name}", split.low: f"low_{name}"}
            for column, candidate in enumerate(self.bank_widths):
                if candidate in lower:
                    bank[..., column] = values[lower[candidate]]
                own = width == candidate
                if bool(own.any()):
                    there = _largest(own.to(active.dtype), places) > 0
                    value = _largest(torch.where(own, active, -torch.inf), places)
                    bank[..., column] = torch.where(there, value, bank[..., column])

    def extra_words(self) -> list[str]:
        return ["switchable scale"] if self.options.switchable_scale else []


def _largest(x: Tensor, shape: torch.Size) -> Tensor:
    """The maximum over the axes along which a tensor of `shape` would be broadcast to `x`."""
    while x.dim() > len(shape):
        x = x.amax(0)
    axes = [axis for axis, size in enumerate(shape) if size == 1 and x.shape[axis] > 1]
    return x.amax(axes, keepdim=True) if axes else x
