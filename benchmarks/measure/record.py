"""What every measurement says of itself, and where its results go."""

from __future__ import annotations

import datetime
import os
import platform
import shlex
import sys
from collections.abc import Iterable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import timm
import torch

from qvit.version import __version__

RESULTS = Path(__file__).resolve().parents[1] / "results"
#: Options that say where results go, not what is measured.
_WHERE = ("--out", "--runs", "--page")


def record_of(
    *, device: str = "cpu", threads: int | None = None, packages: Iterable[str] = (), switches: Sequence[str] = ()
) -> dict[str, Any]:
    """Command, date, hardware and versions, for a file of results.

    Args:
        device: Where it was measured.
        threads: How many threads it had; those of torch if not given.
        packages: Further packages whose versions count.
        switches: Options without a value that change no result.
    """
    words = [word for word in sys.argv[1:] if word not in switches]
    threads = threads or torch.get_num_threads()
    cpu = f"CPU, {os.cpu_count()} cores, {threads} threads, {platform.machine()}"
    versions = {"qvit": __version__, "torch": torch.__version__, "timm": timm.__version__}
    return {
        "command": shown(["python", f"benchmarks/measure/{Path(sys.argv[0]).name}", *words]),
        "date": datetime.date.today().isoformat(),
        "hardware": torch.cuda.get_device_name() if device.startswith("cuda") else cpu,
        "versions": versions | {"python": platform.python_version()} | {name: version(name) for name in packages},
    }


def shown(words: Iterable[str]) -> str:
    """A command line for readers on other machines: files by their names alone, and without where results went."""
    kept: list[str] = []
    rest = iter(words)
    for word in rest:
        if word in _WHERE:
            next(rest, None)
        elif Path(word).is_absolute() or (kept and kept[-1].startswith("--") and "/" in word):
            kept.append(Path(word).name)
        else:
            kept.append(word)
    return shlex.join(kept)
