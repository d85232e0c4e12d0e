"""The learning rate over the steps of a run: timm's schedules, each of which ends where the run ends."""

from __future__ import annotations

from typing import Any

import torch
from timm.scheduler import create_scheduler_v2

from qvit.errors import UsageError, nearest
from qvit.training.config import TrainConfig

SCHEDULES = ("cosine", "tanh", "step", "multistep", "poly")


def create_schedule(optimizer: torch.optim.Optimizer, config: TrainConfig, steps_per_epoch: int) -> Any:
    """timm's schedule, per step: warm-up first, then the whole decay in what is left of the epochs."""
    if config.sched not in SCHEDULES:
        raise UsageError(
            f"unknown schedule '{config.sched}'{nearest(config.sched, SCHEDULES)} ({', '.join(SCHEDULES)})"
        )
    if config.warmup_epochs > config.epochs:
        raise UsageError(f"warmup_epochs ({config.warmup_epochs}) must not be more than epochs ({config.epochs})")
    try:
        scheduler, _ = create_scheduler_v2(
            optimizer,
            sched=config.sched,
            num_epochs=max(1, config.epochs - config.warmup_epochs),
            min_lr=config.min_lr,
            warmup_epochs=config.warmup_epochs,
            warmup_prefix=True,
            step_on_epochs=False,
            updates_per_epoch=steps_per_epoch,
        )
    except (AssertionError, ValueError) as error:
        raise UsageError(f"schedule '{config.sched}': {error}") from None
    return scheduler
