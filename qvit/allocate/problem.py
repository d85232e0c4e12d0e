"""What allocation decides: one option for each of many units, at the least total damage within a budget.

    minimise     Σ_i damage_i(n_i)
    subject to   Σ_pairs coefficient · n_i · n_j  +  Σ_i additive_i(n_i)  ≤  budget

Bit operations are the first sum (a product of two operands' widths), bytes of weights or milliseconds of a table the
second. A unit is one width: a site, one head of it, or several that are tied.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Problem:
    """Choose one option per unit so that the cost stays within the budget.

    Attributes:
        options: Candidate widths of each unit, ascending.
        damages: Damage of each option, same lengths.
        coefficients, left, right: See `CostModel.pairs`; indices of units.
        budget: Limit on the cost.
        additive: Cost of each option by itself, same lengths; empty for none.
    """

    options: Sequence[Sequence[int]]
    damages: Sequence[Sequence[float]]
    coefficients: Sequence[int]
    left: Sequence[int]
    right: Sequence[int]
    budget: float
    additive: Sequence[Sequence[float]] = ()

    def cost(self, widths: Sequence[int]) -> float:
        """The cost of integer widths; exact where coefficients and additive costs are integers."""
        products = sum(
            c * widths[i] * widths[j] for c, i, j in zip(self.coefficients, self.left, self.right, strict=True)
        )
        if not self.additive:
            return products
        own = zip(self.options, self.additive, widths, strict=True)
        return products + sum(costs[options.index(width)] for options, costs, width in own)

    def damage(self, widths: Sequence[int]) -> float:
        """The total damage of integer widths."""
        own = zip(self.options, self.damages, widths, strict=True)
        return sum(damages[options.index(width)] for options, damages, width in own)
