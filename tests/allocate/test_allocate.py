"""Integer widths within a budget: against brute force on small problems, by its promises on real models."""

from __future__ import annotations

import itertools
import logging
import random
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qvit.allocate import Problem, program, round_to_budget, solve
from qvit.errors import QvitError
from qvit.models.create import create_model
from qvit.models.families import inspect_model
from qvit.plan.budget import parse_budget
from qvit.plan.cost import CostModel, Matmul
from qvit.plan.spec import Layout, Site, TensorSpec

SMALL = {"depth": 2, "embed_dim": 24, "num_heads": 3}


@pytest.fixture(scope="module")
def cost() -> CostModel:
    """A real model with a width per head: 79 widths."""
    return inspect_model(create_model("vit_digits", **SMALL))


def random_problem(seed: int) -> Problem:
    """Four to six units with two to four options, random products among them, and a budget that is tight: the cost of a
    random choice, or one operation less.
    """
    generator = random.Random(seed)
    units = generator.randint(4, 6)
    options = [sorted(generator.sample(range(2, 9), generator.randint(2, 4))) for _ in range(units)]
    damages = [sorted((round(generator.uniform(-5, 20), 3) for _ in own), reverse=True) for own in options]
    pairs = [(generator.randrange(units), generator.randrange(units)) for _ in range(generator.randint(3, 8))]
    coefficients = [generator.choice([0, 1, 3, 10, 1000, 30_000_000]) for _ in pairs]
    left, right = [i for i, _ in pairs], [j for _, j in pairs]
    problem = Problem(options, damages, coefficients, left, right, 0)
    budget = problem.cost([generator.choice(own) for own in options]) - generator.choice([0, 1])
    budget = max(budget, problem.cost([own[0] for own in options]))
    return Problem(options, damages, coefficients, left, right, budget)


def damage(problem: Problem, widths: list[int] | tuple[int, ...]) -> float:
    return sum(
        own[options.index(width)] for options, own, width in zip(problem.options, problem.damages, widths, strict=True)
    )


def least_damage(problem: Problem) -> float:
    """Brute force."""
    return min(damage(problem, w) for w in itertools.product(*problem.options) if problem.cost(w) <= problem.budget)


def random_learned(cost: CostModel, seed: int) -> dict[str, list[float]]:
    """Real-valued widths as a search leaves them: some beyond their limits, some in the middle, some integers."""
    generator = np.random.default_rng(seed)
    middle, spread = generator.uniform(2, 7), generator.uniform(0.1, 3)
    learned = {}
    for name, site in cost.sites.items():
        count = site.layout.num_heads if generator.random() < 0.9 else 1
        own = generator.normal(middle, spread, count)
        own = np.round(own) if generator.random() < 0.1 else own
        learned[name] = [float(width) for width in np.clip(own, 1.5, 8.6)]
    return learned


def spare(cost: CostModel, widths: dict[str, tuple[int, ...]], budget: int) -> list[tuple[str, int]]:
    """Every `(site, head)` that could still have one bit more within the budget."""
    found = []
    for name, own in widths.items():
        for head, width in enumerate(own):
            raised = widths | {name: (*own[:head], width + 1, *own[head + 1 :])}
            if width < 8 and cost.bit_operations(raised) <= budget:
                found.append((name, head))
    return found


# ---- Small problems ----


@pytest.mark.parametrize("seed", range(60))
def test_exact_answers_are_those_of_brute_force(seed: int) -> None:
    problem = random_problem(seed)
    answer = solve(problem, exact=True)
    assert all(width in options for width, options in zip(answer, problem.options, strict=True))
    assert problem.cost(answer) <= problem.budget
    assert damage(problem, answer) == pytest.approx(least_damage(problem), abs=1e-6)


