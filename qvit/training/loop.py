"""The training loop: one for float models, baselines and every method, so that runs differ in the method alone.

    loss = (1 - w)·CE(targets) + w·CE(soft labels of the float model) + penalty

A step is the gradient of this loss, the optimizer's step and timm's schedule, per step. A method takes part through
`Hooks`: what happens at the start of an epoch (Q-ViT freezes its widths there), which penalty is added, which figures
are logged.

Nothing asks the device for a number within a step: figures are read every `log_every` steps, and a loss that is not
finite is noted on the device and found then; the run stops with the step's number and the name of the last good
checkpoint. Quantization-aware finetuning runs with dropout and stochastic depth off (as the Q-ViT code does) unless
asked otherwise; nothing in a ViT depends on the mode otherwise.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Sized
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from timm.data import Mixup
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from timm.scheduler import create_scheduler_v2
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.nn import functional as F

from qvit.errors import QvitError, UsageError, nearest
from qvit.training.checkpoint import LAST, save_checkpoint, seed_everything
from qvit.training.config import TrainConfig
from qvit.training.optimizer import create_optimizer
from qvit.training.progress import TrainingProgress


class Hooks(Protocol):
    """How a method takes part in training. `NoHooks` does nothing."""

    def on_epoch(self, trainer: Trainer, epoch: int) -> None:
        """Called before the epoch's first step."""
        ...

    def penalty(self) -> Tensor | None:
        """Added to the loss of every step; None for none."""
        ...

    def figures(self, *, every_width: bool) -> dict[str, Any]:
        """Figures for the log: `bit_operations`, and at the end of an epoch the widths.

        Called where waiting for the device is allowed.
        """
        ...


class NoHooks:
    """A method without a penalty, stages or figures."""

    def on_epoch(self, trainer: Trainer, epoch: int) -> None: ...

    def penalty(self) -> Tensor | None:
        return None

    def figures(self, *, every_width: bool) -> dict[str, Any]:
        return {}


class Loader(Sized, Iterable[tuple[Tensor, Tensor]], Protocol):
    """Batches of images and class indices, with a length."""


@dataclass
class RunLog:
    """The JSON-lines log of a run; one object a line, flushed."""

    path: Path

    def write(self, event: str, **values: Any) -> None:
        line = json.dumps({"event": event, **values}, allow_nan=False, default=float) + "\n"
        try:
            with self.path.open("ab+") as file:
                if file.tell() and file.seek(-1, 2) is not None and file.read(1) != b"\n":
                    line = "\n" + line  # a killed run left half a line
                file.write(line.encode())
        except OSError as error:
            raise QvitError(f"cannot write the log {self.path}: {error}") from error


