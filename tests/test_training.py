"""Training: the loop, what stops it, the optimizer's groups, checkpoints, options, float weights, evaluation."""

from __future__ import annotations

import hashlib
import io
import json
import logging
import math
import os
import pickle
import resource
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from tiny_models import SMALL, Batches, digit_batches, digits_model, events, small_config, starting_point, tiny_trainer
from torch import Tensor, nn
from torch.nn import functional as F

from qvit.convert import freeze
from qvit.errors import QvitError, UsageError
from qvit.files import write_json
from qvit.plan import QuantPlan
from qvit.quantizers import quantizers_of
from qvit.training.checkpoint import (
    checkpoints_of,
    last_checkpoint,
    load_checkpoint,
    save_checkpoint,
    save_weights,
    seed_everything,
    step_of,
)
from qvit.training.config import TrainConfig
from qvit.training.evaluate import evaluate
from qvit.training.log import RunLog
from qvit.training.loop import Trainer, micro_batch
from qvit.training.models import create_model, load_weights, vit_digits
from qvit.training.optimizer import create_optimizer, drop_widths
from qvit.training.signals import Terminated


@contextmanager
def full_disk(limit: int = 4096) -> Iterator[None]:
    """Within the block no file of this process grows beyond `limit` bytes: writing fails as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def saved(trainer: Trainer) -> Path:
    """The checkpoint that a trainer writes."""
    path = trainer.save()
    assert path is not None
    return path


def float_trainer(run: Path, steps: int = 3, **changes: Any) -> Trainer:
    """A trainer of the float model on random images."""
    teacher = changes.pop("teacher", None)
    config = small_config(**({"method": "float", "batch_size": 8, "log_every": 1} | changes))
    labels = [torch.randint(0, 10, (8,)) for _ in range(steps)]
    loader = Batches(zip(digit_batches(steps), labels, strict=True))
    run.mkdir(parents=True, exist_ok=True)
    _, method = starting_point(small_config(method="lsq", budget="4bit"), attach=False)
    model = digits_model()
    return Trainer(model, config, loader, num_classes=10, run=run, hooks=method, width_lr=1.0, teacher=teacher)


# ------------------------------------------------------------------------------------------------------------- the loop


def test_a_step_is_task_loss_plus_penalty_and_the_log_says_so(tmp_path: Path) -> None:
    trainer, method, _ = tiny_trainer(tmp_path, epochs=2, method_options={"searching_ratio": 1.0})
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


# --------------------------------------------------------------------------------------------------- what stops a run


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
    name = f"{tmp_path}/checkpoints/step-{3 * epoch:09d}-[0-9a-f]+.pt"
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
    trainer = float_trainer(tmp_path, epochs=20, lr=1e20, opt="sgd")
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


# ------------------------------------------------------------------------------------------------------ micro-batches


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


# ------------------------------------------------------------------------------------------------------------- SIGTERM


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


# -------------------------------------------------------------------------------------------------------- checkpoints


def test_checkpoints_within_an_epoch(tmp_path: Path) -> None:
    trainer = float_trainer(tmp_path, steps=5, epochs=1, checkpoint_steps=2, keep_checkpoints=9)
    trainer.fit(quiet=True)
    assert [step_of(path) for path in checkpoints_of(tmp_path)] == [5, 4, 2]


def test_a_checkpoint_is_everything_the_next_epoch_needs(tmp_path: Path) -> None:
    options = {"searching_ratio": 1.0, "width_lr": 0.1}
    first, _, model = tiny_trainer(tmp_path / "a", epochs=2, ema_decay=0.5, method_options=options)
    whole = first.config
    first.config = whole.model_copy(update={"epochs": 1})
    first.fit(quiet=True)
    second, _, other = tiny_trainer(tmp_path / "a", seed=0, epochs=2, ema_decay=0.5, method_options=options)
    second.restore(load_checkpoint(tmp_path / "a"))
    assert second.epoch == 1
    first.config = whole
    first.fit(quiet=True)
    second.fit(quiet=True)
    for (key, value), other_value in zip(model.state_dict().items(), other.state_dict().values(), strict=True):
        assert torch.equal(value, other_value), key
    averages = (first.result_model.state_dict(), second.result_model.state_dict())
    assert all(torch.equal(averages[0][key], averages[1][key]) for key in averages[0])


def _renamed(path: Path, content: bytes) -> None:
    """Puts content there under the name that it must have: what somebody would do who means harm."""
    path.unlink()
    digest = hashlib.sha256(content).hexdigest()[:16]
    (path.parent / f"{path.name.rpartition('-')[0]}-{digest}.pt").write_bytes(content)


def _saved(value: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def _garbage(path: Path) -> None:
    path.write_bytes(b"\x00\x01 this is no checkpoint" * 50)


def _empty(path: Path) -> None:
    path.write_bytes(b"")


def _half(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _all_but_a_byte(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def _one_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


def _named_garbage(path: Path) -> None:
    _renamed(path, b"no checkpoint")


def _other_content(path: Path) -> None:
    _renamed(path, _saved(torch.zeros(3)))


def _incomplete(path: Path) -> None:
    _renamed(path, _saved({"step": 1, "model": {}}))


class Evil:
    """Writes a file when it is unpickled."""

    def __init__(self, target: Path) -> None:
        self.target = str(target)

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return os.mkdir, (self.target,)


def _code(path: Path) -> None:
    _renamed(path, _saved({"step": 1, "model": Evil(path.parent / "executed")}))


DAMAGES = [
    _garbage, _empty, _half, _all_but_a_byte, _one_bit, _named_garbage, _other_content, _incomplete, _code
]  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_named_and_nothing_in_it_is_executed(
    tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    damage(saved(float_trainer(tmp_path)))
    with pytest.raises(QvitError) as caught:
        load_checkpoint(tmp_path)
    assert str(last_checkpoint(tmp_path)) in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "checkpoints" / "executed").exists()


@pytest.mark.parametrize("damage", DAMAGES)
def test_the_checkpoint_before_a_damaged_one_is_taken(
    tmp_path: Path, damage: Callable[[Path], None], caplog: pytest.LogCaptureFixture
) -> None:
    trainer = float_trainer(tmp_path)
    saved(trainer)
    trainer.step = 3
    damage(saved(trainer))
    bad = last_checkpoint(tmp_path)
    assert bad is not None and step_of(bad) == 3
    assert load_checkpoint(tmp_path)["step"] == 0
    assert str(bad) in caplog.text


def test_the_newest_checkpoints_are_kept_and_nothing_half_written(tmp_path: Path) -> None:
    trainer = float_trainer(tmp_path, keep_checkpoints=3)
    for step in (1, 2, 3, 4, 5):
        trainer.step = step
        folder = saved(trainer).parent
        (folder / ".step-000000009-0.pt.abc").write_bytes(b"a process was killed while it wrote this")
    saved(trainer)
    assert [step_of(path) for path in checkpoints_of(tmp_path)] == [5, 4, 3]
    assert len(list(folder.iterdir())) == 3


def test_no_checkpoint_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(QvitError, match="no checkpoint to resume from.*--overwrite"):
        load_checkpoint(tmp_path)


def test_a_checkpoint_of_another_model_does_not_fit(tmp_path: Path) -> None:
    trainer = float_trainer(tmp_path)
    state = load_checkpoint(tmp_path) if saved(trainer) else {}
    other, _, _ = tiny_trainer(tmp_path / "other")
    with pytest.raises(QvitError, match="does not fit this run"):
        other.restore(state)


def test_a_full_disk_leaves_the_previous_checkpoint(tmp_path: Path) -> None:
    trainer = float_trainer(tmp_path, keep_checkpoints=1)
    path = saved(trainer)
    before = path.read_bytes()
    trainer.step = 5
    with full_disk(), pytest.raises(QvitError, match=f"cannot write {path.parent}/step-000000005"):
        trainer.save()
    assert path.read_bytes() == before
    assert [entry.name for entry in path.parent.iterdir()] == [path.name], "a partial file is left behind"
    assert load_checkpoint(tmp_path)["step"] == 0


@pytest.mark.parametrize("kind", ["weights", "json"])
def test_a_full_disk_leaves_the_previous_file(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "file"

    def write(size: int) -> None:
        if kind == "json":
            write_json(path, ["x" * size])
        else:
            save_weights(path, nn.Linear(1, size))

    write(1)
    before = path.read_bytes()
    with full_disk(), pytest.raises(QvitError, match=f"cannot write {path}"):
        write(10_000)
    assert path.read_bytes() == before and len(list(tmp_path.iterdir())) == 1


def test_a_write_that_is_interrupted_leaves_the_previous_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save_checkpoint(tmp_path, {"step": 1})
    before = path.read_bytes()

    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(tmp_path, {"step": 2})
    assert path.read_bytes() == before and len(list(path.parent.iterdir())) == 1


def test_a_file_changes_by_being_renamed_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is read while a file is written is the old content or the new."""
    path = tmp_path / "file.json"
    write_json(path, "old")
    seen: list[str] = []

    def replace(source: str, target: Path) -> None:
        seen.append(json.loads(path.read_text()) + " " + json.loads(Path(source).read_text()))
        raise OSError("no rename today")

    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(QvitError, match="no rename today"):
        write_json(path, "new")
    assert seen == ["old new"] and json.loads(path.read_text()) == "old"