@settings(max_examples=40)
@given(seed=st.integers(1000, 100_000))
def test_quick_answers_fit_and_are_near_the_optimum(seed: int) -> None:
    problem = random_problem(seed)
    answer = solve(problem, exact=False)
    assert problem.cost(answer) <= problem.budget
    best = least_damage(problem)
    worst = sum(max(own) for own in problem.damages)
    assert damage(problem, answer) <= best + 0.15 * (worst - best) + 1e-6


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("seed", [3, 14, 15])
def test_damage_does_not_grow_with_the_budget(seed: int, exact: bool) -> None:
    problem = random_problem(seed)
    low, high = (problem.cost([own[end] for own in problem.options]) for end in (0, -1))
    damages = []
    for budget in np.linspace(low, high, 12).astype(int):
        richer = Problem(
            problem.options, problem.damages, problem.coefficients, problem.left, problem.right, int(budget)
        )
        damages.append(damage(richer, solve(richer, exact=exact)))
    if exact:
        assert all(after <= before + 1e-6 for before, after in itertools.pairwise(damages))
    assert damages[-1] == pytest.approx(sum(min(own) for own in problem.damages))


def test_a_problem_worked_out_by_hand() -> None:
    """Two units of 2 or 4 bits in one product of 10 MACs: 4·4 costs 160, 2·4 80, 2·2 40. The first is worth more."""
    options, damages = [[2, 4], [2, 4]], [[5.0, 0.0], [3.0, 0.0]]
    for budget, expected in ((160, [4, 4]), (159, [4, 2]), (80, [4, 2]), (79, [2, 2]), (40, [2, 2])):
        for exact in (True, False):
            assert solve(Problem(options, damages, [10], [0], [1], budget), exact=exact) == expected


