"""LSQ and LSQ+: every block at the same width, scales learned; the baselines of the Q-ViT paper (its Table 1, "LSQ+").

    lsq     Esser et al., ICLR 2020       symmetric grids; the GELU's output, which has negative values, on a signed one
    lsq+    Bhalgat et al., CVPRW 2020    the GELU's output on an unsigned grid with learned offset

Same sites, granularity (one scale per head), MSE initialisation, optimizer and schedule as `qvit`; widths are fixed, so
no scale needs to be switchable. (The public Q-ViT code trains its uniform baseline with another learning rate than the
method; here they differ in the method alone.)

A budget `3bit` means the plan w3a3 with 8 bits in the first and the last layer. A plan with any widths may be given
instead.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Literal

from pydantic import Field

from qvit.errors import UsageError
from qvit.methods.base import Asymmetric, Method, MethodOptions, register_method
from qvit.plan.budget import parse_budget
from qvit.plan.cost import CostModel
from qvit.plan.quant_plan import QuantPlan, Rule, plan_from
from qvit.plan.spec import Site


class LSQOptions(MethodOptions):
    """Options of `lsq` and `lsq+`."""

    scales: Literal["per-head", "shared", "per-channel"] = Field(
        "per-head",
        description="every head has its own scale (Q-ViT eq. 9); `shared`: all heads of a tensor have one; "
        "`per-channel` for weights, per head for the rest",
    )
    asymmetric: Asymmetric = ()


@register_method("lsq", "lsq+")
class LSQMethod(Method):
    """Uniform widths with learned scales."""

    Options = LSQOptions
    options: LSQOptions

    def plan(self, cost: CostModel) -> QuantPlan:
        if (self.config.budget is None) == (self.config.plan is None):
            raise UsageError(
                f"method '{self.config.method}' needs either --budget, such as 4bit, or --plan, such as w4a4"
            )
        if self.config.plan is not None:
            plan = plan_from(self.config.plan)
        else:
            assert self.config.budget is not None
            parse_budget(self.config.budget, cost)
            match = re.fullmatch(r"(\d+)bits?", self.config.budget.strip().lower())
            if match is None:
                raise UsageError(
                    f"method '{self.config.method}' has one width for all blocks: "
                    f"give a budget such as '4bit', or a --plan; '{self.config.budget}' needs method qvit"
                )
            plan = QuantPlan.preset(f"w{match[1]}a{match[1]}")
        plan = plan.resolve(cost.sites)
        quantized = plan.quantized(cost.sites)
        if self.config.method == "lsq":
            plan = plan.with_rules(*symmetric_rules(quantized))
        return plan.with_rules(
            *offset_rules(self.options.asymmetric), *scale_rules(self.options.scales, quantized)
        ).resolve(cost.sites)

    def budget(self, cost: CostModel) -> int | None:
        return None if self.config.budget is None else parse_budget(self.config.budget, cost)


def symmetric_rules(sites: Iterable[Site]) -> list[Rule]:
    """Rules that take the offset from every site whose default has one."""
    return [Rule(site.name, {"symmetric": True, "signed": True}) for site in sites if not site.default.symmetric]


def offset_rules(patterns: tuple[str, ...]) -> list[Rule]:
    """Rules that give an offset to further activations."""
    return [Rule(pattern, {"symmetric": False, "signed": False}, role="activation") for pattern in patterns]


def scale_rules(scales: str, sites: Iterable[Site]) -> list[Rule]:
    """Rules for what shares a scale; the sites' default is one per head."""
    rules: list[Rule] = []
    for site in sites:
        if scales == "shared" and site.layout.heads:
            rules.append(Rule(site.name, {"granularity": "per-tensor"}))
        elif scales == "per-channel" and site.role == "weight":
            rules.append(Rule(site.name, {"granularity": "per-channel"}))
    return rules
