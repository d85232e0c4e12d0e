"""Checkpoints and weights of a run: written so that they survive a kill, read so that nothing in them is executed.

    RUN/checkpoints/step-000000600-0f3ac41d9e2b77a1.pt          step, and the first 16 digits of the content's SHA-256

The name says what the content must be, so a file that was damaged later is recognised, and the one before it is taken.
A file appears under its name when it is whole and on the disk; only then are older ones deleted. At a full disk the
previous checkpoint is still there.

A checkpoint holds everything that the next step needs: model, optimizer, EMA, step, the current plan, and the sums of
the epoch's log line. Random numbers are not in it: every step seeds all generators from (seed, step, process), and what
a loader yields depends on seed and position alone, so a resumed run draws what the uninterrupted one would have drawn.
"""

from __future__ import annotations

import hashlib
import io
import logging
import random
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save as safetensors_bytes

from qvit.errors import QvitError
from qvit.files import write_atomically

_log = logging.getLogger(__name__)
FOLDER = "checkpoints"
PARTS = ("step", "plan", "model", "optimizer", "ema", "sums")
_NAME = re.compile(r"step-(\d{9,})-([0-9a-f]{16})\.pt")


def checkpoints_of(run: Path) -> list[Path]:
    """The checkpoints of a run, newest first; files under other names are none."""
    found = [path for path in (run / FOLDER).glob("step-*.pt") if _NAME.fullmatch(path.name)]
    return sorted(found, key=lambda path: (step_of(path), path.stat().st_mtime_ns), reverse=True)


def step_of(path: Path) -> int:
    """The step that a checkpoint's name says."""
    match = _NAME.fullmatch(path.name)
    return int(match[1]) if match else -1


def last_checkpoint(run: Path) -> Path | None:
    """The newest checkpoint of a run, or None."""
    return next(iter(checkpoints_of(run)), None)


def save_checkpoint(run: Path, state: dict[str, Any], *, keep: int = 2) -> Path:
    """Writes a checkpoint, deletes all but the newest `keep`, and returns its path.

    Raises QvitError if it cannot be written; those that were there are untouched then.
    """
    buffer = io.BytesIO()
    torch.save(state, buffer)
    content = buffer.getbuffer()
    path = run / FOLDER / f"step-{state['step']:09d}-{_digest(content)}.pt"
    write_atomically(path, lambda file: file.write(content))
    for old in checkpoints_of(run)[keep:]:
        old.unlink(missing_ok=True)
    for left_over in path.parent.glob(".step-*"):  # half-written, by a process that was killed
        left_over.unlink(missing_ok=True)
    return path


def load_checkpoint(run: Path) -> dict[str, Any]:
    """Reads the newest checkpoint of a run that is whole; one that is not is named in a warning.

    Raises QvitError if there is none.
    """
    damage: list[str] = []
    for path in checkpoints_of(run):
        try:
            return _read(path)
        except QvitError as error:
            damage.append(str(error))
            _log.warning("%s; trying the one before it", error)
    if damage:
        raise QvitError(damage[0] if len(damage) == 1 else "no checkpoint can be read: " + "; ".join(damage))
    raise QvitError(
        f"{run} has no checkpoint to resume from: it stopped before its first one was written; "
        "start it again with --overwrite"
    )


def _read(path: Path) -> dict[str, Any]:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise QvitError(f"cannot read the checkpoint {path}: {error.strerror or error}") from error
    if _digest(content) not in path.name:
        raise QvitError(f"the checkpoint {path} is damaged: its content does not have the checksum in its name")
    try:
        state = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise QvitError(f"cannot read the checkpoint {path}: {reason}") from error
    missing = PARTS if not isinstance(state, dict) else [key for key in PARTS if key not in state]
    if missing:
        raise QvitError(f"{path} is not a checkpoint of this version of qvit: it lacks '{missing[0]}'")
    return state


def _digest(content: bytes | memoryview) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def save_weights(path: Path, model: torch.nn.Module) -> None:
    """Writes a model's state as safetensors, atomically."""
    state = {key: value.detach().cpu().contiguous() for key, value in model.state_dict().items()}
    write_atomically(path, lambda file: file.write(safetensors_bytes(state)))


def seed_everything(*numbers: int) -> None:
    """Seeds Python, numpy and torch from some numbers, such as (seed, step, rank).

    What is drawn from then on depends on nothing that happened before.
    """
    mixed = int(np.random.SeedSequence(numbers).generate_state(1)[0])
    random.seed(mixed)
    np.random.seed(mixed)
    torch.manual_seed(mixed)
