"""The float model: no quantizer at all. The baseline from which every method starts, trained by the same loop."""

from __future__ import annotations

from typing import ClassVar

from qvit.errors import UsageError
from qvit.methods.base import Method, register_method
from qvit.plan.cost import CostModel
from qvit.plan.quant_plan import QuantPlan


@register_method("float")
class FloatMethod(Method):
    """Trains in float."""

    quantizes: ClassVar[bool] = False

    def plan(self, cost: CostModel) -> QuantPlan | None:
        if self.config.budget or self.config.plan:
            raise UsageError("method 'float' takes no --budget and no --plan: it does not quantize")
        return None
