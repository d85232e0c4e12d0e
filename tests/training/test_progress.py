"""What long work says where there is no terminal: few lines, with the time left."""

from __future__ import annotations

import io
import math

import pytest
from rich.console import Console

from qvit.cli import console as module
from qvit.training.progress import PlainLines, TrainingProgress


def lines_of(seconds: int) -> list[str]:
    """What is said of a work of so many seconds, a step each."""
    now, text = [0.0], io.StringIO()
    lines = PlainLines(Console(file=text, width=40), clock=lambda: now[0])
    for step in range(seconds + 1):
        now[0] = float(step)
        lines.tell("images of a rather long name that no window is wide enough for", step, seconds, "loss 0.5")
    return text.getvalue().splitlines()


def test_short_work_says_nothing_and_long_work_little() -> None:
    assert lines_of(9) == []
    assert lines_of(20)[0].endswith("for: 10/20, 10 s, 10 s left  loss 0.5")
    days = lines_of(300_000)
    assert len(days) < 10 + math.log(300_000 / 100) / math.log(1.1) + 1
    assert days[-1].split(", ")[1].endswith(" s")


def test_time_left_is_that_of_a_part() -> None:
    """The second part is ten times as fast as the first."""
    now, text = [0.0], io.StringIO()
    lines = PlainLines(Console(file=text), clock=lambda: now[0])
    for step in range(20):
        lines.tell("slow", step, 20)
        now[0] += 1
    for step in range(101):
        lines.tell("fast", step, 1000)
        now[0] += 0.1
    assert text.getvalue().splitlines()[-1].startswith("fast: 100/1000, 30 s, 90 s left")


def test_a_run_and_a_command_tell_by_lines(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PlainLines, "FIRST", 0.0)
    with TrainingProgress("lsq", 10) as bar:
        bar.update(5, {"loss": "0.1"})
    with TrainingProgress("quiet", 10, enabled=False) as bar:
        bar.update(5, {"loss": "0.1"})
    said = capsys.readouterr()
    assert said.err.startswith("lsq: 5/10, 0 s") and "loss 0.1" in said.err and said.err.count("\n") == 1
    text = io.StringIO()
    monkeypatch.setattr(module, "err", Console(file=text))
    for hidden in (False, True):
        with module.progress_bar(hidden=hidden) as show:
            show("images", 3, 4)
    assert text.getvalue().startswith("images: 3/4, 0 s") and text.getvalue().count("\n") == 1 and said.out == ""
