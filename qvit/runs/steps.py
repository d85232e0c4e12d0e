"""Multi-step distillation: a run in steps, each at fewer bits, learning from the one before (8 → 4 → 2).

    float model → run at 8 bits → run at 4 bits → run at 2 bits
         └ teaches ┘      └ teaches ┘      └ teaches ┘

Ranjan and Savakis (2024) train a chain of teachers from the full precision down to few bits, so that no student is far
from its teacher. The paper could not be read; what is here follows its title and the general idea: a step starts from
weights and scales of the step before (`models/inherit.py`) and has its model as teacher; the first one starts from the
float model. The epochs that are asked for are shared out among the steps, so that a chain costs as many as a direct
run.

Each step is an ordinary run in `RUN/steps/N-WORD`. The files of the last one are RUN's own, and `RUN/result.json`,
written last, tells all of them. A call that is repeated goes on with the step that was interrupted.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qvit.errors import UsageError
from qvit.files import write_json
from qvit.models.create import WEIGHTS_FILE
from qvit.plan.budget import is_budget
from qvit.runs.directory import COST, LOG, PLAN, RESULT, STEPS
from qvit.training.config import TrainConfig


def step_configs(config: TrainConfig, run: Path) -> dict[Path, TrainConfig]:
    """The steps of a run by their directories, in order. Raises UsageError for steps that make no chain."""
    words = words_of(config)
    if config.epochs < len(words):
        raise UsageError(f"{config.epochs} epoch(s) cannot be shared by {len(words)} steps: give one each at least")
    shared, rest = divmod(config.epochs, len(words))
    found: dict[Path, TrainConfig] = {}
    for place, word in enumerate(words):
        epochs = shared + (place >= len(words) - rest)
        changes = {"steps": None, "epochs": epochs, **target_of(word)}
        if found:
            before = str(next(reversed(found)))
            changes |= {"start": before, "teacher": before, "teacher_weights": None, "teacher_kwargs": {}}
        name = f"{place + 1}-{Path(word).name.removesuffix('.json')}"
        found[(run / STEPS / name).absolute()] = TrainConfig.create(**config.model_dump() | changes)
    return found


def words_of(config: TrainConfig) -> list[str]:
    """What the steps are called. Raises UsageError."""
    words = [word.strip() for word in (config.steps or "").split(",")]
    if len(words) < 2 or not all(words):
        raise UsageError(f"steps='{config.steps}' needs two or more widths, such as 8bit,4bit,2bit or w8a8,w4a4,w2a2")
    if config.budget is not None or config.plan is not None:
        raise UsageError("steps say the widths of each step: leave out budget and plan")
    if not config.distill:
        raise UsageError("steps learn from one another: give the share of the loss, such as --distill 1")
    return words


def target_of(word: str) -> dict[str, str | None]:
    """The budget or plan that the word of a step means."""
    return {"budget": word, "plan": None} if is_budget(word) else {"budget": None, "plan": word}


def without_steps(config: TrainConfig) -> TrainConfig:
    """The direct run: at the widths of the last step from the beginning."""
    return TrainConfig.create(**config.model_dump() | {"steps": None, **target_of(words_of(config)[-1])})


def conclude(run: Path, results: Mapping[Path, dict[str, Any]], *, write: bool) -> dict[str, Any]:
    """Makes the last step's result that of the run, with what all steps came to; `write`: its files, too."""
    last, result = list(results.items())[-1]
    seconds: dict[str, float] = {}
    for own in results.values():
        for stage, spent in own["seconds"].items():
            seconds[stage] = seconds.get(stage, 0.0) + spent
    keys = ("accuracy", "agreement", "bit_operations", "weight_bytes", "epochs")
    steps = [{"name": folder.name, **{key: own[key] for key in keys}} for folder, own in results.items()]
    result = result | {"seconds": seconds, "epochs": sum(step["epochs"] for step in steps), "steps": steps}
    if write:
        for name in (PLAN, COST, LOG, WEIGHTS_FILE):
            shutil.copyfile(last / name, run / name)
        write_json(run / RESULT, result)
    return result
