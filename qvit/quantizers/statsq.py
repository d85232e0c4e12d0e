"""StatsQ: a weight quantizer whose scale is a statistic of the weights and not a parameter.

    s = 2·mean|w|      Δ = s/2^(b-1)      x̂ = Δ·(q + 1/2)      q = round(clamp(w/Δ - 1/2, -2^(b-1), 2^(b-1) - 1))

Oscillation-free quantization (OFQ, Liu et al., ICML 2023, section 3.2): a learned scale moves with each oscillating
weight and carries others over their rounding boundary; the mean of all magnitudes hardly moves. Levels are half-way
between integers, so there is no zero and as many levels below it as above: at 2 bits ±Δ/2 and ±3Δ/2. In the terms of
the other quantizers this is a grid of scale Δ and offset Δ/2.

The gradient is straight through for every weight, clipped ones included, as in the public code. The scale of the last
forward is kept as a buffer for `grid` and for files; each forward computes its own. Published with one scale per row
(`per-channel`); weights only, widths fixed.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from qvit.errors import UsageError
from qvit.functional import SMALLEST_SCALE, dequantize, quantize, straight_through
from qvit.plan.spec import Layout, TensorSpec
from qvit.quantizers.base import Quantizer, register_quantizer
from qvit.quantizers.observers import HistogramObserver


@register_quantizer("statsq")
class StatsQuantizer(Quantizer):
    """Half-way levels at a scale of 2·mean|w|.

    Attributes:
        scale: Buffer of shape `scale_shape`, Δ of the last forward; NaN until calibrated.
    """

    scale: Tensor

    def __init__(self, spec: TensorSpec, layout: Layout) -> None:
        super().__init__(spec, layout)
        if not spec.signed or not spec.symmetric:
            raise UsageError("quantizer 'statsq' is for weights: signed=True and symmetric=True")
        if spec.learn_bit_width or spec.options.get("switchable_scale"):
            raise UsageError("quantizer 'statsq' has fixed widths: learn_bit_width and switchable_scale must be false")
        self.register_buffer("scale", torch.full(self.scale_shape, math.nan))

    def statistic(self, x: Tensor) -> Tensor:
        """Δ of the viewed weight `x`, in the shape of the scales; not differentiable."""
        magnitudes = x.detach().float().abs()
        shape = (1,) * (x.dim() - len(self.scale_shape)) + tuple(self.scale_shape)
        mean = magnitudes.sum_to_size(shape) * (math.prod(shape) / x.numel())
        return (2 * mean / torch.exp2(self.width_per_scale() - 1)).clamp_min(SMALLEST_SCALE).reshape(self.scale_shape)

    def fake_quantize(self, x: Tensor, bit_width: Tensor | None = None) -> Tensor:
        with torch.no_grad():
            scale = self.statistic(x)
            self.scale.copy_(scale)
            width = self.bit_width if bit_width is None else bit_width
            values = dequantize(quantize(x, scale, width, True, scale / 2), scale, scale / 2).to(x.dtype)
        return straight_through(x, values)

    @torch.no_grad()
    def grid(self, bit_width: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        return self.scale, self.scale / 2

    @torch.no_grad()
    def initialize(self, observer: HistogramObserver) -> None:
        """The scale of the observed weight; the first forward replaces it by that of its own."""
        x, weight = observer.histogram()
        x, weight = (values.reshape(*self.scale_shape, -1) for values in (x, weight))
        mean = (x.abs() * weight).sum(-1) / weight.sum(-1).clamp_min(1)
        self.scale.copy_((2 * mean / torch.exp2(self.width_per_scale() - 1)).clamp_min(SMALLEST_SCALE))
        self.calibrated = True
