"""The widths of least damage within a budget: an integer program.

BOPs are products of two unknown widths, so with binary x_{i,n} ("site i gets n bits") each pair (i, j) of a matmul gets
variables z_{n,m} ≥ 0 with Σ_m z_{n,m} = x_{i,n} and Σ_n z_{n,m} = x_{j,m}; for binary x this makes z = x_i·x_j exactly,
and

    minimise     Σ_i Σ_n damage_i(n)·x_{i,n}
    subject to   Σ_pairs Σ_{n,m} coefficient·n·m·z_{n,m} ≤ budget        Σ_n x_{i,n} = 1 for every i

is linear; costs of a unit's own (bytes, milliseconds) are added to the budget's row. HiGHS (scipy.optimize.milp) solves
it to optimality; where many plans are nearly the best, so that a proof would take hours, it stops after `NODE_LIMIT`
nodes of its tree and says how near the optimum its answer is known to be. For the freezing of a search it stops at the
root: that takes a second for DeiT-S and was within 0.1 % of the optimum where that could be computed. Both are the same
on every machine, as a time limit would not be. The answer is checked in exact integers, compared with a greedy descent,
and spare budget is spent. To optimality, the Lagrangian relaxation first strikes out every option that it proves to be
in no optimum (`relaxation.py`): where the products form a forest, HiGHS is left with a small problem.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import coo_array

from qvit.allocate.problem import Problem
from qvit.allocate.relaxation import reduced
from qvit.errors import QvitError

_log = logging.getLogger(__name__)
#: Nodes of the tree that are searched for a proof; about twenty seconds for DeiT-T, after `relaxation.py`.
NODE_LIMIT = 20_000


def solve(problem: Problem, *, exact: bool = True) -> list[int]:
    """The widths of least total damage within the budget.

    Args:
        problem: What to choose from; its smallest options must fit.
        exact: Search until optimality is proven, or for `NODE_LIMIT` nodes; else stop at the root of the tree, which is
            quick, deterministic, and near the optimum.

    Raises:
        QvitError: If nothing fits.
    """
    candidates: list[list[int]] = []
    smaller = problem
    if exact and (proven := reduced(problem)) is not None:
        smaller, incumbent = proven
        candidates.append(incumbent)
    excluded: list[list[int]] = []
    found = _integer_program(smaller, exact, excluded)
    while found is not None and problem.cost(found) > problem.budget and len(excluded) < 100:
        excluded.append(found)  # over the budget by less than the solver's tolerance
        found = _integer_program(smaller, exact, excluded)
    candidates += [] if found is None else [found]
    candidates += [] if candidates and exact else [_greedy(problem)]
    fitting = [answer for answer in candidates if problem.cost(answer) <= problem.budget]
    return _spend_rest(problem, min(fitting, key=problem.damage))


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


def _greedy(problem: Problem) -> list[int]:
    """Widths by greedy descent from the least damage everywhere.

    One unit is lowered at a time: the one that adds the least damage per BOP saved.
    """
    widths = [
        options[int(np.argmin(damages))] for options, damages in zip(problem.options, problem.damages, strict=True)
    ]
    neighbours: list[list[tuple[float, int]]] = [[] for _ in widths]
    for c, i, j in zip(problem.coefficients, problem.left, problem.right, strict=True):
        neighbours[i].append((c, j))
        neighbours[j].append((c, i))
    total = problem.cost(widths)
    while total > problem.budget:
        best: tuple[float, int, int, float] | None = None
        for unit, (options, damages) in enumerate(zip(problem.options, problem.damages, strict=True)):
            position = options.index(widths[unit])
            if not position:
                continue
            saved = sum(c * widths[other] for c, other in neighbours[unit]) * (widths[unit] - options[position - 1])
            if problem.additive:
                saved += problem.additive[unit][position] - problem.additive[unit][position - 1]
            if saved > 0:
                price = (damages[position - 1] - damages[position]) / saved
                if best is None or price < best[0]:
                    best = (price, unit, options[position - 1], saved)
        if best is None:
            raise QvitError(f"no allocation fits into a budget of {problem.budget}")
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
    unit_cost = max(1e-9, problem.budget / 1e4) if problem.additive else max(1.0, problem.budget / 1e4)
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
    if problem.additive:
        for unit, own in enumerate(problem.additive):
            budget_row += [(int(start[unit]) + n, value / unit_cost) for n, value in enumerate(own)]
    equalities = len(limits)
    add_row(budget_row, problem.budget / unit_cost)
    for widths in excluded:
        chosen = [int(start[unit]) + options.index(widths[unit]) for unit, options in enumerate(problem.options)]
        add_row([(column, 1.0) for column in chosen], len(chosen) - 1.0)
    lower = np.array(limits)
    lower[equalities:] = -np.inf
    total = int(base[-1])
    matrix = coo_array((values, (rows, columns)), shape=(len(limits), total)).tocsr()
    # What all options of a unit have in common would only drown their differences in the solver's tolerance.
    damages = [np.asarray(own, dtype=float) for own in problem.damages]
    damage = np.concatenate([own - own.min() for own in damages] if exact else damages)
    objective = np.zeros(total)
    scale = max(1e-30, float(np.abs(damage).max()))
    objective[:size] = damage / scale
    integrality = np.zeros(total)
    integrality[:size] = 1
    with _native_stdout_silenced():
        answer = milp(
            objective,
            integrality=integrality,
            bounds=Bounds(0, 1),
            constraints=LinearConstraint(matrix, cast("Any", lower), cast("Any", np.array(limits))),
            options={"mip_rel_gap": 0.0, "node_limit": NODE_LIMIT} if exact else {"node_limit": 1, "mip_rel_gap": 2e-3},
        )
    if answer.x is None:  # at the limit of nodes scipy calls the status unknown, and has an answer all the same
        _log.info("the integer program found no answer (%s); the greedy one is taken", answer.message)
        return None
    widths = [
        options[int(np.argmax(answer.x[start[unit] : start[unit + 1]]))] for unit, options in enumerate(problem.options)
    ]
    if exact and not answer.success:
        gap = (answer.fun - answer.mip_dual_bound) * scale / max(1e-30, problem.damage(widths))
        _log.info("the plan's predicted loss is within %.2g %% of the least; no more was proven", 100 * gap)
    return widths


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
