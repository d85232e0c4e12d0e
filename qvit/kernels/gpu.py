"""The operators of `fake_quantize.py` as Triton kernels, for CUDA: one pass forward, one backward, one for all numbers.

A tensor is four axes, as in `cpu.cpp`; a program takes a block of a *tile*, the last two of them, within which the grid
is constant as a rule, and reads the numbers of its group once. Elements of a tile are numbered in 32 bits, and where a
tile lies in one piece nothing is divided: 64-bit divisions of every element's number are dear on a GPU. Backward
reduces in registers and writes one partial sum per program: no atomic additions, the same numbers on every run. Groups
that change from element to element (per channel) have the formulas in backward.

A model has hundreds of quantizers with a few numbers each, and every small operation on them is a launch:
`resolve` makes the grid of the current widths in one launch, `parameter_gradients` all gradients of
scales, offsets and widths in another. Where a width is learned by interpolation (`MIXED`), each of these launches deals
with both grids.

Division is the rounded one, and products and sums are not contracted: an approximate quotient would put values on the
edge between two integers on the wrong side. What a GPU computes is tried beside the formulas before the first use;
where it differs, or Triton is not there, the formulas run and the log says so.
"""

from __future__ import annotations

import functools
import importlib.util
import logging
import math
from typing import Any

import torch
from torch import Tensor

from qvit.errors import first_line
from qvit.kernels.shapes import Axes, axes_of, groups_of, numbers_of_groups

log = logging.getLogger(__name__)
_BLOCK = 1024
#: Numbers of a bank that one program can make.
MOST_NUMBERS = 8192
_Grid = tuple[Tensor | None, ...]

if importlib.util.find_spec("triton") is not None:
    from qvit.kernels import gpu_kernels as kernels


def handles(*tensors: Tensor) -> bool:
    """Whether the kernels take these tensors: on a CUDA device, in float32, float16 or bfloat16."""
    types = (torch.float32, torch.float16, torch.bfloat16)
    return all(x.is_cuda and x.dtype in types for x in tensors) and _works(tensors[0].device)


def forward(x: Tensor, grid: _Grid, dtype: torch.dtype) -> Tensor | None:
    """x̂ in `dtype`, contiguous; None for a tensor of more than four separate axes.

    Args:
        x: Raw.
        grid: Scale, offset, quant_min and quant_max; of two grids, those of both, and the share of the second.
        dtype: Of the result.
    """
    flat, groups = numbers_of_groups(grid)
    axes = axes_of(tuple(x.shape), (x.stride(),), groups)
    if axes is None:
        x = x.contiguous()
        axes = axes_of(tuple(x.shape), (x.stride(),), groups)
    axes = _countable(axes)
    if axes is None:
        return None
    out = torch.empty(x.shape, dtype=dtype, device=x.device)
    if not x.numel():
        return out
    (a, b, rows, columns), strides, of_group = axes.size, axes.strides[0], axes.group
    varies = bool(of_group[2] or of_group[3])
    chunks = math.ceil(rows * columns / _BLOCK)
    launch: Any = kernels.forward_kernel
    launch[(a * b * chunks,)](
        x, out, *nine(flat), chunks, b, rows * columns, *strides, *of_group,
        COLUMNS=columns if varies or not _in_one_piece(axes, 0) else 0, VARIES=varies, SHIFTED=flat[1] is not None,
        MIXED=len(flat) > 4, BLOCK=_BLOCK, enable_fp_fusion=False,
    )  # fmt: skip
    return out


def backward(grad: Tensor, x: Tensor, grid: _Grid, out: Tensor | None = None) -> tuple[Tensor, Tensor] | None:
    """The gradient of `x`, written to `out` if given, and (3, groups) sums; None to leave both to the formulas.

    On two grids, given as in `forward`, the sums are (7, groups).
    """
    flat, groups = numbers_of_groups(grid)
    if out is None:
        out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    found = _to_be_summed(x, grad, groups, out)
    if found is None:
        return None
    x, grad, axes = found
    a, b, rows, columns = axes.size
    chunks = math.ceil(rows * columns / _BLOCK)
    mixed = len(flat) > 4
    partial = torch.empty(7 if mixed else 3, a, b, chunks, dtype=torch.float32, device=x.device)
    launch: Any = kernels.backward_kernel
    launch[(a * b * chunks,)](
        grad, x, out, partial, *nine(flat), chunks, b, rows * columns,
        *axes.strides[0], *axes.strides[1], *axes.strides[2], axes.group[0], axes.group[1], a * b * chunks,
        COLUMNS=0 if _in_one_piece(axes, 0, 1, 2) else columns, SHIFTED=flat[1] is not None, MIXED=mixed, BLOCK=_BLOCK,
        enable_fp_fusion=False,
    )  # fmt: skip
    summed = [axis for axis, of_group in ((1, axes.group[0]), (2, axes.group[1])) if not of_group]
    sums = partial.sum((*summed, 3))
    return out, sums.reshape(len(partial), *(1,) * (x.dim() - len(groups)), *groups)


