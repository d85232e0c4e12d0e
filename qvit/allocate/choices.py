"""Sites, heads, pins and ties as units of a `Problem`, and its answer as widths by site.

Every head of every site is a unit of its own, unless a tie makes several into one. A pin leaves a single option.

    pins    "blocks.0.*=8"                                 all matching sites, all heads; a later pin wins
    ties    "blocks.*.attn.query=blocks.*.attn.key"        sites whose wildcards stand for the same text, head by head
            "blocks.0.attn.qkv.*_weight"                   all matching sites share one width, all their heads

The first and the last layer (patch embedding and classifiers) are pinned to `boundary` bits before any pin.
"""

from __future__ import annotations

import fnmatch
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from qvit.allocate.problem import Problem
from qvit.allocate.relaxation import Relaxation
from qvit.allocate.units import Unit
from qvit.errors import UsageError, nearest
from qvit.measure import Sensitivity
from qvit.plan.cost import FLOAT_BITS, CostModel

Pin = str | tuple[str, int]


@dataclass(frozen=True)
class Choices:
    """A problem without budget, and what its units stand for.

    Attributes:
        problem: Budget 0.
        counts: How many widths each site has.
        unit_of: The unit of every width, sites in order, heads within.
    """

    problem: Problem
    counts: dict[str, int]
    unit_of: list[int]

    def widths(self, answer: list[int]) -> dict[str, tuple[int, ...]]:
        """Widths by site."""
        found, start = {}, 0
        for name, count in self.counts.items():
            found[name] = tuple(answer[unit] for unit in self.unit_of[start : start + count])
            start += count
        return found

    def within(self, budget: float) -> Problem:
        """The problem with a budget."""
        return replace(self.problem, budget=budget)

    def extremes(self) -> tuple[float, float]:
        """The smallest and the largest cost there is."""
        problem = self.problem
        if problem.additive:
            return sum(map(min, problem.additive)), sum(map(max, problem.additive))
        if problem.rates:  # what was measured need not grow with the widths
            relaxation = Relaxation(problem)
            low, high = (problem.cost(relaxation.minimise(sign, damage_weight=0.0)) for sign in (1.0, -1.0))
            return low, high
        low, high = (problem.cost([own[end] for own in problem.options]) for end in (0, -1))
        return low, high


def choices(
    cost: CostModel,
    sensitivity: Sensitivity,
    unit: Unit,
    pins: Iterable[Pin] = (),
    ties: Iterable[str] = (),
    boundary: int | None = 8,
) -> Choices:
    """The problem of a model: see `plans.allocate_plan` for the arguments.

    Raises:
        UsageError: A sensitivity of another model, a pattern that matches nothing, or pins that contradict a tie.
    """
    sensitivity.check(cost.sites)
    counts = {name: len(sensitivity.table[name]) if name in sensitivity.table else 1 for name in cost.sites}
    flat = [(name, head) for name, count in counts.items() for head in range(count)]
    pinned = _pins(cost, sensitivity, pins, boundary)
    index = {own: position for position, own in enumerate(flat)}
    tied = np.array([(index[g[0]], index[own]) for g in _tied(cost, counts, ties) for own in g], dtype=int).reshape(
        -1, 2
    )
    links = coo_array((np.ones(len(tied)), tuple(tied.T)), shape=(len(flat), len(flat)))
    number, labels = connected_components(links, directed=False)
    unit_of = labels.tolist()
    members: list[list[tuple[str, int]]] = [[] for _ in range(number)]
    for own, unit_index in zip(flat, unit_of, strict=True):
        members[unit_index].append(own)
    options = [_options(cost, sensitivity, unit, own, pinned) for own in members]
    damages = [
        [sum(sensitivity.damage(*m, width) for m in own if m[0] in sensitivity.table) for width in widths]
        for own, widths in zip(members, options, strict=True)
    ]
    if unit.is_additive:
        additive = [
            [sum(unit.head_cost(cost.sites[name], counts[name], width) for name, _ in own) for width in widths]
            for own, widths in zip(members, options, strict=True)
        ]
        return Choices(Problem(options, damages, [], [], [], 0, additive), counts, unit_of)
    coefficients, left, right = cost.pairs(counts)
    pairs = [unit_of[i] for i in left], [unit_of[j] for j in right]
    problem = Problem(options, damages, coefficients, *pairs, 0)
    if unit.products:
        problem = _by_rates(problem, cost, counts, unit)
    return Choices(problem, counts, unit_of)


