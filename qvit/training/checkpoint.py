"""Checkpoints and weights of a run: written so that they survive a kill, read so that nothing in them is executed.

A checkpoint holds everything that the next epoch needs: model, optimizer, EMA, epoch, the current plan, the method's
state. Random numbers are not in it: every epoch seeds all generators from (seed, epoch), so a resumed run draws what
the uninterrupted one would have drawn.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save as safetensors_bytes

from qvit.errors import QvitError
from qvit.files import write_atomically

LAST = Path("checkpoints") / "last.pt"
PARTS = ("epoch", "plan", "model", "optimizer", "ema")


def save_checkpoint(run: Path, state: dict[str, Any]) -> Path:
    """Writes the checkpoint of a run atomically and returns its path."""
    path = run / LAST
    write_atomically(path, lambda file: torch.save(state, file))
    return path


def load_checkpoint(run: Path) -> dict[str, Any]:
    """Reads the checkpoint of a run. Raises QvitError if there is none or it cannot be read."""
    path = run / LAST
    if not path.is_file():
        raise QvitError(
            f"{run} has no checkpoint to resume from: it stopped before its first epoch ended; "
            "start it again with --overwrite"
        )
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise QvitError(f"cannot read the checkpoint {path}: {reason}") from error
    missing = PARTS if not isinstance(state, dict) else [key for key in PARTS if key not in state]
    if missing:
        raise QvitError(f"{path} is not a checkpoint of qvit: it lacks '{missing[0]}'")
    return state


def save_weights(path: Path, model: torch.nn.Module) -> None:
    """Writes a model's state as safetensors, atomically."""
    state = {key: value.detach().cpu().contiguous() for key, value in model.state_dict().items()}
    write_atomically(path, lambda file: file.write(safetensors_bytes(state)))


def seed_everything(seed: int, epoch: int = 0) -> None:
    """Seeds Python, numpy and torch from (seed, epoch).

    What an epoch draws depends on nothing that happened before it.
    """
    mixed = int(np.random.SeedSequence((seed, epoch)).generate_state(1)[0])
    random.seed(mixed)
    np.random.seed(mixed)
    torch.manual_seed(mixed)
