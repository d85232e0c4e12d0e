"""Greedy descent: every step the cheapest loss per cost saved, never above the budget, the optimum on convex curves."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_allocate import least_damage, random_problem
from test_allocate_plan import random_sensitivity, small_cost
from tiny_models import SMALL, digit_batches, digits_model

from qvit.allocate import Problem, allocate_plan
from qvit.allocate.greedy import descent, greedy
from qvit.allocate.units import Unit
from qvit.deploy.file.artifact import Artifact
from qvit.errors import QvitError, UsageError
from qvit.measure import measure_sensitivity
from qvit.models.calibrate import calibrate
from qvit.models.convert import freeze, quantize
from qvit.models.families import inspect_model
from qvit.plan.budget import parse_budget


def start_of(problem: Problem) -> list[int]:
    """The width of least damage of each unit."""
    return [options[int(np.argmin(own))] for options, own in zip(problem.options, problem.damages, strict=True)]


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 100_000))
def test_every_step_is_the_one_of_least_damage_per_cost_saved(seed: int) -> None:
    """Prices that are kept from step to step are those that brute force finds in the widths of the moment."""
    problem = random_problem(seed)
    before = start_of(problem)
    for after in descent(problem, before):
        assert problem.cost(before) > problem.budget, "the descent ends within the budget"
        prices = []
        for unit, options in enumerate(problem.options):
            for width in reversed(options[: options.index(before[unit])]):
                lowered = [*before[:unit], width, *before[unit + 1 :]]
                if (saved := problem.cost(before) - problem.cost(lowered)) > 0:
                    prices.append((problem.damage(lowered) - problem.damage(before)) / saved)
                    break
        [unit] = [unit for unit, width in enumerate(after) if width != before[unit]]
        saved = problem.cost(before) - problem.cost(after)
        assert after[unit] < before[unit] and saved > 0
        assert (problem.damage(after) - problem.damage(before)) / saved == pytest.approx(min(prices), abs=1e-12)
        before = after
    assert problem.cost(before) <= problem.budget


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 100_000))
def test_answers_fit_and_are_no_better_than_brute_force(seed: int) -> None:
    problem = random_problem(seed)
    answer = greedy(problem)
    assert all(width in options for width, options in zip(answer, problem.options, strict=True))
    assert problem.cost(answer) <= problem.budget and problem.damage(answer) >= least_damage(problem) - 1e-9


@settings(max_examples=40, deadline=None)
@given(data=st.data(), units=st.integers(1, 4), levels=st.integers(2, 4))
def test_convex_curves_and_steps_of_one_cost_give_the_optimum_at_every_budget(
    data: st.DataObject, units: int, levels: int
) -> None:
    widths, damages = list(range(2, 2 + levels)), []
    for _ in range(units):
        drops = sorted(data.draw(st.lists(st.integers(0, 50), min_size=levels - 1, max_size=levels - 1)))
        damages.append([float(sum(drops[: levels - 1 - n])) for n in range(levels)])
    for budget in range(2 * units, sum([widths[-1]] * units) + 1):
        problem = Problem([widths] * units, damages, [], [], [], budget, [[float(w) for w in widths]] * units)
        assert problem.damage(greedy(problem)) == least_damage(problem)


def test_a_width_that_saves_nothing_is_passed_over() -> None:
    """5 bits cost what 8 do: the next step is to 2 bits. Where nothing saves, nothing fits."""
    problem = Problem([[2, 5, 8]], [[3.0, 1.0, 0.0]], [], [], [], 2.0, [[1.0, 4.0, 4.0]])
    assert list(descent(problem, [8])) == [[2]] and greedy(problem) == [2]
    with pytest.raises(QvitError, match="budget of 0"):
        greedy(Problem([[2, 5, 8]], [[3.0, 1.0, 0.0]], [], [], [], 0.0, [[1.0, 4.0, 4.0]]))


@pytest.mark.parametrize("unit", ["bit_operations", "weight_bytes"])
@pytest.mark.parametrize("seed", [0, 1])
def test_plans_fit_and_lose_no_less_than_those_of_the_program(seed: int, unit: str) -> None:
    generator = np.random.default_rng(seed)
    cost = small_cost(generator)
    sensitivity, kind = random_sensitivity(cost, generator), Unit(unit)
    for budget in ("3bit", "5bit", "60%"):
        best, other = (
            allocate_plan(cost, sensitivity, budget, unit=kind, solver=solver, boundary=None)
            for solver in ("program", "greedy")
        )
        assert other.name == f"fisher-{budget}-greedy" and best.name == f"fisher-{budget}"
        assert kind.total(cost, other.widths()) <= kind.parse(budget, cost)
        assert sensitivity.predicted(other.widths()) >= sensitivity.predicted(best.widths()) * (1 - 1e-9)
    with pytest.raises(UsageError, match=r"unknown solver 'greddy'.*did you mean 'greedy'"):
        allocate_plan(cost, sensitivity, "3bit", solver="greddy")


def test_a_greedy_plan_is_calibrated_and_packed() -> None:
    model, images = digits_model(), digit_batches()
    cost = inspect_model(model)
    plan = allocate_plan(cost, measure_sensitivity(model, images), "4bit", solver="greedy")
    assert cost.bit_operations(plan.widths()) <= parse_budget("4bit", cost)
    assert len({width for own in plan.widths().values() for width in own}) > 2
    quantized = freeze(calibrate(quantize(model, plan), images)).eval()
    packed = Artifact.from_model(quantized, model_name="vit_digits", model_kwargs=SMALL)
    assert torch.equal(packed.model()(images[0]), quantized(images[0]))
