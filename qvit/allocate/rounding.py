"""Integers for the real-valued widths that a search has learned, within a budget.

Damage of learned widths. Quantization error falls as 4^(-b). Where the search has come to rest, the last bit of every
site buys the same loss per BOP: ∂L_i/∂b = -λ·∂C/∂b_i. With L_i = w_i·4^(-b) this gives w_i, and, in units of λ/ln 4,

    damage_i(n) = C_i · (4^(b̃_i - n) - 1)            C_i = ∂C/∂b_i at the learned widths b̃

Nothing in it is tuned: the search's own result says how much each site is worth. (This damage model is ours; the paper
stops at rounding and overshoots its budget.)
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from qvit.allocate.program import Problem, solve
from qvit.errors import QvitError
from qvit.plan.budget import format_bops
from qvit.plan.cost import CostModel

RealWidths = Mapping[str, Sequence[float]]


def round_to_budget(
    cost: CostModel, learned: RealWidths, budget: int, *, low: int = 2, high: int = 8
) -> dict[str, tuple[int, ...]]:
    """Integer widths within `budget` at the least damage to `learned`.

    Args:
        cost: The model's costs.
        learned: Real-valued widths by site, one or one per head.
        budget: Largest BOPs allowed.
        low, high: Range of the widths.

    Raises:
        QvitError: If even `low` bits everywhere exceed the budget.
    """
    counts = {name: len(own) for name, own in learned.items()}
    flat = [min(max(float(width), low), high) for own in learned.values() for width in own]
    coefficients, left, right = cost.pairs(counts)
    smallest = sum(coefficients) * low * low
    if smallest > budget:
        raise QvitError(
            f"no widths from {low} to {high} bits fit into {format_bops(budget)}: "
            f"the smallest model takes {format_bops(smallest)}"
        )
    slope = [0.0] * len(flat)
    for c, i, j in zip(coefficients, left, right, strict=True):
        slope[i] += c * flat[j]
        slope[j] += c * flat[i]
    for reach in (1, 2, high - low):
        options = [[n for n in range(low, high + 1) if abs(n - math.floor(width + 0.5)) <= reach] for width in flat]
        damages = [[slope[i] * (4.0 ** (flat[i] - n) - 1.0) for n in own] for i, own in enumerate(options)]
        problem = Problem(options, damages, coefficients, left, right, budget)
        lowest, highest = (problem.cost([own[end] for own in options]) for end in (0, -1))
        if lowest <= budget <= highest:
            break
    chosen = solve(problem, exact=False)
    result, start = {}, 0
    for name, count in counts.items():
        result[name] = tuple(chosen[start : start + count])
        start += count
    return result
