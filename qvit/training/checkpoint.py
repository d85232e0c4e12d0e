"""Checkpoints and weights of a run: written so that they survive a kill, read so that nothing in them is executed.

    RUN/checkpoints/step-000000600-0f3ac41d9e2b77a1.safetensors     step, and the first digits of the content's SHA-256

The name says what the content must be, so a file that was damaged later is recognised, and the one before it is taken.
A file appears under its name when it is whole and on the disk; only then are older ones deleted. At a full disk the
previous checkpoint is still there.

A checkpoint holds everything that the next step needs: model, optimizer, EMA, step, the current plan, the sums of the
epoch's log line, and what the method and the diagnostics remember. Its tensors have names such as
`optimizer/state/12/exp_avg`; how they hang together, and every number that is no tensor, is JSON in the metadata entry
`state` (`trees.py`). Nothing in it can be executed, and what it says is compared with the model and the optimizer that
are to take it (`Trainer.restore`). Checkpoints in torch's format (`.pt`), which qvit once wrote, are refused: torch's
reader can be made to crash.

Random numbers are not in it: every step seeds all generators from (seed, step, process), and what a loader yields
depends on seed and position alone, so a resumed run draws what the uninterrupted one would have drawn.
"""

from __future__ import annotations

import hashlib
import logging
import random
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from qvit.errors import QvitError
from qvit.files import read_bytes, write_atomically
from qvit.quantizers import quantizers_of
from qvit.tensors import MAX_FILE, MAX_HEADER, compact, decode, encode, parse
from qvit.training.trees import flatten, require_alike, unflatten

_log = logging.getLogger(__name__)
FOLDER = "checkpoints"
PARTS = ("step", "plan", "model", "optimizer", "ema", "sums", "hooks", "diagnostics")
_FORMAT, _VERSION, _OLD = "qvit-checkpoint", "1", ".pt"
_NAME = re.compile(r"step-(\d{9,18})-([0-9a-f]{16})\.(safetensors|pt)")


def checkpoints_of(run: Path) -> list[Path]:
    """The checkpoints of a run, newest first; files under other names are none."""
    found = [path for path in (run / FOLDER).glob("step-*") if _NAME.fullmatch(path.name)]
    return sorted(found, key=lambda path: (step_of(path), _written(path)), reverse=True)


def _written(path: Path) -> int:
    """When a file was written; 0 for one that its run has deleted meanwhile."""
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return 0


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
    structure, tensors = flatten(state)
    blocks = encode(tensors, {"format": _FORMAT, "version": _VERSION, "state": compact(structure)})
    path = run / FOLDER / f"step-{state['step']:09d}-{_digest(blocks)}.safetensors"
    write_atomically(path, lambda file: file.writelines(blocks))
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
    if path.suffix == _OLD:
        raise QvitError(
            f"the checkpoint {path} is in torch's format, which is not read any more: finish this run with the version "
            "of qvit that began it, or start it again with --overwrite"
        )
    content = read_bytes(path, "checkpoint", limit=MAX_FILE)
    if _digest([content]) not in path.name:
        raise QvitError(f"the checkpoint {path} is damaged: its content does not have the checksum in its name")
    try:
        return _decoded(content, step_of(path))
    except QvitError as error:
        raise QvitError(f"cannot read the checkpoint {path}: {error}") from None


def _decoded(content: bytes, step: int) -> dict[str, Any]:
    found = decode(content)
    if found.metadata.get("format") != _FORMAT or "state" not in found.metadata:
        raise QvitError("it is not a checkpoint of qvit")
    if found.metadata.get("version") != _VERSION:
        raise QvitError(f"it has version {found.metadata.get('version')!r:.20}; this qvit reads version {_VERSION}")
    state = unflatten(parse(found.metadata["state"]), found.tensors)
    missing = PARTS if not isinstance(state, dict) else [key for key in PARTS if key not in state]
    if missing:
        raise QvitError(f"it is not a checkpoint of this version of qvit: it lacks '{missing[0]}'")
    if state["step"] != step or isinstance(state["step"], bool):
        raise QvitError(f"'step' is {state['step']!r:.20}, not the {step} of its name")
    if not isinstance(state["plan"], str):
        raise QvitError("'plan' is not a text")
    return state


def _digest(blocks: Iterable[bytes | memoryview]) -> str:
    digest = hashlib.sha256()
    for block in blocks:
        digest.update(block)
    return digest.hexdigest()[:16]


def save_weights(path: Path, model: nn.Module) -> None:
    """Writes a model's state as safetensors, atomically."""
    blocks = encode(model.state_dict(), {"format": "pt"})
    write_atomically(path, lambda file: file.writelines(blocks))


def read_tensors(path: Path, what: str, *, limit: int) -> dict[str, Tensor]:
    """The tensors of a safetensors file by name, of at most `limit` bytes of data. Raises QvitError naming it."""
    content = read_bytes(path, what, limit=limit + MAX_HEADER)
    try:
        return decode(content).tensors
    except QvitError as error:
        raise QvitError(f"cannot read the {what} {path}: {error}") from None


def load_state(model: nn.Module, state: Any, path: str = "model") -> None:
    """Gives a model the state of one with the same plan, in place.

    Raises QvitError, naming the key below `path`, unless names, shapes and types are the same, the values finite,
    scales positive, and widths that are no longer learned those of the plan.
    """
    require_alike(state, model.state_dict(), path)
    for site, quantizer in quantizers_of(model):
        key = f"{site}{quantizer.SUFFIX}.bit_width"
        if not quantizer.learns_width and not torch.equal(state[key].cpu(), quantizer.bit_width.cpu()):
            raise QvitError(f"'{path}/{key}' has other widths than the plan")
        scale = state.get(key := f"{site}{quantizer.SUFFIX}.scale")
        if scale is not None and not bool((scale > 0).all()):
            raise QvitError(f"'{path}/{key}' is not positive")
    model.load_state_dict(state)


def seed_everything(*numbers: int) -> None:
    """Seeds Python, numpy and torch from some numbers, such as (seed, step, rank).

    What is drawn from then on depends on nothing that happened before.
    """
    mixed = int(np.random.SeedSequence(numbers).generate_state(1)[0])
    random.seed(mixed)
    np.random.seed(mixed)
    torch.manual_seed(mixed)
