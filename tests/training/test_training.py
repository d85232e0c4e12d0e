"""The training loop: what a step is, what stops a run, micro-batches, SIGTERM."""

from __future__ import annotations

import json
import math
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import (
    Batches,
    digit_batches,
    digits_model,
    events,
    float_trainer,
    saved,
    small_config,
    tiny_trainer,
)
from torch import Tensor, nn
from torch.nn import functional as F

from qvit.errors import QvitError, UsageError
from qvit.models.convert import freeze
from qvit.plan.quant_plan import QuantPlan
from qvit.quantizers import quantizers_of
from qvit.training.checkpoint import (
    checkpoints_of,
    last_checkpoint,
    load_checkpoint,
)
from qvit.training.evaluate import evaluate
from qvit.training.loop import Trainer, micro_batch
from qvit.training.optimizer import drop_widths
from qvit.training.signals import Terminated

# ------------------------------------------------------------------------------------------------------------- the loop


def test_a_step_is_task_loss_plus_penalty_and_the_log_says_so(tmp_path: Path) -> None:
    options = {"searching_ratio": 1.0, "initial_bits": 4}  # above the budget, so that there is a penalty
    trainer, method, _ = tiny_trainer(tmp_path, epochs=2, method_options=options)
    trainer.fit(quiet=True)
    steps = events(tmp_path, "step")
    assert [(event["step"], event["epoch"]) for event in steps] == [(i + 1, i // 3) for i in range(6)]
    for event in steps:
        assert event["loss"] == pytest.approx(event["task_loss"] + event["penalty"], rel=1e-6)
        assert event["penalty"] > 0 and event["bit_operations"] > method.limit
        assert event["images_per_second"] > 0 and 0 <= event["lr"] <= trainer.config.lr
    assert steps[-1]["lr"] == pytest.approx(0, abs=1e-12), "cosine ends at min_lr"
    epochs = events(tmp_path, "epoch")
    assert [(event["epoch"], event["step"]) for event in epochs] == [(0, 3), (1, 6)]
    assert epochs[0]["train_loss"] == pytest.approx(sum(event["loss"] for event in steps[:3]) / 3, rel=1e-5)
    assert epochs[0]["accuracy"] is None and 0 <= epochs[0]["train_accuracy"] <= 100
    assert epochs[1]["bit_widths"].keys() == {name for name, _ in quantizers_of(trainer.model)}


def test_the_task_loss_of_the_first_step_by_hand(tmp_path: Path) -> None:
    for smoothing in (0.0, 0.2):
        trainer = float_trainer(tmp_path / str(smoothing), steps=1, epochs=1, label_smoothing=smoothing)
        (images, targets), *_ = trainer.loader
        expected = F.cross_entropy(trainer.model(images), targets, label_smoothing=smoothing).item()
        trainer.fit(quiet=True)
        (event,) = events(trainer.run, "step")
        assert event["task_loss"] == pytest.approx(expected, rel=1e-5) and event["penalty"] == 0


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_distillation_by_hand(tmp_path: Path, share: float) -> None:
    teacher = digits_model(seed=9)
    trainer = float_trainer(tmp_path, steps=1, epochs=1, distill=share, teacher=teacher)
    before = {key: value.clone() for key, value in teacher.state_dict().items()}
    (images, targets), *_ = trainer.loader
    logits = trainer.model(images)
    soft = -(teacher(images).softmax(-1) * logits.log_softmax(-1)).sum(-1).mean()
    expected = (1 - share) * F.cross_entropy(logits, targets) + share * soft
    trainer.fit(quiet=True)
    (event,) = events(tmp_path, "step")
    assert event["loss"] == pytest.approx(expected.item(), rel=1e-5)
    assert all(torch.equal(value, before[key]) for key, value in teacher.state_dict().items())
    assert all(parameter.grad is None for parameter in teacher.parameters())


def test_clipping_limits_the_norm_of_the_gradient(tmp_path: Path) -> None:
    norms: dict[float | None, float] = {}
    for limit in (None, 0.01):
        trainer = float_trainer(tmp_path / str(limit), steps=1, epochs=1, clip_grad=limit)

        def note(*_: Any, limit: float | None = limit, model: nn.Module = trainer.model) -> None:
            squares = [p.grad.square().sum().item() for p in model.parameters() if p.grad is not None]
            norms[limit] = math.sqrt(sum(squares))

        trainer.optimizer.register_step_pre_hook(note)
        trainer.fit(quiet=True)
    assert norms[None] > 0.05 and norms[0.01] == pytest.approx(0.01, rel=1e-3)


@pytest.mark.parametrize("asked", [False, True])
def test_dropout_is_off_in_finetuning_unless_asked_for(tmp_path: Path, asked: bool) -> None:
    trainer = float_trainer(tmp_path, epochs=1, stochastic_depth=asked)
    modes: list[bool] = []
    trainer.model.register_forward_pre_hook(lambda module, _: modes.append(module.training))
    trainer.fit(quiet=True)
    assert modes == [asked] * 3


def test_the_average_follows_the_weights_by_hand(tmp_path: Path) -> None:
    trainer = float_trainer(tmp_path, steps=2, epochs=1, ema_decay=0.75, lr=0.1)
    weights: list[dict[str, Tensor]] = []

    def note(*_: Any) -> None:
        weights.append({key: value.clone() for key, value in trainer.model.state_dict().items()})

    trainer.optimizer.register_step_post_hook(note)
    trainer.fit(quiet=True)
    assert trainer.result_model is not trainer.model
    for key, value in trainer.result_model.state_dict().items():  # the average begins with the first step's weights
        torch.testing.assert_close(value, 0.75 * weights[0][key] + 0.25 * weights[1][key])


def test_mixup_mixes_images_and_labels(tmp_path: Path) -> None:
    trainer = float_trainer(tmp_path, steps=1, epochs=1, mixup=0.8)
    seen: list[Tensor] = []
    trainer.model.register_forward_pre_hook(lambda _, args: seen.append(args[0].clone()))
    (images, _), *_ = trainer.loader
    original = images.clone()
    trainer.fit(quiet=True)
    assert not torch.equal(seen[0], original)
    share = ((seen[0] - original) / (original.flip(0) - original)).median()
    torch.testing.assert_close(seen[0], original.lerp(original.flip(0), share))


def test_a_monitor_watches_the_model_that_will_be_kept(tmp_path: Path) -> None:
    trainer = float_trainer(tmp_path, epochs=2, ema_decay=0.5)
    watched: list[nn.Module] = []
    trainer.monitor = lambda model: float(watched.append(model) or 12.5)
    trainer.fit(quiet=True)
    assert [event["accuracy"] for event in events(tmp_path, "epoch")] == [12.5, 12.5]
    assert all(model is trainer.result_model for model in watched)


@pytest.mark.parametrize("precision", ["bf16", "fp32", "bf16"])
def test_precisions_in_any_order_in_one_process(tmp_path: Path, precision: str) -> None:
    trainer, _, model = tiny_trainer(tmp_path, epochs=1, precision=precision)
    dtypes: list[torch.dtype] = []
    model.get_submodule("blocks.0.mlp.fc1").register_forward_hook(lambda _, __, out: dtypes.append(out.dtype))
    trainer.fit(quiet=True)
    assert set(dtypes) == {torch.bfloat16 if precision == "bf16" else torch.float32}
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())
    assert all(math.isfinite(event["loss"]) for event in events(tmp_path, "step"))


def test_fewer_images_than_a_batch_are_counted_right(tmp_path: Path) -> None:
    """The loader lowers a batch size that is larger than the data set; shares must be of what was seen."""
    trainer = float_trainer(tmp_path, steps=2, epochs=1, batch_size=64)
    trainer.model.register_forward_hook(lambda _, args, out: out + 1e3 * F.one_hot(labels[len(args[0])], 10))
    labels = {8: torch.zeros(8, dtype=torch.long)}
    trainer.loader = Batches((images, labels[8]) for images, _ in trainer.loader)
    trainer.fit(quiet=True)
    (epoch,) = events(tmp_path, "epoch")
    assert epoch["train_accuracy"] == pytest.approx(100.0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mixup": 0.2, "batch_size": 7}, "even batch size, not 7"),
        ({"opt": "adamww"}, "optimizer 'adamww'"),
        ({"sched": "cosin"}, "cosin.*did you mean 'cosine'"),
    ],
)
def test_what_training_cannot_do_is_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        float_trainer(tmp_path, **changes)


