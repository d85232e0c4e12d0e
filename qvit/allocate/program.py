"""The widths of least damage within a budget: an integer program.

BOPs are products of two unknown widths, so with binary x_{i,n} ("site i gets n bits") each pair (i, j) of a matmul gets
variables z_{n,m} ≥ 0 with Σ_m z_{n,m} = x_{i,n} and Σ_n z_{n,m} = x_{j,m}; for binary x this makes z = x_i·x_j exactly,
and

    minimise     Σ_i Σ_n damage_i(n)·x_{i,n}
    subject to   Σ_pairs Σ_{n,m} coefficient·rate(n,m)·z_{n,m} ≤ budget        Σ_n x_{i,n} = 1 for every i

is linear, whatever the rates (n·m for BOPs); costs of a unit's own (bytes, milliseconds) are added to the budget's row.
HiGHS (scipy.optimize.milp) solves it to optimality; where many plans are nearly the best, so that a proof would take
hours, it stops after `NODE_LIMIT` nodes of its tree and says how near the optimum its answer is known to be. For the
freezing of a search it stops at the root: that takes a second for DeiT-S and was within 0.1 % of the optimum where that
could be computed. Both are the same on every machine, as a time limit would not be. The answer is checked in exact
integers, compared with a greedy descent, and spare budget is spent. To optimality, the Lagrangian relaxation first
strikes out every option that it proves to be in no optimum (`relaxation.py`): where the products form a forest, HiGHS
is left with a small problem.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import coo_array

from qvit.allocate.greedy import greedy
from qvit.allocate.problem import Problem, filled
from qvit.allocate.relaxation import products_of, reduced

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
    candidates += [] if candidates and exact else [greedy(problem)]
    fitting = [answer for answer in candidates if problem.cost(answer) <= problem.budget]
    return filled(problem, min(fitting, key=problem.damage), steps=1)


def _integer_program(problem: Problem, exact: bool, excluded: Sequence[Sequence[int]]) -> list[int] | None:
    """The widths that HiGHS finds, none of those that are excluded, or None."""
    start = np.cumsum([0, *(len(options) for options in problem.options)])
    size = total = int(start[-1])
    rows: list[NDArray[Any]] = []
    columns: list[NDArray[Any]] = []
    values: list[NDArray[Any]] = []
    limits: list[float] = []

    def add_row(own_columns: NDArray[Any], own_values: NDArray[Any], right_hand_side: float) -> None:
        rows.append(np.full(len(own_columns), len(limits)))
        columns.append(own_columns)
        values.append(own_values)
        limits.append(right_hand_side)

    for unit, options in enumerate(problem.options):
        add_row(start[unit] + np.arange(len(options)), np.ones(len(options)), 1.0)
    costs: list[tuple[NDArray[Any], NDArray[Any]]] = []  # columns and values of the budget's row
    for index, (c, i, j) in enumerate(zip(problem.coefficients, problem.left, problem.right, strict=True)):
        if not c:
            continue
        products = products_of(problem, index)
        z = total + np.arange(products.size).reshape(products.shape)
        total += products.size
        costs.append((z.ravel(), products.ravel()))
        for unit, sums in ((i, z), (j, z.T)):
            for n, own in enumerate(sums):
                add_row(np.append(own, start[unit] + n), np.append(np.ones(len(own)), -1.0), 0.0)
    if problem.additive:
        costs.append((np.arange(size), np.concatenate(problem.additive)))
    equalities = len(limits)
    unit_cost = max(1e-9 if problem.additive or problem.rates else 1.0, problem.budget / 1e4)
    if costs:
        found, prices = (np.concatenate(parts) for parts in zip(*costs, strict=True))
        add_row(found, prices / unit_cost, problem.budget / unit_cost)
    for widths in excluded:
        chosen = [start[unit] + options.index(widths[unit]) for unit, options in enumerate(problem.options)]
        add_row(np.array(chosen), np.ones(len(chosen)), len(chosen) - 1.0)
    lower = np.array(limits)
    lower[equalities:] = -np.inf
    entries = (np.concatenate(rows), np.concatenate(columns))
    matrix = coo_array((np.concatenate(values), entries), shape=(len(limits), total)).tocsr()
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
