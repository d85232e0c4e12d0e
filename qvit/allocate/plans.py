"""A sensitivity and a budget become a plan: the widths of least predicted loss that the budget allows.

The predicted loss is the sum of the sites' table entries. The integer program is solved to optimality (`program.py`):
no other plan within the budget has a smaller sum. The greedy solver (`greedy.py`) lowers one width at a time, as
MPTQ-ViT does. Whether the sum predicts the loss of the whole model is a matter of the metric, not of the allocation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from qvit.allocate.choices import Choices, Pin, choices
from qvit.allocate.greedy import greedy
from qvit.allocate.problem import Problem
from qvit.allocate.program import solve
from qvit.allocate.units import Unit
from qvit.errors import QvitError, UsageError, nearest
from qvit.measure import Sensitivity
from qvit.plan.cost import CostModel, Widths
from qvit.plan.quant_plan import QuantPlan

UnitLike = Unit | str | Path | Mapping[str, Any]

SOLVERS: dict[str, Callable[[Problem], list[int]]] = {"program": solve, "greedy": greedy}


def allocate_plan(
    cost: CostModel,
    sensitivity: Sensitivity,
    budget: str | float,
    *,
    unit: UnitLike = "bit_operations",
    pins: Iterable[Pin] = (),
    ties: Iterable[str] = (),
    boundary: int | None = 8,
    name: str | None = None,
    solver: str = "program",
) -> QuantPlan:
    """The plan of least predicted loss within a budget.

    Args:
        cost: The model's costs (`inspect_model`).
        sensitivity: Measured on the same model.
        budget: A number in `unit`, or text such as `4bit`, `21.455G`, `2.5MB`, `12ms` or `25%` (see `units.py`).
        unit: `bit_operations`, `weight_bytes`, or a latency table or its file: that of `qvit bench --latency-table`, or
            {site: {width: milliseconds}}.
        pins: "PATTERN=BITS" or (pattern, bits): sites of a fixed width; a later one wins.
        ties: "PATTERN=PATTERN" or "PATTERN": sites that share a width (see `choices.py`).
        boundary: Width of the first and the last layer; None allocates them like the others.
        name: The plan's name; default: metric and budget.
        solver: `program`, the least of all, or `greedy`, one width lowered at a time.

    Returns:
        A resolved plan with fixed widths, one per head where the site has heads.

    Raises:
        UsageError: A sensitivity of another model, or a budget, pin, tie or solver that cannot be meant.
        QvitError: Nothing fits; the message has the smallest and the largest possible cost.
    """
    kind = Unit.of(unit, cost, sensitivity.model)
    problem = choices(cost, sensitivity, kind, pins, ties, boundary)
    widths = problem.widths(within_budget(problem, kind, budget, cost, solver))
    default = f"{sensitivity.metric}-{budget}" + ("" if solver == "program" else f"-{solver}")
    return plan_with_widths(cost, sensitivity, widths, name or default)


def within_budget(
    problem: Choices, unit: Unit, budget: str | float, cost: CostModel, solver: str = "program"
) -> list[int]:
    """The answer of least damage, or of a solver that comes near. Raises QvitError if nothing fits."""
    if solver not in SOLVERS:
        raise UsageError(f"unknown solver '{solver}': give one of {', '.join(SOLVERS)}{nearest(solver, SOLVERS)}")
    limit = unit.parse(budget, cost)
    smallest, largest = problem.extremes()
    if smallest > limit:
        given = f"'{budget}' ({unit.format(limit)})" if isinstance(budget, str) else unit.format(limit)
        raise QvitError(
            f"budget {given} is impossible: with the widths that may be chosen this model takes between "
            f"{unit.format(smallest)} and {unit.format(largest)}"
        )
    return SOLVERS[solver](problem.within(limit))


def plan_with_widths(cost: CostModel, sensitivity: Sensitivity, widths: Widths, name: str) -> QuantPlan:
    """A resolved plan with the grids that were measured and these widths."""
    base = sensitivity.plan or QuantPlan("default").resolve(cost.sites, sensitivity.model)
    allocated = {site: own for site, own in widths.items() if site in sensitivity.table}
    return QuantPlan(name, (), base.sites, sensitivity.model).with_widths(allocated)
