"""The training loop: one for float models, baselines and every method, so that runs differ in the method alone.

    loss = (1 - w)·CE(targets) + w·(what the teacher says, see `distill.py`) + features + penalty

With stored soft labels (`qvit.data.labels`) their cross-entropy takes the place of both, and the accuracy that is
logged is the agreement with the teacher's first class.

A step is the gradient of this loss over `batch_size` images, on all processes and in all their micro-batches together,
then the optimizer's step and timm's schedule, per step. A method takes part through its hooks (`hooks.py`): what
happens at the start of an epoch (Q-ViT freezes its widths there), which penalty is added, which figures are logged.

Nothing asks the device for a number within a step, and processes exchange gradients alone: figures are read every
`log_every` steps, and a loss that is not finite is noted on the device and found then; the run stops with the step's
number and the name of the last good checkpoint. Quantization-aware finetuning runs with dropout and stochastic depth
off (as the Q-ViT code does) unless asked otherwise; nothing in a ViT depends on the mode otherwise.

A run can be taken up after any step. Random numbers are drawn from (seed, step, process), images from (seed, epoch,
position), so that nothing of the past is needed but the checkpoint.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from timm.data import Mixup
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from qvit.data.labels.recovery import SoftLabelLoss, first_classes
from qvit.data.loading import LoaderLike
from qvit.errors import QvitError, UsageError, first_line
from qvit.kernels import cpu
from qvit.models.families import inspect_model
from qvit.models.features import answers_with_features, classifier_inputs
from qvit.models.layers import QuantLinear
from qvit.quantizers import quantizers_of
from qvit.training.checkpoint import last_checkpoint, load_state, save_checkpoint, seed_everything
from qvit.training.config import TrainConfig
from qvit.training.distill import distillation_loss, feature_loss
from qvit.training.fused_forms import fused_forms
from qvit.training.graphs import GraphedModel, Within, can_be_graphed
from qvit.training.held_weights import HeldWeights
from qvit.training.hooks import ComposedHooks
from qvit.training.log import RunLog
from qvit.training.optimizer import create_optimizer, require_fitting_state
from qvit.training.oscillation import Diagnostics, quantized_weights
from qvit.training.processes import Processes
from qvit.training.progress import TrainingProgress
from qvit.training.schedule import create_schedule
from qvit.training.signals import StopRequest, Terminated
from qvit.training.trees import require_alike


class Trainer:
    """Trains one model.

    Args:
        model: What is trained, on its device.
        config: The run's options.
        loader: Training batches of this process, `batch_size / (processes · accumulate)` images each.
        num_classes: For mixup.
        run: The run's directory.
        hooks: The method's part.
        width_lr: Learning rate of learned widths.
        teacher: Returns logits for a batch, for distillation; None without.
        hints: Returns the features of the float model for a batch, where these are distilled; None without.
        monitor: Measures accuracy on images held out from training, in percent; None without.
        plan: Called for the checkpoint: the current plan as JSON, or None for a float model.
        label: For the progress bar.
        processes: Those that train together; None: this one alone.

    Attributes:
        step: Optimizer steps that are done.
    """

    def __init__(
        self,
        model: nn.Module,
        config: TrainConfig,
        loader: LoaderLike,
        *,
        num_classes: int,
        run: Path,
        hooks: ComposedHooks,
        width_lr: float,
        teacher: Callable[[Tensor], Tensor] | None = None,
        hints: Callable[[Tensor], Tensor] | None = None,
        monitor: Callable[[nn.Module], float] | None = None,
        plan: Callable[[], Any] = lambda: None,
        label: str = "train",
        processes: Processes | None = None,
    ) -> None:
        self.model, self.config, self.loader, self.run, self.hooks = model, config, loader, run, hooks
        self.teacher, self.monitor, self.plan, self.label = teacher, monitor, plan, label
        self.hints, self.has_classes = hints, not answers_with_features(model)
        if hints is not None and self.has_classes and config.compile:
            raise UsageError("compile hides what the classifier sees: leave out compile, or distill_features")
        self.processes = processes or Processes(config.device)
        self.log = RunLog(run / "log.jsonl", enabled=self.processes.is_main, tensorboard=config.tensorboard)
        micro = micro_batch(config, self.processes.world_size)
        self.steps_per_epoch = len(loader) // config.accumulate
        if self.steps_per_epoch == 0:
            raise QvitError(f"too few training images for one batch of {config.batch_size}: use a smaller --batch-size")
        if config.integer_forward:
            run_on_integers(model, config)
        self._create_optimizer = partial(
            create_optimizer, model, opt=config.opt, lr=config.lr, weight_decay=config.weight_decay, width_lr=width_lr
        )
        self.optimizer = self._create_optimizer()
        self.scheduler = create_schedule(self.optimizer, config, self.steps_per_epoch)
        self.mixup = None
        if config.mixup or config.cutmix:
            if micro % 2:
                raise UsageError(f"mixup and cutmix need an even batch size, not {micro}")
            self.mixup = Mixup(
                config.mixup, config.cutmix, label_smoothing=config.label_smoothing, num_classes=num_classes
            )
        smooth = LabelSmoothingCrossEntropy(config.label_smoothing) if config.label_smoothing else nn.CrossEntropyLoss()
        self.criterion = SoftTargetCrossEntropy() if self.mixup else smooth
        if config.labels:
            self.criterion = SoftLabelLoss(config.label_recovery)
        self.ema = ModelEmaV3(model, decay=config.ema_decay) if config.ema_decay else None
        _count_elements_of_whole_steps(model, self.processes.world_size * config.accumulate)
        self.diagnostics = Diagnostics(model) if config.diagnostics and quantized_weights(model) else None
        alone, device = self.processes.alone, self.processes.device
        self.graphs = config.cuda_graphs and can_be_graphed(device, alone=alone, accumulate=config.accumulate)
        self.fuses = device.startswith("cuda") and not config.compile
        self.wrapped: nn.Module | None = None
        self.compiled: Callable[[Tensor], Tensor] = model
        self.trained: list[int] = []
        self.first_bad_step: Tensor | None = None
        self.step = 0
        self.sums: Tensor | None = None
        self.seen = 0
        self.bad_images: set[str] = set()

    @property
    def epoch(self) -> int:
        """The epoch that the next step belongs to."""
        return self.step // self.steps_per_epoch

    @property
    def total_steps(self) -> int:
        return self.config.epochs * self.steps_per_epoch

    @property
    def result_model(self) -> nn.Module:
        """The model to keep: the averaged one where there is an average."""
        return self.ema.module if self.ema else self.model

    def models(self) -> list[nn.Module]:
        """All models that a change of structure (freezing) must reach."""
        return [self.model, *([self.ema.module] if self.ema else [])]

    def fit(self, *, quiet: bool = False) -> None:
        """Trains from the current step to the last.

        Raises:
            QvitError: The loss stops being finite, or another process is lost.
            Terminated: SIGTERM came; a checkpoint has been written.
        """
        shown = self.processes.is_main and not quiet
        with (
            TrainingProgress(self.label, self.total_steps, enabled=shown) as progress,
            StopRequest() as stop,
            self.processes.lost_ones_are_reported(),
        ):
            while self.step < self.total_steps:
                if self.step % self.steps_per_epoch == 0:
                    self.hooks.on_epoch(self, self.epoch)
                self._wrap()
                self._train_epoch(progress, stop)
                if self.epoch % self.config.checkpoint_every == 0 or self.step == self.total_steps:
                    self.save()
                if stop.requested and self.processes.alone and self.step < self.total_steps:
                    self._terminate()

    def save(self) -> Path | None:
        """Writes a checkpoint, never one with weights that are not finite; returns its path in the first process.

        All processes must call it.
        """
        if broken := self._broken():
            self._stop_diverged(self.step, broken)
        sums = None if self.sums is None else self.processes.gather(self.sums).mean(0)
        if not self.processes.is_main:
            return None
        state = {
            "step": self.step,
            "plan": json.dumps(self.plan()),
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "ema": self.ema.module.state_dict() if self.ema else None,
            "sums": None if sums is None else {"parts": sums, "images": self.seen},
            "hooks": self.hooks.state_dict(),
            "diagnostics": self.diagnostics.state_dict() if self.diagnostics else {},
        }
        return save_checkpoint(self.run, state, keep=self.config.keep_checkpoints)

    def restore(self, state: dict[str, Any]) -> None:
        """Continues from a checkpoint; the model has been built from the checkpoint's plan already.

        Raises QvitError, naming the key, for a state that is not that of this model, optimizer and method.
        """
        try:
            if not 0 <= state["step"] <= self.total_steps:
                raise QvitError(f"'step' is {state['step']}, and this run has {self.total_steps}")
            require_fitting_state(state["optimizer"], self.optimizer, self._create_optimizer)
            load_state(self.model, state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            if self.ema:
                load_state(self.ema.module, state["ema"], "ema")
            self.step = state["step"]
            if state["sums"] is not None:
                require_alike(state["sums"], {"parts": torch.zeros(4), "images": 0}, "sums")
                device = next(self.model.parameters()).device
                self.sums, self.seen = state["sums"]["parts"].to(device), state["sums"]["images"]
            remembering = {"hooks": self.hooks} | ({"diagnostics": self.diagnostics} if self.diagnostics else {})
            for name, part in remembering.items():
                part.load_state_dict(state[name])
                require_alike(state[name], part.state_dict(), name)
        except QvitError as error:
            raise QvitError(f"the checkpoint of {self.run} does not fit this run: {error}") from None
        except (KeyError, ValueError, RuntimeError, AttributeError, TypeError) as error:
            raise QvitError(f"the checkpoint of {self.run} does not fit this run: {first_line(error)}") from error

    def _wrap(self) -> None:
        """Prepares the model for the steps to come, anew if what is trained has changed (widths were frozen)."""
        trained = [id(parameter) for parameter in self.model.parameters() if parameter.requires_grad]
        if self.wrapped is None or trained != self.trained:
            self.compiled, self.wrapped = self.model, None  # ends the hooks of the old wrapper first
            self.wrapped = self.processes.wrap(self.model)
            self.held = HeldWeights(self.model)
            if self.config.compile:
                self.compiled = torch.compile(self.wrapped)
            else:
                around = partial(fused_forms, self.model, self.held) if self.fuses else nullcontext
                self.compiled = GraphedModel(self.model, around) if self.graphs else Within(self.wrapped, around)
            self.trained = trained

    def _train_epoch(self, progress: TrainingProgress, stop: StopRequest) -> None:
        """The rest of the epoch that the next step belongs to."""
        self.model.train(self.config.stochastic_depth)
        epoch, done = divmod(self.step, self.steps_per_epoch)
        accumulate = self.config.accumulate
        self.loader.set_epoch(epoch, done * accumulate)
        batches = iter(self.loader)
        start = since = time.perf_counter()
        images = 0
        for index in range(done, self.steps_per_epoch):
            step = self.step + 1
            own = list(islice(batches, accumulate))
            if len(own) < accumulate:
                raise QvitError(f"the training images of epoch {epoch} ended before its step {index + 1}")
            seed_everything(self.config.seed, step, self.processes.rank)
            parts = self._step(own, step)
            self.step = step
            self.sums = parts if self.sums is None else self.sums + parts
            size = sum(len(batch) for batch, _ in own) * self.processes.world_size
            images, self.seen = images + size, self.seen + size
            last = index + 1 == self.steps_per_epoch
            stopping = stop.requested and self.processes.alone
            if step % self.config.log_every == 0 or last:
                now = time.perf_counter()
                asked = self._report(parts, size, images / max(1e-9, now - since), stop.requested, progress)
                stopping = stopping or asked
                images, since = 0, now
            if not last and stopping:
                self._terminate()
            if not last and self.config.checkpoint_steps and step % self.config.checkpoint_steps == 0:
                self.save()
        self._end_epoch(epoch, time.perf_counter() - start)

    def _end_epoch(self, epoch: int, seconds: float) -> None:
        if broken := self._broken():
            self._stop_diverged(self.step, broken)
        assert self.sums is not None
        rows = self.processes.gather(self.sums)
        means = (rows.mean(0) / self.steps_per_epoch).tolist()
        correct = float(rows[:, 3].sum())
        accuracy = self.monitor(self.result_model) if self.monitor else None
        self._log_bad_images(epoch)
        self.log.write(
            "epoch",
            epoch=epoch,
            step=self.step,
            train_loss=means[0],
            train_accuracy=100 * correct / self.seen if self.has_classes else None,
            accuracy=accuracy,
            seconds=seconds,
            **self.hooks.figures(every_width=True),
        )
        if self.diagnostics:
            self.log.write("diagnostics", epoch=epoch, step=self.step, sites=self.diagnostics.record())
        self.sums, self.seen = None, 0

    def _log_bad_images(self, epoch: int) -> None:
        """Names the unreadable images that were met for the first time."""
        if self.config.on_bad_image != "skip":
            return
        names = set().union(*self.processes.gather_objects(self.loader.bad_images()))
        if new := sorted(names - self.bad_images):
            self.bad_images |= names
            self.log.write("bad_images", epoch=epoch, step=self.step, count=len(self.bad_images), names=new)

    def _step(self, batches: list[tuple[Tensor, Tensor]], step: int) -> Tensor:
        """One optimizer step; returns [loss, task loss, penalty, correct] on the device, the last one a sum."""
        *others, (batch, targets) = batches
        share = 1 / len(batches)
        if others and not self.config.compile:
            with self.held.first():
                before = [self._backward(*other, share, last=False) for other in others]
            with self.held.last():
                parts = self._backward(batch, targets, share, last=True)
        else:
            before = [self._backward(*other, share, last=False) for other in others]
            parts = self._backward(batch, targets, share, last=True)
        for own in before:
            parts = parts + own
        self.hooks.before_step(self)
        if self.config.clip_grad:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip_grad)
        self.optimizer.step()
        self.hooks.after_step(self)
        if self.diagnostics:
            self.diagnostics.observe()
        self.optimizer.zero_grad(set_to_none=True)
        self.scheduler.step_update(num_updates=step)
        if self.ema:
            self.ema.update(self.model, step=step)
        with torch.no_grad():
            if self.first_bad_step is None:
                self.first_bad_step = torch.zeros((), device=parts.device)
            self.first_bad_step.add_(((self.first_bad_step == 0) & ~torch.isfinite(parts[0])) * step)
        return parts

    def _backward(self, batch: Tensor, targets: Tensor, share: float, *, last: bool) -> Tensor:
        """Adds the gradient of one micro-batch; processes exchange theirs with the last one."""
        labels = targets
        if self.mixup:
            if len(batch) % 2:
                raise QvitError(f"mixup and cutmix need an even batch size, not {len(batch)}")
            batch, labels = self.mixup(batch, targets)
        waits = isinstance(self.wrapped, DistributedDataParallel) and not last
        with self.wrapped.no_sync() if waits else nullcontext():  # type: ignore[union-attr]
            mixed = self.config.precision == "bf16"  # a cast that is kept for later would be outside of a graph
            with torch.autocast(batch.device.type, torch.bfloat16, enabled=mixed, cache_enabled=not self.graphs):
                logits, features = self._answers(batch)
                task = self._task_loss(logits.float(), labels, batch)
                if features is not None and self.hints is not None:
                    task = task + self.config.distill_features_weight * feature_loss(features, self.hints(batch))
            task = task if share == 1 else task * share
            penalty = self.hooks.penalty(self.step) if last else None
            loss = task if penalty is None else task + penalty.to(task.dtype)
            loss.backward()
        with torch.no_grad():
            classes = first_classes(targets) if self.config.labels else targets
            correct = (logits.argmax(-1) == classes).sum() if self.has_classes else torch.zeros_like(task)
            parts = [loss, task, torch.zeros_like(task) if penalty is None else penalty]
            return torch.stack([part.detach().to(torch.float32) for part in (*parts, correct)])

    def _answers(self, batch: Tensor) -> tuple[Tensor, Tensor | None]:
        """What the model answers, and where features are distilled these, in float32."""
        if self.hints is None:
            return self.compiled(batch), None
        with classifier_inputs(self.model) as seen:
            answer = self.compiled(batch)
        return answer, (seen[-1] if seen else answer).float()

    def _task_loss(self, logits: Tensor, labels: Tensor, batch: Tensor) -> Tensor:
        if not self.has_classes:
            return logits.new_zeros(())
        share = self.config.distill
        if not share or self.teacher is None:
            return self.criterion(logits, labels)
        with torch.no_grad():
            taught = self.teacher(batch).float()
        distilled = distillation_loss(logits, taught, self.config.distill_kind, self.config.distill_temperature)
        return distilled if share == 1 else (1 - share) * self.criterion(logits, labels) + share * distilled

    def _report(self, parts: Tensor, size: int, speed: float, stop: bool, progress: TrainingProgress) -> bool:
        """Logs the step just done; returns whether any process was asked to stop."""
        assert self.first_bad_step is not None
        own = torch.cat([parts, self.first_bad_step[None], parts.new_tensor([float(stop)])])
        rows = self.processes.gather(own).tolist()
        if bad := [int(row[4]) for row in rows if row[4]]:
            self._stop_diverged(min(bad), "the loss is not finite")
        loss, task, penalty, correct = (sum(row[i] for row in rows) for i in range(4))
        loss, task, penalty = loss / len(rows), task / len(rows), penalty / len(rows)
        figures = self.hooks.figures(every_width=False)
        bops = figures.get("bit_operations")
        if bops is not None and not math.isfinite(bops):
            self._stop_diverged(self.step, "a bit-width is not finite")
        lr = self.optimizer.param_groups[0]["lr"]
        self.log.write(
            "step",
            step=self.step,
            epoch=(self.step - 1) // self.steps_per_epoch,
            loss=loss,
            task_loss=task,
            penalty=penalty,
            bit_operations=bops,
            lr=lr,
            images_per_second=speed,
        )
        shown = {"loss": f"{loss:.3f}"} | ({"accuracy": f"{100 * correct / size:.1f}%"} if self.has_classes else {})
        shown |= {"BOPs": f"{bops / 1e9:.3g}G"} if bops else {}
        progress.update(self.step, shown | {"lr": f"{lr:.1e}"})
        return any(row[5] for row in rows)

    def _broken(self) -> str:
        """Names a weight, scale or width that is not finite, or the empty string."""
        values = [(name, value) for name, value in self.model.state_dict().items() if value.is_floating_point()]
        finite = torch.stack([torch.isfinite(value).all() for _, value in values])
        if bool(finite.all()):
            return ""
        return f"'{values[finite.tolist().index(False)][0]}' is not finite"

    def _terminate(self) -> None:
        path = self.save()
        self.log.write("terminated", step=self.step)
        raise Terminated(
            f"SIGTERM at step {self.step} of {self.total_steps}: saved {path or 'a checkpoint'}; "
            f"`qvit train --resume {self.run}` continues"
        )

    def _stop_diverged(self, step: int, reason: str) -> None:
        last = last_checkpoint(self.run)
        kept = f"the last good checkpoint is {last}" if last else "there is no checkpoint yet"
        self.log.write("failed", step=step, reason=reason)
        raise QvitError(
            f"{reason} at step {step} (epoch {max(0, step - 1) // self.steps_per_epoch}); {kept}. "
            "Try a smaller --lr, or --precision fp32"
        )


def run_on_integers(model: nn.Module, config: TrainConfig) -> None:
    """Lets the linear layers of a quantized model compute their outputs from integers. Raises UsageError."""
    if config.compile:
        raise UsageError("integer_forward and compile exclude each other: a compiled model computes in float")
    place = next(model.parameters()).device.type
    if place != "cpu":
        raise UsageError(f"integer_forward is for CPUs, and this run is on {place}")
    if not cpu.available() or not cpu.has_int8_dot_products():
        lacks = "has no 8-bit dot products (VNNI, AMX)" if cpu.available() else "has no compiled kernels"
        raise UsageError(f"integer_forward would not be faster here, or not exact: this machine {lacks}")
    for module in model.modules():
        if isinstance(module, QuantLinear):
            module.integer_forward = True


def micro_batch(config: TrainConfig, world_size: int) -> int:
    """Images that one process computes at a time. Raises UsageError if the batch cannot be divided evenly."""
    parts = world_size * config.accumulate
    if config.batch_size % parts:
        raise UsageError(
            f"a batch of {config.batch_size} images cannot be divided evenly over {world_size} process(es) and "
            f"{config.accumulate} micro-batch(es): give a multiple of {parts} as --batch-size"
        )
    return config.batch_size // parts


def _count_elements_of_whole_steps(model: nn.Module, parts: int) -> None:
    """LSQ's gradient factor counts the elements of an activation in the whole batch, wherever its parts are."""
    found = dict(quantizers_of(model))
    if found:
        for name, site in inspect_model(model).sites.items():
            if name in found and site.role == "activation":
                found[name].batch_parts = parts