def test_json_without_nan(tmp_path: Path) -> None:
    with pytest.raises(ValueError):
        write_json(tmp_path / "file.json", {"accuracy": math.nan})
    assert not list(tmp_path.iterdir())


def test_the_log_is_json_lines_and_its_errors_are_ours(tmp_path: Path) -> None:
    log = RunLog(tmp_path / "log.jsonl")
    log.write("step", step=1, loss=torch.tensor(0.5))
    log.write("end", step=1)
    first, second = (json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines())
    assert first == {"event": "step", "step": 1, "loss": 0.5} and second == {"event": "end", "step": 1}
    with pytest.raises(QvitError, match="cannot write the log"):
        RunLog(tmp_path / "missing" / "log.jsonl").write("step")


def test_a_line_that_was_cut_off_does_not_swallow_the_next(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    path.write_text('{"event": "step", "step": 1}\n{"event": "step", "st')
    RunLog(path).write("resume", step=1)
    parsed = []
    for line in path.read_text().splitlines():
        try:
            parsed.append(json.loads(line)["event"])
        except json.JSONDecodeError:
            parsed.append("cut off")
    assert parsed == ["step", "cut off", "resume"]


def test_tensorboard_gets_the_figures_of_the_log(tmp_path: Path) -> None:
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    trainer, _, _ = tiny_trainer(tmp_path, epochs=1, tensorboard=True)
    trainer.fit(quiet=True)
    board = event_accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    board.Reload()
    assert {"step/loss", "step/lr", "step/bit_operations", "epoch/train_accuracy"} <= set(board.Tags()["scalars"])
    assert any(tag.startswith("bit_widths/blocks.0.attn") for tag in board.Tags()["scalars"])
    losses = [(entry.step, entry.value) for entry in board.Scalars("step/loss")]
    logged = [(event["step"], event["loss"]) for event in events(tmp_path, "step")]
    assert losses == [(step, pytest.approx(loss, rel=1e-6)) for step, loss in logged]


def test_without_tensorboard_the_error_says_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard.writer", None)
    with pytest.raises(UsageError, match="pip install"):
        tiny_trainer(tmp_path, tensorboard=True)


def test_seeds_are_of_all_their_numbers() -> None:
    def draw(seed: int, epoch: int) -> tuple[float, float, float]:
        import random

        seed_everything(seed, epoch)
        return random.random(), float(np.random.rand()), float(torch.rand(()))

    assert draw(1, 2) == draw(1, 2)
    assert len({draw(seed, epoch) for seed in range(3) for epoch in range(3)}) == 9


# ---------------------------------------------------------------------------------------------------------- optimizer


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
    options = {"width_lr": 0.05, "searching_ratio": 1.0}
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


# ------------------------------------------------------------------------------------------------------------ options


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"epoch": 3}, "unknown option 'epoch'; did you mean 'epochs'"),
        ({"epochs": 0}, "epochs = 0"),
        ({"epochs": "many"}, "epochs = 'many'"),
        ({"lr": -1}, "lr = -1"),
        ({"distill": 1.5}, "distill = 1.5"),
        ({"augment": "heavy"}, "augment = 'heavy'.*'none', 'light' or 'deit'"),
        ({"precision": "fp16"}, "precision = 'fp16'"),
        ({"test_share": 1.0}, "test_share"),
        ({"epochs": 0, "lr": 0}, "epochs = 0.*; lr = 0"),
    ],
)
def test_options_are_validated(values: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        TrainConfig.create(**({"model": "vit_digits"} | values))
    assert "\n" not in str(caught.value)


def test_a_config_survives_json_and_cannot_be_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "images").mkdir()
    monkeypatch.chdir(tmp_path)
    config = TrainConfig.create(model="vit_digits", data="images", method_options={"head_wise": False}, mixup=0.5)
    assert config.data == str(tmp_path / "images"), "a run is resumed from wherever you are"
    assert TrainConfig.create(**json.loads(json.dumps(config.model_dump()))) == config
    with pytest.raises(ValueError):
        config.lr = 1.0  # type: ignore[misc]
    (tmp_path / "digits").mkdir()
    assert TrainConfig.create(model="vit_digits", data="digits").data == "digits"


