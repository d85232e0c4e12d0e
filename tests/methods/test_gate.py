"""The accuracy gate: what n images can say, and a search that never returns a plan that misses."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import digits_model
from torch import Tensor, nn

from qvit.allocate.units import Unit
from qvit.errors import QvitError
from qvit.measure import Sensitivity
from qvit.methods.ptq.gate import GATE, RESOLUTION, UNITS, Gate, Judge, Loss
from qvit.models.families import inspect_model
from qvit.plan.cost import CostModel
from qvit.plan.quant_plan import QuantPlan

COST = inspect_model(digits_model())
IMAGES = 200

# ------------------------------------------------------------------------------------------------ what images can say


@pytest.mark.parametrize(("lost", "limit"), [(0, 1.0), (3, 2.0), (17, 12.5)])
def test_confidence_without_labels_is_that_of_the_binomial(lost: int, limit: float) -> None:
    loss, p = Loss(IMAGES, lost, 0, labelled=False), limit / 100
    few = sum(math.comb(IMAGES, k) * p**k * (1 - p) ** (IMAGES - k) for k in range(lost + 1))
    assert loss.drop == 100 * lost / IMAGES
    assert loss.confidence(limit) == pytest.approx(1 - few)
    assert loss.confidence(loss.at_most(0.95)) == pytest.approx(0.95)


def test_rule_of_three_and_the_ends() -> None:
    assert Loss(300, 0, 0, labelled=False).at_most(0.95) == pytest.approx(1.0, abs=0.01), "3 of 300"
    every = Loss(10, 10, 0, labelled=False)
    assert every.confidence(50) == 0 and every.confidence(100) == 1 and every.at_most() == 100


def test_confidence_with_labels_covers_the_true_loss() -> None:
    random, true = np.random.default_rng(0), 2.0  # 4 % lost, 2 % gained
    counts = random.multinomial(256, [0.04, 0.02, 0.94], size=2000)
    losses = [Loss(256, int(lost), int(gained), labelled=True) for lost, gained, _ in counts]
    assert 0.93 < np.mean([loss.at_most(0.95) >= true for loss in losses]) < 0.98
    for loss in losses[:5]:
        assert loss.confidence(loss.at_most(0.9)) == pytest.approx(0.9)
    more, fewer = Loss(2560, 10, 5, labelled=True), Loss(256, 1, 0, labelled=True)
    assert more.confidence(0.5) > fewer.confidence(0.5) > 0.5


class Answers(nn.Module):
    """Answers image i, which is its number, with the class `answers[i]`."""

    def __init__(self, answers: list[int]) -> None:
        super().__init__()
        self.answers = torch.tensor(answers)

    def forward(self, images: Tensor) -> Tensor:
        return torch.eye(10)[self.answers[images]]


def test_a_judge_counts_what_was_lost_and_gained() -> None:
    numbers, truth = torch.arange(5), torch.tensor([1, 2, 3, 4, 5])
    of_float, ours = Answers([1, 2, 3, 0, 0]), Answers([1, 0, 0, 4, 9])
    labelled = Judge(of_float, [(numbers[:2], truth[:2]), (numbers[2:], truth[2:])])
    assert labelled.loss(ours) == Loss(5, lost=2, gained=1, labelled=True) and labelled.loss(ours).drop == 20.0
    without = Judge(of_float, [(numbers, torch.full((5,), -1))])
    assert without.loss(ours) == Loss(5, lost=4, gained=0, labelled=False), "four answers changed"
    with pytest.raises(QvitError, match="NaN"):
        without.loss(nn.Sequential(ours, nn.BatchNorm1d(10).eval().double(), nn.Threshold(2.0, math.nan)).float())


# ---------------------------------------------------------------------------------------------------------- the search


def mean_width(plan: QuantPlan) -> float:
    """By bit operations: the uniform width of blocks that costs as much."""
    own = COST.bit_operations(plan.widths())
    low, high = (COST.bit_operations(COST.uniform(bits)) for bits in (2, 8))
    return 2 + 6 * (own - low) / (high - low)


class Trials:
    """Stands for quantization: counts calls, and makes models that err on so many of the images."""

    def __init__(self, errors: Callable[[QuantPlan, bool], int]) -> None:
        self.errors, self.made, self.measured = errors, [], 0

    def quantize(self, plan: QuantPlan, final: bool) -> nn.Module:
        self.made.append((plan.name, final))
        wrong = self.errors(plan, final)
        return Answers([1] * wrong + [0] * (IMAGES - wrong))

    def sensitivity(self, grids: QuantPlan) -> Sensitivity:
        self.measured += 1
        raw = {name: np.array([[4.0**-bits for bits in range(2, 9)]]) for name in COST.sites}
        fields: dict[str, Any] = {"model": "vit_digits", "metric": "fisher", "images": 8, "seed": 0, "seconds": 0.0}
        return Sensitivity.from_raw(raw, widths=tuple(range(2, 9)), plan=grids, **fields)


def gate(trials: Trials, run: Path, *, cost: CostModel = COST, said: list[str] | None = None, **options: Any) -> Gate:
    numbers, labels = torch.arange(IMAGES), torch.zeros(IMAGES, dtype=torch.int64)
    judges = [Judge(Answers([0] * IMAGES), [(numbers, labels)]) for _ in range(2)]
    given: dict[str, Any] = {"max_drop": 2.0, "objective": "bops", "narrowest": 3, "boundary": 8, "solver": "program"}
    given |= options
    given.setdefault("unit", Unit(UNITS.get(given["objective"], "")))
    return Gate(
        cost, quantize=trials.quantize, sensitivity=trials.sensitivity, searching=judges[0], confirming=judges[1],
        run=run, notify=(said if said is not None else []).append, **given,
    )  # fmt: skip


def test_the_fastest_plan_within_the_drop(tmp_path: Path) -> None:
    """Where two widths take the same time, the wider one costs nothing."""
    table = {name: {bits: float(max(bits, 6)) for bits in range(2, 9)} for name in COST.sites}
    trials = Trials(lambda plan, final: 4 if mean_width(plan) >= 3.5 else 5)
    unit = Unit.of(table, COST)
    _, plan, record = gate(trials, tmp_path, objective="latency", unit=unit).search()
    assert record["objective"] == "latency" and unit.total(COST, plan.widths()) <= 1.1 * 6 * len(COST.sites)


@pytest.mark.parametrize("needed", [2.9, 3.7, 5.0, 6.2, 7.9])
def test_the_cheapest_plan_within_the_drop(needed: float, tmp_path: Path) -> None:
    trials = Trials(lambda plan, final: 4 if mean_width(plan) >= needed else 5)  # 2.0 points, or 2.5
    model, plan, record = gate(trials, tmp_path).search()
    assert mean_width(plan) >= needed and record["drop"] == 2.0 and record["measure"] == "accuracy"
    missed = [trial["bit_operations"] for trial in record["trials"] if not trial["within"]]
    cost = COST.bit_operations(plan.widths())
    narrowest = COST.bit_operations(QuantPlan.preset("w3a3").resolve(COST.sites).widths())
    assert cost == narrowest or cost <= 1.02 * RESOLUTION * max(missed), "no cheaper plan would have passed"
    assert trials.made[-1] == (plan.name, True) and sum(final for _, final in trials.made) == 1
    assert isinstance(model, Answers) and int(model.answers.sum()) == 4


def test_bytes_leave_the_activations_at_8_bits(tmp_path: Path) -> None:
    needed = 0.6 * COST.weight_bytes(COST.uniform(8))
    trials = Trials(lambda plan, final: 0 if COST.weight_bytes(plan.widths()) > needed else 10)
    _, plan, record = gate(trials, tmp_path, objective="bytes").search()
    assert [trial["plan"] for trial in record["trials"]][:2] == ["w8a8", "w5a8"]
    assert needed < COST.weight_bytes(plan.widths()) <= 1.1 * needed
    widths = {spec.widths for name, spec in plan.sites.items() if spec is not None and not name.endswith("weight")}
    assert {width for own in widths for width in own} == {8}


def test_a_plan_that_misses_is_never_returned(tmp_path: Path) -> None:
    said: list[str] = []
    trials = Trials(lambda plan, final: 7)
    with pytest.raises(QvitError, match=r"no plan loses at most 2 points: even w8a8 loses 3\.50 points of top-1"):
        gate(trials, tmp_path, said=said).search()
    assert trials.made == [("w8a8", False)] and not trials.measured
    assert "search w8a8" in said[-1] and "loses 3.50 points on 200 images, more than 2" in said[-1]


def test_a_confirmation_that_misses_goes_on_to_a_wider_plan(tmp_path: Path) -> None:
    trials = Trials(lambda plan, final: 4 if mean_width(plan) >= (6.5 if final else 4.5) else 9)
    _, plan, record = gate(trials, tmp_path).search()
    confirmed = [(trial["plan"], trial["within"]) for trial in record["trials"] if trial["step"] == "confirm"]
    assert len(confirmed) > 1 and [within for _, within in confirmed] == [False] * (len(confirmed) - 1) + [True]
    assert plan.name == confirmed[-1][0] == "w7a7", "a uniform plan that the bisection had passed over"
    with pytest.raises(QvitError, match=r"even w8a8 loses 4\.50 points"):
        gate(Trials(lambda plan, final: 9 if final else 0), tmp_path / "other").search()


@pytest.mark.parametrize("trials_before", [1, 4, 7])
def test_a_resumed_search_repeats_no_trial(trials_before: int, tmp_path: Path) -> None:
    def errors(plan: QuantPlan, final: bool) -> int:
        return 4 if mean_width(plan) >= 5.3 else 5

    whole = Trials(errors)
    (tmp_path / "whole").mkdir()
    _, plan, record = gate(whole, tmp_path / "whole").search()

    class Killed(BaseException):
        pass

    def stopping(plan: QuantPlan, final: bool) -> int:
        if len(first.made) > trials_before:
            raise Killed
        return errors(plan, final)

    first, second = Trials(stopping), Trials(errors)
    with pytest.raises(Killed):
        gate(first, tmp_path).search()
    assert (tmp_path / GATE).is_file()
    _, again, continued = gate(second, tmp_path).search()
    assert (again, continued) == (plan, record)
    assert len(second.made) == len(whole.made) - trials_before