def test_mixing_a_batch_of_odd_size_is_refused(tmp_path: Path) -> None:
    trainer = float_trainer(tmp_path, epochs=1, mixup=0.2)
    trainer.loader = Batches((images[:7], labels[:7]) for images, labels in trainer.loader)
    with pytest.raises(QvitError, match="even batch size, not 7"):
        trainer.fit(quiet=True)


def test_no_batch_at_all_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(QvitError, match="too few training images for one batch of 8"):
        float_trainer(tmp_path, steps=0)


# ----------------------------------------------------------------------------------------------------- what stops a run


def poison(trainer: Trainer, step: int) -> None:
    """The images of one step are NaN; steps count from 1, an epoch has three."""
    whole = list(trainer.loader)

    class Poisoned(Batches):
        def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
            for index, (images, labels) in enumerate(whole):
                bad = trainer.epoch * len(whole) + index + 1 == step
                yield (torch.full_like(images, math.nan) if bad else images), labels

    trainer.loader = Poisoned(whole)


@pytest.mark.parametrize(("step", "epoch"), [(1, 0), (3, 0), (4, 1), (5, 1), (6, 1)])
@pytest.mark.parametrize("log_every", [1, 10])
def test_a_loss_that_is_not_finite_stops_with_step_and_checkpoint(
    tmp_path: Path, step: int, epoch: int, log_every: int
) -> None:
    trainer, _, _ = tiny_trainer(tmp_path, epochs=3, log_every=log_every)
    poison(trainer, step)
    name = f"{tmp_path}/checkpoints/step-{3 * epoch:09d}-[0-9a-f]+.safetensors"
    kept = f"the last good checkpoint is {name}" if epoch else "there is no checkpoint yet"
    with pytest.raises(QvitError, match=f"not finite at step {step} .*epoch {epoch}.*{kept}"):
        trainer.fit(quiet=True)
    (event,) = events(tmp_path, "failed")
    assert event["step"] == step and "not finite" in event["reason"]
    assert bool(last_checkpoint(tmp_path)) == (epoch > 0)
    if epoch:
        state = load_checkpoint(tmp_path)
        assert state["step"] == 3 * epoch
        assert all(torch.isfinite(value).all() for value in state["model"].values())
    assert not events(tmp_path, "end")


