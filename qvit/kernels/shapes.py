"""How kernels find their way: any tensor as four axes, and the group of each element on them.

Neighbouring axes that lie together in every tensor become one: most tensors need two, a view of q, k or v needs four.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

DIMS = 4
Numbers = tuple[int, ...]


class Axes(NamedTuple):
    """Four sizes, the outermost first, with the strides of groups, of the output and of every input."""

    size: Numbers
    group: Numbers
    out: Numbers
    strides: tuple[Numbers, ...]


@functools.lru_cache(maxsize=4096)
def groups_of(*shapes: Numbers) -> Numbers:
    """The shape of what has numbers of its own, from the shapes of these numbers."""
    return tuple(torch.broadcast_shapes(*shapes))


@functools.lru_cache(maxsize=4096)
def axes_of(shape: Numbers, strides: tuple[Numbers, ...], groups: Numbers, out: Numbers | None = None) -> Axes | None:
    """The axes of tensors of one shape; None where four do not do, or elements of the last one lie apart.

    Args:
        shape: Of all of them.
        strides: Of each.
        groups: Broadcasts to the shape.
        out: Strides of the output; None for a contiguous one.
    """
    group_strides, step = [], 1
    for count in (*reversed(groups), *(1,) * (len(shape) - len(groups))):
        group_strides.append(step if count > 1 else 0)
        step *= count
    out_strides, step = [], 1
    for size in reversed(shape):
        out_strides.append(step)
        step *= size
    table = [tuple(reversed(group_strides)), out or tuple(reversed(out_strides)), *strides]
    axes: list[list[int]] = []  # size, group, out, strides; the innermost first
    for axis in reversed(range(len(shape))):
        own = [shape[axis], *(row[axis] for row in table)]
        if own[0] == 1:
            continue
        if axes and all(own[i] == axes[-1][i] * axes[-1][0] for i in range(1, len(own))):
            axes[-1][0] *= own[0]
        else:
            axes.append(own)
    if not axes:
        axes.append([1, 0, *(1 for _ in table[1:])])
    if len(axes) > DIMS or any(stride != 1 for stride in axes[0][2:]):
        return None
    axes += [[1, *(0 for _ in table)]] * (DIMS - len(axes))
    size, group, out, *rest = (tuple(column) for column in zip(*reversed(axes), strict=True))
    return Axes(size, group, out, tuple(rest))


def numbers_of_groups(grid: tuple[Tensor | None, ...]) -> tuple[list[Tensor | None], Numbers]:
    """Every part of a grid with one number per group, flat in memory, and the shape of the groups."""
    groups = groups_of(*(tuple(part.shape) for part in grid if part is not None))
    return [None if part is None else _per_group(part.detach(), groups) for part in grid], groups


def _per_group(part: Tensor, groups: Numbers) -> Tensor:
    ready = part.dtype == torch.float32 and part.shape == groups and part.is_contiguous()
    return part if ready else part.float().expand(groups).contiguous()
