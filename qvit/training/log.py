"""What a run notes: `log.jsonl`, one JSON object a line, with the same figures for TensorBoard on request; seconds."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from numbers import Real
from pathlib import Path
from typing import Any

from qvit.errors import QvitError, UsageError


class RunLog:
    """Appends to a run's `log.jsonl`, a whole line at a time.

    Args:
        path: The file.
        enabled: False writes nothing (all processes but the first).
        tensorboard: Also writes every number to `tensorboard/` beside the file.

    Raises:
        UsageError: If TensorBoard is asked for and not installed.
    """

    def __init__(self, path: Path, *, enabled: bool = True, tensorboard: bool = False) -> None:
        self.path, self.enabled = path, enabled
        self.board: Any = None
        if tensorboard and enabled:
            try:
                from torch.utils.tensorboard.writer import SummaryWriter
            except ImportError:
                raise UsageError("TensorBoard is not installed: pip install 'qvit[tensorboard]'") from None
            self.board = SummaryWriter(str(path.parent / "tensorboard"))

    def write(self, event: str, **values: Any) -> None:
        """Writes one event. Raises QvitError if it cannot be written, ValueError for NaN."""
        if not self.enabled:
            return
        line = json.dumps({"event": event, **values}, allow_nan=False, default=float) + "\n"
        try:
            with self.path.open("ab+") as file:
                if file.tell() and file.seek(-1, 2) is not None and file.read(1) != b"\n":
                    line = "\n" + line  # a killed run left half a line
                file.write(line.encode())
            if self.board is not None:
                self._to_board(event, values)
        except OSError as error:
            raise QvitError(f"cannot write the log {self.path}: {error}") from error

    def _to_board(self, event: str, values: dict[str, Any]) -> None:
        step = int(values.get("step", 0))
        for key, value in values.items():
            if key in ("step", "epoch", "time"):
                continue
            if isinstance(value, Real) and not isinstance(value, bool):
                self.board.add_scalar(f"{event}/{key}", float(value), step)
            elif key == "bit_widths":
                for site, own in value.items():
                    self.board.add_scalar(f"bit_widths/{site}", sum(own) / len(own), step)
        self.board.flush()


class Stopwatch:
    """Seconds by stage, and in all: `with watch("calibrate"): ...`."""

    def __init__(self) -> None:
        self._started = time.perf_counter()
        self._stages: dict[str, float] = {}

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        since = time.perf_counter()
        yield
        self.add(stage, time.perf_counter() - since)

    def add(self, stage: str, seconds: float) -> None:
        """Counts seconds that were measured elsewhere."""
        self._stages[stage] = self._stages.get(stage, 0.0) + seconds

    def record(self) -> dict[str, float]:
        """Seconds of each stage in order, and `total`: those since the watch was made."""
        stages = {stage: round(seconds, 3) for stage, seconds in self._stages.items()}
        return stages | {"total": round(time.perf_counter() - self._started, 3)}