def test_a_huge_learning_rate_is_stopped(tmp_path: Path) -> None:
    trainer = float_trainer(tmp_path, epochs=20, lr=1e6, opt="sgd")
    with pytest.raises(QvitError, match=r"not finite.*at step \d+"):
        trainer.fit(quiet=True)
    assert events(tmp_path, "failed")


@pytest.mark.parametrize("part", ["weights", "widths", "scales"])
@pytest.mark.parametrize("step", [2, 3])
def test_gradients_that_are_not_finite_stop_the_run_too(tmp_path: Path, part: str, step: int) -> None:
    """The loss of the step is fine, its gradient overflows: what was good until then is never overwritten."""
    trainer, _, _ = tiny_trainer(tmp_path, epochs=2, method_options={"searching_ratio": 1.0})
    parameters = next(group["params"] for group in trainer.optimizer.param_groups if group["name"] == part)
    count = 0

    def overflow(*_: Any) -> None:
        nonlocal count
        count += 1
        if count == step:
            for parameter in parameters:
                parameter.grad = torch.full_like(parameter, math.nan)

    trainer.optimizer.register_step_pre_hook(overflow)
    with pytest.raises(QvitError, match=r"not finite.*at step \d.*no checkpoint yet"):
        trainer.fit(quiet=True)
    assert events(tmp_path, "failed") and not checkpoints_of(tmp_path)


def test_weights_that_broke_in_the_last_step_are_noticed_before_the_monitor_runs(tmp_path: Path) -> None:
    trainer = float_trainer(tmp_path, steps=1, epochs=1)
    trainer.monitor = lambda model: evaluate(model, trainer.loader)["top1"]
    trainer.optimizer.register_step_post_hook(lambda *_: trainer.model.get_parameter("head.bias").data.fill_(math.nan))
    with pytest.raises(QvitError, match=r"at step 1 .*no checkpoint yet"):
        trainer.fit(quiet=True)
    assert events(tmp_path, "failed")


def test_a_checkpoint_never_holds_weights_that_are_not_finite(tmp_path: Path) -> None:
    trainer = float_trainer(tmp_path, epochs=2)
    good = saved(trainer).read_bytes()
    trainer.model.get_parameter("head.bias").data.fill_(math.inf)
    with pytest.raises(QvitError, match=r"'head\.bias' is not finite"):
        trainer.save()
    (path,) = checkpoints_of(tmp_path)
    assert path.read_bytes() == good


# -------------------------------------------------------------------------------------------------------- micro-batches


