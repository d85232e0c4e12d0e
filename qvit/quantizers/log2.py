"""Logarithmic quantizers for attention probabilities: levels are dense near zero, where most probabilities are.

    x̂ = s·2^(-q/steps)        q = round(clamp(-steps·log2(x/s), 0, 2^b - 1))        the largest code means 0

    log2        steps = 1    FQ-ViT (Lin et al., IJCAI 2022)
    log-sqrt2   steps = 2    RepQ-ViT (Li et al., ICCV 2023): half as wide a range, twice as many levels in it

With `log2` a product with x̂ is a shift by q and one multiplication by s. The public code of RepQ-ViT has 2^b levels and
zero, one level more than b bits hold; here zero is one of the 2^b codes.

The scale is the value of code 0. It is chosen from 65 candidates between the largest value and 1/16 of it by the
squared error over the observed histogram, whatever observer is asked for. Bit operations are counted like those of a
uniform grid of the same width. Widths are fixed: a spec that asks to learn them is refused.
"""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor

from qvit.errors import UsageError
from qvit.functional import SMALLEST_SCALE, LogFakeQuantize, log_dequantize, log_quantize
from qvit.plan.spec import Layout, TensorSpec
from qvit.quantizers.bank import BankQuantizer
from qvit.quantizers.base import register_quantizer
from qvit.quantizers.observers import HistogramObserver

_CANDIDATES, _OCTAVES = 64, 4


@register_quantizer("log2")
class Log2Quantizer(BankQuantizer):
    """Powers of two below a scale, and zero.

    Its `scale` is the largest level, the value of code 0, and codes are not multiples of it.
    """

    STEPS: ClassVar[int] = 1
    uniform: ClassVar[bool] = False

    def __init__(self, spec: TensorSpec, layout: Layout) -> None:
        super().__init__(spec, layout)
        if spec.signed or not spec.symmetric:
            raise UsageError(f"quantizer '{spec.quantizer}' is for values from 0 on: signed=False and symmetric=True")
        if spec.learn_bit_width:
            raise UsageError(f"quantizer '{spec.quantizer}' has fixed widths: learn_bit_width must be false")

    def fake_quantize(self, x: Tensor) -> Tensor:
        return LogFakeQuantize.apply(x, self.active_scale(), self.bit_width, self.STEPS)

    @torch.no_grad()
    def to_int(self, x: Tensor) -> Tensor:
        codes, _ = log_quantize(self.view(x), self.grid()[0], self.bit_width, self.STEPS)
        return codes.to(torch.int32).view_as(x)

    @torch.no_grad()
    def from_int(self, q: Tensor) -> Tensor:
        scale = self.grid()[0]
        return log_dequantize(self.view(q).to(scale.dtype), scale, self.bit_width, self.STEPS).view_as(q)

    @torch.no_grad()
    def initialize(self, observer: HistogramObserver) -> None:
        x, weight = observer.histogram()
        x = x.clamp_min(0).reshape(*self.scale_shape, -1)
        weight = weight.reshape(x.shape)
        own = self.width_per_scale().unsqueeze(-1)
        widths = [own.new_tensor(bits) for bits in self.bank_widths] or [own]
        self.scale.copy_(torch.cat([self._fitted(x, weight, width) for width in widths], dim=-1))
        self.calibrated = True

    def _fitted(self, x: Tensor, weight: Tensor, width: Tensor) -> Tensor:
        """The scale of least squared error at one width, `scale_shape + (1,)`."""
        top = torch.where(weight > 0, x, 0.0).amax(-1, keepdim=True).clamp_min(SMALLEST_SCALE)
        best, least = top, torch.full_like(top, math.inf)
        for step in range(_CANDIDATES + 1):
            scale = top * 2.0 ** (-_OCTAVES * step / _CANDIDATES)
            codes, _ = log_quantize(x, scale, width, self.STEPS)
            error = (weight * (x - log_dequantize(codes, scale, width, self.STEPS)).square()).sum(-1, keepdim=True)
            best, least = torch.where(error < least, scale, best), torch.minimum(error, least)
        return best


@register_quantizer("log-sqrt2")
class LogSqrt2Quantizer(Log2Quantizer):
    """Powers of the square root of two."""

    STEPS: ClassVar[int] = 2
