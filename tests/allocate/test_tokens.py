"""Component widths, widths of the class token and splits of patches in one program, held against enumeration."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from tiny_models import digit_batches, digits_model, shake
from torch import nn

from qvit.allocate.frontier import lower_hull
from qvit.allocate.program import solve
from qvit.allocate.tokens import (
    TokenCandidates,
    TokenChoices,
    TokenOption,
    damage_of,
    sum_of,
    token_choices,
    token_plan,
)
from qvit.measure import Sensitivity, measure_sensitivity
from qvit.measure.fisher import Sums
from qvit.measure.metric import Task
from qvit.measure.token_places import Places, measure_places, spread
from qvit.models.calibrate import calibrate
from qvit.models.convert import quantize
from qvit.models.create import create_model
from qvit.models.families import inspect_model
from qvit.plan.cost import CostModel
from qvit.plan.quant_plan import QuantPlan
from qvit.plan.spec import TokenSplit

WIDTHS = (3, 5, 8)
SITES = ("blocks.0.attn.query", "blocks.0.mlp.fc1.input")
FREE = (*SITES, "blocks.0.mlp.fc1.weight", "blocks.0.attn.key")
CANDIDATES = TokenCandidates((8,), (0.5,))


@pytest.fixture(scope="module")
def cost() -> CostModel:
    return inspect_model(digits_model())


def tables(cost: CostModel, seed: int) -> tuple[Sensitivity, Places]:
    """Random damages that fall with the width."""
    rng = np.random.default_rng(seed)

    def falling(rows: int) -> np.ndarray:
        return np.sort(rng.exponential(size=(rows, len(WIDTHS))), axis=1)[:, ::-1].copy()

    raw = {name: falling(site.layout.num_heads) for name, site in cost.sites.items()}
    measured = Sensitivity.from_raw(
        raw, model="vit_digits", metric="fisher", images=4, seed=seed, seconds=0.0, widths=WIDTHS
    )
    return measured, spread({site: falling(cost.sites[site].tokens) for site in SITES}, measured)


def problem_of(cost: CostModel, seed: int) -> tuple[TokenChoices, Sensitivity, Places]:
    """All but four sites are pinned, so that everything can be tried."""
    measured, places = tables(cost, seed)
    pins = [(name, 5) for name, site in cost.sites.items() if name not in FREE and site.position == "block"]
    return token_choices(cost, measured, places, CANDIDATES, pins), measured, places


def everything(cost: CostModel, measured: Sensitivity, places: Places) -> list[tuple[int, float]]:
    """Costs and damages of all plans, token by token, by nothing that the program uses."""
    fixed = {n: (8,) if s.position != "block" else (5,) for n, s in cost.sites.items() if n not in FREE}
    every = list(CANDIDATES.options(WIDTHS, 1))
    found = []
    for query, fc1 in itertools.product(every, every):
        tokens = sum(by_hand(option, places[site]) for site, option in zip(SITES, (query, fc1), strict=True))
        for weight, *keys in itertools.product(WIDTHS, WIDTHS, WIDTHS):
            widths: dict[str, Sequence[int]] = {**fixed, SITES[0]: query.widths, SITES[1]: fc1.widths}
            widths |= {FREE[2]: (weight,), FREE[3]: tuple(keys)}
            rest = {name: own for name, own in widths.items() if name not in SITES}
            found.append((cost.bit_operations(widths), tokens + measured.predicted(rest)))
    return found


def by_hand(option: TokenOption, places: np.ndarray) -> float:
    total = 0.0
    for place, row in enumerate(places):
        split, width = option.split, option.width
        if split is not None and place > 0:
            important = place < int(split.share * len(places))
            width = (split.high or option.width) if important else split.low
        total += row[WIDTHS.index(width)]
    return total


@pytest.mark.parametrize("seed", range(2))
def test_the_program_finds_the_best_of_all_plans(cost: CostModel, seed: int) -> None:
    problem, measured, places = problem_of(cost, seed)
    plans = everything(cost, measured, places)
    costs = [own for own, _ in plans]
    for share in (0.02, 0.2, 0.5, 0.8):
        budget = int(min(costs) + share * (max(costs) - min(costs)))
        answer = solve(problem.within(budget))
        widths = problem.widths(answer)
        assert cost.bit_operations(widths) == problem.problem.cost(answer) <= budget
        assert problem.problem.damage(answer) == pytest.approx(min(d for own, d in plans if own <= budget))
        plan = token_plan(cost, measured, widths, "tokens")
        assert cost.bit_operations(plan.widths()) == cost.bit_operations(widths)
        calibrate(quantize(digits_model(), plan), digit_batches())


def test_the_frontier_is_that_of_all_plans(cost: CostModel) -> None:
    problem, measured, places = problem_of(cost, 3)
    plans = sorted(everything(cost, measured, places))
    corners = lower_hull(problem, 100)
    best = np.minimum.accumulate([damage for _, damage in plans])
    costs = np.array([own for own, _ in plans])
    for own, damage, _ in corners:
        assert damage == pytest.approx(best[np.searchsorted(costs, own, side="right") - 1])
    assert corners[0][0] == costs[0] and corners[-1][1] == pytest.approx(best[-1])
    assert any(isinstance(own, TokenOption) and own.split for own in problem.tokens[SITES[1]].values())
    # no plan lies below the line between two neighbours
    hull = np.interp(costs, [own for own, *_ in corners], [damage for _, damage, _ in corners])
    assert (np.array([damage for _, damage in plans]) >= hull - 1e-9).all()


def test_options_by_hand() -> None:
    options = {(o.width, o.split) for o in TokenCandidates((8,), (0.5,)).options((3, 5), 1)}
    low, high = TokenSplit(0.5, 3), TokenSplit(0.5, 3, 5)
    assert options == {
        *((3, None), (5, None), (8, TokenSplit(0, 3)), (8, TokenSplit(0, 5))),
        *((5, low), (8, high)),
    }
    assert {o.split for o in TokenCandidates((8,), ()).options((3, 5), 0)} == {None}
    places = np.array([[9.0, 2.0, 1.0], [5.0, 1.0, 0.5], [4.0, 1.0, 0.5], [3.0, 0.5, 0.1]])
    assert damage_of(TokenOption(8, high), places, WIDTHS, 1) == 1.0 + 1.0 + 4.0 + 3.0
    assert sum_of(TokenOption(8, high), 4, 1) == 8 + 5 + 3 + 3


def swin() -> nn.Module:
    kwargs = {"img_size": 32, "window_size": 4, "depths": (1, 1), "num_heads": (2, 4), "embed_dim": 16}
    return shake(create_model("swin_tiny_patch4_window7_224", **kwargs)).eval()


@pytest.mark.parametrize("which", ["class token", "none", "windows"])
def test_places_add_up_to_the_metric(which: str) -> None:
    further = {} if which == "class token" else {"class_token": False, "global_pool": "avg"}
    model, batches = (swin(), [torch.randn(4, 3, 32, 32)]) if which == "windows" else (
        digits_model(depth=2, **further), digit_batches(1, 6)
    )  # fmt: skip
    sites = [name for name, site in inspect_model(model).sites.items() if site.tokens]
    measured = measure_sensitivity(model, batches, metric="fisher", widths=WIDTHS, seed=5)
    plan = QuantPlan("default").resolve(inspect_model(model).sites)
    places = measure_places(model, batches, plan, sites, WIDTHS, seed=5)
    for site in sites:
        assert places[site].shape == (inspect_model(model).sites[site].tokens, len(WIDTHS))
        np.testing.assert_allclose(places[site].sum(0), measured.raw[site].sum(0), rtol=1e-4)
        np.testing.assert_allclose(spread(places, measured)[site].sum(0), measured.table[site].sum(0), rtol=0.2)
    own = inspect_model(model)
    problem = token_choices(own, measured, spread(places, measured), TokenCandidates())
    low, high = problem.extremes()
    answer = solve(problem.within(0.5 * (low + high)))
    assert own.bit_operations(problem.widths(answer)) == problem.problem.cost(answer) <= 0.5 * (low + high)
    assert own.bit_operations(own.uniform(3)) == low


def test_places_are_those_of_the_ranking() -> None:
    """By hand for a single image: the errors of a site's tokens, in the order of the attention that they received."""
    model, images = digits_model(depth=2), digit_batches(1, 4)
    site, plan = "blocks.1.mlp.fc1.input", QuantPlan("default").resolve(inspect_model(model).sites)
    places = measure_places(model, images, plan, [site], WIDTHS, seed=3)[site]
    task = Task("fisher", model, WIDTHS, plan, images, seed=3)
    received: list[torch.Tensor] = []
    hook = task.probe.model.get_submodule("blocks.0.attn.attn_drop").register_forward_hook(
        lambda _module, _inputs, probs: received.append(probs[:, :, 0].mean(1))
    )
    expected = torch.zeros(17, len(WIDTHS), dtype=torch.float64)
    with hook:
        for name, tensor, grad in Sums(task).gradients():
            if name == site:
                order = [0, *(1 + received[-1][0, 1:].argsort(descending=True, stable=True))]
                for column, error in enumerate(task.probe.errors(site, tensor, WIDTHS)):
                    expected[:, column] += (error * grad).double().square().sum(-1)[0, order] / 2 / 4
    np.testing.assert_allclose(places, expected.numpy(), rtol=1e-4, atol=1e-12)