# ------------------------------------------------------------------------------------------------------ float weights


def weights_file(folder: Path, kind: str, state: dict[str, Tensor]) -> Path:
    if kind == "safetensors":
        save_file(state, folder / "weights.safetensors")
        return folder / "weights.safetensors"
    wrapped: Any = {
        "pth": state,
        "pt": state,
        "model.pth": {"model": state, "epoch": 3},
        "state_dict.pth": {"state_dict": state},
        "module.pth": {"state_dict": {f"module.{key}": value for key, value in state.items()}},
    }[kind]
    path = folder / f"weights.{kind}"
    torch.save(wrapped, path)
    return path


@pytest.mark.parametrize("kind", ["safetensors", "pth", "pt", "model.pth", "state_dict.pth", "module.pth"])
def test_weights_of_every_kind_are_loaded(tmp_path: Path, kind: str) -> None:
    source = digits_model(seed=4)
    path = weights_file(tmp_path, kind, source.state_dict())
    loaded = create_model("vit_digits", weights=path, **SMALL)
    assert all(torch.equal(value, source.state_dict()[key]) for key, value in loaded.state_dict().items())


def test_a_pickle_with_code_is_refused_and_not_executed(tmp_path: Path) -> None:
    target = tmp_path / "executed"
    path = tmp_path / "weights.pth"
    for archive in (True, False):
        if archive:
            torch.save({"state_dict": Evil(target)}, path)
        else:
            path.write_bytes(pickle.dumps(Evil(target)))
        with pytest.raises(QvitError, match=f"cannot read the weights {path}") as caught:
            create_model("vit_digits", weights=path, **SMALL)
        assert "\n" not in str(caught.value) and not target.exists()
    pickle.loads(path.read_bytes())
    assert target.exists(), "the file was harmless: this test would prove nothing"