def test_micro_batches_are_the_same_training(tmp_path: Path) -> None:
    """The gradient of 16 images, at once or in four parts: also that of scales, whose factor counts elements."""
    images, labels = digit_batches(1, 16)[0], torch.randint(0, 10, (16,))
    gradients: list[dict[str, Tensor]] = []
    for parts in (1, 4):
        trainer, _, model = tiny_trainer(
            tmp_path / str(parts), steps=parts, epochs=1, batch_size=16, accumulate=parts, label_smoothing=0.1
        )
        trainer.loader = Batches(zip(images.chunk(parts), labels.chunk(parts), strict=True))
        assert trainer.steps_per_epoch == 1

        def note(*_: Any, model: nn.Module = model) -> None:
            gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})

        trainer.optimizer.register_step_pre_hook(note)
        trainer.fit(quiet=True)
    whole, parted = gradients
    assert whole.keys() == parted.keys() and any(name.endswith("input_quantizer.scale") for name in whole)
    for name, value in whole.items():
        assert torch.allclose(parted[name], value, rtol=1e-3, atol=1e-4 * float(value.abs().max())), name
    losses = [events(tmp_path / parts, "step")[0]["loss"] for parts in ("1", "4")]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    accuracies = [events(tmp_path / parts, "epoch")[0]["train_accuracy"] for parts in ("1", "4")]
    assert accuracies[0] == accuracies[1]


@pytest.mark.parametrize(("batch", "accumulate", "world", "micro"), [(64, 1, 1, 64), (64, 4, 8, 2), (6, 3, 1, 2)])
def test_a_batch_is_divided_evenly(batch: int, accumulate: int, world: int, micro: int) -> None:
    config = small_config(batch_size=batch, accumulate=accumulate)
    assert micro_batch(config, world) == micro
    with pytest.raises(UsageError, match=f"{batch} images cannot be divided evenly over 5 process.*multiple of"):
        micro_batch(config, 5)


# -------------------------------------------------------------------------------------------------------------- SIGTERM


@pytest.mark.parametrize("step", [1, 2, 3, 4])
def test_sigterm_saves_and_ends_after_the_step(tmp_path: Path, step: int) -> None:
    """Also in the middle of an epoch, and at its last step; the rest gives the model of an uninterrupted run."""
    options = {"searching_ratio": 0.5, "width_lr": 0.1}
    whole, _, expected = tiny_trainer(tmp_path / "whole", epochs=2, ema_decay=0.5, method_options=options)
    whole.fit(quiet=True)
    first, _, _ = tiny_trainer(tmp_path / "run", epochs=2, ema_decay=0.5, method_options=options)
    before = signal.getsignal(signal.SIGTERM)

    def ask(*_: Any) -> None:
        if first.step + 1 == step:
            os.kill(os.getpid(), signal.SIGTERM)

    first.optimizer.register_step_pre_hook(ask)
    with pytest.raises(Terminated, match=f"SIGTERM at step {step} of 6: saved .*step-00000000{step}-.*--resume"):
        first.fit(quiet=True)
    assert signal.getsignal(signal.SIGTERM) == before
    assert [event["step"] for event in events(tmp_path / "run", "terminated")] == [step]
    state = load_checkpoint(tmp_path / "run")
    second, _, model = tiny_trainer(tmp_path / "run", epochs=2, ema_decay=0.5, method_options=options)
    if step > 3:
        freeze(model, plan_of_checkpoint(state)), freeze(second.models()[1], plan_of_checkpoint(state))
        drop_widths(second.optimizer)
    second.restore(state)
    second.fit(quiet=True)
    for (key, value), other in zip(expected.state_dict().items(), model.state_dict().values(), strict=True):
        assert torch.equal(value, other), key
    for kind in ("epoch", "freeze"):
        mine, theirs = ([strip(event) for event in events(run, kind)] for run in (second.run, whole.run))
        assert mine == theirs, "the log of an epoch is that of the whole epoch"


def strip(event: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in event.items() if key != "seconds"}


def plan_of_checkpoint(state: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """The frozen widths in a checkpoint."""
    return {name: spec.widths for name, spec in QuantPlan.from_json(json.loads(state["plan"])).sites.items() if spec}


def test_sigterm_after_the_last_step_lets_the_run_end(tmp_path: Path) -> None:
    trainer = float_trainer(tmp_path, epochs=1)

    def ask(*_: Any) -> None:
        if trainer.step == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    trainer.optimizer.register_step_pre_hook(ask)
    trainer.fit(quiet=True)
    assert trainer.step == 3 and not events(tmp_path, "terminated")
