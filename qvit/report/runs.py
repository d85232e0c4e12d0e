"""A run as plain frozen data: what was asked, what came out, what happened on the way.

Sites, costs, results and events are those of `qvit.documents`. Bit operations are plain counts for one image (not in
G), weights are bytes, accuracies are percent, times are seconds. None stands for what a run has not written: everything
of an interrupted run, and numbers that were not finite (a loss that diverged).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qvit.documents.log import DiagnosticsEvent, EpochEvent, FreezeEvent, StepEvent
from qvit.documents.patches import Patches
from qvit.documents.run import Costs, PlannedSite, Result


@dataclass(frozen=True)
class Log:
    """What `log.jsonl` tells; every field is empty where a run was stopped before it wrote it."""

    started: float | None = None
    total_steps: int | None = None
    steps_per_epoch: int | None = None
    budget_bit_operations: float | None = None
    uniform_bit_operations: Mapping[int, float] = field(default_factory=dict)
    steps: tuple[StepEvent, ...] = ()
    epochs: tuple[EpochEvent, ...] = ()
    diagnostics: tuple[DiagnosticsEvent, ...] = ()
    freeze: FreezeEvent | None = None
    failure: str | None = None
    last_step: int = 0
    unreadable_lines: int = 0


@dataclass(frozen=True)
class Run:
    """One run directory.

    Attributes:
        path: The directory.
        model: Name of the model.
        method: "float", "lsq", "lsq+", "qvit", ...
        budget: The budget as the user wrote it, or None.
        seed: The seed, or None where nothing says it.
        config: All options as written in `config.json`.
        plan_name: Name of the plan, or None without a plan.
        plan: Sites with their widths; sites that stay in float are left out.
        cost: The costs, or None where they are not written yet.
        result: The outcome, or None for an unfinished run.
        log: The events.
        patches: Test images and the widths of their patches, or None where none were drawn.
    """

    path: Path
    model: str
    method: str
    budget: str | None
    seed: int | None
    config: Mapping[str, Any]
    plan_name: str | None
    plan: Mapping[str, PlannedSite]
    cost: Costs | None
    result: Result | None
    log: Log
    patches: Patches | None = None

    @property
    def finished(self) -> bool:
        """Whether the run has ended with a result."""
        return self.result is not None

    @property
    def learned(self) -> bool:
        """Whether the run learns (or has learned) bit-widths."""
        if self.log.freeze is not None or any(site.learn_bit_width for site in self.plan.values()):
            return True
        return any(w != round(w) for epoch in self.log.epochs for widths in epoch.bit_widths.values() for w in widths)

    @property
    def state(self) -> str:
        """`finished`, or where and why the run stopped, for people."""
        if self.finished:
            return "finished"
        if self.log.failure is not None:
            return f"failed at step {self.log.last_step}: {self.log.failure}"
        if self.log.last_step == 0:
            return "stopped before the first logged step, or still starting"
        total = "" if self.log.total_steps is None else f" of {self.log.total_steps}"
        return f"stopped at step {self.log.last_step}{total}, or still running"

    @property
    def bit_widths(self) -> dict[str, tuple[int, ...]]:
        """Widths by site: the plan's; of a run stopped while it was learning, those of its last epoch, rounded."""
        widths = {site: tuple(spec.bit_width) for site, spec in self.plan.items()}
        if self.learned and not self.finished and self.log.freeze is None and self.log.epochs:
            learned = self.log.epochs[-1].bit_widths
            widths |= {site: tuple(round(width) for width in values) for site, values in learned.items()}
        return widths
