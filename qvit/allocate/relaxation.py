"""The Lagrangian relaxation of an allocation: exact, in a millisecond, where the products form a forest.

    L(λ) = min over widths of  Σ damage + λ·(cost - budget)  ≤  the least damage within the budget, for every λ ≥ 0

Units are nodes, products of two widths are edges. In a ViT they form stars: the input of `qkv` with all the W_q, W_k
and W_v that it meets, q with k of one head, and so on. On a forest the minimum is found by dynamic programming from the
leaves to the roots, all nodes of one depth at once: as exact for the bilinear bit operations as for additive costs.
Passed back down, the same numbers give for every option of every unit the least value of any choice that contains it.
An option whose value exceeds the damage of a known answer is in no better one: `reduced` strikes it out. What a product
costs is a table over the options of its two units, so measured milliseconds are no harder than bit operations.

Ties between sites can close a circle, which has no such order: `Relaxation.is_forest` says so, and `minimise` then
moves one unit at a time until none improves, which is a good answer and not a proof.
"""

from __future__ import annotations

from collections import deque

import numpy as np
from numpy.typing import NDArray

from qvit.allocate.problem import Problem, filled

_HALVINGS = 60


class Relaxation:
    """Minimises damage + λ·cost for any λ.

    Args:
        problem: Its budget plays no part here.
    """

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        units, most = len(problem.options), max(map(len, problem.options))
        self.lengths = np.array([len(own) for own in problem.options])
        self.widths = np.zeros((units, most))
        self.damages = np.full((units, most), np.inf)
        self.own = np.zeros((units, most))
        for unit, (options, damages) in enumerate(zip(problem.options, problem.damages, strict=True)):
            self.widths[unit, : len(options)] = options
            self.damages[unit, : len(options)] = damages
            if problem.additive:
                self.own[unit, : len(options)] = problem.additive[unit]
        edges: dict[tuple[int, int], NDArray[np.float64]] = {}
        for index, (c, i, j) in enumerate(zip(problem.coefficients, problem.left, problem.right, strict=True)):
            if not c:
                continue
            costs = np.zeros((most, most))  # by the options of the left unit and of the right one
            costs[: self.lengths[i], : self.lengths[j]] = products_of(problem, index)
            if i == j:
                self.own[i] += costs.diagonal()
            else:
                key, costs = ((i, j), costs) if i < j else ((j, i), costs.T)
                edges[key] = edges[key] + costs if key in edges else costs
        self._grow(units, most, edges)

    def _grow(self, units: int, most: int, edges: dict[tuple[int, int], NDArray[np.float64]]) -> None:
        """Parents and depths, breadth first from the unit with most neighbours in each tree."""
        self.neighbours: list[list[tuple[int, NDArray[np.float64]]]] = [[] for _ in range(units)]
        for (i, j), costs in edges.items():  # by the options of the other unit, and one's own
            self.neighbours[i].append((j, costs.T))
            self.neighbours[j].append((i, costs))
        parent, above, depth = np.full(units, -1), np.zeros((units, most, most)), np.full(units, -1)
        trees = 0
        for root in sorted(range(units), key=lambda unit: -len(self.neighbours[unit])):
            if depth[root] >= 0:
                continue
            trees, depth[root], queue = trees + 1, 0, deque([root])
            while queue:
                unit = queue.popleft()
                for other, costs in self.neighbours[unit]:
                    if depth[other] < 0:
                        parent[other], above[other], depth[other] = unit, costs, depth[unit] + 1
                        queue.append(other)
        self.is_forest = len(edges) == units - trees
        self.parent, self.above = parent, above  # the cost of the product with the parent: own options × parent's
        self.levels = [np.flatnonzero(depth == level) for level in range(int(depth.max()) + 1)]

    def minimise(self, price: float, *, damage_weight: float = 1.0) -> list[int]:
        """The widths of least damage_weight·damage + price·cost."""
        absent = np.isinf(self.damages)
        own = np.where(absent, np.inf, damage_weight * np.where(absent, 0.0, self.damages) + price * self.own)
        chosen = self._upwards(own, price)[2] if self.is_forest else self._alternating(own, price)
        return [int(self.widths[unit, position]) for unit, position in enumerate(chosen)]

    def bounds(self, price: float) -> tuple[float, NDArray[np.float64]]:
        """The least damage + price·cost, and that with a given option: (units, options). For a forest."""
        belief, messages, _ = self._upwards(self.damages + price * self.own, price)
        roots = self.levels[0]
        least = float(belief[roots].min(1).sum())
        tree = belief.copy()  # by unit the least of its own tree, given its option
        for nodes in self.levels[1:]:
            above = self.parent[nodes]
            rest = np.where(np.isinf(tree[above]), np.inf, tree[above] - messages[nodes])
            down = (rest[:, None, :] + price * self.above[nodes]).min(2)
            tree[nodes] = belief[nodes] + down
        return least, tree - tree.min(1, keepdims=True) + least

    def _upwards(
        self, own: NDArray[np.float64], price: float
    ) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.int64]]:
        """Beliefs of subtrees, messages to parents (both units × options), and the choice."""
        belief, messages = own.copy(), np.zeros_like(own)
        answers = np.zeros(own.shape, dtype=np.int64)
        for nodes in self.levels[:0:-1]:
            values = belief[nodes][:, :, None] + price * self.above[nodes]
            messages[nodes], answers[nodes] = values.min(1), values.argmin(1)
            np.add.at(belief, self.parent[nodes], messages[nodes])
        chosen = belief.argmin(1)
        for nodes in self.levels[1:]:
            chosen[nodes] = answers[nodes, chosen[self.parent[nodes]]]
        return belief, messages, chosen

    def _alternating(self, own: NDArray[np.float64], price: float) -> NDArray[np.int64]:
        chosen = self.damages.argmin(1)
        for _ in range(100):
            before = chosen.copy()
            for unit, around in enumerate(self.neighbours):
                chosen[unit] = (own[unit] + price * sum(costs[chosen[other]] for other, costs in around)).argmin()
            if (before == chosen).all():
                break
        return chosen


