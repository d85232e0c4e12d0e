"""DQ: step size and range are learned, and the width follows from them.

    q_max = round(x_max/d)      x̂ = d·round(clamp(x/d, q_min, q_max))        q_min = -(q_max + 1) signed, 0 unsigned
    b̃ = log2(x_max/d + 1) + 1  (signed)        b̃ = log2(x_max/d + 1)  (unsigned)

Uhlich et al., Mixed Precision DNNs: All you need is a good parametrization (ICLR 2020), the parametrization that they
found best. d is our `scale`. With g the incoming gradient and rounding straight through,

    ∂x̂/∂d = q - x/d inside the range         q_max - x_max/d above        -(q_max - x_max/d) - 1 below (signed)
    ∂x̂/∂x_max = 0 inside                     1 above                      -1 below (signed), 0 (unsigned)

at fixed x_max and fixed d: d feels rounding errors, x_max clipped elements. The signed range reaches one step further
down than up, as everywhere here, so that an integer b̃ is exactly the grid of that width; in the paper it is symmetric.
A range counts from the offset where there is one.

Ours: b̃ stays within its range (`clamp_inward`); what is stored is log2 of x_max, so that a step of Adam, which is as
long as the learning rate, moves every width by about as many bits; d has no LSQ factor, so that the loss and the
penalty on b̃ meet in it unscaled. Power-of-two step sizes are left out.

There is a scale and a range for each width: shapes `()` or one per head. `settle` keeps the range (its upper end) and
makes the scale fit the final width: d = x_max/quant_max.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from qvit.errors import UsageError
from qvit.functional import SMALLEST_SCALE, clamp_inward, integer_range, round_ste
from qvit.kernels.fake_quantize import Grid, backward_on, quantize_on
from qvit.plan.spec import Layout, TensorSpec
from qvit.quantizers.base import register_quantizer
from qvit.quantizers.derived import DerivedWidthQuantizer
from qvit.quantizers.observers import HistogramObserver


@register_quantizer("dq")
class RangeQuantizer(DerivedWidthQuantizer):
    """Learned scale and range.

    Attributes:
        scale: Parameter, as in LSQ: the width's shape + (1,).
        log2_range: Parameter, log2 of x_max, in the width's shape; NaN until calibrated.
    """

    width_parameters: ClassVar[tuple[str, ...]] = ("log2_range",)

    def __init__(self, spec: TensorSpec, layout: Layout) -> None:
        super().__init__(spec, layout)
        if self.scale_shape != tuple(self.bit_width.shape) or self.options.switchable_scale:
            raise UsageError(
                "quantizer 'dq' has one scale and one range for each width: granularity must be 'per-head' for a width "
                "per head and 'per-tensor' for a single one, and switchable_scale false"
            )
        self.log2_range = nn.Parameter(torch.full(self.scale_shape, math.nan))

    def derived_width(self) -> Tensor:
        return derived_width(self.scale[..., 0], self.log2_range, int(self.spec.signed), *self.spec.bit_width_range)

    def fake_quantize(self, x: Tensor, bit_width: Tensor | None = None) -> Tensor:
        scale = self.scale[..., 0].clamp_min(SMALLEST_SCALE)
        quant_max = round_ste(torch.exp2(self.derived_width() - int(self.spec.signed)) - 1)
        quant_min = -(quant_max + 1) if self.spec.signed else torch.zeros_like(quant_max)
        offset = None if self.offset is None else self.offset[..., 0]
        return GridQuantize.apply(x, scale, offset, quant_min, quant_max)

    @torch.no_grad()
    def initialize(self, observer: HistogramObserver) -> None:
        """The scale of least squared error at the starting width, and the range that this width gives it."""
        self.calibrated = False  # so that the width is the one to start from
        super().initialize(observer)
        self.log2_range.copy_((self.scale[..., 0] * integer_range(self.bit_width, self.spec.signed)[1]).log2())

    def settle(self, bit_width: Tensor) -> None:
        before = torch.exp2(self.derived_width() - int(self.spec.signed)) - 1
        self.scale.mul_((before / integer_range(bit_width, self.spec.signed)[1]).unsqueeze(-1))


def derived_width(scale: Tensor, log2_range: Tensor, signed: Tensor | int, low: float, high: float) -> Tensor:
    """b̃ of step sizes and ranges, elementwise and differentiable in both; `signed` is 1 or 0."""
    steps = torch.exp2(log2_range) / scale.clamp_min(SMALLEST_SCALE)
    return clamp_inward(torch.log2(steps + 1) + signed, low, high)


class GridQuantize(torch.autograd.Function):
    """Quantizes and dequantizes on a grid, with gradients of all its numbers, the limits included."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, scale: Tensor, offset: Tensor | None, quant_min: Tensor, quant_max: Tensor
    ) -> Tensor:
        grid = Grid(scale, offset, quant_min, quant_max)
        ctx.save_for_backward(x, *grid)
        return quantize_on(x, grid)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, *numbers = ctx.saved_tensors
        grid = Grid(*numbers)
        grad_x, sums = backward_on(grads[0], x, grid)
        rounding, clipped, total = (part.sum_to_size(grid.scale.shape) for part in sums)
        above = (clipped - grid.quant_min * total) / (grid.quant_max - grid.quant_min)
        to_limits = (grid.scale * (total - above), grid.scale * above)
        return grad_x, rounding + clipped, None if grid.offset is None else total, *to_limits
