"""From real-valued or desired widths to integers within a budget, at the least damage: an integer program.

BOPs are products of two unknown widths, so with binary x_{i,n} ("site i gets n bits") each pair (i, j) of a matmul gets
variables z_{n,m} ≥ 0 with Σ_m z_{n,m} = x_{i,n} and Σ_n z_{n,m} = x_{j,m}; for binary x this makes z = x_i·x_j exactly,
and

    minimise     Σ_i Σ_n damage_i(n)·x_{i,n}
    subject to   Σ_pairs Σ_{n,m} coefficient·n·m·z_{n,m} ≤ budget        Σ_n x_{i,n} = 1 for every i

is linear. HiGHS (scipy.optimize.milp) solves it, to optimality or, for the freezing of a search, at the root of its
tree: that takes a second for DeiT-S, is the same on every machine (a time limit would not be), and was within 0.1 % of
the optimum where that could be computed. The answer is checked in exact integers, compared with a greedy descent, and
spare budget is spent.

Damage of learned widths. Quantization error falls as 4^(-b). Where the search has come to rest, the last bit of every
site buys the same loss per BOP: ∂L_i/∂b = -λ·∂C/∂b_i. With L_i = w_i·4^(-b) this gives w_i, and, in units of λ/ln 4,

    damage_i(n) = C_i · (4^(b̃_i - n) - 1)            C_i = ∂C/∂b_i at the learned widths b̃

Nothing in it is tuned: the search's own result says how much each site is worth. (This damage model is ours; the paper
stops at rounding and overshoots its budget.)
"""

from __future__ import annotations

import logging
import math
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import coo_array

from qvit.cost import CostModel, format_bops
from qvit.errors import QvitError

_log = logging.getLogger(__name__)
RealWidths = Mapping[str, Sequence[float]]


@dataclass(frozen=True)
class Problem:
    """Choose one option per unit so that Σ coefficient·width[left]·width[right] ≤ budget.

    A unit is one width: a site, or one head of it.

    Attributes:
        options: Candidate widths of each unit, ascending.
        damages: Damage of each option, same lengths.
        coefficients, left, right: See `CostModel.pairs`; indices of units.
        budget: Limit on the sum.
    """

    options: Sequence[Sequence[int]]
    damages: Sequence[Sequence[float]]
    coefficients: Sequence[int]
    left: Sequence[int]
    right: Sequence[int]
    budget: int

    def cost(self, widths: Sequence[int]) -> int:
        """The exact cost of integer widths."""
        return sum(c * widths[i] * widths[j] for c, i, j in zip(self.coefficients, self.left, self.right, strict=True))


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


def solve(problem: Problem, *, exact: bool = True) -> list[int]:
    """The widths of least total damage within the budget.

    Args:
        problem: What to choose from; its smallest options must fit.
        exact: Search until optimality is proven; else stop at the root of the tree, which is quick, deterministic, and
            near the optimum.

    Raises:
        QvitError: If nothing fits.
    """
    excluded: list[list[int]] = []
    found = _integer_program(problem, exact, excluded)
    while found is not None and problem.cost(found) > problem.budget and len(excluded) < 100:
        excluded.append(found)  # over the budget by less than the solver's tolerance
        found = _integer_program(problem, exact, excluded)
    answers = [
        answer for answer in (found, _greedy(problem)) if answer is not None and problem.cost(answer) <= problem.budget
    ]
    return _spend_rest(problem, min(answers, key=lambda answer: _damage(problem, answer)))


def _spend_rest(problem: Problem, widths: list[int]) -> list[int]:
    """Raises one unit at a time, the one that saves most damage, while the budget has room."""
    while True:
        best: tuple[float, list[int]] | None = None
        for unit, (options, damages) in enumerate(zip(problem.options, problem.damages, strict=True)):
            position = options.index(widths[unit])
            if position + 1 < len(options):
                gain = damages[position] - damages[position + 1]
                if gain > 0 and (best is None or gain > best[0]):
                    raised = [*widths[:unit], options[position + 1], *widths[unit + 1 :]]
                    if problem.cost(raised) <= problem.budget:
                        best = (gain, raised)
        if best is None:
            return widths
        widths = best[1]


def _damage(problem: Problem, widths: Sequence[int]) -> float:
    return sum(
        damages[options.index(width)]
        for options, damages, width in zip(problem.options, problem.damages, widths, strict=True)
    )


