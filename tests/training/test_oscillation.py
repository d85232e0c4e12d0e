"""Oscillation: its frequency by hand, the three remedies, what is remembered across an interruption, the log."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import calibrated_model, events, tiny_trainer
from torch import nn

from qvit.quantizers import quantizers_of
from qvit.training.checkpoint import load_checkpoint
from qvit.training.oscillation import Diagnostics, Oscillations, RemedyOptions, create_remedy, quantized_weights
from qvit.training.oscillation.remedies import Annealing, Freezing, Regularizer
from qvit.training.oscillation.tracking import codes_of

WEIGHTS = ("oscillating", "variation", "outliers")


def codes(model: nn.Module) -> dict[str, torch.Tensor]:
    return {s: codes_of(q, w) for own in quantized_weights(model) for s, q, w in own.parts(detached=True)}


def test_frequency_by_hand() -> None:
    """Changes +1, +1, -1, 0, +2, +1: oscillations in the third and the fifth, whatever stands between."""
    state = Oscillations(torch.tensor([0.0]), compact=True)
    expected = 0.0
    for code, oscillates in ((1, 0), (2, 0), (1, 1), (1, 0), (3, 1), (4, 0)):
        state.observe(torch.tensor([float(code)]), 0.25)
        expected += 0.25 * (oscillates - expected)
        assert state.frequency.item() == pytest.approx(expected, abs=1e-3)
    assert state.direction.item() == 1 and state.codes.item() == 4


def test_the_widest_change_of_a_byte_is_no_overflow() -> None:
    state = Oscillations(torch.tensor([127.0]), compact=True)
    for code in (-128.0, 127.0):
        state.observe(torch.tensor([code]), 0.5)
    assert state.codes.dtype == torch.int8 and state.frequency.item() == 0.5
    assert Oscillations(torch.tensor([255.0]), compact=False).codes.item() == 255


@pytest.mark.parametrize("plan", ["w4a4", "w2a8"])
def test_weights_and_their_codes_are_those_of_the_quantizers(plan: str) -> None:
    model = calibrated_model(plan)
    found = codes(model)
    assert set(found) == {site for site, _ in quantizers_of(model) if site.endswith("weight")}
    for own in quantized_weights(model):
        for site, quantizer, _ in own.parts(detached=True):
            exact = quantizer.to_int(own.parameter.detach().chunk(len(own.sites))[own.sites.index(site)])
            assert torch.equal(found[site].view_as(exact).to(torch.int32), exact), site


def test_the_sample_lies_within_each_scale_and_counts_oscillations() -> None:
    model = calibrated_model("w4a4", embed_dim=32)
    diagnostics = Diagnostics(model)
    diagnostics.observe()
    assert diagnostics.oscillations is not None
    for (site, quantizer, weight), rows in zip(
        diagnostics.parts, diagnostics.oscillations.codes.split(diagnostics.rows), strict=True
    ):
        own = codes_of(quantizer, weight)
        assert rows.numel() <= max(64 * quantizer.num_groups, own.numel()), site
        assert set(rows.flatten().tolist()) <= set(own.flatten().tolist())
    weight = model.get_submodule("blocks.0.mlp.fc1").get_parameter("weight")
    before = weight.detach().clone()
    with torch.no_grad():
        for step in range(4):
            weight.copy_(before if step % 2 else -before)
            diagnostics.observe()
    record = diagnostics.record()
    assert record["blocks.0.mlp.fc1.weight"]["oscillating"] > 0.5
    assert record["blocks.0.mlp.fc2.weight"]["oscillating"] == 0
    flat = weight.detach().flatten()
    assert record["blocks.0.mlp.fc1.weight"]["variation"] == pytest.approx(
        float(flat.std() / flat.abs().mean()), rel=1e-2
    )
    assert record["blocks.0.mlp.fc1.weight"]["outliers"] == pytest.approx(
        float(flat.abs().max() / flat.std()), rel=1e-2
    )


def test_the_schedule_of_the_regularizer() -> None:
    remedy = create_remedy(calibrated_model(), RemedyOptions())
    assert isinstance(remedy, Regularizer)
    for t in (0.0, 0.1, 0.25):
        assert remedy.strength(t) == 0.0 and remedy.penalty(t) is None
    for t in (0.3, 0.625, 0.9, 1.0):
        assert remedy.strength(t) == pytest.approx(0.005 * (1 - math.cos(math.pi * (t - 0.25) / 0.75)), rel=1e-12)
    assert remedy.strength(1.0) == pytest.approx(0.01)
    penalty = remedy.penalty(1.0)
    assert penalty is not None and penalty.item() == pytest.approx(0.01 * remedy.loss().item(), rel=1e-6)
    late = create_remedy(calibrated_model(), RemedyOptions(regularizer_start=0.1, regularizer_peak=2.0), 0.6)
    assert isinstance(late, Regularizer) and late.strength(0.6) == 0.0 and late.strength(1.0) == pytest.approx(2.0)
    never = create_remedy(calibrated_model(), RemedyOptions(), 1.0)
    assert never.penalty(1.0) is None


def test_descent_on_the_regularizer_leads_to_the_grid() -> None:
    model = calibrated_model("w3a3")
    remedy = create_remedy(model, RemedyOptions())
    assert isinstance(remedy, Regularizer)
    first = remedy.loss()
    weights = [own.parameter for own in remedy.weights]
    for _ in range(50):
        loss = remedy.loss()
        for parameter, gradient in zip(weights, torch.autograd.grad(loss, weights), strict=True):
            parameter.data.sub_(gradient)
    assert remedy.loss().item() < 0.5 * first.item()


def test_a_frozen_weight_stays_at_its_mean_code() -> None:
    model = calibrated_model("w3a3")
    remedy = create_remedy(
        model, RemedyOptions(oscillation="freezing", freezing_from=0.4, freezing_to=0.4, freezing_momentum=0.2)
    )
    assert isinstance(remedy, Freezing)
    own = next(own for own in remedy.weights if own.sites == ("blocks.0.mlp.fc1.weight",))
    quantizer = own.quantizers[0]
    assert quantizer is not None
    scale = quantizer.grid()[0]
    with torch.no_grad():
        own.parameter.zero_()
        for step in range(8):  # to and fro
            own.parameter[0, 0] = scale * (0 if step % 2 else 1.2)
            remedy.after_step(0.5)
    assert remedy.frozen[own.sites[0]].sum() == 1 and bool(remedy.frozen[own.sites[0]][0, 0])
    held = float(own.parameter.detach()[0, 0] / scale)
    assert held == pytest.approx(round(held), abs=1e-5)
    with torch.no_grad():
        own.parameter.fill_(float(3 * scale))
        quantizer.scale.mul_(1.5)
    remedy.after_step(0.6)
    assert own.parameter[0, 0].item() == pytest.approx(held * 1.5 * float(scale), abs=1e-6), "it follows its scale"
    assert own.parameter[1, 1].item() == pytest.approx(3 * float(scale))


def test_the_threshold_falls_by_half_a_cosine() -> None:
    remedy = create_remedy(calibrated_model(), RemedyOptions(oscillation="freezing"), 0.2)
    assert isinstance(remedy, Freezing)
    assert [remedy.threshold(t) for t in (0.2, 0.6, 1.0)] == pytest.approx([0.04, 0.025, 0.01])


def test_annealing_moves_weights_at_boundaries_alone() -> None:
    model = calibrated_model("w4a4")
    remedy = create_remedy(model, RemedyOptions(oscillation="annealing", annealing_share=0.5))
    assert isinstance(remedy, Annealing)
    own = next(own for own in remedy.weights if own.sites == ("blocks.0.mlp.fc1.weight",))
    quantizer = own.quantizers[0]
    assert quantizer is not None
    scale = float(quantizer.grid()[0])
    values = torch.tensor([0.5, 0.504, 0.506, -1.497, 0.0, 7.5, 9.5, -8.5]) * scale
    with torch.no_grad():
        own.parameter.view(-1)[:8] = values
    for t, moved in ((0.4, [True] * 8), (0.5, [True, True, False, True, False, False, False, False])):
        before = own.parameter.detach().clone()
        own.parameter.grad = torch.ones_like(own.parameter)
        remedy.before_step(t)
        assert own.parameter.grad.view(-1)[:8].bool().tolist() == moved
        with torch.no_grad():
            own.parameter.sub_(1e-4 * scale)  # as momentum and weight decay would, without a gradient
        remedy.after_step(t)
        assert (own.parameter != before).view(-1)[:8].tolist() == moved


REMEDIES: dict[str, dict[str, Any]] = {
    "regularizer": {"regularizer_start": 0.0, "regularizer_peak": 1.0},
    "freezing": {"freezing_from": 0.005, "freezing_to": 0.005},
    "annealing": {"annealing_share": 0.7, "annealing_distance": 0.2},
}


@pytest.mark.parametrize("name", REMEDIES)
def test_a_resumed_run_is_the_uninterrupted_one(tmp_path: Path, name: str) -> None:
    changes: dict[str, Any] = {
        "method": "vvtq", "lr": 0.02, "epochs": 2, "checkpoint_steps": 1, "keep_checkpoints": 9,
        "method_options": {"oscillation": name, **REMEDIES[name]},
    }  # fmt: skip
    whole, _, expected = tiny_trainer(tmp_path / "whole", steps=4, **changes)
    whole.fit(quiet=True)
    first, _, _ = tiny_trainer(tmp_path / "part", steps=4, **changes)
    first.config = first.config.model_copy(update={"epochs": 1})
    first.fit(quiet=True)
    second, method, model = tiny_trainer(tmp_path / "part", steps=4, **changes)
    second.restore(load_checkpoint(tmp_path / "part"))
    assert second.step == 4
    second.fit(quiet=True)
    for key, value in expected.state_dict().items():
        assert torch.equal(value, model.state_dict()[key]), key
    assert events(tmp_path / "whole", "diagnostics")[-1] == events(tmp_path / "part", "diagnostics")[-1]
    if name == "freezing":
        assert any(bool(frozen.any()) for frozen in method.remedy.frozen.values())


def test_checkpoints_of_before_are_read(tmp_path: Path) -> None:
    trainer, _, _ = tiny_trainer(tmp_path, method="vvtq", epochs=1)
    trainer.fit(quiet=True)
    state = load_checkpoint(tmp_path)
    del state["hooks"], state["diagnostics"]
    trainer.restore(state)


def test_diagnostics_of_any_method_and_without(tmp_path: Path) -> None:
    for method in ("lsq+", "qvit"):
        trainer, _, model = tiny_trainer(tmp_path / method, method=method, epochs=2)
        trainer.fit(quiet=True)
        found = events(tmp_path / method, "diagnostics")
        assert [event["epoch"] for event in found] == [0, 1]
        assert all(tuple(row) == WEIGHTS for event in found for row in event["sites"].values())
        assert set(found[0]["sites"]) == {site for site, _ in quantizers_of(model) if site.endswith("weight")}
    trainer, _, _ = tiny_trainer(tmp_path / "off", method="lsq+", epochs=1, diagnostics=False)
    trainer.fit(quiet=True)
    assert trainer.diagnostics is None and not events(tmp_path / "off", "diagnostics")


def test_the_penalty_is_added_once_whatever_the_micro_batches(tmp_path: Path) -> None:
    options = {"oscillation": "regularizer", "regularizer_start": 0.0, "regularizer_peak": 5.0}
    totals = []
    for parts in (1, 2):
        trainer, method, _ = tiny_trainer(
            tmp_path / str(parts), method="vvtq", epochs=1, steps=4, accumulate=parts, batch_size=8 * parts,
            method_options=options,
        )  # fmt: skip
        trainer.step = 2
        batches = list(trainer.loader)[:parts]
        trainer._wrap()
        method.total_steps = 4
        totals.append(trainer._step(batches, 1)[2].item())
    assert totals[0] == pytest.approx(totals[1], rel=1e-6) and totals[0] > 0
