"""Widths of tokens as options of the integer program: plain ones, a width of the class token, splits of the patches.

A product with an operand whose N tokens have widths b_t costs MACs/N · (Σ_t b_t) · b' (`plan/cost.py`). The sum of its
tokens' widths is all that costs depend on, so it takes the width's place: the problem is still one of products of two
whole numbers, with coefficients divided by N, and what is known of it (exact bounds on forests, the frontier) holds.

    plain      b for all tokens                    sum  N·b
    class      c for the p prefix tokens, b < c         p·c + (N - p)·b
    split      h for the important k tokens, l < h      k·h + (N - k)·l          prefix tokens are important
    both       c, h, l                                  p·c + (k - p)·h + (N - k)·l

The damage of an option is the sum over its tokens of what their places add at their widths
(`measure/token_places.py`). Of options with equal sums the one of least damage is left, and none that costs more than
another and hurts as much: costs grow with the sum, so this loses no optimum. As groups of tokens have one lower width
for all heads, the heads of such an activation share one width, too.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from qvit.allocate.choices import Choices, Pin, choices
from qvit.allocate.plans import plan_with_widths
from qvit.allocate.units import Unit
from qvit.measure import Sensitivity
from qvit.plan.cost import CostModel, TokenWidths
from qvit.plan.quant_plan import QuantPlan, Rule
from qvit.plan.spec import TokenSplit


@dataclass(frozen=True)
class TokenOption:
    """Widths of an activation's tokens.

    Attributes:
        width: The tensor's, that of prefix tokens.
        split: The groups; None for one width.
    """

    width: int
    split: TokenSplit | None = None

    @property
    def widths(self) -> Sequence[int]:
        """As `cost.CostModel` takes them."""
        return (self.width,) if self.split is None else TokenWidths((self.width,), self.split)


@dataclass(frozen=True)
class TokenCandidates:
    """What widths of tokens are tried.

    Attributes:
        class_widths: Of prefix tokens; none for no such width.
        shares: Of important tokens; none for no splits.
    """

    class_widths: tuple[int, ...] = (8,)
    shares: tuple[float, ...] = (0.25, 0.5, 0.75)

    def options(self, widths: Sequence[int], prefix: int) -> Iterator[TokenOption]:
        """All of them, for a tensor of these widths with so many prefix tokens."""
        class_widths = self.class_widths if prefix else ()
        for low in widths:
            yield TokenOption(low)
            yield from (TokenOption(own, TokenSplit(0, low)) for own in class_widths if own > low)
            for share in self.shares:
                for high in (width for width in widths if width > low):
                    yield TokenOption(high, TokenSplit(share, low))
                    yield from (TokenOption(own, TokenSplit(share, low, high)) for own in class_widths if own > high)


def damage_of(option: TokenOption, places: NDArray[np.float64], widths: Sequence[int], prefix: int) -> float:
    """The sum over all tokens of what they add at their widths.

    Args:
        option: Which.
        places: (tokens by importance, widths).
        widths: Those of the columns.
        prefix: How many prefix tokens there are.
    """
    column = {width: index for index, width in enumerate(widths)}
    if option.split is None:
        return float(places[:, column[option.width]].sum())
    important = option.split.important(len(places), prefix)
    high = option.width if option.split.high is None else option.split.high
    groups = ((0, prefix, option.width), (prefix, important, high), (important, len(places), option.split.low))
    return float(sum(places[start:end, column[width]].sum() for start, end, width in groups))


def sum_of(option: TokenOption, tokens: int, prefix: int) -> int:
    """The sum of the tokens' widths."""
    return tokens * option.width if option.split is None else option.split.total(option.width, tokens, prefix)


@dataclass(frozen=True)
class TokenChoices(Choices):
    """Choices in which some sites have sums of their tokens' widths for a width.

    Attributes:
        tokens: What such a sum stands for, by site.
    """

    tokens: Mapping[str, Mapping[int, TokenOption]]

    def widths(self, answer: list[int]) -> dict[str, Sequence[int]]:
        found: dict[str, Sequence[int]] = dict(super().widths(answer))
        return found | {site: own[found[site][0]].widths for site, own in self.tokens.items()}


def token_choices(
    cost: CostModel,
    sensitivity: Sensitivity,
    places: Mapping[str, NDArray[np.float64]],
    candidates: TokenCandidates,
    pins: Iterable[Pin] = (),
    boundary: int | None = 8,
) -> TokenChoices:
    """The problem of a model whose tokens may differ in width at the sites of `places`; its budgets are bit operations.

    Args:
        cost: The model's costs.
        sensitivity: Of the same model; of the sites of `places` its widths alone count.
        places: Damages by site, (tokens, widths of the sensitivity), none increasing in the width (`spread`).
        candidates: What is tried.
        pins, boundary: See `allocate_plan`; a pinned site has one width for all tokens.
    """
    plain = choices(cost, sensitivity, Unit("bit_operations"), pins, list(places), boundary)
    starts = dict(zip(plain.counts, np.cumsum([0, *plain.counts.values()]).tolist(), strict=False))
    problem, tokens = plain.problem, {}
    options, damages, divisors = list(problem.options), list(problem.damages), [1] * len(problem.options)
    for site, own in places.items():
        unit, count, prefix = plain.unit_of[starts[site]], len(own), cost.sites[site].layout.prefix_tokens
        if len(options[unit]) == 1:
            continue
        best: dict[int, tuple[float, TokenOption]] = {}
        for option in candidates.options(sensitivity.widths, prefix):
            total, damage = sum_of(option, count, prefix), damage_of(option, own, sensitivity.widths, prefix)
            if total not in best or damage < best[total][0]:
                best[total] = damage, option
        kept = _undominated(best)
        options[unit], damages[unit] = list(kept), [damage for damage, _ in kept.values()]
        divisors[unit], tokens[site] = count, {total: option for total, (_, option) in kept.items()}
    pairs = zip(problem.coefficients, problem.left, problem.right, strict=True)
    coefficients = [c // (divisors[i] * divisors[j]) for c, i, j in pairs]
    changed = replace(problem, options=options, damages=damages, coefficients=coefficients)
    return TokenChoices(changed, plain.counts, plain.unit_of, tokens)


def _undominated(best: Mapping[int, tuple[float, TokenOption]]) -> dict[int, tuple[float, TokenOption]]:
    """Those than which none that costs less hurts as little, by ascending sum."""
    kept: dict[int, tuple[float, TokenOption]] = {}
    least = float("inf")
    for total in sorted(best):
        if best[total][0] < least:
            kept[total], least = best[total], best[total][0]
    return kept


def token_plan(cost: CostModel, sensitivity: Sensitivity, widths: Mapping[str, Sequence[int]], name: str) -> QuantPlan:
    """The plan of an answer's widths: on the grids that were measured, with a scale for each width of tokens."""
    plan = plan_with_widths(cost, sensitivity, widths, name)
    rules = []
    for site, own in widths.items():
        if isinstance(own, TokenWidths):
            groups = {"bit_width_range": [own.split.low, own[0]], "token_bit_width": own.split.to_json()}
            rules.append(Rule(site, groups | {"switchable_scale": True}))
    return plan.with_rules(*rules, name=name).resolve(cost.sites)
