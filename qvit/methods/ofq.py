"""OFQ: oscillation-free quantization (Liu et al., ICML 2023, arXiv 2302.02210), as far as its parts fit into a plan.

* StatsQ: weights have a statistical scale per row in place of a learned one (`quantizers/statsq.py`).
* Confidence-guided annealing: in the last share of training only weights at a rounding boundary move
  (`training/oscillation/remedies.py`; the paper adds 30 epochs to 300 for it, hence the share of 0.1).
* Activations as in LSQ+, here with one scale per head; the paper has one per token position and a learned shift before
  and after each quantizer, which ties a model to one sequence length.

Left out is query-key reparameterization, which quantizes the product of the query's and the key's weights of each head:
C × C numbers and multiply-accumulates with all C channels in place of twice d, so another model at another cost, which
no plan of sites describes. The paper's numbers at 2 bits (DeiT-T 64.33, Swin-T 78.52) are with it.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from qvit.methods.base import Asymmetric, MethodOptions, register_method
from qvit.methods.lsq import LSQMethod
from qvit.methods.vvtq import WithRemedy
from qvit.plan.cost import CostModel
from qvit.plan.quant_plan import QuantPlan, Rule
from qvit.training.oscillation import RemedyOptions


class OFQOptions(RemedyOptions, MethodOptions):
    """Options of `ofq`: those of the remedies, with OFQ's own by default, and three more."""

    oscillation: Literal["regularizer", "freezing", "annealing", "none"] = Field("annealing", description="the remedy")
    scales: Literal["per-head", "shared"] = Field(
        "per-head", description="of activations; `shared`: all heads of a tensor have one"
    )
    weight_scales: Literal["per-channel", "per-tensor"] = Field(
        "per-channel", description="of weights; `per-channel` in the paper"
    )
    asymmetric: Asymmetric = ()


@register_method("ofq")
class OFQMethod(WithRemedy, LSQMethod):
    """Uniform widths, statistical scales of weights, annealing at the rounding boundaries."""

    Options = OFQOptions
    options: Any

    def plan(self, cost: CostModel) -> QuantPlan:
        plan = super().plan(cost)
        change = {"quantizer": "statsq", "granularity": self.options.weight_scales}
        weights = [site.name for site in plan.quantized(cost.sites) if site.role == "weight"]
        return plan.with_rules(*(Rule(name, change) for name in weights)).resolve(cost.sites)
