"""EdMIPS: a softmax over candidate widths is learned (Cai and Vasconcelos, CVPR 2020, arXiv 2004.05795).

Every width from 2 to 8 is a branch of every site (`quantizers/edmips.py`), and costs are expected ones, MACs ·
E[b_weight] · E[b_activation]. All branches start alike: the search begins at 5 bits on average, whatever the budget, in
the first and the last layer, too.

All else is as in `qvit`, whose penalty takes the place of the paper's λ·complexity: that has no budget. At the end of
the search the wish of each site is its likeliest width, as in the paper, brought within the budget as Q-ViT's widths
are.

In a short search the shares stay nearly equal: the penalty then tilts all of them alike, and the likeliest width is 2
nearly everywhere while the expected one is at the budget. `wish="expected"` (ours) rounds expected widths instead.

Logits have the learning rate of widths, and ordinary training images; the paper has no other either.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from qvit.errors import UsageError
from qvit.methods.base import register_method
from qvit.methods.qvit import HIGH, LOW, QViTMethod, SearchOptions
from qvit.plan.cost import CostModel
from qvit.plan.quant_plan import QuantPlan
from qvit.quantizers import Quantizer


class EdMIPSOptions(SearchOptions):
    """Options of `edmips`, most of which it shares with `qvit`."""

    head_wise: bool = Field(True, description="a distribution over widths per head; off: one per tensor")
    width_lr: float | None = Field(
        None, gt=0, description="learning rate of the logits; by default that of `qvit`'s widths"
    )
    scales: Literal["per-head", "shared"] = Field(
        "per-head", description="`shared`: all heads of a tensor have one scale"
    )
    wish: Literal["likeliest", "expected"] = Field(
        "likeliest", description="width of each site that is rounded within the budget at the end of the search"
    )


@register_method("edmips")
class EdMIPSMethod(QViTMethod):
    """A learned distribution over widths, within a budget."""

    Options = EdMIPSOptions

    def start(self, cost: CostModel, budget: int) -> QuantPlan:
        bits = (LOW + HIGH) // 2
        return QuantPlan.preset(f"w{bits}a{bits}", boundary_bits=bits).resolve(cost.sites)

    def plan(self, cost: CostModel) -> QuantPlan:
        if self.config.plan is not None:
            raise UsageError("method 'edmips' starts with all widths alike: it takes no --plan to start from")
        return super().plan(cost)

    def spec_changes(self) -> dict[str, Any]:
        return {"quantizer": "edmips", "switchable_scale": True}

    def bit_operations(self) -> Tensor:
        assert self.differentiable is not None
        return self.differentiable(self.widths())

    def widths(self) -> Tensor:
        if not self.quantizers[0].learns_width:
            return super().widths()
        quantizers: list[Any] = self.quantizers
        logits = torch.cat([q.logits.view(-1, q.logits.shape[-1]) for q in quantizers])
        return logits.softmax(-1) @ quantizers[0].candidates

    def wish(self, quantizer: Quantizer) -> Tensor:
        likeliest = self.options.wish == "likeliest"
        return quantizer.integer_bit_width() if likeliest else quantizer.clamped_bit_width()
