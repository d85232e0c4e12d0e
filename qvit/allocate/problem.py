"""What allocation decides: one option for each of many units, at the least total damage within a budget.

    minimise     Σ_i damage_i(n_i)
    subject to   Σ_pairs coefficient · rate(n_i, n_j)  +  Σ_i additive_i(n_i)  ≤  budget

Bit operations are the first sum with the rate n_i · n_j (a product of two operands' widths), milliseconds that were
measured for pairs of widths the same sum with rates of their own, bytes of weights or milliseconds by site the second.
A unit is one width: a site, one head of it, or several that are tied.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property


@dataclass(frozen=True)
class Problem:
    """Choose one option per unit so that the cost stays within the budget.

    Attributes:
        options: Candidate widths of each unit, ascending.
        damages: Damage of each option, same lengths.
        coefficients, left, right: See `CostModel.pairs`; indices of units.
        budget: Limit on the cost.
        additive: Cost of each option by itself, same lengths; empty for none.
        rates: For each product what one of its coefficient costs, by the widths (left, right); empty for their product.
    """

    options: Sequence[Sequence[int]]
    damages: Sequence[Sequence[float]]
    coefficients: Sequence[int]
    left: Sequence[int]
    right: Sequence[int]
    budget: float
    additive: Sequence[Sequence[float]] = ()
    rates: Sequence[Mapping[tuple[int, int], float]] = ()

    def product(self, index: int, left: int, right: int) -> float:
        """The cost of a product of two units at two widths."""
        rate = self.rates[index][left, right] if self.rates else left * right
        return self.coefficients[index] * rate

    def cost(self, widths: Sequence[int]) -> float:
        """The cost of integer widths; exact where coefficients and additive costs are integers."""
        pairs = enumerate(zip(self.left, self.right, strict=True))
        products = sum(self.product(index, widths[i], widths[j]) for index, (i, j) in pairs)
        if not self.additive:
            return products
        own = zip(self.options, self.additive, widths, strict=True)
        return products + sum(costs[options.index(width)] for options, costs, width in own)

    def damage(self, widths: Sequence[int]) -> float:
        """The total damage of integer widths."""
        own = zip(self.options, self.damages, widths, strict=True)
        return sum(damages[options.index(width)] for options, damages, width in own)

    @cached_property
    def products_of(self) -> list[list[int]]:
        """For each unit the products that it takes part in."""
        found: list[list[int]] = [[] for _ in self.options]
        for index, (i, j) in enumerate(zip(self.left, self.right, strict=True)):
            for unit in {i, j}:
                found[unit].append(index)
        return found

    def extra(self, widths: Sequence[int], unit: int, width: int) -> float:
        """What the cost grows by where one unit gets another width."""
        old, options = widths[unit], self.options[unit]
        grown = 0.0 if self.rates else 0
        for index in self.products_of[unit]:
            i, j = self.left[index], self.right[index]
            new = (width if i == unit else widths[i], width if j == unit else widths[j])
            grown += self.product(index, *new) - self.product(index, widths[i], widths[j])
        if self.additive:
            costs = self.additive[unit]
            grown += costs[options.index(width)] - costs[options.index(old)]
        return grown

    def restricted(self, options: Sequence[Sequence[int]]) -> Problem:
        """The same with some of the options alone."""

        def kept(values: Sequence[Sequence[float]]) -> list[list[float]]:
            own = zip(self.options, values, options, strict=True)
            return [[row[known.index(width)] for width in some] for known, row, some in own]

        additive = kept(self.additive) if self.additive else self.additive
        return replace(self, options=options, damages=kept(self.damages), additive=additive)


def filled(problem: Problem, widths: Sequence[int], *, steps: int | None = None) -> list[int]:
    """Spends what is left of the budget: gives one unit at a time another option, most damage saved first.

    Args:
        problem: The problem.
        widths: An answer within the budget.
        steps: How many options further a unit may go at once; None for any option, narrower ones too.
    """
    current = list(widths)
    while True:
        room = problem.budget - problem.cost(current)
        best: tuple[float, int, int] | None = None
        for unit, (options, damages) in enumerate(zip(problem.options, problem.damages, strict=True)):
            here = options.index(current[unit])
            reach = range(len(options)) if steps is None else range(here + 1, min(here + 1 + steps, len(options)))
            for n in reach:
                gain = damages[here] - damages[n]
                better = gain > 0 and (best is None or gain > best[0])
                if better and problem.extra(current, unit, options[n]) <= room:
                    best = (gain, unit, options[n])
        if best is None:
            return current
        before = list(current)
        current[best[1]] = best[2]
        if problem.cost(current) > problem.budget:  # by the last digit of a float
            return before
