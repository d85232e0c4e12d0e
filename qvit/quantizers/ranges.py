"""Observers that choose a range without looking at the error: all values, or those between two percentiles.

    minmax        [min, max]: nothing is clipped, one outlier decides the scale
    percentile    [P(1-p), P(p)] with p = 0.9999 (RepQ-ViT, Li et al., ICCV 2023, tries this and two others)
    mse           least squared error (`observers.py`)

From a range to a grid: on a signed one s = max(max/quant_max, min/quant_min), on an unsigned one s = max/quant_max, and
with an offset s = (max - min)/quant_max, β = min. Memory is that of the histograms; percentiles are exact to a bin.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qvit.errors import UsageError, nearest
from qvit.functional import SMALLEST_SCALE, integer_range
from qvit.quantizers.observers import HistogramObserver

PERCENTILE = 0.9999


class MinMaxObserver(HistogramObserver):
    """The range of everything observed."""

    def range(self) -> tuple[Tensor, Tensor]:
        """The ends of the range, both (groups,)."""
        self.histogram()  # refuses if nothing was observed
        return self.smallest, self.largest

    def fit(self, widths: tuple[int, ...], *, signed: bool, with_offset: bool) -> tuple[Tensor, Tensor]:
        bottom, top = (end.unsqueeze(1) for end in self.range())
        table = torch.tensor(widths, device=top.device, dtype=torch.float32).view(1, -1)
        quant_min, quant_max = integer_range(table, signed)
        if with_offset:
            scales = (top - bottom) / quant_max
        elif signed:
            scales = torch.maximum(top / quant_max, bottom / quant_min)
        else:
            scales = top / quant_max
        offsets = bottom.expand_as(scales) if with_offset else torch.zeros_like(scales)
        shape = (*self.scale_shape, len(widths))
        return scales.clamp_min(SMALLEST_SCALE).reshape(shape), offsets.reshape(shape)


class PercentileObserver(MinMaxObserver):
    """The range without the share 1 - `PERCENTILE` of the values at either end."""

    def range(self) -> tuple[Tensor, Tensor]:
        centres, share = self.histogram()
        below = share.double().cumsum(-1)
        ends = []
        for level in (1 - PERCENTILE, PERCENTILE):
            index = (below < level).sum(-1, keepdim=True).clamp_max(centres.shape[-1] - 1)
            ends.append(centres.gather(-1, index).squeeze(-1))
        return torch.maximum(ends[0], self.smallest), torch.minimum(ends[1], self.largest)


OBSERVERS: dict[str, type[HistogramObserver]] = {
    "mse": HistogramObserver,
    "percentile": PercentileObserver,
    "minmax": MinMaxObserver,
}


def observer_class(name: str) -> type[HistogramObserver]:
    """The observer of a name. Raises UsageError with the nearest one."""
    if name not in OBSERVERS:
        raise UsageError(f"unknown observer '{name}'{nearest(name, OBSERVERS)} ({', '.join(OBSERVERS)})")
    return OBSERVERS[name]
