"""Information rectification: queries or keys are normalised before they are quantized.

    x̃ = gain·(x - μ)/sqrt(σ² + ε) + shift        x̂ = fake_quantize(x̃)        μ, σ² over a token's channels in a head

Y. Li et al., Q-ViT: Accurate and Fully Quantized Low-bit Vision Transformer (NeurIPS 2022, section 3.3): quantized
queries and keys carry little information where their distribution does not fill the grid, so it is made regular first,
by a learned gain and shift. The paper's code has a LayerNorm with gain 1 at the start, one for all heads, in a network
trained for 300 epochs. Here each head has one gain and one shift, and they start at the deviation and the mean of what
calibration saw, so that a trained float model starts near its own attention.

Below the normalisation it is LSQ, and codes are those of x̃. Switched off, x passes untouched.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from qvit.plan.spec import Layout, TensorSpec
from qvit.quantizers.base import register_quantizer
from qvit.quantizers.lsq import LearnedScaleQuantizer
from qvit.quantizers.observers import HistogramObserver

_EPSILON = 1e-5


@register_quantizer("irm")
class RectifiedQuantizer(LearnedScaleQuantizer):
    """LSQ behind a normalisation over the last axis.

    Attributes:
        gain, shift: Parameters, one per head.
    """

    def __init__(self, spec: TensorSpec, layout: Layout) -> None:
        super().__init__(spec, layout)
        self.gain = nn.Parameter(torch.ones(layout.heads or ()))
        self.shift = nn.Parameter(torch.zeros(layout.heads or ()))

    def rectify(self, x: Tensor) -> Tensor:
        """x̃ of the viewed tensor."""
        wide = x.float()
        variance, mean = torch.var_mean(wide, dim=-1, correction=0, keepdim=True)
        return ((wide - mean) * torch.rsqrt(variance + _EPSILON) * self.gain + self.shift).to(x.dtype)

    def fake_quantize(self, x: Tensor, bit_width: Tensor | None = None) -> Tensor:
        return super().fake_quantize(self.rectify(x), bit_width)

    @torch.no_grad()
    def to_int(self, x: Tensor) -> Tensor:
        return super().to_int(self.rectify(self.view(x)).view_as(x))

    @torch.no_grad()
    def initialize(self, observer: HistogramObserver) -> None:
        super().initialize(observer)
        x, share = observer.histogram()
        share = share / share.sum(-1, keepdim=True)
        mean = (x * share).sum(-1, keepdim=True)
        deviation = ((x - mean).square() * share).sum(-1).sqrt()
        for parameter, values in ((self.gain, deviation), (self.shift, mean.squeeze(-1))):
            parameter.copy_(values.mean() if values.numel() != parameter.numel() else values.view_as(parameter))
