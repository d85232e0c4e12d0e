"""The directory of a run: its files, what state it is in, and who may write there.

RUN/config.json         every option, versions, hardware, command, class names: enough to start it again
RUN/plan.json           the plan: that of the start while the run is going on, then the final one
RUN/cost.json           costs per site, as `qvit cost --json` prints them
RUN/sensitivity.json    what mixed widths were chosen by, by method `ptq`
RUN/token_places.safetensors  what each token adds to that, by method `pmq`
RUN/patches.json        test images and the widths of their patches, by method `pmq`
RUN/gate.json           what an accuracy gate of method `ptq` tried
RUN/steps/              the steps of a run that has some, each a run's directory
RUN/blocks/             reconstructed blocks of an interrupted run, by method `ptq`: it goes on with the next one
RUN/log.jsonl           one JSON object a line: start, step, epoch, freeze, end
RUN/tensorboard/        the same figures for TensorBoard, on request
RUN/model.safetensors   final weights and scales
RUN/packed.safetensors  the packed model, after `qvit pack`
RUN/result.json         the result, written last: a directory without it holds an interrupted run
RUN/checkpoints/        the last checkpoints, from which a run continues bit for bit (on CPU)
RUN/.qvit-lock          while a process writes here; with it come and go temporary files (`qvit.locks`)

The config is the first file of a run and the last one that is deleted, so whatever moment a kill chooses, the directory
is known for a run's: a call that began it can be repeated.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from qvit.documents.base import read_document
from qvit.documents.run import RunRecord
from qvit.errors import QvitError, UsageError
from qvit.files import MissingFile
from qvit.locks import BeingWritten, is_leftover, writer_of, writing
from qvit.methods.ptq.gate import GATE
from qvit.methods.ptq.method import BLOCKS, PARTIAL, PLACES, PLACES_PARTIAL, SENSITIVITY
from qvit.models.architecture import check_name
from qvit.models.create import WEIGHTS_FILE
from qvit.training.checkpoint import FOLDER, last_checkpoint
from qvit.training.config import TrainConfig

CONFIG, RESULT, PLAN, COST, LOG = "config.json", "result.json", "plan.json", "cost.json", "log.jsonl"
PACKED, PATCHES = "packed.safetensors", "patches.json"
STEPS = "steps"
#: What a method measured before it chose widths: valid as long as the config is.
MEASURED = (SENSITIVITY, PARTIAL, PLACES, PLACES_PARTIAL, GATE)


@contextmanager
def written(run: Path, *, patience: float = 0) -> Iterator[None]:
    """Holds the lock of a run's directory. Raises BeingWritten, naming the other process, if it stays taken."""
    with writing(run, formerly=own_files(), patience=patience):
        yield


@contextmanager
def claimed(run: Path, overwrite: bool) -> Iterator[None]:
    """Holds the lock of a directory in which a run begins, after making sure that nothing is lost or mixed in.

    The directory is removed again if nothing is written there.
    """
    with written(run):
        _claim(run, overwrite)
        yield


def _claim(run: Path, overwrite: bool) -> None:
    if (run / CONFIG).is_file():
        parts = ((BLOCKS, "*.safetensors"), (STEPS, f"*/{CONFIG}"))
        started = last_checkpoint(run) or any(any((run / folder).glob(name)) for folder, name in parts)
        started = started or any((run / name).is_file() for name in MEASURED)
        if not overwrite and ((run / RESULT).is_file() or started):
            state = (
                "a finished run"
                if (run / RESULT).is_file()
                else f"an interrupted run, which `qvit train --resume {run}` continues"
            )
            raise UsageError(f"{run} holds {state}: choose another --out, or --overwrite")
        clear(run)
    elif not all(map(is_leftover, run.iterdir())):
        raise UsageError(f"{run} is not empty and holds no run: choose another --out")


def own_files() -> tuple[str, ...]:
    """Names of the files of a run, in the order in which they are deleted: first what makes it a finished one."""
    return (RESULT, PACKED, PATCHES, PLAN, COST, *MEASURED, LOG, WEIGHTS_FILE, CONFIG)


def clear(run: Path, *, interrupted: bool = False) -> None:
    """Deletes the files of a run, and nothing else; of an interrupted one not those that it goes on with."""
    *others, config = own_files()
    for name in others:
        if not (interrupted and name in MEASURED):
            (run / name).unlink(missing_ok=True)
    for folder in (FOLDER, "tensorboard") if interrupted else (FOLDER, BLOCKS, STEPS, "tensorboard"):
        shutil.rmtree(run / folder, ignore_errors=True)
    if not interrupted:
        (run / config).unlink(missing_ok=True)


def forget_progress(run: Path) -> None:
    """Deletes what a run has achieved, so that it begins anew; whose directory it is stays known."""
    for name in (RESULT, LOG):
        (run / name).unlink(missing_ok=True)
    shutil.rmtree(run / FOLDER, ignore_errors=True)


def read_config(run: Path) -> tuple[TrainConfig, dict[str, Any]]:
    """The config of a run and everything recorded beside it. Raises QvitError if this is no run directory."""
    if not run.is_dir():
        raise QvitError(f"no run at {run}")
    file = run / CONFIG
    try:
        record = read_document(RunRecord, file, "config")
    except MissingFile:
        raise QvitError(f"{run} is not a run directory: it has no {CONFIG}") from None
    try:
        # A stranger's run fetches no repository of its choice; a teacher may be the directory of a run.
        for name in (record.get("model"), None if _is_run(record.get("teacher")) else record.get("teacher")):
            if name is not None:
                check_name(str(name))
        config = TrainConfig.create(**{key: value for key, value in record.items() if key in TrainConfig.model_fields})
    except UsageError as error:
        raise QvitError(f"the config {file}: {error}") from None
    return config, record


def _is_run(name: str | None) -> bool:
    return name is not None and (Path(name) / RESULT).is_file()


def require_finished(run: Path) -> None:
    """Raises QvitError, with what to do, for the directory of an interrupted run, or of one that is going on."""
    if (run / RESULT).is_file():
        return
    if writer := writer_of(run):
        raise BeingWritten(f"{run} holds no {RESULT} yet: it is being written by {writer}")
    raise QvitError(
        f"{run} holds an interrupted run (it has no {RESULT}): continue it with `qvit train --resume {run}`"
    )