def test_a_whole_pickled_model_is_refused(tmp_path: Path) -> None:
    torch.save(digits_model(), tmp_path / "model.pth")
    with pytest.raises(QvitError, match=r"cannot read the weights .*model\.pth"):
        create_model("vit_digits", weights=tmp_path / "model.pth", **SMALL)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.update({"blocks.0.mlp.fc1.weight": torch.zeros(3, 3)}), r"1 wrong shape, first blocks\.0\.mlp"),
        (lambda s: s.pop("norm.bias"), r"1 missing, first norm\.bias"),
        (lambda s: s.update({"neck.weight": torch.zeros(2)}), r"1 unknown, first neck\.weight"),
        (lambda s: s["norm.bias"].fill_(math.nan), "NaN or infinite"),
        (lambda s: s["norm.bias"].fill_(math.inf), "NaN or infinite"),
        (lambda s: s.update({"norm_quantizer.scale": torch.ones(1)}), "a quantized model"),
        (lambda s: s.pop("head.weight"), r"1 missing, first head\.weight"),
    ],
)
def test_weights_that_do_not_fit_are_refused_and_change_nothing(
    tmp_path: Path, change: Callable[[dict[str, Tensor]], Any], message: str
) -> None:
    state = {key: value.clone() for key, value in digits_model(seed=4).state_dict().items()}
    change(state)
    path = weights_file(tmp_path, "safetensors", state)
    model = digits_model()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(QvitError, match=message) as caught:
        load_weights(model, path)
    assert str(path) in str(caught.value)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_another_number_of_classes_leaves_the_classifier_untrained_and_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source = digits_model(seed=4).state_dict()
    path = weights_file(tmp_path, "pth", source)
    with caplog.at_level(logging.WARNING, "qvit"):
        create_model("vit_digits", weights=path, **SMALL)
    assert not caplog.records
    torch.manual_seed(7)
    fresh = create_model("vit_digits", num_classes=4, **SMALL).state_dict()
    torch.manual_seed(7)
    with caplog.at_level(logging.WARNING, "qvit"):
        loaded = create_model("vit_digits", weights=path, num_classes=4, **SMALL).state_dict()
    assert [record.message for record in caplog.records if "head.weight, head.bias" in record.message]
    for key, value in loaded.items():
        assert torch.equal(value, fresh[key] if key.startswith("head.") else source[key]), key


