"""Twin grids: two uniform regions in one grid of k bits, for values that one step cannot serve (PTQ4ViT).

One bit of a code chooses the region, the other k - 1 count steps within it; H = 2^(k-1), and the steps differ by 2^m:

    probabilities (unsigned)   q = 0 … H-1: x̂ = s·q        q = H … 2H-1: x̂ = 2^m·s·(q - H)       2^m·s = 1/H
    GELU outputs (signed)      q = -H … -1: x̂ = s·q        q = 0 … H-1:  x̂ = 2^m·s·q

So most probabilities, which are tiny, have fine steps, and the few large ones coarse steps up to 1; the negative side
of a GELU, which ends at -0.17, has steps of its own (Yuan et al., ECCV 2022). x̂ is s·n with n = q or
(q shifted by m): products run on integers, of k + m - 1 bits.

The region ratio m and the scales are those of least squared error over the observed histogram, whatever observer is
asked for: every m from 0 to 10, for GELU outputs with every coarse step of 33 between its largest value over H - 1 and
1/16 of that. MPTQ-ViT (2024) calls a choice of m by data OPT-m. Its text could not be read, so that the criterion is
ours; PTQ4ViT weights errors by a Hessian. Also ours: x goes to the nearest level of either region, and negative codes
end at -H, so that they leave zero to the others; m is fixed after calibration, s may be trained. Widths are fixed.
"""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor

from qvit.errors import UsageError
from qvit.functional import SMALLEST_SCALE, pick_column, round_ste, wide
from qvit.plan.spec import Layout, TensorSpec
from qvit.quantizers.bank import BankQuantizer
from qvit.quantizers.base import register_quantizer
from qvit.quantizers.observers import HistogramObserver

#: The largest m; and the coarse steps that are tried for values of both signs: how many, over how many octaves.
LARGEST_RATIO = 10
_STEPS, _OCTAVES = 32, 4


@register_quantizer("twin")
class TwinQuantizer(BankQuantizer):
    """Two regions with steps s and 2^m·s.

    Attributes:
        ratio: Buffer, m of each scale, in the shape of `scale`.
    """

    uniform: ClassVar[bool] = False
    has_multiples: ClassVar[bool] = True
    ratio: Tensor

    def __init__(self, spec: TensorSpec, layout: Layout) -> None:
        super().__init__(spec, layout)
        if not spec.symmetric:
            raise UsageError("quantizer 'twin' has no offset: set symmetric to true, and signed for values below 0")
        if spec.learn_bit_width or min(spec.widths) < 2:
            raise UsageError("quantizer 'twin' has fixed widths from 2 on: learn_bit_width must be false")
        self.register_buffer("ratio", torch.zeros_like(self.scale))

    def factor(self) -> Tensor:
        """2^m of each scale that is in use."""
        own = pick_column(self.ratio, self.bit_width, self.candidates)
        return torch.exp2(own.round().clamp(0, LARGEST_RATIO))

    def fake_quantize(self, x: Tensor) -> Tensor:
        scale = wide(self.active_scale())
        return (_levels(wide(x) / scale, self.factor(), self.bit_width, self.spec.signed)[0] * scale).to(x.dtype)

    @torch.no_grad()
    def to_int(self, x: Tensor) -> Tensor:
        factor, half = self.factor(), torch.exp2(self.bit_width - 1)
        u = wide(self.view(x)) / self.grid()[0]
        n, coarse = _levels(u, factor, self.bit_width, self.spec.signed)
        q = torch.where(coarse, n / factor, n)
        q = q if self.spec.signed else torch.where(coarse, q + half, q)
        return q.to(torch.int32).view_as(x)

    @torch.no_grad()
    def from_int(self, q: Tensor) -> Tensor:
        return (self.expanded(self.view(q)).to(self.scale.dtype) * self.grid()[0]).view_as(q)

    @torch.no_grad()
    def expanded(self, q: Tensor) -> Tensor:
        """n of the viewed codes q, int64: x̂ = s·n."""
        factor, half = self.factor().long(), torch.exp2(self.bit_width - 1).long()
        q = q.long()
        if self.spec.signed:
            return torch.where(q < 0, q, q * factor)
        return torch.where(q < half, q, (q - half) * factor)

    @torch.no_grad()
    def multiples(self, x: Tensor) -> Tensor:
        return self.expanded(self.view(self.to_int(x))).view_as(x)

    def largest_multiple(self) -> int:
        half = torch.exp2(self.bit_width - 1)
        fine = half if self.spec.signed else half - 1
        return int(torch.maximum(fine, (half - 1) * self.factor()).max())

    @torch.no_grad()
    def initialize(self, observer: HistogramObserver) -> None:
        x, share = (part.reshape(*self.scale_shape, -1) for part in observer.histogram())
        own = self.width_per_scale().unsqueeze(-1)
        widths = [own.new_tensor(bits) for bits in self.bank_widths] or [own]
        fitted = [self._fitted(x, share, width) for width in widths]
        self.scale.copy_(torch.cat([scale for scale, _ in fitted], dim=-1))
        self.ratio.copy_(torch.cat([ratio for _, ratio in fitted], dim=-1))
        self.calibrated = True

    def _fitted(self, x: Tensor, share: Tensor, width: Tensor) -> tuple[Tensor, Tensor]:
        """Scale and m of least squared error at one width, both `scale_shape + (1,)`."""
        half = torch.exp2(width - 1)
        top = torch.where(share > 0, x, 0.0).amax(-1, keepdim=True)
        signed = self.spec.signed
        if signed:  # where nothing is above 0, the coarse steps are of no use and may be anything
            top = torch.where(top > 0, top, x.abs().amax(-1, keepdim=True))
        coarse = top / (half - 1) if signed else top.clamp_min(1.0) / half
        coarse = coarse.clamp_min(SMALLEST_SCALE * 2.0 ** (LARGEST_RATIO + _OCTAVES))
        best, chosen, least = coarse, torch.zeros_like(coarse), torch.full_like(coarse, math.inf)
        for step in range(_STEPS + 1 if signed else 1):
            for ratio in range(LARGEST_RATIO + 1):
                scale = coarse * 2.0 ** (-_OCTAVES * step / _STEPS - ratio)
                n, _ = _levels(x / scale, torch.full_like(scale, 2.0**ratio), width, signed)
                error = (share * (x - n * scale).square()).sum(-1, keepdim=True)
                better = error < least
                best, chosen = torch.where(better, scale, best), torch.where(better, float(ratio), chosen)
                least = torch.minimum(error, least)
        return best, chosen

    def extra_words(self) -> list[str]:
        ratios = sorted({int(m) for m in self.ratio.flatten().tolist()})
        return [*super().extra_words(), f"ratio=2^{ratios[0]}" + (f"…{ratios[-1]}" if len(ratios) > 1 else "")]


def _levels(u: Tensor, factor: Tensor, bit_width: Tensor, signed: bool) -> tuple[Tensor, Tensor]:
    """The nearest n to u = x/s, straight through, and whether it lies in the coarse region."""
    half = torch.exp2(bit_width - 1)
    zero = torch.zeros_like(half)
    coarse = round_ste(torch.clamp(u / factor, zero, half - 1)) * factor
    if signed:
        above = u >= 0
        return torch.where(above, coarse, round_ste(torch.clamp(u, -half, zero))), above
    fine = round_ste(torch.clamp(u, zero, half - 1))
    above = (u - coarse).abs() < (u - fine).abs()
    return torch.where(above, coarse, fine), above
