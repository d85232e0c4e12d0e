"""Rounding and reconstruction where the tokens of a block are ranked: in a model whose patches are all alike.

Both go block by block, and a block that ranks its tokens does not run alone (`models/families/tokens.py`). What the
rounding needs of the activations are second moments of their errors, which the ranking hardly changes; a reconstruction
sees errors of the width that most patches have. So both work on a copy without ranking, with the same scales: its
patches have that width, its prefix tokens have theirs. Biases are corrected afterwards in the model itself.
"""

from __future__ import annotations

from torch import nn

from qvit.models.convert import plan_of, quantize, take_weights
from qvit.models.families import inspect_model
from qvit.plan.quant_plan import QuantPlan, Rule


def without_ranking(plan: QuantPlan) -> QuantPlan:
    """A resolved plan in which all patches of an activation have the width that most of them have in `plan`."""
    rules = []
    for site, spec in plan.sites.items():
        split = None if spec is None else spec.token_bit_width
        if spec is None or split is None or not split.ranks:
            continue
        most = split.low if split.share <= 0.5 else split.high
        rules.append(Rule(site, {"token_bit_width": None if most is None else {"share": 0, "low": most}}))
    return plan.with_rules(*rules)


def unranked(model: nn.Module, original: nn.Module) -> nn.Module:
    """A copy of a calibrated model that ranks no tokens; `original` is the float model that it was made of."""
    plan = without_ranking(plan_of(model)).resolve(inspect_model(original).sites)
    copy = quantize(original, plan).eval()
    take_weights(copy, model)
    return copy