def difference(grad: Tensor, x: Tensor, above: _Grid, below: _Grid) -> Tensor | None:
    """(groups) sums of grad times x̂ on one grid less x̂ on another of the same groups; None to leave it to formulas."""
    flat, groups = numbers_of_groups(above)
    others, other_groups = numbers_of_groups(below)
    found = _to_be_summed(x, grad, groups) if groups == other_groups else None
    if found is None:
        return None
    x, grad, axes = found
    a, b, rows, columns = axes.size
    chunks = math.ceil(rows * columns / _BLOCK)
    partial = torch.empty(a, b, chunks, dtype=torch.float32, device=x.device)
    launch: Any = kernels.difference_kernel
    launch[(a * b * chunks,)](
        grad, x, partial, *nine([*flat, *others])[:8], chunks, b, rows * columns, *axes.strides[0], *axes.strides[1],
        axes.group[0], axes.group[1], COLUMNS=0 if _in_one_piece(axes, 0, 1) else columns,
        SHIFTED=flat[1] is not None, BLOCK=_BLOCK, enable_fp_fusion=False,
    )  # fmt: skip
    sums = partial.sum([axis for axis, of_group in ((0, axes.group[0]), (1, axes.group[1])) if not of_group] + [2])
    return sums.reshape(*(1,) * (x.dim() - len(groups)), *groups)


def nine(numbers: list[Tensor | None]) -> list[Tensor | None]:
    """The numbers of two grids and a share, as kernels take them; what is not there is not read."""
    return [numbers[0] if part is None else part for part in (*numbers, *(None,) * (9 - len(numbers)))]


def _to_be_summed(
    x: Tensor, grad: Tensor, groups: tuple[int, ...], *others: Tensor
) -> tuple[Tensor, Tensor, Axes] | None:
    """Two tensors, copied where their axes are too many, and axes whose tiles have one group each; None without such.

    `others` are tensors of the same shape that stay as they are.
    """
    for copied in (False, True):
        if copied:
            x, grad = x.contiguous(), grad.contiguous()
        axes = axes_of(tuple(x.shape), tuple(own.stride() for own in (x, grad, *others)), groups)
        if axes is not None:
            break
    if axes is None or axes.group[3] or not x.numel():
        return None
    if axes.group[2] and axes.size[0] == 1:
        axes = _rows_as_tiles(axes)
    axes = None if axes.group[2] else _countable(axes)
    return None if axes is None else (x, grad, axes)


def _in_one_piece(axes: Axes, *inputs: int) -> bool:
    """Whether the elements of a tile follow one another in these inputs."""
    rows, columns = axes.size[2:]
    return all(rows == 1 or axes.strides[i][2] == columns for i in inputs)


def _countable(axes: Axes | None) -> Axes | None:
    """Axes whose tiles can be numbered in 32 bits: the same ones, or with rows as tiles; None if neither will do."""
    if axes is None or axes.size[2] * axes.size[3] < 2**31 - _BLOCK:
        return axes
    return None if axes.size[0] > 1 or axes.size[3] >= 2**31 - _BLOCK else _rows_as_tiles(axes)


def _rows_as_tiles(axes: Axes) -> Axes:
    """Axes of which the first has size 1, with every row as a tile."""
    size, group, out, strides = axes
    return Axes(_one_row(size, 1), _one_row(group), _one_row(out), tuple(map(_one_row, strides)))


def _one_row(numbers: tuple[int, ...], row: int = 0) -> tuple[int, ...]:
    """The axes after a first one of size 1, with one row before the columns; `row` is its size or stride."""
    return *numbers[1:3], row, numbers[3]


