"""The directory of a run: its files, what state it is in, and who may write there.

RUN/config.json         every option, versions, hardware, command, class names: enough to start it again
RUN/plan.json           the plan: that of the start while the run is going on, then the final one
RUN/cost.json           costs per site, as `qvit cost --json` prints them
RUN/sensitivity.json    what mixed widths were chosen by, after `qvit ptq --metric`
RUN/log.jsonl           one JSON object a line: start, step, epoch, freeze, end
RUN/tensorboard/        the same figures for TensorBoard, on request
RUN/model.safetensors   final weights and scales
RUN/packed.safetensors  the packed model, after `qvit pack`
RUN/result.json         the result, written last: a directory without it holds an interrupted run
RUN/checkpoints/        the last checkpoints, from which a run continues bit for bit (on CPU)
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from qvit.errors import QvitError, UsageError
from qvit.models.create import WEIGHTS_FILE
from qvit.training.checkpoint import FOLDER, last_checkpoint
from qvit.training.config import TrainConfig

CONFIG, RESULT, PLAN, COST, LOG = "config.json", "result.json", "plan.json", "cost.json", "log.jsonl"
SENSITIVITY, PACKED = "sensitivity.json", "packed.safetensors"


def claim(run: Path, overwrite: bool) -> None:
    """Makes sure that nothing of another run is lost or mixed in."""
    if (run / CONFIG).is_file():
        if not overwrite and ((run / RESULT).is_file() or last_checkpoint(run)):
            state = (
                "a finished run"
                if (run / RESULT).is_file()
                else f"an interrupted run, which `qvit train --resume {run}` continues"
            )
            raise UsageError(f"{run} holds {state}: choose another --out, or --overwrite")
        clear(run)
    elif run.is_dir() and any(run.iterdir()):
        raise UsageError(f"{run} is not empty and holds no run: choose another --out")
    try:
        run.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise QvitError(f"cannot make {run}: {error}") from error


def own_files() -> tuple[str, ...]:
    """Names of the files of a run, in the order in which they are deleted: first what makes it a finished one."""
    return (RESULT, PACKED, PLAN, COST, SENSITIVITY, LOG, WEIGHTS_FILE, CONFIG)


def clear(run: Path) -> None:
    """Deletes the files of a run, and nothing else."""
    for name in own_files():
        (run / name).unlink(missing_ok=True)
    for folder in (FOLDER, "tensorboard"):
        shutil.rmtree(run / folder, ignore_errors=True)


def forget_progress(run: Path) -> None:
    """Deletes what a run has achieved, so that it begins anew; whose directory it is stays known."""
    for name in (RESULT, LOG):
        (run / name).unlink(missing_ok=True)
    shutil.rmtree(run / FOLDER, ignore_errors=True)


def read_config(run: Path) -> tuple[TrainConfig, dict[str, Any]]:
    """The config of a run and everything recorded beside it. Raises QvitError if this is no run directory."""
    if not run.is_dir():
        raise QvitError(f"no run at {run}")
    try:
        record = json.loads((run / CONFIG).read_text(encoding="utf-8"))
        return TrainConfig.create(
            **{key: value for key, value in record.items() if key in TrainConfig.model_fields}
        ), record
    except FileNotFoundError:
        raise QvitError(f"{run} is not a run directory: it has no {CONFIG}") from None
    except (OSError, json.JSONDecodeError, AttributeError) as error:
        raise QvitError(f"cannot read {run / CONFIG}: {error}") from None


def require_finished(run: Path) -> None:
    """Raises QvitError, with what to do, for the directory of an interrupted run."""
    if not (run / RESULT).is_file():
        raise QvitError(
            f"{run} holds an interrupted run (it has no {RESULT}): continue it with `qvit train --resume {run}`"
        )
