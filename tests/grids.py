"""Grids, shapes and marks for tests of the kernels."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from qvit.kernels import cpu
from qvit.kernels.fake_quantize import Grid, _forward

needs_kernels = pytest.mark.skipif(not cpu.available(), reason="no C++ compiler on this machine")
needs_int8 = pytest.mark.skipif(not cpu.has_int8_dot_products(), reason="no 8-bit dot products on this processor")

SHAPES: list[tuple[tuple[int, ...], tuple[int, ...]]] = [
    ((5, 7), ()),
    ((1,), ()),
    ((3, 1, 17), ()),
    ((0, 4), ()),
    ((2, 3, 5, 7), (3, 1, 1)),
    ((2, 3, 5, 7), (3, 1, 7)),
    ((2, 3, 5, 7), (3, 5, 7)),
    ((2, 5, 33), (33,)),
    ((4, 6, 50), (4, 6, 1)),
    ((6, 4, 5), (4, 1)),
    ((2, 4, 6, 6), (4, 1, 1)),
    ((3, 40000), ()),
    ((2, 3, 200, 100), (3, 1, 1)),
    ((300, 129), (129,)),
]
TYPES = (torch.float32, torch.bfloat16)


def difference(grad: Tensor, x: Tensor, above: Grid, below: Grid) -> Tensor:
    """`difference_on` by its formula."""
    moved = grad.float() * (_forward(x.float(), *above) - _forward(x.float(), *below))
    groups = torch.broadcast_shapes(above.scale.shape, above.quant_max.shape)
    return moved.sum_to_size((1,) * (x.dim() - len(groups)) + groups)


def make_grid(shape: tuple[int, ...], *, signed: bool, offset: bool) -> Grid:
    """Scales of all sizes, so that a good part of the elements is clipped; widths per group."""
    widths = torch.randint(1, 9, shape).float()
    scale = torch.rand(shape) * 2 / torch.exp2(widths) + 0.01
    low = -torch.exp2(widths - 1) if signed else torch.zeros(shape)
    high = torch.exp2(widths - 1) - 1 if signed else torch.exp2(widths) - 1
    return Grid(scale, torch.randn(shape) * 0.3 if offset else None, low, high)