@pytest.mark.parametrize(
    ("name", "kwargs", "classifiers"),
    [
        ("swin_tiny_patch4_window7_224", {"depths": (1, 1), "embed_dim": 12, "num_heads": (1, 2)}, ["head.fc"]),
        ("eva02_tiny_patch14_224", {"depth": 1, "embed_dim": 12, "num_heads": 1}, ["head"]),
        ("deit_tiny_distilled_patch16_224", {"depth": 1, "embed_dim": 12}, ["head", "head_dist"]),
    ],
)
def test_classifiers_of_all_families_may_have_another_size(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str, kwargs: dict[str, Any], classifiers: list[str]
) -> None:
    source = create_model(name, num_classes=3, **kwargs).state_dict()
    path = weights_file(tmp_path, "safetensors", source)
    with caplog.at_level(logging.WARNING, "qvit"):
        loaded = create_model(name, weights=path, num_classes=4, **kwargs).state_dict()
    keys = [f"{classifier}.{leaf}" for classifier in classifiers for leaf in ("weight", "bias")]
    assert [record.message for record in caplog.records if ", ".join(keys) in record.message]
    assert all(torch.equal(value, source[key]) for key, value in loaded.items() if key not in keys)


@pytest.mark.parametrize("name", ["weights.safetensors", "weights.pth"])
def test_damaged_and_missing_weights_are_named(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    with pytest.raises(QvitError, match=f"no weights at {path}"):
        create_model("vit_digits", weights=path, **SMALL)
    for content in (b"", b"nonsense" * 99):
        path.write_bytes(content)
        with pytest.raises(QvitError, match=f"cannot read the weights {path}: .+"):
            create_model("vit_digits", weights=path, **SMALL)
    with pytest.raises(QvitError, match="no weights at"):
        create_model("vit_digits", weights=tmp_path, **SMALL)


def test_unknown_models_and_arguments() -> None:
    with pytest.raises(UsageError, match="unknown model 'deit_tinny_.*; did you mean 'deit_tiny_patch16_224'"):
        create_model("deit_tinny_patch16_224")
    with pytest.raises(UsageError, match="unknown model 'vit_digit'.*'vit_digits'"):
        create_model("vit_digit")
    with pytest.raises(UsageError, match="cannot make 'vit_digits'.*embed_dimm"):
        create_model("vit_digits", embed_dimm=4)
    with pytest.raises(UsageError, match="cannot make 'vit_digits'"):
        create_model("vit_digits", embed_dim=5, num_heads=2)
    with pytest.raises(UsageError, match="no pretrained weights"):
        create_model("vit_digits", pretrained=True)


def test_without_a_network_the_way_out_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*_: Any, **__: Any) -> None:
        raise OSError("We couldn't connect to the hub\nand more lines")

    monkeypatch.setattr(timm, "create_model", offline)
    with pytest.raises(QvitError, match="cannot fetch the pretrained weights of 'deit_tiny_patch16_224'.*--weights"):
        create_model("deit_tiny_patch16_224", pretrained=True)


