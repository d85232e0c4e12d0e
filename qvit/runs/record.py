"""`config.json`: every option of a run, and what is needed to understand it later."""

from __future__ import annotations

import os
import platform
import sys
import time
from pathlib import Path
from typing import Any

import timm
import torch

from qvit.data.labels import SoftLabelStore
from qvit.runs.subject import Subject
from qvit.training.config import TrainConfig
from qvit.training.processes import Processes
from qvit.version import __version__


def run_record(config: TrainConfig, subject: Subject, processes: Processes) -> dict[str, Any]:
    """The content of `config.json`: every option, and what is needed to understand the run later."""
    bundle = subject.bundle
    return config.model_dump() | {
        "num_classes": _classes_of(subject),
        "class_names": list(bundle.class_names),
        "data_note": bundle.note,
        "labels_digest": None if config.labels is None else SoftLabelStore(config.labels).digest,
        "versions": {
            "qvit": __version__,
            "torch": torch.__version__,
            "timm": timm.__version__,
            "python": platform.python_version(),
        },
        "hardware": _hardware(processes.device),
        "processes": processes.world_size,
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }


def _classes_of(subject: Subject) -> int | None:
    """Classes of a run's model: those of the data, or its own where it has none or the data have no labels."""
    own = getattr(subject.model, "num_classes", None)
    return own if own == 0 else subject.bundle.num_classes or own


def _hardware(device: str) -> str:
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(torch.device(device))
    return f"CPU, {os.cpu_count()} cores, {platform.machine()}"
