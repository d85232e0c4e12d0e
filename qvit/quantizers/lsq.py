"""LSQ with its two extensions: LSQ+'s learned offset, and Q-ViT's switchable scale.

    LSQ    Esser et al., Learned Step Size Quantization, ICLR 2020     scale learned, gradient × 1/sqrt(n·quant_max)
    LSQ+   Bhalgat et al., CVPR Workshops 2020                         offset learned, where the spec is asymmetric
    Q-ViT  Li et al. 2022, arXiv 2201.07703, section 3.3               one scale per candidate width (`bank.py`)
    VVTQ   Huang et al. 2023, arXiv 2307.00331                         other n in 1/sqrt(n·quant_max), see below

The width's gradient, while it is learned, is that of the clipping limits (Q-ViT), which clipped elements feel alone, or

    difference     ∂x̂/∂b̃ = (q(x; b+1) - q(x; b-1)) / 2 at b = round(b̃), where x̂ is q(x; b) as with `clipping`

in which every element has its say: what one bit more would change, to first order. (Ours; the scales of the neighbours
are those of their widths in the bank.) By interpolation (FracBits, Yang and Jin 2021, eq. 3), with l = floor(b̃) and
f = b̃ - l,

    x̂ = (1 - f)·q(x; l) + f·q(x; l+1)            ∂x̂/∂b̃ = q(x; l+1) - q(x; l)

every element has its say as well, and the forward pass mixes two grids until the widths are frozen.

n of the gradient's factor, by option `scale_gradient`, for the N elements x that share a scale and a width:

    count   N (LSQ)        count-linear   N·quant_max, so 1/(sqrt(N)·quant_max) (activations in VVTQ's public code)
    norm    Σ|x| (weights in VVTQ's public code)        norm-squared   (Σ|x|)², so 1/(Σ|x|·sqrt(quant_max)) (its paper)

Initialisation minimises the squared error for every width (`observers.py`), as in Q-ViT; LSQ takes
2·mean|x|/sqrt(quant_max).
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from qvit.functional import integer_range, wide
from qvit.kernels.fake_quantize import FakeQuantize, Grid, Learned, Meta, codes_on, fuses
from qvit.kernels.linear import Codes
from qvit.plan.spec import Layout, TensorSpec
from qvit.quantizers.bank import BankQuantizer
from qvit.quantizers.base import has_hooks, register_quantizer
from qvit.quantizers.observers import HistogramObserver

#: Forms of `ScaleOptions.scale_gradient` that need the tensor itself.
NORMS = ("norm", "norm-squared")


class LearnedScaleQuantizer(BankQuantizer):
    """What LSQ and its relatives share: scales learned by their gradients, on a uniform grid."""

    splits_tokens: ClassVar[bool] = True

    def __init__(self, spec: TensorSpec, layout: Layout) -> None:
        super().__init__(spec, layout)
        self.first_width = self.bank_widths[0] if self.bank_widths else 0

    def fake_quantize(self, x: Tensor, bit_width: Tensor | None = None) -> Tensor:
        width, limits = (self.bit_width, self._limits()) if bit_width is None else (bit_width, None)
        about = (limits, self.spec.signed, self._elements_per_scale(x.numel(), x), self.first_width)
        return FakeQuantize.apply(x, self.scale, self.offset, width, self.candidates, *about, *self._gradients())

    def _limits(self) -> tuple[int, int] | None:
        """The range of a learned width."""
        return self.spec.bit_width_range if self.learns_width else None

    def _gradients(self) -> tuple[str, bool]:
        return self.options.width_gradient, self.options.scale_gradient == "count-linear"

    @torch.no_grad()
    def _elements_per_scale(self, count: int, x: Tensor | None) -> Tensor | int:
        """n of the gradient's factor, but for quant_max; activations are counted over the parts of the step's batch."""
        form = self.options.scale_gradient
        if form in NORMS:
            assert x is not None
            norm = wide(x.abs()).sum_to_size(self.groups).to(self.scale.dtype) * self.batch_parts
            norm = norm.clamp_min(torch.finfo(norm.dtype).tiny ** 0.25)
            return norm.square() if form == "norm-squared" else norm
        return count * self.batch_parts // self.num_groups

    @torch.no_grad()
    def initialize(self, observer: HistogramObserver) -> None:
        own = self.width_per_scale()
        widths = self.bank_widths or tuple(sorted({int(width) for width in own.flatten().tolist()}))
        scales, offsets = observer.fit(widths, signed=self.spec.signed, with_offset=self.offset is not None)
        if not self.bank_widths:
            places = torch.tensor(widths, device=own.device, dtype=own.dtype)
            pick = torch.searchsorted(places, own.expand(self.scale_shape).unsqueeze(-1).contiguous())
            scales, offsets = (values.gather(-1, pick) for values in (scales, offsets))
        self.scale.copy_(scales.reshape(self.scale.shape))
        if self.offset is not None:
            self.offset.copy_(offsets.reshape(self.offset.shape))
        self.calibrated = True


@register_quantizer("lsq")
class LSQQuantizer(LearnedScaleQuantizer):
    """Learned scale, optionally learned offset, optionally one of each per width; with fused forms."""

    rounds_only: ClassVar[bool] = True
    _range: tuple[Tensor, int, tuple[Tensor, Tensor]] | None = None

    def fused(self, count: int, x: Tensor | None = None) -> Learned | None:
        return None if self.layout.view is not None else self._learned(count, x)

    def grouped(self, count: int) -> Learned | None:
        return self._learned(count, None)

    def _learned(self, count: int, x: Tensor | None) -> Learned | None:
        if (
            not self.enabled
            or not self.calibrated
            or self.observer is not None
            or has_hooks(self)
            or self.spec.token_bit_width is not None
            or (x is None and self.options.scale_gradient in NORMS)
            or not fuses(self.scale, x)
        ):
            return None
        limits = self._limits()
        known = None if limits else self._fixed_range()
        about = (self._elements_per_scale(count, x), known, self.first_width)
        meta = Meta(self.candidates, limits, self.spec.signed, *about, *self._gradients())
        return Learned(self.scale, self.offset, self.bit_width, meta)

    def _fixed_range(self) -> tuple[Tensor, Tensor]:
        """`quant_range` of a width that is no parameter, computed once."""
        if torch.is_inference_mode_enabled() or self.bit_width.is_inference():  # such tensors are of no use in training
            return integer_range(self.bit_width, self.spec.signed)
        version = self.bit_width._version
        if self._range is None or self._range[0] is not self.bit_width or self._range[1] != version:
            self._range = (self.bit_width, version, integer_range(self.bit_width, self.spec.signed))
        return self._range[2]

    @torch.no_grad()
    def row_codes(self, weight: Tensor) -> Codes | None:
        if not (self.enabled and self.calibrated and self.spec.signed and self.fits_int8):
            return None
        scale, offset = self.grid()
        view = self.view(weight)
        in_rows = view.shape[-1] == weight.shape[-1] or self.num_groups == 1
        if offset is not None or not in_rows:
            return None
        codes = codes_on(view, Grid(scale, None, *self.quant_range()))
        return codes.view(weight.shape), scale.expand(*view.shape[:-1], 1).reshape(len(weight))
