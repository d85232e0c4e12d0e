"""The Lagrangian relaxation of an allocation: exact, in a millisecond, where the products form a forest.

    L(λ) = min over widths of  Σ damage + λ·(cost - budget)  ≤  the least damage within the budget, for every λ ≥ 0

Units are nodes, products of two widths are edges. In a ViT they form stars: the input of `qkv` with all the W_q, W_k
and W_v that it meets, q with k of one head, and so on. On a forest the minimum is found by dynamic programming from the
leaves to the roots, all nodes of one depth at once: as exact for the bilinear bit operations as for additive costs.
Passed back down, the same numbers give for every option of every unit the least value of any choice that contains it.
An option whose value exceeds the damage of a known answer is in no better one: `reduced` strikes it out.

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
        edges: dict[tuple[int, int], float] = {}
        for c, i, j in zip(problem.coefficients, problem.left, problem.right, strict=True):
            if i == j:
                self.own[i] += c * self.widths[i] ** 2
            elif c:
                key = (min(i, j), max(i, j))
                edges[key] = edges.get(key, 0) + c
        self._grow(units, edges)

    def _grow(self, units: int, edges: dict[tuple[int, int], float]) -> None:
        """Parents and depths, breadth first from the unit with most neighbours in each tree."""
        self.neighbours: list[list[tuple[int, float]]] = [[] for _ in range(units)]
        for (i, j), c in edges.items():
            self.neighbours[i].append((j, c))
            self.neighbours[j].append((i, c))
        parent, weight, depth = np.full(units, -1), np.zeros(units), np.full(units, -1)
        trees = 0
        for root in sorted(range(units), key=lambda unit: -len(self.neighbours[unit])):
            if depth[root] >= 0:
                continue
            trees, depth[root], queue = trees + 1, 0, deque([root])
            while queue:
                unit = queue.popleft()
                for other, c in self.neighbours[unit]:
                    if depth[other] < 0:
                        parent[other], weight[other], depth[other] = unit, c, depth[unit] + 1
                        queue.append(other)
        self.is_forest = len(edges) == units - trees
        self.parent, self.weight = parent, weight
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
            down = (rest[:, None, :] + price * self._products(nodes)).min(2)
            tree[nodes] = belief[nodes] + down
        return least, tree - tree.min(1, keepdims=True) + least

    def _products(self, nodes: NDArray[np.int64]) -> NDArray[np.float64]:
        """Cost of the product with the parent: (nodes, own options, parent's options)."""
        above = self.widths[self.parent[nodes]]
        return self.weight[nodes, None, None] * self.widths[nodes][:, :, None] * above[:, None, :]

    def _upwards(
        self, own: NDArray[np.float64], price: float
    ) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.int64]]:
        """Beliefs of subtrees, messages to parents (both units × options), and the choice."""
        belief, messages = own.copy(), np.zeros_like(own)
        answers = np.zeros(own.shape, dtype=np.int64)
        for nodes in self.levels[:0:-1]:
            values = belief[nodes][:, :, None] + price * self._products(nodes)
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
                slope = sum(c * self.widths[other, chosen[other]] for other, c in around)
                chosen[unit] = (own[unit] + price * slope * self.widths[unit]).argmin()
            if (before == chosen).all():
                break
        return chosen


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
