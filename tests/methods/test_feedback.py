"""Rounds of plans with the quantized model's feedback: on a toy whose first plan is wrong, and on a model."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_models import digit_batches, digits_model, small_config

from qvit.allocate import allocate_plan
from qvit.errors import UsageError
from qvit.measure import Sensitivity, measure_sensitivity
from qvit.measure.metric import Task
from qvit.methods import create_method
from qvit.methods.ptq.feedback import LIMIT, QuantizedFeedback, updated
from qvit.models.families import inspect_model
from qvit.plan.cost import Widths
from qvit.plan.quant_plan import QuantPlan
from qvit.runs.run import train

SITES = ("blocks.0.mlp.fc1.weight", "blocks.0.mlp.fc2.weight")
GRIDS = QuantPlan("default").resolve(inspect_model(digits_model()).sites)


def sensitivity_of(first: float, second: float) -> Sensitivity:
    """Losses of 2 and of 8 bits for two sites."""
    raw = {site: np.array([[loss, 0.0]]) for site, loss in zip(SITES, (first, second), strict=True)}
    return Sensitivity.from_raw(raw, model="toy", metric="toy", images=4, seed=0, seconds=0.0, widths=(2, 8))


def one_of_two(sensitivity: Sensitivity) -> QuantPlan:
    """2 bits for the site that suffers least, 8 for the other."""
    low = min(SITES, key=lambda site: sensitivity.damage(site, 0, 2))
    return GRIDS.with_widths({site: (2 if site == low else 8,) for site in SITES})


def test_a_wrong_first_plan_is_found_out() -> None:
    """The first site looks cheap in float; once it has 2 bits its gradients are ten times as large."""
    asked: list[int] = []

    def low(widths: Widths) -> int:
        return [tuple(widths[site]) for site in SITES].index((2,))

    def feedback(widths: Widths) -> dict[str, torch.Tensor]:
        asked.append(low(widths))
        return {SITES[0]: torch.tensor([10.0 if low(widths) == 0 else 5.0]).double()}

    losses = [3.0, 1.0]
    found, rounds = updated(sensitivity_of(0.5, 1.0), one_of_two, lambda own: losses[low(own)], feedback, 5)
    assert low(one_of_two(sensitivity_of(0.5, 1.0)).widths()) == 0
    assert low(one_of_two(found).widths()) == 1
    # The second plan repeats in the third round: that is the end.
    assert [(each.divergence, each.best) for each in rounds] == [(3.0, False), (1.0, True)] and asked == [0, 1]
    assert rounds[1].changed == 2
    # Where the judgement is the other way round, the first plan is kept.
    found, rounds = updated(sensitivity_of(0.5, 1.0), one_of_two, lambda own: losses[1 - low(own)], feedback, 5)
    assert low(one_of_two(found).widths()) == 0 and [each.best for each in rounds] == [True, False]
    # One round asks for no feedback.
    asked.clear()
    assert len(updated(sensitivity_of(0.5, 1.0), one_of_two, lambda _: 0.0, feedback, 1)[1]) == 1 and not asked


def test_factors_are_ratios_of_traces_in_the_quantized_model() -> None:
    model, images = digits_model(), digit_batches(1, 4)
    cost = inspect_model(model)
    own = QuantizedFeedback(Task("feedback", model, (2, 4, 8), GRIDS, images))
    coarse, fine = ({site: (width,) for site in cost.sites} for width in (2, 8))
    assert own.judge({}) == pytest.approx(0, abs=1e-6)
    assert own.judge(coarse) > own.judge(fine) > 0
    near, far = own.factors(fine), own.factors(coarse)
    assert set(near) == set(cost.sites)
    off = {site: float((near[site].log().abs()).max()) for site in near}
    assert np.median(list(off.values())) < 0.1
    assert any(float(far[site].log().abs().max()) > 3 * off[site] for site in far)
    assert all(bool(((values >= 1 / LIMIT) & (values <= LIMIT)).all()) for values in far.values())


def test_rounds_keep_the_budget_and_are_never_judged_worse() -> None:
    model, images = digits_model(), digit_batches(1, 8)
    cost = inspect_model(model)
    sensitivity = measure_sensitivity(model, images, metric="lampq", widths=(2, 4, 8))
    limit = cost.bit_operations(cost.uniform(3))
    own = QuantizedFeedback(Task("feedback", model, (2, 4, 8), GRIDS, images))

    def allocated(losses: Sensitivity) -> QuantPlan:
        return allocate_plan(cost, losses, limit, boundary=None)

    found, rounds = updated(sensitivity, allocated, own.judge, own.factors, 3)
    plan = allocated(found)
    assert cost.bit_operations(plan.widths()) <= limit
    assert own.judge(plan.widths()) == pytest.approx(min(each.divergence for each in rounds))
    assert sum(each.best for each in rounds) == 1


def test_rounds_are_of_mixed_widths(tmp_path: Path) -> None:
    config = small_config(method="ptq", budget="w4a4", method_options={"rounds": 3})
    with pytest.raises(UsageError, match="--rounds are of mixed widths"):
        create_method(config).plan(inspect_model(digits_model()))


def test_a_run_says_what_its_rounds_found(tmp_path: Path) -> None:
    options = {"metric": "lampq", "rounds": 2, "class_token": "off"}
    config = small_config(method="ptq", budget="4bit", calibration_images=16, method_options=options)
    lines: list[str] = []
    result = train(config, tmp_path / "run", quiet=True, notify=lines.append)
    assert 1 <= len(result["rounds"]) <= 2 and sum(each["best"] for each in result["rounds"]) == 1
    assert any("the best is kept" in line for line in lines)
    cost = inspect_model(digits_model())
    assert result["bit_operations"] <= cost.bit_operations(cost.uniform(4))
