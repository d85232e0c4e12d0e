"""What stored soft labels cost: bytes per crop, crops per second to make, and crops per second to replay.

N images with M crops each are labelled by a teacher, then replayed by the training loader, with four crops of each
drawn image and with one. Without `--data` the images are random JPEGs of 500x375 pixels; of a folder of class folders,
N images are taken evenly. Without `--teacher-weights` the teacher is untrained, which changes no time.

    python benchmarks/measure/labels.py                                                   1000 images x 20 crops, DeiT-T
    python benchmarks/measure/labels.py --teacher deit_small_patch16_224 --device cuda --workers 8 --batch 256
    QVIT_DATA=FOLDER python benchmarks/measure/labels.py --teacher-weights FILE.safetensors
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from record import RESULTS, record_of
from safetensors.torch import save_file

from qvit.data.labels import SoftLabelStore
from qvit.data.labels.loading import StoredLabels
from qvit.data.open import data_config_of, open_data, open_source, train_loader
from qvit.files import write_json
from qvit.models.create import create_model
from qvit.runs.labels import LabelRequest, write_labels


def collect(options: argparse.Namespace, folder: Path) -> Path:
    """A data set whose training split has N images: links to those of `--data`, or random ones."""
    generator = np.random.default_rng(0)
    source: Any = open_source(options.data, split="train") if options.data else None
    if source is not None and len(source) < options.images:
        raise SystemExit(f"{options.data} has {len(source)} images, fewer than {options.images}")
    for split, count in (("train", options.images), ("val", 2)):
        for number in range(count):
            target = folder / split / f"class{number % 2}" / f"{number:06d}.jpg"
            target.parent.mkdir(parents=True, exist_ok=True)
            if source is None:
                coarse = Image.fromarray(generator.integers(0, 256, (24, 32, 3), dtype=np.uint8))
                coarse.resize((500, 375), Image.Resampling.BICUBIC).save(target, quality=90)
            else:
                target.write_bytes(source.store.read(int(source.rows[number * len(source) // count])))
    return folder


def replay_speed(data: Path, store: Path, crops_per_image: int, options: argparse.Namespace) -> float:
    """Crops per second of a pass of the training loader, at the student's size."""
    config = data_config_of(create_model(options.student))
    classes = SoftLabelStore(store).call.num_classes
    labels = StoredLabels(SoftLabelStore(store), classes, min(crops_per_image, options.crops))
    loader = train_loader(
        open_data(data).train,
        config,
        batch_size=min(options.batch, options.images),
        workers=options.workers,
        device=options.device,
        labels=labels,
    )
    start = time.perf_counter()
    crops = sum(len(images) for images, _ in loader)
    return crops / (time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--crops", type=int, default=20)
    parser.add_argument("--top-k", default="5")
    parser.add_argument("--teacher", default="deit_tiny_patch16_224")
    parser.add_argument("--teacher-weights")
    parser.add_argument("--student", default="deit_tiny_patch16_224")
    parser.add_argument("--data", default=os.environ.get("QVIT_DATA"), help="a folder of class folders")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--out", type=Path, default=RESULTS / "labels.json")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as temporary:
        data, store, weights = Path(temporary) / "images", Path(temporary) / "store", options.teacher_weights
        collect(options, data)
        teacher: Any = create_model(options.teacher)
        if weights is None:
            weights = Path(temporary) / "untrained.safetensors"
            save_file({key: value.contiguous() for key, value in teacher.state_dict().items()}, weights)
        classes = {"num_classes": teacher.num_classes}
        request = LabelRequest.create(
            model=options.student, model_kwargs=classes, teacher=options.teacher, teacher_kwargs=classes,
            teacher_weights=str(weights), data=str(data), crops=options.crops, batch_size=options.batch,
            top_k=int(options.top_k) if options.top_k.isdecimal() else options.top_k, workers=options.workers,
            device=options.device,
        )  # fmt: skip
        made = write_labels(request, store)
        speeds = {f"replayed_per_second_{n}": round(replay_speed(data, store, n, options), 1) for n in (4, 1)}
    result = {
        **record_of(device=options.device),
        "teacher": options.teacher,
        "real_images": bool(options.data),
        "images": made["images"],
        "crops_per_image": made["crops_per_image"],
        "top_k": options.top_k,
        "bytes": made["bytes"],
        "bytes_per_crop": round(made["bytes_per_crop"], 3),
        "labelled_per_second": round(made["crops_per_second"], 1),
        "seconds": made["seconds"],
        "workers": options.workers,
        **speeds,
        "peak_memory_mib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
    }
    write_json(options.out, result)
    sys.stdout.write(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