def resolve(
    scales: Tensor, offsets: Tensor | None, bit_width: Tensor, first: int, limits: tuple[int, int] | None, signed: bool,
    smallest: float, mixed: bool = False,
) -> list[Tensor | None] | None:  # fmt: skip
    """Scale, offset, quant_min, quant_max and width of each group, side by side in one tensor; None to leave it.

    Args:
        scales, offsets: Banks, (..., W); columns are for widths from `first` on, or one for all.
        bit_width: Learned if there are `limits`.
        first: Width of the first column.
        limits: Of the width.
        signed: The grid.
        smallest: Scale.
        mixed: Make the grids of both neighbours of a learned width: five parts each, and the share of the upper one.
    """
    place = _places(scales, bit_width)
    if place is None or not scales.is_contiguous() or (offsets is not None and not offsets.is_contiguous()):
        return None
    groups, count, of_scale, of_width = place
    out = torch.empty(11 if mixed else 5, count, dtype=torch.float32, device=scales.device)
    least, most = limits or (0, 0)
    launch: Any = kernels.resolve_kernel
    launch[(2 if mixed else 1,)](
        scales, scales if offsets is None else offsets, bit_width, out, count, first, float(least), float(most),
        smallest, OF_SCALE=of_scale, OF_WIDTH=of_width, COLUMNS=scales.shape[-1], SIGNED=signed,
        SHIFTED=offsets is not None, LIMITED=limits is not None, MIXED=mixed, BLOCK=_power_of_two(count),
        enable_fp_fusion=False,
    )  # fmt: skip
    return [part.view(groups) if i % 5 != 1 or offsets is not None else None for i, part in enumerate(out.unbind(0))]


def parameter_gradients(
    sums: Tensor, scale: Tensor, scales: Tensor, offsets: Tensor | None, bit_width: Tensor, first: int,
    limits: tuple[int, int] | None, signed: bool, elements: Tensor | int | None, linear: bool = False,
    mixed: bool = False,
) -> tuple[Tensor, Tensor | None, Tensor | None] | None:  # fmt: skip
    """Gradients of banks and width from A, C, B, for a grid that `resolve` has made: `scale` is its first part.

    None where there is no such grid, or its numbers cannot be told from these shapes. `linear` and what else these
    tensors mean: see `Meta`; `mixed`: the grids are two, the sums seven.
    """
    place = _places(scales, bit_width)
    if place is None or not sums.is_contiguous():
        return None
    _, count, of_scale, of_width = place
    parts = 11 if mixed else 5
    whole = scale.untyped_storage().nbytes() == 4 * parts * count and not scale.storage_offset()
    if not whole or scale.dtype != torch.float32 or sums.numel() != (7 if mixed else 3) * count:
        return None
    numbers = scale.as_strided((parts, count), (count, 1), 0)
    of_elements, scaled = 0, 0
    if isinstance(elements, Tensor):
        if elements.numel() not in (1, count) or not elements.is_contiguous():
            return None
        of_elements, scaled = int(elements.numel() > 1), 2
    elif elements is not None:
        scaled = 1
    to_scales = torch.empty_like(scales)
    to_offsets = None if offsets is None else torch.empty_like(offsets)
    to_width = None if limits is None else torch.empty_like(bit_width)
    columns = scales.shape[-1]
    launch: Any = kernels.gradients_kernel
    launch[(1,)](
        sums, numbers, elements if isinstance(elements, Tensor) else sums, to_scales,
        to_scales if to_offsets is None else to_offsets, to_scales if to_width is None else to_width, count,
        of_elements, float(elements) if isinstance(elements, int) else 0.0, first,
        OF_SCALE=of_scale, OF_WIDTH=of_width, COLUMNS=columns, PADDED=1 << (columns - 1).bit_length(), SIGNED=signed,
        SHIFTED=offsets is not None, LIMITED=limits is not None, MIXED=mixed, SCALED=scaled, LINEAR=linear,
        BLOCK=_power_of_two(count), enable_fp_fusion=False,
    )  # fmt: skip
    return to_scales, to_offsets, to_width


def _power_of_two(count: int) -> int:
    return max(16, 1 << (count - 1).bit_length())


