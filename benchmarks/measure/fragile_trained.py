"""Figure 2a of the Q-ViT paper as the paper made it, on a model that trains in minutes: every point is fine-tuned.

A small ViT learns the digits in float. Then GELU outputs, fully-connected layers or attention alone are quantized: once
calibrated alone, and once by a run of `lsq+` from the float weights, of which each seed has its own.

    python benchmarks/measure/fragile_trained.py --seeds 0 1 2
"""

from __future__ import annotations

import argparse
import statistics
import sys
from pathlib import Path
from typing import Any

import torch
from record import RESULTS, record_of

from qvit.files import write_json
from qvit.runs.analysis import PARTS, analyze
from qvit.runs.directory import RESULT
from qvit.runs.run import train
from qvit.runs.subject import Request
from qvit.training.config import TrainConfig

FLOAT = {"method": "float", "epochs": 80, "batch_size": 50, "lr": 3e-3, "warmup_epochs": 10}
TUNED = {"batch_size": 100, "lr": 1e-3}


def main() -> None:
    options = parse()
    torch.set_num_threads(options.threads)
    points: dict[tuple[str, int, bool], list[dict[str, Any]]] = {}
    floats = []
    for seed in options.seeds:
        weights = options.runs / f"float-{seed}"
        if not (weights / RESULT).is_file():
            train(TrainConfig.create(model="vit_digits", data="digits", seed=seed, device="cpu", **FLOAT), weights)
        request = Request(model="vit_digits", data="digits", weights=str(weights), seed=seed, device="cpu")
        for training in (None, {**TUNED, "epochs": options.epochs}):
            folder = options.runs / f"{'plain' if training is None else 'tuned'}-{seed}"
            found = analyze(request, folder, what=("parts",), widths=options.widths, training=training, progress=tell)
            for row in found["points"]:
                points.setdefault((row["part"], row["bit_width"], training is not None), []).append(row)
        floats.append(found["float"]["top1"])
    rows = [
        {
            "part": part,
            "bit_width": width,
            "trained": trained,
            **{key: statistics.mean(row[key] for row in own) for key in ("top1", "drop", "divergence")},
            "drop_deviation": statistics.stdev(row["drop"] for row in own) if len(own) > 1 else None,
        }
        for (part, width, trained), own in sorted(points.items(), key=lambda item: PARTS.index(item[0][0]))
    ]
    head = {"model": "vit_digits", "seeds": options.seeds, "epochs": options.epochs, "float": floats}
    images = points[PARTS[0], options.widths[0], True][0]["images"]
    write_json(options.out, {**head, "images": images, "rows": rows, **record_of(threads=options.threads)})


def tell(text: str, done: int, total: int) -> None:
    sys.stderr.write(f"\r\033[K{done} of {total} images: {text}")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--widths", nargs="+", type=int, default=[2, 3, 4])
    parser.add_argument("--epochs", type=int, default=20, help="of every point")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--runs", type=Path, default=Path("runs/fragile-trained"))
    parser.add_argument("--out", type=Path, default=RESULTS / "fragile_trained.json")
    return parser.parse_args()


if __name__ == "__main__":
    main()
