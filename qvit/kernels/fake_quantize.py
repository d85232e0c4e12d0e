"""The fake-quantize operator: one pass forward, one pass backward with the gradients of scale, offset and width.

`torch.ops.qvit.fake_quantize` and `.fake_quantize_backward` work on a *grid*: scale, offset, quant_min and quant_max of
each group of elements. Backward returns the gradient of x, and three sums over the elements of every group, g being the
incoming gradient, c = clamp(u) and g' = g·1[u ≠ c] its clipped part:

    A = Σ g·(q - c)        C = Σ g'·c = quant_max·H + quant_min·L        B = Σ g' = H + L

All other gradients are combinations of them (`parameter_gradients`):

    ∂s: A + C        ∂β: B        ∂b: s·ln2·2^(b-1)·(H - L), or s·ln2·2^b·H unsigned

A width may be learned otherwise (`Meta.gradient`). By differences, which need a sum of their own (`width_slope`):

    ∂b: Σ g·(q(x; b+1) - q(x; b-1)) / 2        and at a limit of the width the difference to its only neighbour

By interpolation x̂ is on two grids at a time (`Mixed`); its sums are those of both, by their shares, and of

    ∂b: Σ g·(q(x; l+1) - q(x; l))

All point beyond the width's limits, too: what counts is the sum over all parts of a batch (`training/optimizer.py`).

`FakeQuantize` is `functional.switchable_fake_quantize`, its reference, made of these two operators. On CPUs they are
compiled loops (`cpu.py`) where these are faster (`trial.py`), on CUDA Triton kernels (`gpu.py`), elsewhere the formulas
below; a model that torch.compile or torch.export traces gets these, to be fused with what is around them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from qvit.functional import SMALLEST_SCALE, integer_range, pick_column, wide
from qvit.kernels import cpu, gpu, trial

_LIBRARY = torch.library.Library("qvit", "DEF")
_GRID = "Tensor scale, Tensor? offset, Tensor quant_min, Tensor quant_max"
_LIBRARY.define(f"fake_quantize(Tensor x, {_GRID}, ScalarType? dtype=None) -> Tensor")
_LIBRARY.define(f"fake_quantize_backward(Tensor grad, Tensor x, {_GRID}) -> (Tensor, Tensor)")


class Grid(NamedTuple):
    """Numbers of each group, all of which broadcast against x."""

    scale: Tensor
    offset: Tensor | None
    quant_min: Tensor
    quant_max: Tensor

    def numbers(self) -> tuple[Tensor | None, ...]:
        """All of them, as kernels take them."""
        return self

    def heads_last(self) -> Grid:
        """The grid for `x.transpose(-3, -2)`."""
        return Grid(*map(_heads_last, self))


class Mixed(NamedTuple):
    """Grids of two neighbouring widths, and the share of the upper one: x̂ = (1 - f)·q(x; l) + f·q(x; l+1)."""

    lower: Grid
    upper: Grid
    share: Tensor

    def numbers(self) -> tuple[Tensor | None, ...]:
        """All nine, as of `Grid`."""
        return (*self.lower, *self.upper, self.share)

    def heads_last(self) -> Mixed:
        """As of `Grid`."""
        return Mixed(self.lower.heads_last(), self.upper.heads_last(), _heads_last(self.share))


def _heads_last(part: Any) -> Any:
    return part if part is None or part.dim() < 2 else part.transpose(-3, -2)


class Meta(NamedTuple):
    """What a quantizer's tensors mean; see `functional.switchable_fake_quantize`."""

    candidates: Tensor
    limits: tuple[int, int] | None
    signed: bool
    elements_per_scale: Tensor | int | None
    #: (quant_min, quant_max) where somebody has them already.
    known_range: tuple[Tensor, Tensor] | None = None
    #: The first of the candidates, which follow one another; None if it is not known without asking the device.
    first: int | None = None
    #: How a learned width gets its gradient, see `TensorSpec.width_gradient`.
    gradient: str = "clipping"
    #: Elements per scale are to be multiplied by quant_max.
    linear: bool = False


