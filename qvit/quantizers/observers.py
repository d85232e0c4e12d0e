"""Streaming observation of a tensor, and the scale of least squared error for any width from what was seen.

An observer keeps one histogram per scale: 2048 bins over [-R, R], R a power of two that doubles when a larger value
arrives. Doubling merges bins two by two, so the counts stay exact however many batches pass, and memory is 8 KiB per
scale: activations are never kept.

For every width separately, `fit` minimises  Σ_i count_i · (x_i - s·q_i - β)²  over the bin centres x_i: the best of 32
clipping limits between the largest value and 1/100 of it, then least squares for (s, β) and re-rounding, in turn (for β
= 0: s = <x, q> / <q, q>, the iteration that the Q-ViT code uses from one starting point). A bin is 1/16 of an 8-bit
step when the range is used in full. Source of the criterion: Q-ViT section 4.1, "a typical MSE-based approach".
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from qvit.errors import QvitError
from qvit.functional import SMALLEST_SCALE, integer_range

BINS = 2048
_SEARCH_STEPS = 64
_SHRINK = 0.93
_LOWER_ENDS = (1.0, 0.75, 0.5, 0.3, 0.15, 0.05)
_REFINEMENTS = 12


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

    @torch.no_grad()
    def observe(self, x: Tensor) -> None:
        """Adds a tensor that the scales broadcast against. Raises QvitError for NaN or infinite values."""
        values = self._grouped(x.detach().float())
        if self.counts is None:
            self.counts = values.new_zeros(self.groups, BINS)
            self.limit = values.new_zeros(self.groups)
            self.smallest = values.new_full((self.groups,), math.inf)
        largest = values.abs().amax(dim=1)
        if not bool(torch.isfinite(largest).all()):
            raise QvitError(
                "NaN or infinite values while calibrating: the float model is broken before any quantization"
            )
        self.smallest = torch.minimum(self.smallest, values.amin(dim=1))
        self._widen(torch.where(largest > 0, torch.exp2(torch.floor(torch.log2(largest.clamp_min(1e-30))) + 1), 0.0))
        limit = self.limit.clamp_min(1e-30).unsqueeze(1)
        index = (torch.floor(values / limit * (BINS / 2)).to(torch.int64) + BINS // 2).clamp_(0, BINS - 1)
        index += torch.arange(self.groups, device=index.device).unsqueeze(1) * BINS
        self.counts += torch.bincount(index.flatten(), minlength=self.groups * BINS).view(self.groups, BINS)

    def fit(self, widths: tuple[int, ...], *, signed: bool, with_offset: bool) -> tuple[Tensor, Tensor]:
        """Scales and offsets of least squared error.

        Args:
            widths: Candidate widths.
            signed: Grid, see `functional.integer_range`.
            with_offset: Whether β is free; else it is 0.

        Returns:
            Two tensors `scale_shape + (len(widths),)`: scales (positive) and offsets (float units).
        """
        if self.counts is None:
            raise QvitError("nothing was observed: no calibration batch reached this tensor")
        table = torch.tensor(widths, device=self.counts.device, dtype=torch.float32).view(1, -1, 1)
        chunk = max(1, 2**21 // (BINS * len(widths)))
        parts = [
            self._fit_groups(slice(i, i + chunk), table, signed, with_offset) for i in range(0, self.groups, chunk)
        ]
        scales, offsets = (torch.cat(part).reshape(*self.scale_shape, len(widths)) for part in zip(*parts, strict=True))
        return scales, offsets

    def _fit_groups(self, rows: slice, widths: Tensor, signed: bool, with_offset: bool) -> tuple[Tensor, Tensor]:
        """Scales and offsets `(groups, widths)` of some histograms; see the module's text."""
        assert self.counts is not None
        counts, limit = self.counts[rows].unsqueeze(1), self.limit[rows].view(-1, 1, 1)
        centres = (torch.arange(BINS, device=counts.device) + 0.5) * (2.0 / BINS) - 1.0
        x = centres * limit
        weight = counts / counts.sum(-1, keepdim=True).clamp_min(1)
        quant_min, quant_max = integer_range(widths, signed)
        occupied = counts > 0
        top = (
            torch.where(occupied, x if not signed else x.abs(), -math.inf)
            .amax(-1, keepdim=True)
            .clamp_min(SMALLEST_SCALE)
        )
        offset = self.smallest[rows].view(-1, 1, 1) if with_offset else torch.zeros_like(limit)
        offset = offset.expand(-1, widths.shape[1], -1)

        def round_to_grid(scale: Tensor, offset: Tensor) -> Tensor:
            return torch.round(torch.clamp((x - offset) / scale, quant_min, quant_max))

        def error(q: Tensor, scale: Tensor, offset: Tensor) -> Tensor:
            return (weight * (x - q * scale - offset).square()).sum(-1, keepdim=True)

        best_scale, best_offset = (top / quant_max).clamp_min(SMALLEST_SCALE), offset
        best_error = torch.full_like(best_scale, math.inf)
        for share in _LOWER_ENDS if with_offset else (0.0,):
            lower = offset * share
            for step in range(_SEARCH_STEPS):
                upper = lower + (top - lower) * _SHRINK**step if with_offset else top * _SHRINK**step
                scale = ((upper - lower) / quant_max).clamp_min(SMALLEST_SCALE)
                candidate = error(round_to_grid(scale, lower), scale, lower)
                better = candidate < best_error
                best_scale = torch.where(better, scale, best_scale)
                best_offset = torch.where(better, lower, best_offset)
                best_error = torch.minimum(candidate, best_error)
        scale, shift = best_scale, best_offset
        for _ in range(_REFINEMENTS):
            q = round_to_grid(scale, shift)
            mean_q, mean_x = ((weight * part).sum(-1, keepdim=True) if with_offset else 0.0 for part in (q, x))
            numerator = (weight * (x - mean_x) * (q - mean_q)).sum(-1, keepdim=True)
            denominator = (weight * (q - mean_q).square()).sum(-1, keepdim=True)
            updated = numerator / denominator.clamp_min(1e-30)
            scale = torch.where((denominator > 0) & (updated > SMALLEST_SCALE), updated, scale)
            shift = mean_x - scale * mean_q if with_offset else shift
            candidate = error(round_to_grid(scale, shift), scale, shift)
            better = candidate < best_error
            best_scale, best_offset = torch.where(better, scale, best_scale), torch.where(better, shift, best_offset)
            best_error = torch.minimum(candidate, best_error)
        return best_scale.squeeze(-1), best_offset.squeeze(-1)

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