def _greedy(problem: Problem) -> list[int]:
    """Widths by greedy descent from the least damage everywhere.

    One unit is lowered at a time: the one that adds the least damage per BOP saved.
    """
    widths = [
        options[int(np.argmin(damages))] for options, damages in zip(problem.options, problem.damages, strict=True)
    ]
    neighbours: list[list[tuple[int, int]]] = [[] for _ in widths]
    for c, i, j in zip(problem.coefficients, problem.left, problem.right, strict=True):
        neighbours[i].append((c, j))
        neighbours[j].append((c, i))
    total = problem.cost(widths)
    while total > problem.budget:
        best: tuple[float, int, int, int] | None = None
        for unit, (options, damages) in enumerate(zip(problem.options, problem.damages, strict=True)):
            position = options.index(widths[unit])
            saved = (
                sum(c * widths[other] for c, other in neighbours[unit]) * (widths[unit] - options[position - 1])
                if position
                else 0
            )
            if saved > 0:
                price = (damages[position - 1] - damages[position]) / saved
                if best is None or price < best[0]:
                    best = (price, unit, options[position - 1], saved)
        if best is None:
            raise QvitError(f"no allocation fits into {format_bops(problem.budget)}")
        widths[best[1]] = best[2]
        total = problem.cost(widths)
    return widths


def _integer_program(problem: Problem, exact: bool, excluded: Sequence[Sequence[int]]) -> list[int] | None:
    """The widths that HiGHS finds, none of those that are excluded, or None."""
    start = np.cumsum([0, *(len(options) for options in problem.options)])
    size = int(start[-1])
    pairs = [(c, i, j) for c, i, j in zip(problem.coefficients, problem.left, problem.right, strict=True) if c]
    base = size + np.cumsum([0, *(len(problem.options[i]) * len(problem.options[j]) for _, i, j in pairs)])
    rows: list[int] = []
    columns: list[int] = []
    values: list[float] = []
    limits: list[float] = []

    def add_row(entries: list[tuple[int, float]], right_hand_side: float) -> None:
        rows.extend([len(limits)] * len(entries))
        columns.extend(column for column, _ in entries)
        values.extend(value for _, value in entries)
        limits.append(right_hand_side)

    for unit, options in enumerate(problem.options):
        add_row([(int(start[unit]) + n, 1.0) for n in range(len(options))], 1.0)
    budget_row: list[tuple[int, float]] = []
    unit_cost = max(1.0, problem.budget / 1e4)
    for position, (c, i, j) in enumerate(pairs):
        many = len(problem.options[j])
        first = int(base[position])
        for n, width in enumerate(problem.options[i]):
            add_row([(first + n * many + m, 1.0) for m in range(many)] + [(int(start[i]) + n, -1.0)], 0.0)
            budget_row += [
                (first + n * many + m, c * width * other / unit_cost) for m, other in enumerate(problem.options[j])
            ]
        for m in range(many):
            add_row(
                [(first + n * many + m, 1.0) for n in range(len(problem.options[i]))] + [(int(start[j]) + m, -1.0)], 0.0
            )
    equalities = len(limits)
    add_row(budget_row, problem.budget / unit_cost)
    for widths in excluded:
        chosen = [int(start[unit]) + options.index(widths[unit]) for unit, options in enumerate(problem.options)]
        add_row([(column, 1.0) for column in chosen], len(chosen) - 1.0)
    lower = np.array(limits)
    lower[equalities:] = -np.inf
    total = int(base[-1])
    matrix = coo_array((values, (rows, columns)), shape=(len(limits), total)).tocsr()
    damage = np.concatenate([np.asarray(own, dtype=float) for own in problem.damages])
    objective = np.zeros(total)
    objective[:size] = damage / max(1e-30, float(np.abs(damage).max()))
    integrality = np.zeros(total)
    integrality[:size] = 1
    with _native_stdout_silenced():
        answer = milp(
            objective,
            integrality=integrality,
            bounds=Bounds(0, 1),
            constraints=LinearConstraint(matrix, cast("Any", lower), cast("Any", np.array(limits))),
            options={"mip_rel_gap": 0.0} if exact else {"node_limit": 1, "mip_rel_gap": 2e-3},
        )
    if answer.status not in (0, 1) or answer.x is None:
        _log.info("the integer program found no answer (%s); the greedy one is taken", answer.message)
        return None
    return [
        options[int(np.argmax(answer.x[start[unit] : start[unit + 1]]))] for unit, options in enumerate(problem.options)
    ]


@contextmanager
def _native_stdout_silenced() -> Iterator[None]:
    """HiGHS prints a line of debugging to the process's stdout now and then, which would end up in someone's JSON."""
    sys.stdout.flush()
    try:
        saved = os.dup(1)
    except OSError:
        yield
        return
    try:
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), 1)
        yield
    finally:
        os.dup2(saved, 1)
        os.close(saved)
