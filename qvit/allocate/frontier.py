"""The Pareto frontier of predicted loss against cost: every plan that some price of cost makes the best one.

At a price λ the best plan minimises  damage + λ·cost. Sweeping λ yields the *supported* plans, the corners of the lower
convex hull of all (cost, damage): of two neighbours, none lies below the line between them. For additive costs this is
the merge of the sites' own convex hulls by slope (ZeroQ's and HAWQ's frontier, without their dynamic program).

What is exact. Each minimum at a price is, for bytes and milliseconds, and for bit operations too, though these are
products, as long as the products form a forest (`relaxation.py`); without ties they do in every family. With ties that
close a circle the minimum is a local one, and `frontier_report` says so. Plans between two corners that no price
selects are not on the list; `allocate_plan` finds the best of all for one budget.

The corners are found by splitting: the price at which two known corners are equal either yields one below their line,
or proves that there is none. The widest gaps are split first, so a limit on the number of points costs resolution
alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qvit.allocate.choices import Choices, Pin, choices
from qvit.allocate.plans import UnitLike
from qvit.allocate.relaxation import Relaxation
from qvit.allocate.units import Unit
from qvit.measure import Sensitivity, agreement_of
from qvit.plan.cost import CostModel

FORMAT, VERSION = "qvit-frontier", 1
Corner = tuple[float, float, list[int]]  # cost, damage, answer


@dataclass(frozen=True)
class Point:
    """A plan on the frontier.

    Attributes:
        cost: In the frontier's unit.
        predicted_loss: Sum of the sensitivity's table.
        widths: By site, one or one per head.
        bit_operations, weight_bytes: Costs in both units, whichever the frontier's is.
    """

    cost: float
    predicted_loss: float
    widths: Mapping[str, Sequence[int]]
    bit_operations: int
    weight_bytes: int

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        data = {key: getattr(self, key) for key in ("cost", "predicted_loss", "bit_operations", "weight_bytes")}
        return data | {"widths": {site: list(own) for site, own in self.widths.items()}}


def frontier(
    cost: CostModel,
    sensitivity: Sensitivity,
    *,
    unit: UnitLike = "bit_operations",
    pins: Iterable[Pin] = (),
    ties: Iterable[str] = (),
    boundary: int | None = 8,
    points: int = 100,
) -> list[Point]:
    """The corners of the frontier, cost ascending and predicted loss descending.

    Args:
        cost, sensitivity, unit, pins, ties, boundary: See `allocate_plan`.
        points: Largest number of corners; the two ends are always among them.
    """
    kind = Unit.of(unit, cost, sensitivity.model)
    return _points(choices(cost, sensitivity, kind, pins, ties, boundary), cost, sensitivity, kind, points)


def frontier_report(
    cost: CostModel,
    sensitivity: Sensitivity,
    chosen: Sequence[tuple[str, Mapping[str, Sequence[int]]]] = (),
    *,
    unit: UnitLike = "bit_operations",
    pins: Iterable[Pin] = (),
    ties: Iterable[str] = (),
    boundary: int | None = 8,
    points: int = 100,
    against: Sensitivity | None = None,
) -> dict[str, Any]:
    """The frontier as plain data, beside chosen plans and the uniform ones: what the page draws.

    Args:
        cost, sensitivity, unit, pins, ties, boundary, points: See `frontier`.
        chosen: Names (budgets) and widths of plans to mark.
        against: Another sensitivity, measured for some sites, to hold the predictions against.
    """
    kind = Unit.of(unit, cost, sensitivity.model)
    problem = choices(cost, sensitivity, kind, pins, ties, boundary)
    uniform = []
    for bits in sensitivity.widths if len(sensitivity.table) == len(cost.sites) else ():  # else no plan is uniform
        widths = {name: (bits if site.position == "block" else boundary or bits,) for name, site in cost.sites.items()}
        if math.isfinite(kind.total(cost, widths)):
            uniform.append((f"{bits} bit", widths))
    marked = {
        key: [{"name": name} | _point(widths, cost, sensitivity, kind).to_json() for name, widths in plans]
        for key, plans in (("chosen", list(chosen)), ("uniform", uniform))
    }
    measured = ("model", "metric", "images", "seed", "type_normalised")
    return {
        "format": FORMAT,
        "version": VERSION,
        **{key: getattr(sensitivity, key) for key in measured},
        "unit": kind.name,
        "exact": Relaxation(problem.problem).is_forest,
        "points": [p.to_json() for p in _points(problem, cost, sensitivity, kind, points)],
        **marked,
        "agreement": None if against is None else agreement_of(sensitivity, against),
    }


def _point(widths: Mapping[str, Sequence[int]], cost: CostModel, sensitivity: Sensitivity, unit: Unit) -> Point:
    own = (cost.bit_operations(widths), cost.weight_bytes(widths))
    return Point(unit.total(cost, widths), sensitivity.predicted(widths), widths, *own)


def _points(problem: Choices, cost: CostModel, sensitivity: Sensitivity, unit: Unit, limit: int) -> list[Point]:
    corners = lower_hull(problem, max(2, limit))
    return [_point(problem.widths(answer), cost, sensitivity, unit) for _, _, answer in corners]


def lower_hull(problem: Choices, limit: int) -> list[Corner]:
    """At most `limit` corners of the hull, cost ascending."""
    relaxation, task = Relaxation(problem.problem), problem.problem

    def corner(answer: list[int]) -> Corner:
        return task.cost(answer), task.damage(answer), answer

    largest = max(sum(map(max, task.damages)), 1e-30)
    smallest, most = problem.extremes()
    cheap = corner(relaxation.minimise(1.0, damage_weight=1e-7 * max(most - smallest, 1e-30) / largest))
    good = corner(relaxation.minimise(1e-9 * largest / max(most, 1e-30)))
    found = [cheap] if good[0] <= cheap[0] or good[1] >= cheap[1] else [cheap, good]
    if len(found) == 1:
        return found
    across, down = good[0] - cheap[0], cheap[1] - good[1]

    def gap(pair: tuple[Corner, Corner]) -> float:
        one, other = pair
        return max((other[0] - one[0]) / across, (one[1] - other[1]) / down)

    pairs = [(cheap, good)]
    while pairs and len(found) < limit:
        widest = max(pairs, key=gap)
        pairs.remove(widest)
        one, other = widest
        price = (one[1] - other[1]) / (other[0] - one[0])
        new = corner(relaxation.minimise(price))
        below = (one[1] + price * one[0]) - (new[1] + price * new[0])
        inside = one[0] < new[0] < other[0] and other[1] < new[1] < one[1]
        if inside and below > 1e-12 * (one[1] + price * one[0]):
            found.append(new)
            pairs += [(one, new), (new, other)]
    return sorted(found, key=lambda point: point[:2])
