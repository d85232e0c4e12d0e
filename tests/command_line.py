"""How tests call the command line: `qvit("cost", "vit_digits", "--json").json`. Import the fixture by its name."""

from __future__ import annotations

import json
import logging
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest

from qvit import cli
from qvit.cli import console

SMALL_DIGITS = ["vit_digits", "-m", "depth=1", "-m", "embed_dim=16", "-m", "num_heads=2"]
QUICK = [
    "--device",
    "cpu",
    "--epochs",
    "1",
    "--batch-size",
    "200",
    "--set",
    "threads=1",
    "--set",
    "calibration_images=32",
]


@dataclass
class Answer:
    """What a command returned."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        assert self.code == 0, self.err
        return json.loads(self.out)

    def failed(self, code: int) -> str:
        """The message of a failure that was reported as promised: one line on stderr, no traceback."""
        lines = self.err.strip().splitlines()
        assert self.code == code, f"exit code {self.code}: {self.err}"
        assert len(lines) == 1 and lines[0].startswith("error: "), self.err
        assert "Traceback" not in self.err + self.out
        assert "defect" not in lines[0], lines[0]
        return lines[0]


Qvit = Callable[..., Answer]


@pytest.fixture
def qvit(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Qvit]:
    """Runs a command in this process: `qvit("cost", "vit_digits", "--json")`."""
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(console.out, "_width", None)  # set where COLUMNS was there when the console was made
    monkeypatch.delenv("QVIT_DEBUG", raising=False)
    level = logging.getLogger("timm").level

    def call(*arguments: Any) -> Answer:
        monkeypatch.setattr(sys, "argv", ["qvit", *map(str, arguments)])
        capsys.readouterr()
        with warnings.catch_warnings(), pytest.raises(SystemExit) as caught:
            cli.main()
        captured = capsys.readouterr()
        return Answer(int(caught.value.code or 0), captured.out, captured.err)

    yield call
    logging.getLogger("timm").setLevel(level)
