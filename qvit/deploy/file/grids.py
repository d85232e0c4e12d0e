"""What a packed file keeps of a quantizer: the numbers of its grid, and how they get back into its banks.

A quantizer in training has a bank with one scale (and offset) per candidate width. A packed one has a single width, or
one per head, so of the bank only what that width picks is kept:

    scale        what `grid()` returns; `(groups)` where scales are switchable, else `scale_shape`
    offset       the same, where the grid has one (LSQ+ in float units; statsq: scale/2)
    low_scale    the scale (and `low_offset` the offset) of the lower width, where tokens form groups
    high_scale   the same of the width between, where they form three
    others       further parameters of the quantizer: `gain` and `shift` of `irm`

How they get back into a bank is the quantizer's (`Quantizer.restore`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from qvit.deploy.file.documents import LARGEST
from qvit.errors import QvitError
from qvit.functional import SMALLEST_SCALE
from qvit.quantizers import Quantizer

Numbers = dict[str, Tensor]
_GRID = ("scale", "offset", "bit_width")


@torch.no_grad()
def grid_values(quantizer: Quantizer) -> dict[str, Tensor]:
    """The numbers of a quantizer's grid by name, detached, on its own device."""
    scale, offset = quantizer.grid()
    values = {"scale": scale} if offset is None else {"scale": scale, "offset": offset}
    split = quantizer.spec.token_bit_width
    for group, width in () if split is None else (("low", split.low), ("high", split.high)):
        if width is not None:
            own = zip(
                (f"{group}_scale", f"{group}_offset"), quantizer.grid(scale.new_tensor(float(width))), strict=True
            )
            values |= {name: value for name, value in own if value is not None}
    others = {name: value for name, value in quantizer.state_dict().items() if name not in _GRID}
    return {name: value.detach() for name, value in (values | others).items()}


@torch.no_grad()
def set_grid(quantizer: Quantizer, values: Mapping[str, Tensor]) -> None:
    """Gives a quantizer the numbers that `grid_values` returned, and marks it as calibrated.

    Raises:
        QvitError: Numbers that no quantizer has: NaN, infinite or huge, a scale that is not positive, two scales in one
            place of a bank.
    """
    for name, value in values.items():
        if not bool((value.abs() <= LARGEST).all()):
            raise QvitError(f"its {name} is not finite, or beyond {LARGEST:,.0f}")
        if name.endswith("scale") and not bool((value >= SMALLEST_SCALE).all()):
            raise QvitError(f"its {name} is not positive")
    quantizer.restore(values)
    state = quantizer.state_dict()
    for name, value in values.items():
        if name in state and name not in _GRID:
            state[name].copy_(value)
    quantizer.calibrated = True
    restored = grid_values(quantizer)
    wrong = [name for name, value in values.items() if not torch.equal(restored[name], value)]
    if wrong:
        raise QvitError(f"its {wrong[0]} cannot be that of its widths")


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
