"""What a packed file keeps of a quantizer: the numbers of its grid, and how they get back into its banks.

A quantizer in training has a bank with one scale (and offset) per candidate width. A packed one has a single width, or
one per head, so of the bank only what that width picks is kept:

    scale        what `grid()` returns; `(groups)` where scales are switchable, else `scale_shape`
    offset       the same, where the grid has one (LSQ+ in float units; statsq: scale/2)
    low_scale    the scale (and `low_offset` the offset) of the lower width, where tokens form two groups
    others       further parameters of the quantizer: `gain` and `shift` of `irm`

Back in a bank, every number stands in the column of its width. The other columns, which nothing reads, repeat the
largest of them, so that a state dict of the restored model is one of a calibrated model.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from qvit.errors import QvitError
from qvit.functional import SMALLEST_SCALE, pick_column
from qvit.quantizers import Quantizer

Numbers = dict[str, Tensor]
_GRID = ("scale", "offset", "bit_width")
_HEADROOM = 2.0**16


@torch.no_grad()
def grid_values(quantizer: Quantizer) -> dict[str, Tensor]:
    """The numbers of a quantizer's grid by name, detached, on its own device."""
    scale, offset = quantizer.grid()
    values = {"scale": scale} if offset is None else {"scale": scale, "offset": offset}
    split = quantizer.spec.token_bit_width
    if split is not None:
        for name in ("scale", "offset"):
            bank = getattr(quantizer, name, None)
            if bank is not None:
                low = pick_column(bank, bank.new_tensor(float(split.low)), _candidates(quantizer))
                values[f"low_{name}"] = low.clamp_min(SMALLEST_SCALE) if name == "scale" else low
    others = {name: value for name, value in quantizer.state_dict().items() if name not in _GRID}
    return {name: value.detach() for name, value in (values | others).items()}


@torch.no_grad()
def set_grid(quantizer: Quantizer, values: Mapping[str, Tensor]) -> None:
    """Gives a quantizer the numbers that `grid_values` returned, and marks it as calibrated.

    Raises:
        QvitError: Numbers that no quantizer has: NaN or infinite, a scale that is not positive, two scales in one place
            of a bank.
    """
    for name, value in values.items():
        limit = value.abs() * _HEADROOM if name.endswith(("scale", "offset")) else value
        if not bool(torch.isfinite(limit).all()):
            raise QvitError(f"its {name} is not finite")
        if name.endswith("scale") and not bool((value >= SMALLEST_SCALE).all()):
            raise QvitError(f"its {name} is not positive")
    for name in ("scale", "offset"):
        if name in values:
            _set_bank(quantizer, name, values)
    state = quantizer.state_dict()
    for name, value in values.items():
        if name in state and name not in _GRID:
            state[name].copy_(value)
    quantizer.calibrated = True
    restored = grid_values(quantizer)
    wrong = [name for name, value in values.items() if not torch.equal(restored[name], value)]
    if wrong:
        raise QvitError(f"its {wrong[0]} cannot be that of its widths")


def _set_bank(quantizer: Quantizer, name: str, values: Mapping[str, Tensor]) -> None:
    """Writes the scale or the offset into the columns of the widths that use it."""
    bank, active = getattr(quantizer, name, None), values[name]
    if not isinstance(bank, Tensor):  # a grid's offset that follows from its scale
        return
    if bank.dim() == len(quantizer.scale_shape):
        bank.copy_(active)
        return
    if bank.shape[-1] == 1:
        bank.copy_(active.unsqueeze(-1))
        return
    places = bank.shape[:-1]
    width = quantizer.integer_bit_width().expand(quantizer.groups)
    bank.copy_(_largest(active, places).unsqueeze(-1).expand_as(bank))
    split = quantizer.spec.token_bit_width
    for column, candidate in enumerate(_candidates(quantizer).tolist()):
        if split is not None and candidate == split.low:
            bank[..., column] = values[f"low_{name}"]
        own = width == candidate
        if bool(own.any()):
            there = _largest(own.to(active.dtype), places) > 0
            value = _largest(torch.where(own, active, -torch.inf), places)
            bank[..., column] = torch.where(there, value, bank[..., column])


def _largest(x: Tensor, shape: torch.Size) -> Tensor:
    """The maximum over the axes along which a tensor of `shape` would be broadcast to `x`."""
    while x.dim() > len(shape):
        x = x.amax(0)
    axes = [axis for axis, size in enumerate(shape) if size == 1 and x.shape[axis] > 1]
    return x.amax(axes, keepdim=True) if axes else x


def _candidates(quantizer: Quantizer) -> Tensor:
    """The width of each column of the banks."""
    return quantizer.get_buffer("candidates")


def by_kind(grids: Mapping[str, Numbers]) -> tuple[Numbers, Numbers, Numbers]:
    """The numbers of all sites' grids as scales by site, offsets by site, and the rest by `SITE.name`."""
    scales = {site: values["scale"] for site, values in grids.items()}
    offsets = {site: values["offset"] for site, values in grids.items() if "offset" in values}
    named = ("scale", "offset")
    extras = {f"{site}.{key}": v for site, values in grids.items() for key, v in values.items() if key not in named}
    return scales, offsets, extras


def cut(numbers: Tensor | None, shapes: Mapping[str, Mapping[str, tuple[int, ...]]]) -> dict[str, Numbers]:
    """The numbers of each site out of the one tensor that holds them all. Raises QvitError."""
    places = [(site, name, shape) for site in sorted(shapes) for name, shape in shapes[site].items()]
    total = sum(math.prod(shape) for _, _, shape in places)
    if numbers is None or numbers.dtype != torch.float32 or tuple(numbers.shape) != (total,):
        raise QvitError(f"it lacks the tensor 'scales' of {total} float32 numbers")
    found: dict[str, Numbers] = {site: {} for site, own in sorted(shapes.items()) if own}
    position = 0
    for site, name, shape in places:
        end = position + math.prod(shape)
        found[site][name] = numbers[position:end].clone().reshape(shape)
        position = end
    return found
