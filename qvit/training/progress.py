"""What a person sees while a run trains: one line with steps, loss, accuracy, BOPs, learning rate and time left.

Silent where nobody looks (no terminal).
"""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


class TrainingProgress:
    """A progress bar over the steps of a run; a context manager.

    Args:
        label: What is shown on the left.
        total: Number of steps of the whole run.
        enabled: False shows nothing.
    """

    def __init__(self, label: str, total: int, *, enabled: bool = True) -> None:
        console = Console(stderr=True)
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[figures]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
            disable=not (enabled and console.is_terminal),
            transient=True,
        )
        self.task = self.progress.add_task(label, total=total, figures="")

    def update(self, step: int, figures: dict[str, Any]) -> None:
        """Moves to `step` and shows `figures`, in their order."""
        self.progress.update(
            self.task, completed=step, figures="  ".join(f"{key} {value}" for key, value in figures.items())
        )

    def __enter__(self) -> TrainingProgress:
        self.progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.progress.stop()
