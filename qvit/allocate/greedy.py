"""Widths by greedy descent, after the greedy mixed precision of MPTQ-ViT (Tai and Wu 2024).

All units start at the width of least damage, the widest of those that differ. One unit at a time then goes to its next
narrower width, the one with the least

    price = (damage(narrower) - damage(now)) / (cost now - cost at the narrower width)

until the cost is within the budget: performance lost for what is saved. Costs may be products of two widths, so a price
is that of the widths which the others have at the moment.

MPTQ-ViT lowers layers one at a time by performance and compressibility; its text could not be read. The price as a
ratio, damages from the sensitivity's table in place of a model that is measured at every step, a width per head, and
what is left of the budget being spent, are ours. Where all steps save the same and damages are convex in the width, no
answer is better. Elsewhere that of `program.py` is; by how much is measured in docs/results.md.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from qvit.allocate.problem import Problem, filled
from qvit.errors import QvitError

_NONE = float("inf")


def greedy(problem: Problem) -> list[int]:
    """Widths within the budget by greedy descent, what is left of the budget spent.

    Raises:
        QvitError: If the descent ends above the budget.
    """
    widths = [
        options[int(np.argmin(damages))] for options, damages in zip(problem.options, problem.damages, strict=True)
    ]
    for step in descent(problem, widths):
        widths = step
    if problem.cost(widths) > problem.budget:
        raise QvitError(f"no allocation fits into a budget of {problem.budget}")
    return filled(problem, widths, steps=1)


def descent(problem: Problem, widths: list[int]) -> Iterator[list[int]]:
    """The widths after each step, until they fit or nothing narrower saves.

    Args:
        problem: The problem.
        widths: Where to start.
    """
    current, cost = list(widths), problem.cost(widths)
    steps = [_step(problem, current, unit) for unit in range(len(current))]
    while cost > problem.budget:
        price, unit, width = min(steps)
        if price == _NONE:
            return
        around = {end for index in problem.products_of[unit] for end in (problem.left[index], problem.right[index])}
        current[unit] = width
        cost = problem.cost(current)
        for other in around | {unit}:
            steps[other] = _step(problem, current, other)
        yield list(current)


def _step(problem: Problem, widths: list[int], unit: int) -> tuple[float, int, int]:
    """Price, unit and width of the next narrower option that saves anything."""
    options, damages = problem.options[unit], problem.damages[unit]
    here = options.index(widths[unit])
    for position in range(here - 1, -1, -1):
        saved = -problem.extra(widths, unit, options[position])
        if saved > 0:
            return (damages[position] - damages[here]) / saved, unit, options[position]
    return _NONE, unit, widths[unit]
