"""What the accuracy benchmarks share: sets of images, float models to start from, and how seeds are summed up.

`digits` are scikit-learn's, 1,200 training and 597 test images; `cifar10` are the first images of each class of
cifar10-train.tar.gz and cifar10-test.tar.gz in a folder. Test images are opened for the last line of each run alone.
"""

from __future__ import annotations

import argparse
import datetime
import os
import platform
import statistics
import sys
import tarfile
from pathlib import Path
from typing import Any

import timm
import torch

from qvit.jobs import Job
from qvit.training.config import TrainConfig
from qvit.version import __version__

SMALL = {"img_size": 32, "patch_size": 4, "embed_dim": 64, "depth": 4, "num_heads": 4}
SETS: dict[str, dict[str, Any]] = {
    "digits": {
        "common": {"model": "vit_digits", "data": "digits", "batch_size": 50},
        "float": {"epochs": 80, "lr": 3e-3, "warmup_epochs": 10},
        "quantized": {"epochs": 40, "lr": 2e-3, "calibration_images": 512},
    },
    "cifar10": {
        "common": {"model": "vit_tiny_patch16_224", "model_kwargs": SMALL, "batch_size": 100},
        "float": {"epochs": 20, "lr": 2e-3, "warmup_epochs": 2},
        "quantized": {"epochs": 6, "lr": 1e-3},
    },
}


def common_of(options: argparse.Namespace) -> dict[str, Any]:
    """Settings of every run of a set: its model and images, one thread."""
    return {**SETS[options.set]["common"], "device": "cpu", "threads": 1, "checkpoint_every": 10, **images_of(options)}


def float_jobs(options: argparse.Namespace, cut: dict[str, Any]) -> list[Job]:
    """One float model per seed, `float-seedN`."""
    values = {**common_of(options), **SETS[options.set]["float"], **cut, "method": "float"}
    return [Job(f"float-seed{seed}", TrainConfig.create(**values, seed=seed)) for seed in options.seeds]


def images_of(options: argparse.Namespace) -> dict[str, Any]:
    """Where the images of the set are; of CIFAR-10 smaller archives are made first."""
    if options.set == "digits":
        return {}
    paths = {}
    for part, count in (("train", options.train_images), ("test", options.test_images)):
        source, target = options.data / f"cifar10-{part}.tar.gz", options.runs / f"cifar10-{part}-{count}.tar"
        if not target.is_file():
            options.runs.mkdir(parents=True, exist_ok=True)
            take_first(source, target, count // 10)
        paths["data" if part == "train" else "eval_data"] = str(target.absolute())
    return paths


def take_first(source: Path, target: Path, per_class: int) -> None:
    """Copies the first images of each class folder of an archive."""
    taken: dict[str, int] = {}
    half = target.with_suffix(".part")
    with tarfile.open(source) as archive, tarfile.open(half, "w") as out:
        for member in archive:
            folder = member.name.split("/")[-2] if member.isfile() and "/" in member.name else None
            if folder is not None and taken.get(folder, 0) < per_class:
                taken[folder] = taken.get(folder, 0) + 1
                out.addfile(member, archive.extractfile(member))
    half.replace(target)


def spread(name: str, values: list[float]) -> dict[str, float]:
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return {f"{name}_mean": statistics.mean(values), f"{name}_std": deviation}


def record_of(script: str) -> dict[str, Any]:
    """Command, hardware, date and versions, for a file of results; paths of this machine are left out."""
    words = iter(sys.argv[1:])
    shown = [word for word in words if word not in ("--data", "--runs", "--out") or next(words) is None]
    versions = {"qvit": __version__, "torch": torch.__version__, "timm": timm.__version__}
    return {
        "command": " ".join(["python", f"benchmarks/accuracy/{script}", *shown]),
        "hardware": f"CPU, {os.cpu_count()} cores, {platform.machine()}",
        "date": datetime.date.today().isoformat(),
        "versions": {**versions, "python": platform.python_version()},
    }


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of every accuracy benchmark."""
    parser.add_argument("--set", choices=list(SETS), default="digits")
    parser.add_argument("--data", type=Path, help="folder of the CIFAR-10 archives")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--train-images", type=int, default=8000, help="of CIFAR-10")
    parser.add_argument("--test-images", type=int, default=4000, help="of CIFAR-10")
    parser.add_argument("--workers", type=int, help="processes; default: one per core")
    parser.add_argument("--short", action="store_true", help="one epoch a run, to try the machinery")
    parser.add_argument("--out", type=Path)


def parsed(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """The options, with one folder of runs per set."""
    options = parser.parse_args()
    options.runs = options.runs / options.set
    if options.set == "cifar10" and options.data is None:
        parser.error("--set cifar10 needs --data, a folder with cifar10-train.tar.gz and cifar10-test.tar.gz")
    return options