def products_of(problem: Problem, index: int) -> NDArray[np.float64]:
    """The costs of one product: (left unit's options, right unit's options)."""
    left, right = problem.options[problem.left[index]], problem.options[problem.right[index]]
    return np.array([[problem.product(index, n, m) for m in right] for n in left], dtype=float)


def reduced(problem: Problem) -> tuple[Problem, list[int]] | None:
    """The problem without options that no optimum has, and the best answer met on the way.

    None if nothing can be proven: the products form no forest, or nothing fits.
    """
    relaxation = Relaxation(problem)
    if not relaxation.is_forest:
        return None
    cheapest = relaxation.minimise(1.0, damage_weight=0.0)
    if problem.cost(cheapest) > problem.budget:
        return None
    free = relaxation.minimise(0.0)
    if problem.cost(free) <= problem.budget:
        return problem.restricted([[width] for width in free]), free
    best = cheapest
    low, high = 0.0, 1e-30
    spread = max(max(own) - min(own) for own in problem.damages)
    while problem.cost(relaxation.minimise(high)) > problem.budget and high < 1e30 * max(spread, 1e-30):
        high *= 4.0
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        answer = relaxation.minimise(middle)
        if problem.cost(answer) <= problem.budget:
            high = middle
            best = min(best, answer, key=problem.damage)
        else:
            low = middle
    best = filled(problem, best)
    limit = problem.damage(best)
    allowed = np.isfinite(relaxation.damages)
    for price in (low, high):
        _, values = relaxation.bounds(price)
        slack = 1e-9 * (abs(limit) + abs(price * problem.budget))
        allowed &= values - price * problem.budget <= limit + slack
    kept = [
        [width for n, width in enumerate(options) if allowed[unit, n] or width == best[unit]]
        for unit, options in enumerate(problem.options)
    ]
    return problem.restricted(kept), best
