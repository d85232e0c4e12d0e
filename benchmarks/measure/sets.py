"""What the accuracy benchmarks share: sets of images, float models to start from, and how seeds are summed up.

`digits` are scikit-learn's, 1,200 training and 597 test images. The others are the first images of each class of
archives in a folder (`--train-images`, `--test-images`, `--float-images`):

    cifar10           cifar10-train.tar.gz and cifar10-test.tar.gz; a small model from scratch
    cifar10-trained   the same with more steps, from one float model that saw more images than the quantized runs
    tiny-imagenet     tiny-imagenet-train-N.tar and tiny-imagenet-val.tar; DeiT-T with the weights of
                      deit_tiny_patch16_224.safetensors, patches resampled from 16 to 8 pixels and trained on at 64
                      pixels, one float model for all seeds

Test images are opened for the last line of each run alone.
"""

from __future__ import annotations

import argparse
import statistics
import tarfile
from pathlib import Path
from typing import Any

from qvit.runs.jobs import Job
from qvit.training.config import TrainConfig

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
    "cifar10-trained": {
        "title": "A ViT of 4 blocks, 4 heads and width 64 on 32 pixels (patches of 4)",
        "common": {"model": "vit_tiny_patch16_224", "model_kwargs": SMALL, "batch_size": 50},
        "float": {"epochs": 8, "lr": 1e-3, "warmup_epochs": 1},
        "quantized": {"epochs": 5, "lr": 5e-4},
        "one_float_model": True,
    },
    "tiny-imagenet": {
        "title": "DeiT-T with its ImageNet weights, on 64 pixels (patches of 8), answers among 1000 classes",
        "common": {
            "model": "deit_tiny_patch16_224",
            "model_kwargs": {"img_size": 64, "patch_size": 8, "num_classes": 1000},
        },
        "float": {"batch_size": 50, "epochs": 1, "lr": 1e-4, "warmup_epochs": 0},
        "quantized": {"batch_size": 100, "epochs": 5, "lr": 2.5e-4},
        "one_float_model": True,
    },
}


def common_of(options: argparse.Namespace) -> dict[str, Any]:
    """Settings of every run of a set: its model and images, one thread."""
    place = {"device": options.device, "precision": options.precision, "threads": 1, "checkpoint_every": 10**6}
    return {**SETS[options.set]["common"], **place, "diagnostics": options.diagnostics, **images_of(options)}


def float_jobs(options: argparse.Namespace, cut: dict[str, Any]) -> list[Job]:
    """The float models, `float-seedN`: one per seed, or one for all."""
    own = SETS[options.set]
    values = {**common_of(options), **own["float"], **cut, "method": "float", "workers": options.float_workers}
    if options.float_images is not None and options.set != "digits":
        values["data"] = archive(options, "train", options.float_images)
    if options.set == "tiny-imagenet":
        values["weights"] = str(options.data / "deit_tiny_patch16_224.safetensors")
    if options.weights is not None:
        return []
    seeds = options.seeds[:1] if own.get("one_float_model") else options.seeds
    return [Job(f"float-seed{seed}", TrainConfig.create(**values, seed=seed)) for seed in seeds]


def float_of(options: argparse.Namespace, seed: int) -> str:
    """The float job that a seed's runs start from."""
    return f"float-seed{options.seeds[0] if SETS[options.set].get('one_float_model') else seed}"


def images_of(options: argparse.Namespace) -> dict[str, Any]:
    """Where the images of the set are; archives of as many as are asked for are made first."""
    if options.set == "digits":
        return {}
    parts = {"data": ("train", options.train_images), "eval_data": ("test", options.test_images)}
    paths = {name: archive(options, *part) for name, part in parts.items()}
    if options.set == "tiny-imagenet":
        paths["class_map"] = str((options.data / "imagenet-classes.txt").absolute())
    return paths


def archive(options: argparse.Namespace, part: str, count: int) -> str:
    """An archive of the first images of each class, `count` of them in all."""
    name, classes = ("tiny-imagenet", 200) if options.set == "tiny-imagenet" else ("cifar10", 10)
    target = options.runs / f"{name}-{part}-{count}.tar"
    if not target.is_file():
        options.runs.mkdir(parents=True, exist_ok=True)
        pattern = {"tiny-imagenet": {"train": "-train-?.tar", "test": "-val.tar"}}.get(name, {}).get(part)
        sources = sorted(options.data.glob(name + (pattern or f"-{part}.tar.gz")))
        take_first(sources, target, count // classes)
    return str(target.absolute())


def take_first(sources: list[Path], target: Path, per_class: int) -> None:
    """Copies the first images of each class folder of archives, read one after the other."""
    taken: dict[str, int] = {}
    half = target.with_suffix(".part")
    with tarfile.open(half, "w") as out:
        for source in sources:
            if taken and min(taken.values()) >= per_class:
                break
            with tarfile.open(source) as images:
                for member in images:
                    folder = member.name.split("/")[-2] if member.isfile() and "/" in member.name else None
                    if folder is not None and taken.get(folder, 0) < per_class:
                        taken[folder] = taken.get(folder, 0) + 1
                        out.addfile(member, images.extractfile(member))
    half.replace(target)


def spread(name: str, values: list[float]) -> dict[str, float]:
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return {f"{name}_mean": statistics.mean(values), f"{name}_std": deviation}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of every accuracy benchmark."""
    parser.add_argument("--set", choices=list(SETS), default="digits")
    parser.add_argument("--data", type=Path, help="folder of the archives")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--train-images", type=int, default=8000, help="from the archives, as many of each class")
    parser.add_argument("--float-images", type=int, help="those of the float models; default: the same")
    parser.add_argument("--test-images", type=int, default=4000)
    parser.add_argument("--weights", type=Path, help="float weights to start from, in place of training them")
    parser.add_argument("--workers", type=int, help="runs at a time; default: one per core")
    parser.add_argument("--float-workers", type=int, default=0, help="processes that read images for a float run")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--diagnostics", action="store_true", help="record oscillations")
    parser.add_argument("--short", action="store_true", help="one epoch a run, to try the machinery")
    parser.add_argument("--out", type=Path)


def parsed(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """The options, with one folder of runs per set."""
    options = parser.parse_args()
    options.runs = options.runs / options.set
    if options.set != "digits" and options.data is None:
        parser.error(f"--set {options.set} needs --data, the folder of its archives")
    return options