def test_names_with_tag_and_prefix_are_understood() -> None:
    model = create_model("timm/vit_tiny_patch16_224.augreg_in21k", depth=1, img_size=32, embed_dim=24)
    assert type(model).__name__ == "VisionTransformer"


def test_vit_digits_is_what_its_description_says() -> None:
    model: Any = create_model("vit_digits")
    described = " ".join((vit_digits.__doc__ or "").split())
    thousands = round(sum(parameter.numel() for parameter in model.parameters()) / 1000)
    heads = model.blocks[0].attn.num_heads
    expected = f"width {model.embed_dim}, depth {len(model.blocks)}, {heads} heads, {thousands} thousand parameters"
    assert expected in described
    assert model(torch.zeros(2, 1, 8, 8)).shape == (2, 10)
    assert timm.create_model("vit_digits", num_classes=3)(torch.zeros(1, 1, 8, 8)).shape == (1, 3)


# --------------------------------------------------------------------------------------------------------- evaluation


class Fixed(nn.Module):
    """Returns what it is given."""

    def forward(self, x: Tensor) -> Tensor:
        return x


def test_top1_and_top5_by_hand() -> None:
    logits = torch.arange(8.0).repeat(4, 1)  # class 7 first, then 6, 5, 4, 3
    batches = [(logits, torch.tensor([7, 6, 3, 2])), (logits[:1], torch.tensor([0]))]
    seen: list[int] = []
    scores = evaluate(Fixed().train(), batches, progress=seen.append)
    assert scores == {"top1": 20.0, "top5": 60.0, "images": 5} and seen == [4, 5]
    assert isinstance(scores["images"], int)


def test_fewer_than_five_classes_are_all_in_the_top_five() -> None:
    assert evaluate(Fixed(), [(torch.eye(3), torch.tensor([0, 1, 1]))]) == {
        "top1": pytest.approx(200 / 3), "top5": 100.0, "images": 3
    }  # fmt: skip


@pytest.mark.parametrize("training", [True, False])
def test_evaluation_restores_the_mode_even_after_an_error(training: bool) -> None:
    model = Fixed().train(training)
    bad = torch.eye(6)
    bad[2, 2] = math.nan
    for batches, message in (([], "no images"), ([(bad, torch.zeros(6, dtype=torch.long))], "1 of 6 images")):
        with pytest.raises(QvitError, match=message):
            evaluate(model, batches)
        assert model.training is training


def test_saved_weights_are_what_the_model_has(tmp_path: Path) -> None:
    model = digits_model()
    save_weights(tmp_path / "model.safetensors", model)
    state = load_file(tmp_path / "model.safetensors")
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in state.items())
