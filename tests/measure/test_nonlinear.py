"""Which integer forms are chosen: by name, and by the smallest error, which is measured here a second time."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from tiny_models import digit_batches, digits_model
from torch import Tensor

from qvit.documents.run import IntegerForms
from qvit.measure.nonlinear import choose_forms
from qvit.methods.ptq.stages import ptq
from qvit.models.calibrate import calibrate
from qvit.models.convert import plan_of, quantize, quantizers_disabled
from qvit.models.integer_functions import functions_of, places
from qvit.nonlinear import OPERATIONS


@torch.no_grad()
def test_the_best_form_by_sqnr_is_that_of_the_smallest_error() -> None:
    images = digit_batches(1, 16)
    model = calibrate(quantize(digits_model(depth=2), "w8a8"), images)
    found = choose_forms(model, "sqnr", images)
    seen: dict[str, tuple[Tensor, Tensor]] = {}
    for path, function in functions_of(model):
        function.register_forward_hook(lambda f, x, y, path=path: seen.update({path: (x[0], y)}))
    with quantizers_disabled(model):
        model.eval()(images[0])
    assert set(found["sqnr"]) == set(places(model)) == set(seen)
    for path, function in functions_of(model):
        x, y = seen[path]
        errors = {
            name: (function.values(x, form) - y).square() for name, form in OPERATIONS[function.operation].items()
        }
        assert function.form == min(errors, key=lambda name: float(errors[name].sum()))
        for name, error in errors.items():
            ratio = float(y.square().sum() / error.sum())
            assert found["sqnr"][path][name] == pytest.approx(10 * math.log10(ratio), abs=0.02)
    assert found["forms"] == plan_of(model).nonlinear
    IntegerForms.model_validate(found)


def test_post_training_quantization_gives_forms_before_it_corrects_biases() -> None:
    images, told = digit_batches(2, 8), []
    options: dict[str, Any] = {"calibration_images": 16, "chosen": told.append}
    plain = ptq(digits_model(depth=2), "w8a8", images, **options)
    own = ptq(digits_model(depth=2), "w8a8", images, nonlinear="softmax=i-vit,blocks.1.mlp.act=i-bert", **options)
    assert told == [{"forms": plan_of(own).nonlinear}] and told[0]["forms"]["softmax"] == "i-vit"
    assert not plan_of(plain).nonlinear
    biases = [dict(model.named_parameters())["blocks.1.mlp.fc2.bias"] for model in (plain, own)]
    assert not torch.equal(*biases)
    again = ptq(digits_model(depth=2), plan_of(own), images, calibration_images=16)
    assert plan_of(again).nonlinear == plan_of(own).nonlinear
    without = ptq(digits_model(depth=2), plan_of(own), images, calibration_images=16, nonlinear="float")
    assert not plan_of(without).nonlinear
