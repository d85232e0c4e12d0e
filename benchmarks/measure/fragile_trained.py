"""Figure 2a of the Q-ViT paper as the paper made it, on models that train in minutes: every point is fine-tuned.

A model learns in float: a small ViT the digits, or DeiT-T images of 64 pixels (`sets.py`). Then GELU outputs,
fully-connected layers or attention alone are quantized: once calibrated alone, and once by a run of `lsq+` from the
float weights, of which each seed has its own where the set has no float model for all.

    python benchmarks/measure/fragile_trained.py --seeds 0 1 2
    python benchmarks/measure/fragile_trained.py --set tiny-imagenet --data FOLDER --float-images 20000 \
        --train-images 4000 --test-images 5000 --epochs 1 --seeds 0
"""

from __future__ import annotations

import argparse
import statistics
import sys
from pathlib import Path
from typing import Any

import torch
from record import RESULTS, record_of
from sets import SETS, add_arguments, common_of, float_jobs, float_of, parsed

from qvit.files import write_json
from qvit.runs.analysis import PARTS, analyze
from qvit.runs.directory import RESULT
from qvit.runs.run import train
from qvit.runs.subject import Request

TUNED = {"digits": {"batch_size": 100, "lr": 1e-3}, "tiny-imagenet": {"batch_size": 100, "lr": 2.5e-4}}
#: What analyses take of the settings of a set.
SHARED = ("model", "model_kwargs", "data", "eval_data", "class_map", "device")


def main() -> None:
    options = parse()
    torch.set_num_threads(options.threads)
    points: dict[tuple[str, int, bool], list[dict[str, Any]]] = {}
    floats = []
    for job in float_jobs(options, {}):
        if not (options.runs / job.name / RESULT).is_file():
            train(job.config, options.runs / job.name, overwrite=True)
    common = {key: value for key, value in common_of(options).items() if key in SHARED}
    for seed in options.seeds:
        request = Request(weights=str(options.runs / float_of(options, seed)), seed=seed, **common)
        for training in (None, {**TUNED[options.set], "epochs": options.epochs}):
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
    head = {"model": common["model"], "set": options.set, "title": SETS[options.set].get("title", "")}
    head |= {"seeds": options.seeds, "epochs": options.epochs, "float": floats}
    if options.set != "digits":
        head |= {"float_images": options.float_images, "train_images": options.train_images}
    images = points[PARTS[0], options.widths[0], True][0]["images"]
    write_json(options.out, {**head, "images": images, "rows": rows, **record_of(threads=options.threads)})


def tell(text: str, done: int, total: int) -> None:
    sys.stderr.write(f"\r\033[K{done} of {total} images: {text}")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument("--widths", nargs="+", type=int, default=[2, 3, 4])
    parser.add_argument("--epochs", type=int, default=20, help="of every point")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--runs", type=Path, default=Path("runs/fragile-trained"))
    parser.set_defaults(out=RESULTS / "fragile_trained.json")
    return parsed(parser)


if __name__ == "__main__":
    main()