@pytest.mark.parametrize("seed", range(20))
def test_without_the_integer_program_the_descent_answers(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """It gives up what costs least per operation: within the budget, and not far from the best."""
    monkeypatch.setattr("qvit.allocate.program._integer_program", lambda *_: None)
    assert solve(Problem([[2, 4], [2, 4]], [[5.0, 0.0], [3.0, 0.0]], [10], [0], [1], 159)) == [4, 2]
    assert solve(Problem([[2, 4], [2, 4]], [[3.0, 0.0], [5.0, 0.0]], [10], [0], [1], 159)) == [2, 4]
    problem = random_problem(seed)
    answer = solve(problem)
    assert problem.cost(answer) <= problem.budget
    best, worst = least_damage(problem), sum(max(own) for own in problem.damages)
    assert damage(problem, answer) <= best + 0.5 * (worst - best) + 1e-6


@pytest.mark.parametrize("exact", [True, False])
def test_an_answer_without_proof_is_taken(
    exact: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Many nearly equal plans: the tree ends at its limit, the answer counts, and its distance is told."""
    generator = random.Random(0)
    coefficients = [generator.randrange(900, 1100) for _ in range(20)]
    damages = [[c * (9 - width) / 1000 + generator.random() / 50 for width in range(2, 9)] for c in coefficients * 2]
    pairs = (coefficients, list(range(20)), list(range(20, 40)))
    problem = Problem([list(range(2, 9))] * 40, damages, *pairs, budget=sum(coefficients) * 20 + 1)
    monkeypatch.setattr(program, "NODE_LIMIT", 1)
    answers, real = [], program.milp

    def spied(*arguments: Any, **options: Any) -> Any:
        answers.append(real(*arguments, **options))
        return answers[-1]

    monkeypatch.setattr(program, "milp", spied)
    if not exact:
        options = {"mip_rel_gap": 0.0, "node_limit": 1}
        monkeypatch.setattr(program, "milp", lambda *a, **k: spied(*a, **(k | {"options": options})))
    with caplog.at_level(logging.INFO):
        widths = program._integer_program(problem, exact, [])
    assert widths is not None and not answers[0].success, "the problem is too easy to test this"
    assert problem.cost(widths) <= problem.budget
    assert problem.damage(solve(problem, exact=exact)) <= problem.damage(widths)
    told = [record.getMessage() for record in caplog.records if "of the least" in record.getMessage()]
    assert len(told) == exact


def test_options_that_do_no_good_are_not_bought() -> None:
    """More bits may do more damage than fewer, in a table from elsewhere: then the budget stays unspent."""
    problem = Problem([[2, 4, 8], [2, 4, 8]], [[1.0, 0.0, 2.0], [0.0, 1.0, 2.0]], [10], [0], [1], 10_000)
    assert solve(problem) == [4, 2]


def test_units_in_no_product_cost_nothing() -> None:
    problem = Problem([[2, 8], [2, 8], [2, 8]], [[1.0, 0.0]] * 3, [10, 0], [0, 2], [1, 2], 40)
    assert solve(problem) == [2, 2, 8]


def test_nothing_fits() -> None:
    for exact in (True, False):
        with pytest.raises(QvitError, match="no allocation fits into a budget of 39"):
            solve(Problem([[2, 4], [2, 4]], [[1.0, 0.0]] * 2, [10], [0], [1], 39), exact=exact)


# ---- Learned widths of a real model ----


@pytest.mark.parametrize("seed", range(12))
def test_the_budget_is_kept_and_used(cost: CostModel, seed: int) -> None:
    generator = random.Random(seed)
    learned = random_learned(cost, seed)
    low, high = cost.extreme()
    budget = generator.choice([low, low + generator.randint(0, 50_000), round(low + (high - low) * generator.random())])
    widths = round_to_budget(cost, learned, budget)
    assert cost.bit_operations(widths) <= budget
    assert list(widths) == list(learned)
    for name, own in widths.items():
        assert len(own) == len(learned[name])
        assert all(isinstance(width, int) and 2 <= width <= 8 for width in own)
    reachable = {
        (name, head) for name, head in spare(cost, widths, budget) if widths[name][head] < nearest(learned[name][head])
    }
    assert not reachable  # nobody is below its own rounding while there is room


def nearest(width: float) -> int:
    return int(np.floor(min(max(width, 2.0), 8.0) + 0.5))


@pytest.mark.parametrize("bits", [3, 4, 6])
def test_spare_budget_is_spent(cost: CostModel, bits: int) -> None:
    """Widths that were learned far below the budget are raised until next to nothing of it is left."""
    budget = parse_budget(f"{bits}bit", cost)
    learned = {name: [bits - 0.6] * site.layout.num_heads for name, site in cost.sites.items()}
    before = cost.bit_operations({name: tuple(nearest(width) for width in own) for name, own in learned.items()})
    widths = round_to_budget(cost, learned, budget)
    after = cost.bit_operations(widths)
    assert before < 0.9 * budget
    assert 0.98 * budget < after <= budget


def test_a_budget_for_everything_gives_everything(cost: CostModel) -> None:
    learned = {name: [7.6] * site.layout.num_heads for name, site in cost.sites.items()}
    assert {width for own in round_to_budget(cost, learned, cost.extreme()[1]).values() for width in own} == {8}


def test_the_smallest_budget_gives_the_smallest_model(cost: CostModel) -> None:
    """Even for widths learned far above it."""
    for learned_width in (2.0, 5.3, 8.0):
        learned = {name: [learned_width] * site.layout.num_heads for name, site in cost.sites.items()}
        widths = round_to_budget(cost, learned, cost.extreme()[0])
        assert {width for own in widths.values() for width in own} == {2}


@pytest.mark.parametrize("seed", range(4))
def test_widths_that_are_integers_within_the_budget_stay(cost: CostModel, seed: int) -> None:
    """Their own cost is the budget, to the last operation: nothing better is affordable."""
    generator = random.Random(seed)
    chosen = {
        name: tuple(generator.randint(2, 8) for _ in range(site.layout.num_heads)) for name, site in cost.sites.items()
    }
    learned = {name: [float(width) for width in own] for name, own in chosen.items()}
    assert round_to_budget(cost, learned, cost.bit_operations(chosen)) == chosen


@pytest.mark.parametrize("seed", range(3))
def test_roundings_that_fit_exactly_are_hardly_touched(cost: CostModel, seed: int) -> None:
    """Widths a little off an integer, and a budget of exactly their roundings: few change, and by one bit."""
    generator = np.random.default_rng(seed)
    chosen = {name: generator.integers(3, 8, site.layout.num_heads) for name, site in cost.sites.items()}
    rounded = {name: tuple(int(width) for width in own) for name, own in chosen.items()}
    learned = {name: list(own + generator.uniform(-0.1, 0.1, len(own))) for name, own in chosen.items()}
    widths = round_to_budget(cost, learned, cost.bit_operations(rounded))
    changes = [abs(a - b) for name in rounded for a, b in zip(widths[name], rounded[name], strict=True)]
    assert max(changes) <= 1 and sum(changes) <= 0.1 * len(changes)


def test_the_same_question_has_the_same_answer(cost: CostModel) -> None:
    learned, budget = random_learned(cost, 3), parse_budget("3bit", cost)
    assert round_to_budget(cost, learned, budget) == round_to_budget(cost, learned, budget)


def test_widths_that_were_worth_more_keep_more(cost: CostModel) -> None:
    """Sites of one kind, at the same cost: the one with the larger learned width never ends below the other."""
    learned = {name: [4.0] * site.layout.num_heads for name, site in cost.sites.items()}
    learned["blocks.0.attn.query"] = learned["blocks.0.attn.key"] = [2.6, 4.0, 5.4]
    learned["blocks.1.attn.query"] = learned["blocks.1.attn.key"] = [5.4, 4.0, 2.6]
    widths = round_to_budget(cost, learned, parse_budget("3bit", cost))
    assert widths["blocks.0.attn.query"][0] < widths["blocks.0.attn.query"][2]
    assert widths["blocks.1.attn.key"][0] > widths["blocks.1.attn.key"][2]


def test_lower_and_upper_limits_can_be_given(cost: CostModel) -> None:
    learned = random_learned(cost, 8)
    widths = round_to_budget(cost, learned, parse_budget("5bit", cost), low=3, high=6)
    assert {width for own in widths.values() for width in own} <= {3, 4, 5, 6}
    with pytest.raises(QvitError, match="no widths from 3 to 6 bits fit into"):
        round_to_budget(cost, learned, cost.extreme()[0], low=3, high=6)


def test_an_infeasible_budget_says_how_small_the_model_can_be(cost: CostModel) -> None:
    low, _ = cost.extreme()
    with pytest.raises(QvitError, match=rf"the smallest model takes {low / 1e6:.3f} M"):
        round_to_budget(cost, random_learned(cost, 0), low - 1)


def test_damage_of_learned_widths_by_hand() -> None:
    """One product of 100 MACs; 5.0 and 3.0 learned, 12 affordable: a·b ≤ 12 with damages 4^(b̃ - n) - 1, weighed by the
    other operand's width: 3 · (4^(5 - a) - 1) + 5 · (4^(3 - b) - 1) is least at (4, 3): 9, against 12.75 at (6, 2).
    """
    sites = {name: Site(name, "weight", Layout(), TensorSpec(), numel=8) for name in ("a", "b")}
    model = CostModel(sites, [Matmul(100, "a", "b")])
    assert round_to_budget(model, {"a": [5.0], "b": [3.0]}, 1200) == {"a": (4,), "b": (3,)}
    assert round_to_budget(model, {"a": [5.0], "b": [3.0]}, 1500) == {"a": (5,), "b": (3,)}


def test_a_model_of_the_size_of_deit_small_is_quick_and_within_budget() -> None:
    """Twelve blocks with a width for each of six heads, more than 700 in all, in seconds."""
    with torch.device("meta"):
        model = inspect_model(create_model("deit_small_patch16_224"))
    learned = random_learned(model, 1)
    budget = parse_budget("4bit", model)
    widths = round_to_budget(model, learned, budget)
    assert 0.999 * budget < model.bit_operations(widths) <= budget
