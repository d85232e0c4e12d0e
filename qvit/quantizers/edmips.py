"""EdMIPS: every candidate width is a branch, and a softmax over the branches is learned.

    π = softmax(logits)        x̂ = Σ_k π_k·q(x; b_k)        b̃ = Σ_k π_k·b_k        ∂x̂/∂π_k = q(x; b_k)

Cai and Vasconcelos, Rethinking Differentiable Search for Mixed-Precision Neural Networks (CVPR 2020). The candidates
are all widths of `bit_width_range`; each has its own scale, a column of the bank of switchable scales, and feels the
loss π_k times as much as alone. Logits start equal, at 0.01. Weights and activations are mixed separately: the product
of two mixtures is the mixture of all products, the paper's composite convolution.

`integer_bit_width` is the width of the largest π; `freeze` leaves that column of the bank, or the one it is told.

A step quantizes each tensor once for every candidate forward, and twice backward (again, for the gradient of π): values
of branches are not kept, so memory is that of LSQ.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from qvit.errors import UsageError
from qvit.functional import SMALLEST_SCALE, integer_range, wide
from qvit.kernels.fake_quantize import Grid, backward_on, quantize_on
from qvit.plan.spec import Layout, TensorSpec
from qvit.quantizers.base import register_quantizer
from qvit.quantizers.derived import DerivedWidthQuantizer

START = 0.01


@register_quantizer("edmips")
class MixtureQuantizer(DerivedWidthQuantizer):
    """A mixture of the candidate widths.

    Attributes:
        scale: Parameter, the bank: `scale_shape` + (W,).
        logits: Parameter, the width's shape + (W,).
    """

    width_parameters: ClassVar[tuple[str, ...]] = ("logits",)

    def __init__(self, spec: TensorSpec, layout: Layout) -> None:
        super().__init__(spec, layout)
        if not self.options.switchable_scale:
            raise UsageError("quantizer 'edmips' has a scale for each candidate width: switchable_scale must be true")
        self.logits = nn.Parameter(torch.full((*self.bit_width.shape, len(self.bank_widths)), START))

    def derived_width(self) -> Tensor:
        return self.logits.softmax(-1) @ self.candidates

    def integer_bit_width(self) -> Tensor:
        """The width of the largest share; no gradient passes."""
        return self.candidates[self.logits.detach().argmax(-1)] if self.calibrated else self.bit_width

    def fake_quantize(self, x: Tensor, bit_width: Tensor | None = None) -> Tensor:
        elements, (_, linear) = self._elements_per_scale(x.numel(), x), self._gradients()
        shares = self.logits.softmax(-1)
        return Mixture.apply(x, self.scale, self.offset, shares, self.candidates, self.spec.signed, elements, linear)


class Mixture(torch.autograd.Function):
    """The sum over the candidates of share · x̂."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        scales: Tensor,
        offsets: Tensor | None,
        shares: Tensor,
        candidates: Tensor,
        signed: bool,
        elements: Tensor | int,
        linear: bool,
    ) -> Tensor:
        ctx.save_for_backward(x, scales, offsets, shares, candidates)
        ctx.signed, ctx.elements, ctx.linear = signed, elements, linear
        total = torch.zeros_like(wide(x))
        for grid, share in _branches(scales, offsets, shares, candidates, signed):
            total.addcmul_(quantize_on(x, grid, total.dtype), share)
        return total.to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, scales, offsets, shares, candidates = ctx.saved_tensors
        grad = wide(grads[0])
        grad_x, banks = torch.zeros_like(grad), ([], [], [])
        branches = _branches(scales, offsets, shares, candidates, ctx.signed)
        for grid, share in branches:
            own, sums = backward_on(grad, wide(x), grid)
            grad_x.addcmul_(own, share)
            rounding, clipped, total = (part.sum_to_size(grid.scale.shape) * share for part in sums)
            factor = torch.rsqrt(ctx.elements * grid.quant_max.pow(2 if ctx.linear else 1))
            values = quantize_on(x, grid, grad.dtype)
            banks[0].append(((rounding + clipped) * factor).sum_to_size(scales.shape[:-1]))
            banks[1].append(total.sum_to_size(scales.shape[:-1]))
            banks[2].append((values * grad).sum_to_size(share.shape))
        to_scales, to_offsets, to_shares = (torch.stack(own, -1) for own in banks)
        return grad_x.to(x.dtype), to_scales, None if offsets is None else to_offsets, to_shares, *(None,) * 4


def _branches(
    scales: Tensor, offsets: Tensor | None, shares: Tensor, candidates: Tensor, signed: bool
) -> list[tuple[Grid, Tensor]]:
    """The grid of each candidate, one for each group that has a scale or a share of its own, and its share."""
    groups = torch.broadcast_shapes(scales.shape[:-1], shares.shape[:-1])
    found = []
    for index, width in enumerate(candidates):
        scale = scales[..., index].clamp_min(SMALLEST_SCALE).expand(groups)
        offset = None if offsets is None else offsets[..., index].expand(groups)
        found.append((Grid(scale, offset, *integer_range(width, signed)), shares[..., index]))
    return found