class Trainer:
    """Trains one model.

    Args:
        model: What is trained, on its device.
        config: The run's options.
        loader: Training batches; iterating it anew starts a new epoch.
        num_classes: For mixup.
        run: The run's directory.
        hooks: The method's part.
        width_lr: Learning rate of learned widths.
        teacher: The float model, for distillation; None without.
        monitor: Measures accuracy on images held out from training, in percent; None without.
        plan: Called for the checkpoint: the current plan as JSON, or None for a float model.
        label: For the progress bar.
    """

    def __init__(
        self,
        model: nn.Module,
        config: TrainConfig,
        loader: Loader,
        *,
        num_classes: int,
        run: Path,
        hooks: Hooks,
        width_lr: float,
        teacher: nn.Module | None = None,
        monitor: Callable[[nn.Module], float] | None = None,
        plan: Callable[[], Any] = lambda: None,
        label: str = "train",
    ) -> None:
        self.model, self.config, self.loader, self.run, self.hooks = model, config, loader, run, hooks
        self.teacher, self.monitor, self.plan, self.label = teacher, monitor, plan, label
        self.log = RunLog(run / "log.jsonl")
        AcceleratorState._reset_state(
            reset_partial_state=False
        )  # another run of this process may have had another precision
        self.accelerator = Accelerator(
            cpu=config.device == "cpu", mixed_precision="bf16" if config.precision == "bf16" else "no"
        )
        if self.accelerator.distributed_type not in (DistributedType.NO,):
            raise UsageError("training on several processes is not supported yet: start one process")
        self.optimizer = create_optimizer(
            model, opt=config.opt, lr=config.lr, weight_decay=config.weight_decay, width_lr=width_lr
        )
        self.steps_per_epoch = len(loader)
        if self.steps_per_epoch == 0:
            raise QvitError(f"too few training images for one batch of {config.batch_size}: use a smaller --batch-size")
        known = ("cosine", "tanh", "step", "multistep", "poly")
        if config.sched not in known:
            raise UsageError(f"unknown schedule '{config.sched}'{nearest(config.sched, known)} ({', '.join(known)})")
        try:
            scheduler, _ = create_scheduler_v2(
                self.optimizer,
                sched=config.sched,
                num_epochs=config.epochs,
                min_lr=config.min_lr,
                warmup_epochs=config.warmup_epochs,
                warmup_prefix=True,
                step_on_epochs=False,
                updates_per_epoch=self.steps_per_epoch,
            )
        except (AssertionError, ValueError) as error:
            raise UsageError(f"schedule '{config.sched}': {error}") from None
        assert scheduler is not None
        self.scheduler = scheduler
        self.mixup = None
        if config.mixup or config.cutmix:
            if config.batch_size % 2:
                raise UsageError(f"mixup and cutmix need an even batch size, not {config.batch_size}")
            self.mixup = Mixup(
                config.mixup, config.cutmix, label_smoothing=config.label_smoothing, num_classes=num_classes
            )
        smooth = LabelSmoothingCrossEntropy(config.label_smoothing) if config.label_smoothing else nn.CrossEntropyLoss()
        self.criterion = SoftTargetCrossEntropy() if self.mixup else smooth
        self.ema = ModelEmaV3(model, decay=config.ema_decay) if config.ema_decay else None
        self.compiled = torch.compile(model) if config.compile else model
        self.first_bad_step: Tensor | None = None
        self.epoch = 0

    @property
    def result_model(self) -> nn.Module:
        """The model to keep: the averaged one where there is an average."""
        return self.ema.module if self.ema else self.model

    def models(self) -> list[nn.Module]:
        """All models that a change of structure (freezing) must reach."""
        return [self.model, *([self.ema.module] if self.ema else [])]

    def fit(self, *, quiet: bool = False) -> None:
        """Trains from the current epoch to the last. Raises QvitError if the loss stops being finite."""
        total = self.config.epochs * self.steps_per_epoch
        with TrainingProgress(self.label, total, enabled=not quiet) as progress:
            while self.epoch < self.config.epochs:
                seed_everything(self.config.seed, self.epoch)
                self.hooks.on_epoch(self, self.epoch)
                self._train_epoch(progress)
                self.epoch += 1
                if self.epoch % self.config.checkpoint_every == 0 or self.epoch == self.config.epochs:
                    self.save()

    def save(self) -> Path:
        """Writes a checkpoint at the end of an epoch; never one with weights that are not finite."""
        broken = [
            name
            for name, value in self.model.state_dict().items()
            if value.is_floating_point() and not bool(torch.isfinite(value).all())
        ]
        if broken:
            self._stop_diverged(self.epoch * self.steps_per_epoch, f"'{broken[0]}' is not finite")
        state = {
            "epoch": self.epoch,
            "plan": json.dumps(self.plan()),
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "ema": self.ema.module.state_dict() if self.ema else None,
        }
        return save_checkpoint(self.run, state)

    def restore(self, state: dict[str, Any]) -> None:
        """Continues from a checkpoint; the model has been built from the checkpoint's plan already."""
        try:
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            if self.ema:
                self.ema.module.load_state_dict(state["ema"])
            self.epoch = int(state["epoch"])
        except (KeyError, ValueError, RuntimeError, AttributeError, TypeError) as error:
            raise QvitError(
                f"the checkpoint {self.run / LAST} does not fit this run: {str(error).splitlines()[0]}"
            ) from error

    def _train_epoch(self, progress: TrainingProgress) -> None:
        self.model.train(self.config.stochastic_depth)
        start, begun = time.perf_counter(), self.epoch * self.steps_per_epoch
        sums: Tensor | None = None
        images, seen, since = 0, 0, start
        for index, (batch, targets) in enumerate(self.loader):
            step = begun + index + 1
            parts = self._step(batch, targets, step)
            sums = parts if sums is None else sums + parts
            images += len(batch)
            seen += len(batch)
            if step % self.config.log_every == 0 or index + 1 == self.steps_per_epoch:
                now = time.perf_counter()
                self._report(step, parts.tolist(), len(batch), images / max(1e-9, now - since), progress)
                images, since = 0, now
        assert sums is not None
        means = (sums / self.steps_per_epoch).tolist()
        accuracy = self.monitor(self.result_model) if self.monitor else None
        figures = self.hooks.figures(every_width=True)
        self.log.write(
            "epoch",
            epoch=self.epoch,
            step=begun + self.steps_per_epoch,
            train_loss=means[0],
            train_accuracy=100 * means[3] * self.steps_per_epoch / seen,
            accuracy=accuracy,
            seconds=time.perf_counter() - start,
            **figures,
        )

    def _step(self, batch: Tensor, targets: Tensor, step: int) -> Tensor:
        """One optimizer step; returns [loss, task loss, penalty, correct] on the device."""
        labels = targets
        if self.mixup:
            batch, labels = self.mixup(batch, targets)
        with self.accelerator.autocast():
            logits = self.compiled(batch)
            task = self._task_loss(logits.float(), labels, batch)
        penalty = self.hooks.penalty()
        loss = task if penalty is None else task + penalty.to(task.dtype)
        self.accelerator.backward(loss)
        if self.config.clip_grad:
            self.accelerator.clip_grad_norm_(self.model.parameters(), self.config.clip_grad)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.scheduler.step_update(num_updates=step)
        if self.ema:
            self.ema.update(self.model, step=step)
        with torch.no_grad():
            if self.first_bad_step is None:
                self.first_bad_step = torch.zeros((), device=loss.device)
            self.first_bad_step.add_(((self.first_bad_step == 0) & ~torch.isfinite(loss)) * step)
            correct = (logits.argmax(-1) == targets).sum()
            parts = [loss, task, torch.zeros_like(task) if penalty is None else penalty, correct]
            return torch.stack([part.detach().to(torch.float32) for part in parts])

    def _task_loss(self, logits: Tensor, labels: Tensor, batch: Tensor) -> Tensor:
        share = self.config.distill
        if not share or self.teacher is None:
            return self.criterion(logits, labels)
        with torch.no_grad():
            soft = self.teacher(batch).float().softmax(-1)
        distilled = F.cross_entropy(logits, soft)
        return distilled if share == 1 else (1 - share) * self.criterion(logits, labels) + share * distilled

    def _report(self, step: int, parts: list[float], size: int, speed: float, progress: TrainingProgress) -> None:
        loss, task, penalty, correct = parts
        assert self.first_bad_step is not None
        if bad := int(self.first_bad_step):
            self._stop_diverged(bad, "the loss is not finite")
        lr = self.optimizer.param_groups[0]["lr"]
        figures = self.hooks.figures(every_width=False)
        bops = figures.get("bit_operations")
        self.log.write(
            "step",
            step=step,
            epoch=self.epoch,
            loss=loss,
            task_loss=task,
            penalty=penalty,
            bit_operations=bops,
            lr=lr,
            images_per_second=speed,
        )
        shown = {"loss": f"{loss:.3f}", "accuracy": f"{100 * correct / size:.1f}%"}
        shown |= {"BOPs": f"{bops / 1e9:.3g}G"} if bops else {}
        progress.update(step, shown | {"lr": f"{lr:.1e}"})

    def _stop_diverged(self, step: int, reason: str) -> None:
        last = self.run / LAST
        kept = f"the last good checkpoint is {last}" if last.is_file() else "there is no checkpoint yet"
        self.log.write("failed", step=step, reason=reason)
        raise QvitError(
            f"{reason} at step {step} (epoch {max(0, step - 1) // self.steps_per_epoch}); {kept}. "
            "Try a smaller --lr, or --precision fp32"
        )