class Learned(NamedTuple):
    """The tensors of a quantizer, and what they mean."""

    scales: Tensor
    offsets: Tensor | None
    bit_width: Tensor
    meta: Meta


def fuses(*tensors: Tensor | None) -> bool:
    """Whether layers call the fused functions for these tensors; a model that is traced is left to the compiler."""
    if torch.compiler.is_compiling():
        return False
    given = [tensor for tensor in tensors if tensor is not None]
    return gpu.handles(*given) if given and given[0].is_cuda else cpu.would_handle(*given)


def resolve(scales: Tensor, offsets: Tensor | None, bit_width: Tensor, meta: Meta) -> tuple[Grid | Mixed, Tensor]:
    """The grid of the current widths, and these as integers; by interpolation both grids, and the lower widths."""
    mixed = meta.limits is not None and meta.gradient == "interpolation"
    if meta.first is not None and _at_once(scales):
        about = (meta.first, meta.limits, meta.signed, SMALLEST_SCALE, mixed)
        found: Any = gpu.resolve(scales, offsets, bit_width, *about)
        if found is not None:
            lower = Grid(*found[:4])
            return (Mixed(lower, Grid(*found[5:9]), found[10]) if mixed else lower), found[4]
    if meta.limits is None or not mixed:
        return formula_resolve(scales, offsets, bit_width, meta)
    least, most = meta.limits
    width = wide(bit_width.detach()).clamp(least, most)
    lower = width.floor().clamp_max(max(least, most - 1))
    upper = _fixed(scales, offsets, (lower + 1).clamp_max(most), meta)
    return Mixed(_fixed(scales, offsets, lower, meta), upper, width - lower), lower


def _fixed(scales: Tensor, offsets: Tensor | None, width: Tensor, meta: Meta) -> Grid:
    """The grid of integer widths that are given."""
    grid, _ = resolve(scales, offsets, width, meta._replace(limits=None, known_range=None))
    assert isinstance(grid, Grid)
    return grid


def _at_once(scales: Tensor) -> bool:
    """Whether a kernel makes all numbers of a quantizer."""
    return scales.is_cuda and not torch.compiler.is_compiling() and gpu.handles(scales)


def formula_resolve(scales: Tensor, offsets: Tensor | None, bit_width: Tensor, meta: Meta) -> tuple[Grid, Tensor]:
    """`resolve`, operation by operation."""
    width = wide(bit_width) if meta.limits is None else wide(bit_width).clamp(*meta.limits).round()
    scale = wide(pick_column(scales, width, meta.candidates)).clamp_min(SMALLEST_SCALE)
    offset = None if offsets is None else wide(pick_column(offsets, width, meta.candidates))
    return Grid(scale, offset, *(meta.known_range or integer_range(width, meta.signed))), width


def width_slope(
    grad: Tensor, x: Tensor, width: Tensor, scales: Tensor, offsets: Tensor | None, meta: Meta
) -> Tensor | None:
    """The gradient of a width that is learned by differences, per group; None for others.

    To be taken before `backward_on` writes to `grad`.
    """
    if meta.limits is None or meta.gradient != "difference":
        return None
    least, most = meta.limits
    above, below = (width + 1).clamp_max(most), (width - 1).clamp_min(least)
    sides = [_fixed(scales, offsets, side, meta) for side in (above, below)]
    return difference_on(grad, x, *sides) / (above - below).clamp_min(1)


