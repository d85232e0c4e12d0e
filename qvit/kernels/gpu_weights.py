"""The weights of all layers, quantized in one launch per step, for CUDA.

Layer by layer a weight takes two launches forward (its grid, then x̂) and three backward, hundreds in a step, each of
which takes longer to start than to run. Here the weights, their scales, offsets and widths are laid side by side
(`torch.cat`, one launch for 128 tensors), and a program quantizes a block of a *group*, elements that share a scale.
A group's elements are runs of `inner` numbers, `stride` apart: rows of a projection, blocks of rows or of columns, all
of it. A table of integers, made once, says for every group

    0 first element   1 inner   2 stride   3 elements   4 first program   5 first scale   6 columns of scales   7 width
    8 width of the first column   9 signed   10 first offset, or -1   11 programs   12 n of the scale's gradient

Backward is a launch for the weights' gradients and partial sums and one for all gradients of scales and offsets, added
in a fixed order. Values are those of the quantizers one by one, bit for bit, and gradients up to the order of sums.
What is kept for backward are the weights themselves.

Widths that are learned, banks whose groups share scales, and n by norms are for `FakeQuantize`. How fast this is has
not been measured: `QVIT_GPU_FUSED=weights` turns it on.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from qvit.functional import SMALLEST_SCALE
from qvit.kernels.fake_quantize import Learned
from qvit.kernels.shapes import Numbers, groups_of
from qvit.kernels.switches import forms_on

if importlib.util.find_spec("triton") is not None:
    from qvit.kernels import gpu_weights_kernels as kernels

ENABLED = "weights" in forms_on()
_BLOCK = 1024
_FIELDS = 13
#: A tensor as its quantizer views it, and the quantizer.
Weight = tuple[Tensor, Learned]


class _Shape(NamedTuple):
    """What the table says of a tensor, and nothing that moves in training."""

    shape: Numbers
    scales: Numbers
    columns: int
    widths: Numbers
    first: int
    signed: bool
    shifted: bool
    elements: int

    def runs(self) -> tuple[int, int] | None:
        """How long the runs of a group are, and how many groups there are; None where groups are no runs."""
        groups = groups_of(self.scales, self.widths)
        groups = (1,) * (len(self.shape) - len(groups)) + groups
        several = [axis for axis, size in enumerate(groups) if size > 1]
        if not several:
            return math.prod(self.shape), 1
        first, last = several[0], several[-1]
        if groups[first : last + 1] != self.shape[first : last + 1]:
            return None
        return math.prod(self.shape[last + 1 :]), math.prod(groups)


class _Table(NamedTuple):
    """The table, (groups, 13), and the group of each program."""

    groups: Tensor
    owners: Tensor
    columns: int


#: By what is known of the tensors.
Tables = dict[tuple[_Shape, ...], _Table]


def handles(tensor: Tensor, learned: Learned) -> bool:
    """Whether a weight can be quantized with others: on a GPU, in float32, its groups runs with a scale each."""
    return ENABLED and tensor.is_cuda and fits(tensor, learned)


def fits(tensor: Tensor, learned: Learned) -> bool:
    """`handles`, wherever the tensor is."""
    meta, parts = learned.meta, [tensor, learned.scales, learned.bit_width]
    parts += [] if learned.offsets is None else [learned.offsets]
    if not all(part.dtype == torch.float32 and part.is_contiguous() for part in parts) or not tensor.numel():
        return False
    if meta.limits is not None or meta.linear or meta.first is None or not isinstance(meta.elements_per_scale, int):
        return False
    runs = _shape_of(tensor, learned).runs()
    return runs is not None and runs[1] == learned.scales.shape[:-1].numel() and tensor.numel() // runs[1] < 2**31


def quantize_together(weights: Sequence[Weight], tables: Tables) -> list[Tensor]:
    """x̂ of each tensor, differentiable in tensors, scales and offsets; of weights that `handles`.

    `tables` keeps what is made at the first call, outside of a graph that is recorded; it has to live as long as that.
    """
    tensors, learned = zip(*weights, strict=True)
    shapes = tuple(_shape_of(tensor, own) for tensor, own in weights)
    if shapes not in tables:
        tables[shapes] = _table(shapes, tensors[0].device)
    scales, offsets = [own.scales for own in learned], [own.offsets for own in learned if own.offsets is not None]
    widths = [own.bit_width for own in learned]
    return list(_Together.apply(tables[shapes], widths, *tensors, *scales, *offsets))


def _shape_of(tensor: Tensor, learned: Learned) -> _Shape:
    meta, scales = learned.meta, tuple(learned.scales.shape)
    about = (meta.first or 0, meta.signed, learned.offsets is not None, int(meta.elements_per_scale or 0))
    return _Shape(tuple(tensor.shape), scales[:-1], scales[-1], tuple(learned.bit_width.shape), *about)


class _Together(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, table: _Table, widths: list[Tensor], *parts: Tensor) -> tuple[Tensor, ...]:
        ctx.table, count = table, len(widths)
        ctx.save_for_backward(*widths, *parts)
        values, scales, offsets = _kinds(parts, count)
        out = torch.empty_like(values)
        launch: Any = kernels.forward_kernel
        launch[(len(table.owners),)](
            values, out, table.owners, table.groups, scales, offsets, _side_by_side(widths), SMALLEST_SCALE,
            **_constants(offsets), BLOCK=_BLOCK,
        )  # fmt: skip
        return _apart(out, parts[:count])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        table, count = ctx.table, len(grads)
        widths, parts = ctx.saved_tensors[:count], ctx.saved_tensors[count:]
        values, scales, offsets = _kinds(parts, count)
        programs = len(table.owners)
        partial = torch.empty(3, programs, dtype=torch.float32, device=values.device)
        outputs = [torch.empty_like(own) for own in (values, scales, offsets)]
        grid = (table.groups, scales, offsets, _side_by_side(widths), SMALLEST_SCALE, programs)
        constants = _constants(offsets)
        launch: Any = kernels.backward_kernel
        launch[(programs,)](
            _side_by_side(grads), values, outputs[0], partial, table.owners, *grid, **constants, BLOCK=_BLOCK
        )
        launch = kernels.gradients_kernel
        launch[(len(table.groups),)](
            partial, *outputs[1:], *grid, **constants, COLUMNS=1 << (table.columns - 1).bit_length(), BLOCK=256
        )
        kinds = parts[:count], parts[count : 2 * count], parts[2 * count :]
        return None, None, *(part for flat, own in zip(outputs, kinds, strict=True) for part in _apart(flat, own))


def _kinds(parts: Sequence[Tensor], count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Tensors, scales and offsets, each side by side; no numbers where there are no offsets."""
    offsets = parts[2 * count :]
    last = _side_by_side(offsets) if offsets else parts[0].new_empty(0)
    return _side_by_side(parts[:count]), _side_by_side(parts[count : 2 * count]), last


