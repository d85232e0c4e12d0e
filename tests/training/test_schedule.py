"""The optimizer's groups in a training, and their learning rates over time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import (
    float_trainer,
    small_config,
    starting_point,
    tiny_trainer,
)

from qvit.quantizers import quantizers_of
from qvit.training.loop import Trainer
from qvit.training.optimizer import create_optimizer


def test_what_decays_and_what_does_not() -> None:
    model, _ = starting_point(small_config(method="qvit", budget="3bit"))
    optimizer = create_optimizer(model, opt="adamw", lr=1e-3, weight_decay=0.05, width_lr=0.02)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = {group["name"]: group for group in optimizer.param_groups}
    members = {key: {names[id(p)] for p in group["params"]} for key, group in groups.items()}
    assert sum(map(len, members.values())) == len(names) == len(set().union(*members.values()))
    assert members["weights"] == {n for n in names.values() if n.endswith(".weight") and "norm" not in n}
    assert members["widths"] == {n for n in names.values() if n.endswith(".bit_width")}
    assert members["scales"] == {n for n in names.values() if n.endswith(("quantizer.scale", "quantizer.offset"))}
    assert {"cls_token", "pos_embed", "blocks.0.norm1.weight", "head.bias"} <= members["others"]
    assert {key: group["weight_decay"] for key, group in groups.items()} == {
        "weights": 0.05, "others": 0.0, "scales": 0.0, "widths": 0.0
    }  # fmt: skip
    assert {key: group["lr"] for key, group in groups.items()} == pytest.approx(
        {"weights": 1e-3, "others": 1e-3, "scales": 1e-3, "widths": 0.02}
    )


@pytest.mark.parametrize("opt", ["adamw", "adam", "sgd", "lamb", "lion"])
def test_timm_s_optimizers_train_a_quantized_model(tmp_path: Path, opt: str) -> None:
    trainer, _, model = tiny_trainer(tmp_path, epochs=2, opt=opt, method_options={"searching_ratio": 0.5})
    before = model.get_parameter("head.weight").detach().clone()
    trainer.fit(quiet=True)
    assert not torch.equal(model.get_parameter("head.weight"), before)
    assert all((quantizer.scale > 0).all() for _, quantizer in quantizers_of(model))


def rates_of(trainer: Trainer) -> list[dict[str, float]]:
    """The learning rate of each group at every step."""
    rates: list[dict[str, float]] = []

    def note(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        rates.append({group["name"]: group["lr"] for group in optimizer.param_groups})

    trainer.optimizer.register_step_pre_hook(note)
    trainer.fit(quiet=True)
    return rates


@pytest.mark.parametrize("sched", ["cosine", "tanh", "step", "poly"])
def test_widths_follow_the_schedule_at_their_own_rate(tmp_path: Path, sched: str) -> None:
    options = {"width_lr": 0.05, "searching_ratio": 1.0, "width_schedule": "run"}
    trainer, _, _ = tiny_trainer(tmp_path, epochs=2, sched=sched, method_options=options)
    rates = rates_of(trainer)
    assert len(rates) == 6 and rates[0] == pytest.approx(
        {"weights": trainer.config.lr, "others": trainer.config.lr, "scales": trainer.config.lr, "widths": 0.05}
    )
    for rate in rates:
        assert rate["weights"] == rate["others"] == rate["scales"]
        assert rate["widths"] / rate["weights"] == pytest.approx(0.05 / trainer.config.lr)


def test_warm_up_rises_to_the_learning_rate_and_cosine_falls_from_there(tmp_path: Path) -> None:
    rates = [rate["weights"] for rate in rates_of(float_trainer(tmp_path, epochs=4, warmup_epochs=1, lr=1e-3))]
    assert rates[:4] == sorted(rates[:4]) and rates[0] < 1e-4 and rates[3] == pytest.approx(1e-3)
    assert rates[3:] == sorted(rates[3:], reverse=True) and rates[-1] < 1e-4
