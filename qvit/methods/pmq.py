"""PMQ-style patch-wise widths: within each layer, important patches get more bits than the others, image by image.

After Xiao, Li, Yang and Gu, Patch-wise Mixed-Precision Quantization of Vision Transformer (2023, arXiv 2305.06559). Its
abstract says that bits are allocated by a global sensitivity metric and a Pareto frontier, and that widths of patches
are reallocated per layer at inference. Its metric, score, candidate widths and results could not be read, and there is
no public code: everything below is our reconstruction, not the paper's formulas.

    ranking     attention received from the class token in the block before (families/tokens.py)
    tensors     of each block: input of qkv, query, value, input of fc1, input of fc2; on request key
    split       the important share rho of the tokens gets b_hi, the others b_lo < b_hi
    scales      one per width from one calibration (switchable scale): both groups are quantized as plain ones are

`patchwise_plan` keeps every layer's average: rho·b_hi + (1 - rho)·b_lo = b, so it costs what the plain plan costs, but
for rounding rho·N down. `allocate_splits` chooses a split (or none) per block: with splits of equal cost the one that
hurts least, with splits of any cost the set that hurts least within one BOPs budget. As the weights' widths are given,
a block's cost depends on its own split alone: a knapsack with one item per block, solved exactly (`allocate`). Damage
is KL(float ‖ model) over calibration images with one block's split changed (the global metric of ZeroQ, Cai et al.
2020), measured where all other blocks are plain; damages of blocks are added up.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from statistics import mode

import torch
from torch import Tensor, nn

from qvit.allocate import Problem, solve
from qvit.errors import QvitError, UsageError
from qvit.measure.distance import distance_of
from qvit.measure.partial import Partial
from qvit.measure.probe import Probe
from qvit.plan.budget import format_bops
from qvit.plan.cost import CostModel
from qvit.plan.quant_plan import QuantPlan, Rule
from qvit.plan.spec import TensorSpec

LOW, HIGH = 2, 8


@dataclass(frozen=True)
class Split:
    """Widths of the two groups of a block's tokens; equal widths are no split.

    Attributes:
        high, low: Bits of the important tokens and of the others.
        share: The important share.
    """

    high: int
    low: int
    share: float

    @property
    def average(self) -> Fraction:
        """Mean width over the tokens."""
        share = Fraction(self.share).limit_denominator(1000)
        return share * self.high + (1 - share) * self.low


def keeping_average(width: int, share: float) -> list[Split]:
    """All splits with exactly this share and average, the narrowest first; none where the widths are used up."""
    splits = [Split(high, low, share) for low in range(width - 1, LOW - 1, -1) for high in range(width + 1, HIGH + 1)]
    return [split for split in splits if split.average == width]


def token_blocks(cost: CostModel, *, key: bool = False) -> dict[str, list[str]]:
    """The sites whose tokens are split, by the path of their block.

    Raises UsageError for a model whose tokens cannot differ in width.
    """
    blocks: dict[str, list[str]] = {}
    for name, site in cost.sites.items():
        if site.tokens and (key or not name.endswith(".attn.key")):
            blocks.setdefault(name.partition(".attn.")[0].partition(".mlp.")[0], []).append(name)
    if not blocks:
        raise UsageError(
            "the tokens of this model cannot differ in width: patch-wise plans are for VisionTransformers of plain "
            "blocks and for Swin"
        )
    return blocks


def split_plan(
    plan: QuantPlan, cost: CostModel, splits: Mapping[str, Split], *, key: bool = False, name: str | None = None
) -> QuantPlan:
    """A plan with these splits, by block, on top of a plain one.

    Args:
        plan: The plain plan; its widths of the split activations are replaced.
        cost: The model's sites.
        splits: By path of the block, for a tensor of its width (`block_widths`); one that is so many bits wider or
            narrower has both groups that much wider or narrower, as far as widths go. One with a width of its own for
            prefix tokens keeps it; one in float or with heads of several widths stays as it is. A block that is not
            named stays plain, as does a split of equal widths.
        key: Whether the keys are split, too.
    """
    blocks, base, widths = token_blocks(cost, key=key), switchable(plan, cost), block_widths(plan, cost, key=key)
    rules = []
    for block, split in splits.items():
        if block not in blocks:
            raise UsageError(f"'{block}' is no block with tokens: there are {', '.join(blocks)}")
        for site in blocks[block]:
            spec = base.sites[site]
            if spec is None or len(set(spec.widths)) > 1:
                continue
            further = _patch_width(spec) - widths[block]
            high, low = (min(max(width + further, LOW), HIGH) for width in (split.high, split.low))
            if has_class_width(spec) and spec.widths[0] > high:
                tokens = {"share": 0, "low": low} if high == low else {"share": split.share, "low": low, "high": high}
                rules.append(Rule(site, {"token_bit_width": tokens}))
                continue
            tokens = None if high == low else {"share": split.share, "low": low}
            rules.append(Rule(site, {"bit_width": high, "token_bit_width": tokens}))
    return base.with_rules(*rules, name=name).resolve(cost.sites)


def patchwise_plan(plan: QuantPlan, cost: CostModel, share: float, *, key: bool = False, steps: int = 0) -> QuantPlan:
    """The plan with every split activation at its own average: rho·b_hi + (1 - rho)·b_lo = b.

    Widths may differ from tensor to tensor. A tensor stays plain where its heads differ in width, where it is in float,
    or where no two widths have that average (at 2 and at 8 bits).

    Args:
        plan: The plain plan.
        cost: The model's sites.
        share: rho.
        key: Whether the keys are split, too.
        steps: Which of the possible splits, the narrowest being 0.

    Raises:
        UsageError: If no tensor can be split; the shares at which one can are named.
    """
    base = switchable(plan, cost).resolve(cost.sites)
    rules, widths = [], set()
    for site in (site for sites in token_blocks(cost, key=key).values() for site in sites):
        spec = base.sites[site]
        own = set() if spec is None else set(spec.widths)
        widths |= own
        possible = keeping_average(next(iter(own)), share) if len(own) == 1 else []
        if len(possible) > steps:
            split = possible[steps]
            tokens = {"share": split.share, "low": split.low}
            rules.append(Rule(site, {"bit_width": split.high, "token_bit_width": tokens}))
    if not rules:
        raise UsageError(_no_split(sorted(widths), share, steps))
    return base.with_rules(*rules, name=f"{plan.name}-patchwise-{share:g}").resolve(cost.sites)


def _no_split(widths: Sequence[int], share: float, steps: int) -> str:
    shares = sorted({Fraction(n, d) for d in range(2, 7) for n in range(1, d)})
    fitting = [
        f"{float(s):.3g}" for s in shares if any(len(keeping_average(width, float(s))) > steps for width in widths)
    ]
    found = " or ".join(map(str, widths))
    return f"no widths from {LOW} to {HIGH} bits average to {found} bits at a share of {share:g}" + (
        f"; shares that do: {', '.join(fitting)}"
        if fitting
        else ", nor at any other: such a plan has no room for a split"
    )


def block_widths(plan: QuantPlan, cost: CostModel, *, key: bool = False) -> dict[str, int]:
    """The width of the activations that are split, by block; the most frequent one, and the least of several such.

    Raises UsageError if all of a block's are in float.
    """
    resolved, widths = plan.resolve(cost.sites), {}
    for block, sites in token_blocks(cost, key=key).items():
        specs = [spec for site in sites if (spec := resolved.sites[site]) is not None]
        found = sorted(
            width for spec in specs for width in ([_patch_width(spec)] if has_class_width(spec) else set(spec.widths))
        )
        if not found:
            raise UsageError(f"plan '{plan.name}' has all activations of {block} in float: there is nothing to split")
        widths[block] = mode(found)
    return widths


def has_class_width(spec: TensorSpec) -> bool:
    """Whether prefix tokens alone have another width than the other tokens."""
    return spec.token_bit_width is not None and not spec.token_bit_width.ranks


def _patch_width(spec: TensorSpec) -> int:
    """The width of the tokens that a split is about."""
    split = spec.token_bit_width
    return split.low if split is not None and not split.ranks else spec.widths[0]


def switchable(plan: QuantPlan, cost: CostModel) -> QuantPlan:
    """The plan with a scale for each width, so that one calibration serves both groups."""
    resolved = plan.resolve(cost.sites)
    rules = [
        Rule(name, {"switchable_scale": True, "bit_width_range": [LOW, HIGH], "learn_bit_width": False})
        for name, spec in resolved.sites.items()
        if spec is not None and all(LOW <= width <= HIGH for width in spec.widths)
    ]
    return resolved.with_rules(*rules)


def candidate_splits(width: int, shares: Sequence[float], *, free: bool) -> list[Split]:
    """What a block can have: its plain width first, then the splits.

    Args:
        width: The block's plain width.
        shares: Candidate shares.
        free: Any widths up to two bits away from the plain one, plain ones too; else only those that keep its average.
    """
    plain = [Split(width, width, 1.0)]
    if not free:
        return plain + [split for share in shares for split in keeping_average(width, share)[:2]]
    near = [bits for bits in range(max(LOW, width - 2), min(HIGH, width + 2) + 1)]
    plain += [Split(bits, bits, 1.0) for bits in near if abs(bits - width) == 1]
    return plain + [
        Split(high, low, share)
        for share in shares
        for low in near
        for high in near
        if low < width < high or (high - low == 1 and width in (high, low))
    ]


def measure_splits(
    model: nn.Module,
    plan: QuantPlan,
    cost: CostModel,
    candidates: Mapping[str, Sequence[Split]],
    calibration: Iterable[Tensor],
    batches: Sequence[Tensor],
    *,
    key: bool = False,
    progress: Callable[[int, int], None] | None = None,
    partial: Path | None = None,
) -> dict[str, list[float]]:
    """The damage of every candidate of every block, all other blocks being plain: mean KL(float ‖ model), in nats.

    Args:
        model: The float model.
        plan: The plain plan.
        cost: The model's costs.
        candidates: By block; a block's plain width is measured once for all.
        calibration: Batches of training images for the scales.
        batches: Other training images for the damage.
        key: Whether the keys are split, too.
        progress: Gets the number of candidates done, and of all.
        partial: File for what has been measured so far; a repeated call goes on from there (`measure/partial.py`).
    """
    probe = Probe(model, calibration, split_plan(plan, cost, {}, key=key))
    with torch.no_grad():
        reference = [distance_of(model).prepared(model.eval()(batch)) for batch in batches]
    plain_widths, done = block_widths(plan, cost, key=key), 0
    so_far = Partial.of_probe(partial, probe, (), batches, ("splits", key, sorted(plan.widths().items())))
    _, measured = so_far.load()
    damages: dict[str, list[float]] = {block: [] for block in candidates}
    total = sum(len(own) for own in candidates.values())
    for block, own in candidates.items():
        for split in own:
            is_plain = split.high == split.low == plain_widths[block]
            place = f"{'' if is_plain else block} {split.high} {split.low} {split.share!r}"
            if place not in measured:
                quantized = probe.under(split_plan(plan, cost, {block: split}, key=key))
                measured[place] = torch.tensor(divergence(quantized, batches, reference), dtype=torch.float64)
                so_far.save(len(measured), lambda: measured)
            damages[block].append(float(measured[place]))
            done += 1
            if progress is not None:
                progress(done, total)
    return damages


@torch.no_grad()
def divergence(model: nn.Module, batches: Sequence[Tensor], reference: Sequence[Tensor]) -> float:
    """Mean distance of a model's answers from the prepared `reference` (see `measure/distance.py`) over images."""
    distance, total = distance_of(model), 0.0
    for batch, answers in zip(batches, reference, strict=True):
        total += float(distance.total(answers, distance.prepared(model(batch))))
    return total / sum(map(len, batches))