def _by_rates(problem: Problem, cost: CostModel, counts: dict[str, int], unit: Unit) -> Problem:
    """The problem with products that cost what was measured; a head takes its share of a product's time."""
    matmuls = [matmul for matmul in cost.matmuls for _ in range(max(counts[matmul.left], counts[matmul.right]))]
    heads = Counter(matmuls)
    rates = [
        {(n, m): unit.rate(matmul, n, m) / heads[matmul] for n in problem.options[i] for m in problem.options[j]}
        for matmul, i, j in zip(matmuls, problem.left, problem.right, strict=True)
    ]
    return replace(problem, coefficients=[1] * len(rates), rates=rates)


def _options(
    cost: CostModel, sensitivity: Sensitivity, unit: Unit, members: list[tuple[str, int]], pinned: dict[str, int]
) -> list[int]:
    """The widths that all members of a unit may have."""
    names = list(dict.fromkeys(name for name, _ in members))
    if left_out := [name for name in names if name not in sensitivity.table]:
        if not all(unit.serves(name, FLOAT_BITS) for name in names):
            raise UsageError(
                f"the sensitivity leaves '{left_out[0]}' out, and the latency table has no time of it in float"
            )
        return [FLOAT_BITS]
    fixed = {pinned[name]: name for name in reversed(names) if name in pinned}
    if len(fixed) > 1:
        (other, second), (one, first) = list(fixed.items())[-2:]
        raise UsageError(
            f"'{first}' (pinned to {one} bits) is tied to '{second}' (pinned to {other}): change a pin or the tie"
        )
    widths = list(fixed or sensitivity.widths)
    for name in names:
        if not (widths := [width for width in widths if unit.serves(name, width)]):
            raise UsageError(f"the latency table has no entry for '{name}' at any width that it may have")
    return widths


def _pins(cost: CostModel, sensitivity: Sensitivity, pins: Iterable[Pin], boundary: int | None) -> dict[str, int]:
    """Width by site; the last pin wins."""
    if boundary is not None and not 2 <= boundary <= 16:
        raise UsageError(f"boundary {boundary} must lie between 2 and 16 bits, or be None for free")
    pinned: dict[str, int] = {}
    if boundary is not None:
        ends = [name for name, site in cost.sites.items() if site.position != "block"]
        pinned = {name: boundary for name in ends if name in sensitivity.table}
    for pin in pins:
        pattern, bits = _parsed_pin(pin)
        matching = [name for name in fnmatch.filter(cost.sites, pattern) if name in sensitivity.table]
        if not matching:
            raise UsageError(f"pin '{pattern}' matches no site that was measured{nearest(pattern, sensitivity.table)}")
        pinned |= dict.fromkeys(matching, bits)
    return pinned


def _parsed_pin(pin: Pin) -> tuple[str, int]:
    pattern, bits = pin.rpartition("=")[::2] if isinstance(pin, str) else pin
    text = str(bits).strip().lower().removesuffix("bit")
    if not pattern or not text.isdecimal() or not 2 <= int(text) <= 16:
        raise UsageError(f"pin '{pin}' is not PATTERN=BITS with 2 to 16 bits, such as 'blocks.0.*=8'")
    return pattern.strip(), int(text)


def _tied(cost: CostModel, counts: dict[str, int], ties: Iterable[str]) -> list[list[tuple[str, int]]]:
    """Groups of (site, head) that share a width."""
    groups: list[list[tuple[str, int]]] = []
    for tie in ties:
        patterns = [part.strip() for part in tie.split("=")]
        matching = [
            {name: key for name in cost.sites if (key := _wildcards(part, name)) is not None} for part in patterns
        ]
        for part, found in zip(patterns, matching, strict=True):
            if not found:
                raise UsageError(f"tie '{tie}': '{part}' matches no site{nearest(part, cost.sites)}")
        if len(patterns) == 1:
            groups.append([(name, head) for name in matching[0] for head in range(counts[name])])
            continue
        together: dict[tuple[str, ...], list[str]] = {}
        for found in matching:
            for name, key in found.items():
                together.setdefault(key, []).append(name)
        several = [list(dict.fromkeys(names)) for names in together.values() if len(set(names)) > 1]
        if not several:
            raise UsageError(f"tie '{tie}': no two sites agree in what the wildcards stand for")
        for names in several:
            heads = {counts[name] for name in names}
            if len(heads) == 1:
                groups += [[(name, head) for name in names] for head in range(heads.pop())]
            else:
                groups.append([(name, head) for name in names for head in range(counts[name])])
    return groups


def _wildcards(pattern: str, name: str) -> tuple[str, ...] | None:
    """What `*` and `?` of the pattern stand for in the name; None if it does not match."""
    parts = {"*": "(.*)", "?": "(.)"}
    match = re.fullmatch("".join(parts.get(letter) or re.escape(letter) for letter in pattern), name)
    return None if match is None else match.groups()
