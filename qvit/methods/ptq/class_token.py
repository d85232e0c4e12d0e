"""A width of its own for the class token, and for registers: the prefix of the tokens.

Every block reads the class token's row of a product for the answer, and it is one of some 200: 8 bits for it in a plan
of 4 cost 0.4 % more bit operations. In the plan this is a token split with a share of 0 (`TokenSplit`):

    {"bit_width": 8, "token_bit_width": {"share": 0, "low": 4}, "switchable_scale": true}

Sites that get it are left operands, whose tokens are rows of a product (`ROWS`): two scales for two ranges of rows, and
every sum stays one of integers. Keys and values lie along the axis that is summed over or normalised over, where one
token of 200 counts little.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qvit.errors import UsageError
from qvit.measure.distance import distance_of
from qvit.measure.probe import Probe
from qvit.methods.pmq import divergence
from qvit.plan.budget import format_bops
from qvit.plan.cost import CostModel
from qvit.plan.quant_plan import QuantPlan, Rule
from qvit.quantizers import Quantizer, quantizers_of

#: Activations that get the width.
ROWS = (".attn.qkv.input", ".attn.query", ".mlp.fc1.input", ".mlp.fc2.input")
#: The width that is tried, and the largest one of activations where it is.
TRIED, UP_TO = 8, 6
#: How many of the calibration images decide, at most.
IMAGES = 64
#: How often an allocation is repeated, at most, to make room for it.
_ROUNDS = 8
#: The part of the limit that each of them gives up besides, since another plan has another price of these bits.
_SLACK = 10_000


def with_class_token(plan: QuantPlan, cost: CostModel, width: int, *, up_to: int = 8) -> QuantPlan | None:
    """The plan with this width for prefix tokens at every site of `ROWS` that is narrower; None where there is none.

    Args:
        plan: Any plan; sites in float, with token groups, or with heads of several widths stay as they are.
        cost: The model's sites.
        width: Bits of the prefix tokens.
        up_to: The largest width of a site that is changed.
    """
    resolved, rules = plan.resolve(cost.sites), []
    for name, site in cost.sites.items():
        spec = resolved.sites[name]
        if spec is None or not site.tokens or not site.layout.prefix_tokens or not name.endswith(ROWS):
            continue
        low = min(spec.widths)
        plain = spec.token_bit_width is None and spec.quantizer == "lsq" and max(spec.widths) == low
        if plain and low <= min(up_to, width - 1):
            changes = {"bit_width": width, "bit_width_range": [low, width], "learn_bit_width": False}
            tokens = {"share": 0, "low": low}
            rules.append(Rule(name, changes | {"switchable_scale": True, "token_bit_width": tokens}))
    return resolved.with_rules(*rules, name=f"{plan.name}-class{width}").resolve(cost.sites) if rules else None


def without_class_token(plan: QuantPlan, cost: CostModel) -> QuantPlan:
    """The same grids with the lower width for all tokens, where `with_class_token` gave two."""
    rules = []
    for name, spec in plan.sites.items():
        split = None if spec is None else spec.token_bit_width
        if split is not None and not split.ranks and name.endswith(ROWS):
            rules.append(Rule(name, {"bit_width": split.low, "token_bit_width": None}))
    return plan.with_rules(*rules).resolve(cost.sites)


@dataclass(frozen=True)
class ClassToken:
    """What was decided about a width of the class token.

    Attributes:
        width: Bits.
        used: Whether the plan has it.
        extra_bit_operations: What it costs beside the plan without it.
        divergence: KL(float ‖ model) on calibration images without it and with it, or the cosine distance of features;
            None where nothing was measured.
        reason: Why, in words.
    """

    width: int
    used: bool
    extra_bit_operations: int
    divergence: tuple[float, float] | None
    reason: str


def choose(
    plan: QuantPlan,
    cost: CostModel,
    option: int | str,
    limit: int | None,
    measure: Callable[[QuantPlan], tuple[float, float]],
    measured: str = "divergence",
) -> tuple[QuantPlan, ClassToken | None]:
    """The plan, with a width for the class token if it pays.

    Args:
        plan: The plan without.
        cost: The model's costs.
        option: `PTQOptions.class_token`.
        limit: Bit operations that are not to be exceeded; None for any.
        measure: The distances without and with it, of the plan that has it.
        measured: What they are, in words.

    Raises:
        UsageError: A width was asked for that the model cannot have, or that exceeds the budget.
    """
    if option == "off":
        return plan, None
    asked = isinstance(option, int)
    width = option if isinstance(option, int) else TRIED
    wider = _wider(plan, cost, option)
    if wider is None:
        if asked:
            raise UsageError(
                f"no activation of this model can have {width} bits for the class token alone: its plan has as many "
                "throughout, or its blocks know no prefix tokens; leave out --class-token"
            )
        return plan, None
    before, after = (cost.bit_operations(own.resolve(cost.sites).widths()) for own in (plan, wider))
    extra = after - before
    price = f"{format_bops(extra)} more bit operations ({100 * extra / before:.2f} %)"
    if limit is not None and after > limit:
        if asked:
            raise UsageError(
                f"{width} bits for the class token take {price}, which exceeds the budget: leave out --class-token, or "
                "give the name of a plan, such as w4a4, as the budget"
            )
        return plan, ClassToken(width, False, extra, None, f"{price} exceed the budget")
    if asked:
        return wider, ClassToken(width, True, extra, None, f"asked for, for {price}")
    without, with_it = measure(wider)
    pays = with_it < without
    reason = f"{measured} from the float model {without:.4f} without, {with_it:.4f} with it, for {price}"
    return (wider if pays else plan), ClassToken(width, pays, extra, (without, with_it), reason)


def leaving_room(
    plan: QuantPlan, cost: CostModel, option: int | str, limit: int, least: float, allocated: Callable[[int], QuantPlan]
) -> QuantPlan:
    """A plan of mixed widths that has room within the limit for the class token's bits, as `choose` will add them.

    Where not even the narrowest widths leave that room, `choose` finds that those bits exceed the limit.

    Args:
        plan: What was allocated within the limit.
        cost, option, limit: As for `choose`.
        least: Bit operations of the narrowest widths.
        allocated: The plan for a smaller limit.
    """
    within = limit
    for _ in range(_ROUNDS):
        wider = None if option == "off" else _wider(plan, cost, option)
        over = 0 if wider is None else cost.bit_operations(wider.resolve(cost.sites).widths()) - limit
        if over <= 0:
            break
        within -= over + limit // _SLACK
        if within < least:
            break
        plan = allocated(within)
    return plan


def _wider(plan: QuantPlan, cost: CostModel, option: int | str) -> QuantPlan | None:
    """The plan with the width that was asked for, or the one that is tried."""
    asked = isinstance(option, int)
    return with_class_token(plan, cost, option if isinstance(option, int) else TRIED, up_to=8 if asked else UP_TO)


@torch.no_grad()
def divergences(model: nn.Module, source: nn.Module, plan: QuantPlan, batches: Iterable[Tensor]) -> tuple[float, float]:
    """Mean distance from the float model without and with a width for the class token, each after plain calibration.

    Args:
        model: The float model that is right.
        source: The float model that is quantized.
        plan: Resolved, with the width.
        batches: Calibration images.
    """
    images = list(batches)
    probe = Probe(source, images, plan)
    reference = [distance_of(model).prepared(model.eval()(batch)) for batch in images]
    found = [divergence(probe.under(own), images, reference) for own in (without_class_token(plan, probe.cost), plan)]
    return found[0], found[1]


def record_of(decision: ClassToken | None) -> dict[str, Any]:
    """What a result says of it."""
    return {} if decision is None else {"class_token": asdict(decision)}


def scales_of(quantizer: Quantizer) -> Tensor:
    """The scales of a quantizer; where prefix tokens have a width of their own, of the other tokens."""
    split = quantizer.spec.token_bit_width
    return (quantizer.grid() if split is None else quantizer.grid(quantizer.group_widths()[-1]))[0]


def step_of(quantizer: Quantizer) -> float:
    """The mean of `scales_of`."""
    return float(scales_of(quantizer).mean())


@contextmanager
def upper_scales_held(block: nn.Module) -> Iterator[None]:
    """Within the block the scales of prefix tokens are not trained.

    They share a parameter, hence a learning rate, with the scales of the other tokens, which are up to a hundred times
    as large, and have nothing to gain: their grid is fine.
    """
    with ExitStack() as stack:
        for _, quantizer in quantizers_of(block):
            split = quantizer.spec.token_bit_width
            if split is None:
                continue
            lower = quantizer.get_buffer("candidates") == split.low

            def only_lower(grad: Tensor, lower: Tensor = lower) -> Tensor:
                return grad * lower

            for name in ("scale", "offset"):
                bank = quantizer._parameters.get(name)
                if bank is not None:
                    stack.callback(bank.register_hook(only_lower).remove)
        yield
