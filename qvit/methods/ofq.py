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

from qvit.methods.base import MethodOptions, register_method
from qvit.methods.lsq import LSQMethod
from qvit.methods.vvtq import WithRemedy
from qvit.plan.cost import CostModel
from qvit.plan.quant_plan import QuantPlan, Rule
from qvit.training.oscillation import RemedyOptions


class OFQOptions(RemedyOptions, MethodOptions):
    """Options of `ofq`, beside those of `RemedyOptions`.

    Attributes:
        oscillation: The remedy; OFQ's own by default.
        scales: Of activations: `per-head`, or `shared` by the heads of a tensor.
        weight_scales: Of weights: `per-channel` (the paper) or `per-tensor`.
        asymmetric: Patterns of further activation sites that get an offset.
    """

    oscillation: Literal["regularizer", "freezing", "annealing", "none"] = "annealing"
    scales: Literal["per-head", "shared"] = "per-head"
    weight_scales: Literal["per-channel", "per-tensor"] = "per-channel"
    asymmetric: tuple[str, ...] = ()


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
