"""Streaming observation of a tensor, and the scale of least squared error for any width from what was seen.

An observer keeps one histogram per scale: 4096 bins over [-R, R], R a power of two that doubles when a larger value
arrives. Doubling merges bins two by two; zero parts two bins, and a bin holds its end away from zero, so that it makes
no difference how the values are cut into batches. Memory is 16 KiB per scale: activations are never kept.

For every width separately, `fit` minimises  Σ_i count_i · (x_i - s·q_i - β)²  over the bin centres x_i: the best of 32
clipping limits between the largest value and 1/32 of it (with β: of either end, and of both), then of steps of 1/64 and
1/512 around it, then least squares for (s, β) and re-rounding, in turn (for β = 0: s = <x, q> / <q, q>, the iteration
that the Q-ViT code uses from one starting point). The error is within 3 % of the least possible. A bin is 1/16 of an
8-bit step on a signed grid whose range is used in full, 1/8 on an unsigned one. Source of the criterion: Q-ViT section
4.1, "a typical MSE-based approach".
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from qvit.errors import QvitError
from qvit.functional import SMALLEST_SCALE, integer_range

BINS = 4096
_SEARCH_STEPS = 32
_REFINEMENTS = 12
# Values of a search that are measured in one operation: 1 MiB.
_AT_A_TIME = 2**18


class HistogramObserver:
    """Histograms of everything observed, one per scale.

    Args:
        scale_shape: Shape of the scales, broadcasting against the observed tensors; `()` for one scale.
    """

    def __init__(self, scale_shape: tuple[int, ...]) -> None:
        self.scale_shape = scale_shape
        self.groups = math.prod(scale_shape)
        self.counts: Tensor | None = None
        self.limit = torch.zeros(0)
        self.smallest = torch.zeros(0)
        self.largest = torch.zeros(0)

    @torch.no_grad()
    def observe(self, x: Tensor) -> None:
        """Adds a tensor that the scales broadcast against. Raises QvitError for NaN or infinite values."""
        values = self._grouped(x.detach().float())
        if self.counts is None:
            self.counts = values.new_zeros(self.groups, BINS)
            self.limit = values.new_zeros(self.groups)
            self.smallest = values.new_full((self.groups,), math.inf)
            self.largest = values.new_full((self.groups,), -math.inf)
        largest = values.abs().amax(dim=1)
        if not bool(torch.isfinite(largest).all()):
            raise QvitError(
                "NaN or infinite values while calibrating: the float model is broken before any quantization"
            )
        self.smallest = torch.minimum(self.smallest, values.amin(dim=1))
        self.largest = torch.maximum(self.largest, values.amax(dim=1))
        mantissa, exponent = torch.frexp(largest)
        power = torch.ldexp(torch.ones_like(largest), exponent - (mantissa == 0.5).to(exponent.dtype))
        self._widen(torch.where(largest > 0, power.clamp_min(1e-30), 0.0))
        place = values / self.limit.clamp_min(1e-30).unsqueeze(1) * (BINS / 2)
        index = torch.where(place > 0, torch.ceil(place) - 1, torch.floor(place)).to(torch.int64)
        index = (index + BINS // 2).clamp_(0, BINS - 1)
        index += torch.arange(self.groups, device=index.device).unsqueeze(1) * BINS
        self.counts += torch.bincount(index.flatten(), minlength=self.groups * BINS).view(self.groups, BINS)

    def histogram(self) -> tuple[Tensor, Tensor]:
        """Bin centres and the share of each bin, both (groups, bins)."""
        self._require_values()
        x, weight = self._points(slice(None))
        return x.squeeze(1), weight.squeeze(1)

    def fit(self, widths: tuple[int, ...], *, signed: bool, with_offset: bool) -> tuple[Tensor, Tensor]:
        """Scales and offsets of least squared error.

        Args:
            widths: Candidate widths.
            signed: Grid, see `functional.integer_range`.
            with_offset: Whether β is free; else it is 0.

        Returns:
            Two tensors `scale_shape + (len(widths),)`: scales (positive) and offsets (float units).
        """
        self._require_values()
        table = torch.tensor(widths, device=self.smallest.device, dtype=torch.float32).view(1, -1, 1)
        chunk = max(1, 2**21 // (self._points_per_group * len(widths)))
        parts = [
            self._fit_groups(slice(i, i + chunk), table, signed, with_offset) for i in range(0, self.groups, chunk)
        ]
        scales, offsets = (torch.cat(part).reshape(*self.scale_shape, len(widths)) for part in zip(*parts, strict=True))
        return scales, offsets

    _points_per_group = BINS

    def _points(self, rows: slice) -> tuple[Tensor, Tensor]:
        """Bin centres and shares of some histograms, both (groups, 1, bins)."""
        assert self.counts is not None
        counts, limit = self.counts[rows].unsqueeze(1), self.limit[rows].view(-1, 1, 1)
        places = (torch.arange(BINS, device=counts.device) + 0.5) * (2.0 / BINS) - 1.0
        return places * limit, counts / counts.sum(-1, keepdim=True).clamp_min(1)

    def _require_values(self) -> None:
        if self.counts is None:
            raise QvitError("nothing was observed: no calibration batch reached this tensor")

    def _fit_groups(self, rows: slice, widths: Tensor, signed: bool, with_offset: bool) -> tuple[Tensor, Tensor]:
        """Scales and offsets `(groups, widths)` of some histograms; see the module's text."""
        x, weight = self._points(rows)
        occupied = torch.where(weight > 0, x.abs() if signed else x, -math.inf)
        top = occupied.amax(-1, keepdim=True).clamp_min(SMALLEST_SCALE).expand(-1, widths.shape[1], -1)
        bottom = self.smallest[rows].view(-1, 1, 1).expand_as(top) if with_offset else torch.zeros_like(top)
        fit = _Fit(x, weight, *integer_range(widths, signed))
        mean = fit.mean(x)
        shares = [step / _SEARCH_STEPS for step in range(1, _SEARCH_STEPS)]
        best = fit.measured(bottom, top)
        candidates = [(bottom, top - (top - bottom) * share) for share in shares]
        if with_offset:
            candidates += [(bottom + (mean - bottom) * share, top - (top - mean) * share) for share in shares]
        best = fit.search(best, candidates)
        if with_offset:
            bottom, top, _ = best
            best = fit.search(best, [(bottom + (top - bottom) * share, top) for share in shares])
        for part in (64, 512):
            for moved in (1, 0, 1, 0) if with_offset else (1,):
                bottom, top, _ = best
                steps = [(top - bottom) * (count / part) for count in (-4, -3, -2, -1, 1, 2, 3, 4)]
                best = fit.search(best, [(bottom, top + step) if moved else (bottom + step, top) for step in steps])
        bottom, top, error = best
        scale, offset = fit.refined(fit.scale(bottom, top), bottom, error, with_offset)
        return scale.squeeze(-1), offset.squeeze(-1)

    def _grouped(self, x: Tensor) -> Tensor:
        """`x` as `(groups, elements)`."""
        shape = (1,) * (x.dim() - len(self.scale_shape)) + self.scale_shape
        own = [axis for axis, size in enumerate(shape) if size > 1]
        return x.permute(*own, *(axis for axis in range(x.dim()) if axis not in own)).reshape(self.groups, -1)

    def _widen(self, needed: Tensor) -> None:
        """Doubles the range of the histograms that `needed` (powers of two) exceeds, merging bins two by two."""
        assert self.counts is not None
        counts, limit = self.counts, torch.where(self.limit == 0, needed, self.limit)
        while bool((needed > limit).any()):
            grow = needed > limit
            merged = counts.view(self.groups, BINS // 2, 2).sum(-1)
            padded = torch.nn.functional.pad(merged, (BINS // 4, BINS // 4))
            counts = torch.where(grow.unsqueeze(1), padded, counts)
            limit = torch.where(grow, limit * 2, limit)
        self.counts, self.limit = counts, limit


class ValueObserver(HistogramObserver):
    """The values themselves in place of histograms, for tensors with fewer values per scale than a histogram has bins.

    Seen once: a weight with a scale per channel, whose fit takes a tenth of the time.
    """

    @torch.no_grad()
    def observe(self, x: Tensor) -> None:
        if self.counts is not None:
            raise QvitError("a ValueObserver keeps one tensor; use a HistogramObserver for batches")
        self.counts = self._grouped(x.detach().float())
        if not bool(torch.isfinite(self.counts).all()):
            raise QvitError("NaN or infinite values in a weight: the float model is broken before any quantization")
        self.smallest, self.largest = self.counts.aminmax(dim=1)
        self._points_per_group = self.counts.shape[1]

    def _points(self, rows: slice) -> tuple[Tensor, Tensor]:
        assert self.counts is not None
        values = self.counts[rows].unsqueeze(1)
        return values, torch.full_like(values, 1.0 / values.shape[-1])


class _Fit:
    """Squared error of intervals [bottom, top] over histograms, and the search for its least value.

    Args:
        x: Bin centres, (groups, 1, bins).
        weight: Share of every bin, same shape.
        quant_min, quant_max: Grid of every width, (1, widths, 1).
    """

    def __init__(self, x: Tensor, weight: Tensor, quant_min: Tensor, quant_max: Tensor) -> None:
        self.x, self.weight, self.quant_min, self.quant_max = x, weight, quant_min, quant_max

    def mean(self, values: Tensor) -> Tensor:
        return (self.weight * values).sum(-1, keepdim=True)

    def scale(self, bottom: Tensor, top: Tensor) -> Tensor:
        return ((top - bottom) / self.quant_max).clamp_min(SMALLEST_SCALE)

    def integers(self, scale: Tensor, offset: Tensor) -> Tensor:
        return (self.x - offset).div_(scale).clamp_(self.quant_min, self.quant_max).round_()

    def error(self, integers: Tensor, scale: Tensor, offset: Tensor) -> Tensor:
        error = integers * scale
        return torch.sub(self.x, error, out=error).sub_(offset).square_().mul_(self.weight).sum(-1, keepdim=True)

    def measured(self, bottom: Tensor, top: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        scale = self.scale(bottom, top)
        return bottom, top, self.error(self.integers(scale, bottom), scale, bottom)

    def search(
        self, best: tuple[Tensor, Tensor, Tensor], candidates: list[tuple[Tensor, Tensor]]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The best of `best` and `candidates`, for every width on its own; of equals the first.

        As many candidates at a time as fit a processor's cache, since each is a handful of operations on one histogram.
        """
        room = max(1, _AT_A_TIME // (best[2].numel() * self.x.shape[-1]))
        for start in range(0, len(candidates), room):
            bottoms, tops = (torch.stack(ends) for ends in zip(*candidates[start : start + room], strict=True))
            found = self.measured(bottoms, tops)
            first = found[2].nan_to_num(nan=math.inf, posinf=math.inf).argmin(dim=0, keepdim=True)
            candidate = [part.gather(0, first).squeeze(0) for part in found]
            better = candidate[2] < best[2]
            best = tuple(torch.where(better, new, old) for new, old in zip(candidate, best, strict=True))  # type: ignore[assignment]
        return best

    def refined(self, scale: Tensor, offset: Tensor, error: Tensor, with_offset: bool) -> tuple[Tensor, Tensor]:
        """Least squares for the scale (and the offset) at fixed integers, and re-rounding, in turn."""
        best_scale, best_offset = scale, offset
        mean_x = self.mean(self.x) if with_offset else 0.0
        q = self.integers(scale, offset)
        for _ in range(_REFINEMENTS):
            mean_q = self.mean(q) if with_offset else 0.0
            denominator = self.mean((q - mean_q).square_())
            updated = self.mean((self.x - mean_x) * (q - mean_q)) / denominator.clamp_min(1e-30)
            before = scale, offset
            scale = torch.where((denominator > 0) & (updated > SMALLEST_SCALE), updated, scale)
            offset = mean_x - scale * mean_q if with_offset else offset
            q = self.integers(scale, offset)
            candidate = self.error(q, scale, offset)
            better = candidate < error
            best_scale, best_offset = torch.where(better, scale, best_scale), torch.where(better, offset, best_offset)
            error = torch.minimum(candidate, error)
            if torch.equal(scale, before[0]) and torch.equal(offset, before[1]):
                break  # and what follows would be the same again
        return best_scale, best_offset