def _places(scales: Tensor, bit_width: Tensor) -> tuple[tuple[int, ...], int, int, int] | None:
    """Shape and number of the groups, and how far apart their scales and their widths are: 1, or 0 if shared.

    None where that does not describe them.
    """
    rows, widths = tuple(scales.shape[:-1]), tuple(bit_width.shape)
    groups = groups_of(rows, widths)
    count = math.prod(groups)
    if count * scales.shape[-1] > MOST_NUMBERS or {math.prod(rows), math.prod(widths)} - {1, count}:
        return None
    return groups, count, int(math.prod(rows) > 1), int(math.prod(widths) > 1)


@functools.cache
def _works(device: torch.device) -> bool:
    """Whether the kernels compute what the formulas do on this device."""
    if importlib.util.find_spec("triton") is None:
        log.warning("no Triton, so quantization on %s takes many passes", device)
        return False
    try:
        if _compute_what_formulas_do(device):
            return True
        log.warning("the Triton kernels do not compute what they should on %s: formulas take their place", device)
    except Exception as error:  # a compiler of another version, a driver, a device that Triton does not know
        log.warning("no Triton kernels on %s, so quantization takes many passes: %s", device, first_line(error))
    return False


def _compute_what_formulas_do(device: torch.device) -> bool:
    from qvit.kernels.fake_quantize import Grid, Meta, Mixed, _backward, _forward, formula_gradients, formula_resolve

    def same(found: Any, expected: Any, exactly: bool = True, close: float = 1e-4) -> bool:
        pairs = zip(found, expected, strict=True)
        if exactly:
            return all(torch.equal(left, right) for left, right in pairs)
        return all(torch.allclose(left, right, rtol=1e-3, atol=close) for left, right in pairs)

    x = torch.linspace(-2, 2, 3 * 1200, device=device).view(1, 3, 40, 30)
    banks = torch.tensor([[0.11, 0.2], [0.3, 0.1], [0.07, 0.5]], device=device).view(3, 1, 1, 2)
    width = torch.tensor([3.2, 3.6, 9.0], device=device).view(3, 1, 1)
    meta = Meta(torch.tensor([3.0, 4.0], device=device), (3, 4), True, 1200, None, 3)
    grid, known = formula_resolve(banks, banks / 3, width, meta)
    about = (3, (3, 4), True)
    own: Any = resolve(banks, banks / 3, width, *about, 1e-8)
    values, (grad_x, sums) = _forward(x, *grid), _backward(x, x, *grid)
    found: Any = backward(x, x, grid)
    result = same(own, (*grid, known)) and same([forward(x, grid, x.dtype), found[0]], [values, grad_x])
    result = result and same(found[1:], [sums], False, 1e-2)
    fixed = meta._replace(limits=None)
    of_parts = formula_gradients(sums, Grid(*own[:4]), own[4], banks, banks, width, meta)
    result = result and same(
        parameter_gradients(sums.contiguous(), own[0], banks, banks, width, *about, 1200), of_parts, False
    )

    own = resolve(banks, banks / 3, width, *about, 1e-8, mixed=True)
    share = torch.tensor([0.2, 0.6, 1.0], device=device).view(3, 1, 1)
    sides = [torch.full_like(width, bits) for bits in (3.0, 4.0)]
    grids = [formula_resolve(banks, banks / 3, side, fixed)[0] for side in sides]
    result = result and same([*own[:4], *own[5:9]], [*grids[0], *grids[1]]) and same([own[10]], [share], False)
    pair, (low, high) = Mixed(grids[0], grids[1], share), [_forward(x, *one) for one in grids]
    (lower, below), (upper, above) = (_backward(x, x, *one) for one in grids)
    moved = (x * (high - low)).sum_to_size(1, *share.shape)
    sums = torch.cat([below * (1 - share), above * share, moved[None]])
    found = backward(x, x, pair.numbers())
    grads = [forward(x, pair.numbers(), x.dtype), found[0]]
    result = result and same(grads, [torch.lerp(low, high, share), torch.lerp(lower, upper, share)], False)
    result = result and same([found[1], difference(x, x, *grids[::-1])], [sums, moved], False, 1e-2)
    parts = (
        formula_gradients(sums[3 * i : 3 * i + 3], grids[i], sides[i], banks, banks, width, fixed) for i in range(2)
    )
    wanted = [left + right for left, right in zip(*(own[:2] for own in parts), strict=True)]
    found = parameter_gradients(sums.contiguous(), own[0], banks, banks, width, *about, 1200, mixed=True)
    return result and same(found, [*wanted, moved], False)