def parameter_gradients(
    sums: Tensor,
    grid: Grid | Mixed,
    width: Tensor,
    scales: Tensor,
    offsets: Tensor | None,
    bit_width: Tensor,
    meta: Meta,
    slope: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The gradients of the banks of scales and offsets and of the width, from the sums of `backward_on`.

    The other arguments are those of `resolve` and its results, and `slope` what `width_slope` returned.
    """
    mixed = isinstance(grid, Mixed)
    limits = None if slope is not None else meta.limits
    if meta.first is not None and _at_once(scales):
        about = (meta.first, limits, meta.signed, meta.elements_per_scale, meta.linear, mixed)
        scale = grid.lower.scale if isinstance(grid, Mixed) else grid.scale
        found = gpu.parameter_gradients(sums, scale, scales, offsets, bit_width, *about)
        if found is not None:
            return found if slope is None else (*found[:2], slope.sum_to_size(bit_width.shape))
    if isinstance(grid, Mixed):
        assert meta.limits is not None
        pairs = ((sums[:3], grid.lower, width), (sums[3:6], grid.upper, (width + 1).clamp_max(meta.limits[1])))
        fixed = meta._replace(limits=None)
        lower, upper = (formula_gradients(*own, scales, offsets, bit_width, fixed) for own in pairs)
        of_offsets = None if lower[1] is None or upper[1] is None else lower[1] + upper[1]
        return lower[0] + upper[0], of_offsets, sums[6].sum_to_size(bit_width.shape)
    of_parts = formula_gradients(sums, grid, width, scales, offsets, bit_width, meta._replace(limits=limits))
    return of_parts if slope is None else (*of_parts[:2], slope.sum_to_size(bit_width.shape))


def formula_gradients(
    sums: Tensor, grid: Grid, width: Tensor, scales: Tensor, offsets: Tensor | None, bit_width: Tensor, meta: Meta
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """`parameter_gradients`, operation by operation."""
    rounding, clipped, total = sums
    quant_min, quant_max = grid.quant_min, grid.quant_max
    grad_scale = rounding + clipped
    if meta.elements_per_scale is not None:
        per_scale = meta.elements_per_scale * quant_max
        grad_scale = grad_scale * torch.rsqrt(per_scale * quant_max if meta.linear else per_scale)
    grad_scales = _to_bank(grad_scale, scales, width, meta.candidates)
    grad_offsets = None if offsets is None else _to_bank(total, offsets, width, meta.candidates)
    grad_width = None
    if meta.limits is not None:
        above = (clipped - quant_min * total) / (quant_max - quant_min)
        outward = 2 * above - total if meta.signed else above
        grad_width = (outward * (grid.scale * (quant_max + 1) * math.log(2.0))).sum_to_size(bit_width.shape)
    return grad_scales, grad_offsets, grad_width


def quantize_on(
    x: Tensor, grid: Grid | Mixed, dtype: torch.dtype | None = None, *, scratch: str | None = None
) -> Tensor:
    """x̂ on a grid, in `dtype` (of x by default). Not differentiable.

    `scratch` names memory that is used again on the CPU (`cpu.scratch`): the result is used up before the next call.
    """
    dtype = dtype or x.dtype
    if torch.compiler.is_compiling():
        if isinstance(grid, Grid):
            return _forward(x, *grid, dtype=dtype)
    elif _directly(x) and (found := gpu.forward(x, grid.numbers(), dtype)) is not None:
        return found
    elif (scratch is not None or isinstance(grid, Mixed)) and _compiled("forward", x, grid=grid):
        out = None if scratch is None else cpu.scratch(scratch, x.shape, dtype, x)
        return cpu.forward(x, grid.numbers(), dtype, out=out)
    if isinstance(grid, Grid):
        return torch.ops.qvit.fake_quantize(x, *grid, dtype)
    return _forward_between(x, grid, dtype)


def _directly(*tensors: Tensor) -> bool:
    """Whether kernels are called without PyTorch's dispatcher, which takes longer than they do."""
    return tensors[0].is_cuda and all(type(x) in (Tensor, nn.Parameter) for x in tensors) and gpu.handles(*tensors)


def codes_on(x: Tensor, grid: Grid, zero: int = 0) -> Tensor:
    """q - zero in int8. Not differentiable."""
    if not torch.compiler.is_compiling() and _compiled("codes", x):
        return cpu.forward(x, grid, torch.int8, zero)
    return _codes(x, grid, zero)


def backward_on(grad: Tensor, x: Tensor, grid: Grid | Mixed, out: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The gradient of x, and A, C, B as (3, *groups) with as many axes as x.

    On two grids the sums are seven: those of the lower and of the upper one, by their shares, and the width's gradient.
    The gradient is written to `out` if that is given; it may be `grad` itself.
    """
    if torch.compiler.is_compiling():
        if isinstance(grid, Grid):
            return _backward(grad, x, *grid)
    elif _directly(grad, x) and (found := gpu.backward(grad, x, grid.numbers(), out)) is not None:
        return found
    elif (out is not None or isinstance(grid, Mixed)) and _compiled("backward", grad, x, grid=grid):
        return cpu.backward(grad, x, grid.numbers(), out)
    if isinstance(grid, Grid):
        grad_x, sums = torch.ops.qvit.fake_quantize_backward(grad, x, *grid)
        return (grad_x if out is None else out.copy_(grad_x)), sums
    return _backward_between(grad, x, grid, out)


def difference_on(grad: Tensor, x: Tensor, above: Grid, below: Grid) -> Tensor:
    """Σ grad·(x̂ on one grid - x̂ on another) over the elements of each group, (*groups) with as many axes as x."""
    if not torch.compiler.is_compiling():
        if _directly(grad, x) and (found := gpu.difference(grad, x, above, below)) is not None:
            return found
        if _compiled("difference", grad, x):
            return cpu.difference(grad, x, above, below)
    return _difference(grad, x, above, below)


def packed(grid: Grid | Mixed, width: Tensor) -> tuple[Tensor | None, ...]:
    """What `resolve` returned as tensors to be saved for backward."""
    return (*grid.numbers(), width)


def unpacked(parts: Sequence[Any]) -> tuple[Grid | Mixed, Tensor]:
    """What `packed` was given."""
    grid = Grid(*parts[:4])
    return (grid if len(parts) == 5 else Mixed(grid, Grid(*parts[4:8]), parts[8])), parts[-1]


class FakeQuantize(torch.autograd.Function):
    """`functional.switchable_fake_quantize`; the same arguments, all positional, and more of `Meta`."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        scales: Tensor,
        offsets: Tensor | None,
        bit_width: Tensor,
        candidates: Tensor,
        limits: tuple[int, int] | None,
        signed: bool,
        elements_per_scale: Tensor | int | None,
        first: int | None = None,
        gradient: str = "clipping",
        linear: bool = False,
    ) -> Tensor:
        meta = Meta(candidates, limits, signed, elements_per_scale, None, first, gradient, linear)
        grid, width = resolve(scales, offsets, bit_width, meta)
        shares = elements_per_scale if isinstance(elements_per_scale, Tensor) else None
        ctx.save_for_backward(x, scales, offsets, bit_width, candidates, shares, *packed(grid, width))
        ctx.about = (limits, signed, elements_per_scale if shares is None else None, None, first, gradient, linear)
        return quantize_on(x, grid)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, scales, offsets, bit_width, candidates, shares, *parts = ctx.saved_tensors
        grid, width = unpacked(parts)
        meta = Meta(candidates, *ctx.about)
        meta = meta if shares is None else meta._replace(elements_per_scale=shares)
        slope = width_slope(grads[0], x, width, scales, offsets, meta)
        grad_x, sums = backward_on(grads[0], x, grid)
        of_grid = parameter_gradients(sums, grid, width, scales, offsets, bit_width, meta, slope)
        return grad_x, *of_grid, *(None,) * 7


def _forward(
    x: Tensor,
    scale: Tensor,
    offset: Tensor | None,
    quant_min: Tensor,
    quant_max: Tensor,
    dtype: torch.dtype | None = None,
) -> Tensor:
    u = _in_steps(x, scale, offset)
    values = torch.minimum(torch.maximum(u, quant_min), quant_max).round_().mul_(scale)
    return (values if offset is None else values.add_(offset)).to(dtype or x.dtype)


def _backward(
    grad: Tensor, x: Tensor, scale: Tensor, offset: Tensor | None, quant_min: Tensor, quant_max: Tensor
) -> tuple[Tensor, Tensor]:
    grad = wide(grad)
    u = _in_steps(x, scale, offset)
    clamped = torch.minimum(torch.maximum(u, quant_min), quant_max)
    # On CPU, comparisons that yield booleans and clamps between tensors cost several times an addition: here are none.
    cut = u.ne_(clamped).mul_(grad)
    shape = _shape_of(grad, scale, quant_max)
    parts = (clamped.round().sub_(clamped).mul_(grad), cut * clamped, cut)
    sums = torch.stack([part.sum_to_size(shape) for part in parts])
    return (grad - cut).to(x.dtype), sums


def _codes(x: Tensor, grid: Grid, zero: int) -> Tensor:
    u = _in_steps(x, grid.scale, grid.offset)
    return (torch.minimum(torch.maximum(u, grid.quant_min), grid.quant_max).round_() - zero).to(torch.int8)


def _difference(grad: Tensor, x: Tensor, above: Grid, below: Grid) -> Tensor:
    moved = wide(grad) * (_forward(wide(x), *above) - _forward(wide(x), *below))
    return moved.sum_to_size(_shape_of(moved, above.scale, above.quant_max))


def _forward_between(x: Tensor, grid: Mixed, dtype: torch.dtype) -> Tensor:
    within = torch.promote_types(dtype, torch.float32)  # the mixture is rounded, not its parts
    values, upper = (quantize_on(x, own, within) for own in (grid.lower, grid.upper))
    return values.lerp_(upper, grid.share.to(within)).to(dtype)


def _backward_between(grad: Tensor, x: Tensor, grid: Mixed, out: Tensor | None = None) -> tuple[Tensor, Tensor]:
    slope = difference_on(grad, x, grid.upper, grid.lower)
    of_upper, above = backward_on(grad, x, grid.upper)
    grad_x, below = backward_on(grad, x, grid.lower, out)
    mixed = wide(grad_x)
    mixed.lerp_(wide(of_upper), grid.share.to(mixed.dtype))
    grad_x = mixed if mixed.dtype == grad_x.dtype else grad_x.copy_(mixed)
    return grad_x, torch.cat([below * (1 - grid.share), above * grid.share, slope[None]])


def _compiled(operator: str, *tensors: Tensor, grid: Grid | Mixed | None = None) -> bool:
    """Whether an operator runs in its compiled form on these very tensors; see `trial.py`."""
    if not cpu.handles(*tensors):
        return False
    name = f"{operator} between grids" if isinstance(grid, Mixed) else operator
    return trial.is_compiled(name, _forms, cpu.library_file)


def _forms(operator: str) -> tuple[trial.Form, trial.Form]:
    """The compiled and the plain form of an operator, for a trial: on the queries of four images of DeiT-T."""
    x = torch.linspace(-1.0, 1.0, 4 * 3 * 197 * 64).view(4, 3, 197, 64)
    scale = torch.full((3, 1, 1), 0.1)
    grid = Grid(scale, scale / 2, -80 * scale, 70 * scale)
    upper = grid._replace(scale=scale / 2)
    mixed = Mixed(grid, upper, scale)
    forms: dict[str, tuple[trial.Form, trial.Form]] = {
        "forward": (lambda: cpu.forward(x, grid, x.dtype), lambda: _forward(x, *grid)),
        "backward": (lambda: cpu.backward(x, x, grid), lambda: _backward(x, x, *grid)),
        "codes": (lambda: cpu.forward(x, grid, torch.int8), lambda: _codes(x, grid, 0)),
        "difference": (lambda: cpu.difference(x, x, upper, grid), lambda: _difference(x, x, upper, grid)),
        "forward between grids": (
            lambda: cpu.forward(x, mixed.numbers(), x.dtype),
            lambda: _forward_between(x, mixed, x.dtype),
        ),
        "backward between grids": (
            lambda: cpu.backward(x, x, mixed.numbers()),
            lambda: _backward_between(x, x, mixed),
        ),
    }
    return forms[operator]


def _forward_on_cpu(x: Tensor, *grid: Any) -> Tensor:
    *parts, dtype = grid if len(grid) == 5 else (*grid, None)
    dtype = dtype or x.dtype
    if dtype in (torch.float32, torch.bfloat16) and _compiled("forward", x):
        return cpu.forward(x, tuple(parts), dtype)
    return _forward(x, *parts, dtype=dtype)


def _backward_on_cpu(grad: Tensor, x: Tensor, *grid: Any) -> tuple[Tensor, Tensor]:
    if _compiled("backward", grad, x):
        return cpu.backward(grad, x, grid)
    return _backward(grad, x, *grid)


def _forward_on_cuda(x: Tensor, *grid: Any) -> Tensor:
    *parts, dtype = grid if len(grid) == 5 else (*grid, None)
    found = gpu.forward(x, tuple(parts), dtype or x.dtype) if gpu.handles(x) else None
    return _forward(x, *parts, dtype=dtype) if found is None else found


def _backward_on_cuda(grad: Tensor, x: Tensor, *grid: Any) -> tuple[Tensor, Tensor]:
    found = gpu.backward(grad, x, grid) if gpu.handles(grad, x) else None
    return _backward(grad, x, *grid) if found is None else found


def _fake_forward(x: Tensor, *grid: Any) -> Tensor:
    dtype = grid[4] if len(grid) == 5 else None
    return torch.empty(x.shape, dtype=dtype or x.dtype, device=x.device)


def _fake_backward(grad: Tensor, x: Tensor, *grid: Any) -> tuple[Tensor, Tensor]:
    sums = torch.empty(3, *_shape_of(x, grid[0], grid[3]), dtype=wide(x).dtype, device=x.device)
    return torch.empty(x.shape, dtype=x.dtype, device=x.device), sums


for _name, _plain, _on_cpu, _on_cuda, _fake in (
    ("fake_quantize", _forward, _forward_on_cpu, _forward_on_cuda, _fake_forward),
    ("fake_quantize_backward", _backward, _backward_on_cpu, _backward_on_cuda, _fake_backward),
):
    _LIBRARY.impl(_name, _plain, "CompositeExplicitAutograd")
    _LIBRARY.impl(_name, _on_cpu, "CPU")
    _LIBRARY.impl(_name, _on_cuda, "CUDA")
    torch.library.register_fake(f"qvit::{_name}", _fake, lib=_LIBRARY)


def _in_steps(x: Tensor, scale: Tensor, offset: Tensor | None) -> Tensor:
    """(x - β)/s, a new tensor of at least float32."""
    return wide(x) / scale if offset is None else (wide(x) - offset).div_(scale)


def _to_bank(grad: Tensor, bank: Tensor, width: Tensor, candidates: Tensor) -> Tensor:
    """The gradient of a bank from that of the picked entries: zero in every other column."""
    column = grad.unsqueeze(-1)
    if bank.shape[-1] > 1:
        column = column * (width.unsqueeze(-1) == candidates)
    return column.sum_to_size(bank.shape)


def _shape_of(full: Tensor, *parts: Tensor) -> tuple[int, ...]:
    """The broadcast shape of `parts`, with as many dimensions as `full`.

    It is what a sum over shared elements is reduced to.
    """
    shape = torch.broadcast_shapes(*(part.shape for part in parts))
    return (1,) * (full.dim() - len(shape)) + tuple(shape)
