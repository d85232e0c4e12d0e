"""What a person sees while something takes long: a bar on a terminal, plain lines elsewhere, on stderr.

While a run trains, with steps, loss, accuracy, BOPs, learning rate and time left. Lines are few: the first after ten
seconds, the next ones when a tenth of the time so far has passed again, so that a log of three days has a hundred.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


class PlainLines:
    """Progress as lines of text, for where there is no terminal: in a file or a pipe.

    Args:
        console: Where they go.
        clock: Seconds.
    """

    FIRST, SHARE = 10.0, 0.1

    def __init__(self, console: Console, clock: Callable[[], float] = time.monotonic) -> None:
        self._console, self._clock = console, clock
        self._started = clock()
        self._due = self._started + self.FIRST
        self._counted: tuple[str, float, int] | None = None

    def tell(self, text: str, done: int, total: int, figures: str = "") -> None:
        """Writes a line if it is time: what is done, the seconds spent, and those left of this `text`."""
        now = self._clock()
        if self._counted is None or text != self._counted[0] or done < self._counted[2]:
            self._counted = text, now, done
        if now < self._due:
            return
        self._due = now + max(self.FIRST, self.SHARE * (now - self._started))
        _, since, first = self._counted
        left = f", {(now - since) * (total - done) / (done - first):.0f} s left" if total > done > first else ""
        line = f"{text}: {done}/{total}, {now - self._started:.0f} s{left}{f'  {figures}' if figures else ''}"
        self._console.print(line, markup=False, highlight=False, soft_wrap=True)


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
        self._label, self._total = label, total
        self._lines = PlainLines(console) if enabled and not console.is_terminal else None

    def update(self, step: int, figures: dict[str, Any]) -> None:
        """Moves to `step` and shows `figures`, in their order."""
        shown = "  ".join(f"{key} {value}" for key, value in figures.items())
        self.progress.update(self.task, completed=step, figures=shown)
        if self._lines is not None:
            self._lines.tell(self._label, step, self._total, shown)

    def __enter__(self) -> TrainingProgress:
        self.progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.progress.stop()