def _constants(offsets: Tensor) -> dict[str, Any]:
    return {"FIELDS": _FIELDS, "SHIFTED": bool(offsets.numel()), "enable_fp_fusion": False}


def _side_by_side(parts: Sequence[Tensor]) -> Tensor:
    """All numbers of some tensors, one after another."""
    return torch.cat([part.detach().reshape(-1) for part in parts])


def _apart(flat: Tensor, parts: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Views of what `_side_by_side` made, in the shapes of its parts."""
    pieces = flat.split([part.numel() for part in parts])
    return tuple(piece.view(part.shape) for piece, part in zip(pieces, parts, strict=True))


def _table(shapes: tuple[_Shape, ...], device: torch.device) -> _Table:
    """The table of some tensors."""
    rows: list[Tensor] = []
    elements = scales = offsets = widths = programs = 0
    for own in shapes:
        found = own.runs()
        assert found is not None
        inner, count = found
        size = math.prod(own.shape)
        blocks = math.ceil(size / count / _BLOCK)
        group = torch.arange(count)
        groups = groups_of(own.scales, own.widths)
        width = torch.arange(math.prod(own.widths)).view(own.widths).expand(groups).reshape(-1)
        columns = [
            elements + group * inner, inner, count * inner, size // count, programs + group * blocks,
            scales + group * own.columns, own.columns, widths + width, own.first, int(own.signed),
            offsets + group * own.columns if own.shifted else -1, blocks, own.elements,
        ]  # fmt: skip
        rows.append(torch.stack([torch.as_tensor(column).expand(count) for column in columns], dim=1))
        elements, programs = elements + size, programs + count * blocks
        scales, widths = scales + count * own.columns, widths + math.prod(own.widths)
        offsets += count * own.columns if own.shifted else 0
    table = torch.cat(rows)
    owners = torch.arange(len(table), dtype=torch.int32).repeat_interleave(table[:, 11])
    return _Table(table.to(device), owners.to(device), max(own.columns for own in shapes))