def allocate_splits(
    plan: QuantPlan,
    cost: CostModel,
    candidates: Mapping[str, Sequence[Split]],
    damages: Mapping[str, Sequence[float]],
    budget: int,
    *,
    key: bool = False,
) -> dict[str, Split]:
    """One candidate per block: the least total damage within the budget.

    Args:
        plan: The plain plan, whose other widths stay.
        cost: The model's costs.
        candidates, damages: By block, same lengths.
        budget: Largest BOPs allowed, of the whole model.
        key: Whether the keys are split, too.

    Raises:
        QvitError: If no choice fits; the smallest and the largest possible are shown.
    """

    def bops(splits: Mapping[str, Split]) -> int:
        return cost.bit_operations(split_plan(plan, cost, splits, key=key).widths())

    base = bops({})
    prices = [[bops({block: split}) - base for split in own] for block, own in candidates.items()]
    lowest, highest = (base + sum(pick(own) for own in prices) for pick in (min, max))
    if lowest > budget:
        raise QvitError(
            f"no splits fit into {format_bops(budget)}: with this plan the model takes between "
            f"{format_bops(lowest)} and {format_bops(highest)}"
        )
    # The plan without splits is a unit of its own, with one option: costs stay integers.
    options = [[0], *(list(range(len(own))) for own in prices)]
    own_damages = [[0.0], *(damages[block] for block in candidates)]
    _, *answer = solve(Problem(options, own_damages, [], [], [], budget, [[base], *prices]))
    return {block: own[index] for (block, own), index in zip(candidates.items(), answer, strict=True)}
