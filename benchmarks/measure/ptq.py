r"""Accuracy of post-training quantization: uniform and mixed widths, plain and with reconstructed blocks, beside float.

Every row is one `qvit ptq` run with its own directory, so a number can be looked into; runs that are there are not run
again. Calibration images and evaluated images are different data. Rows say how many steps and images they took: on a
CPU a reconstruction is short, and its numbers are not the best that it can do.

    python benchmarks/measure/ptq.py --weights W.safetensors --data TRAIN.tar --eval-data TEST.tar \
        --class-map classes.txt
    python benchmarks/measure/ptq.py ... --plans w4a4 --steps 2000 --recon-images 1024    longer, of one width
    python benchmarks/measure/ptq.py ... --metrics fisher --mixed 4bit                    mixed widths, too
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from record import RESULTS, record_of

from qvit.files import write_json
from qvit.runs.directory import RESULT, SENSITIVITY
from qvit.runs.run import train
from qvit.training.config import TrainConfig

KEYS = ("agreement", "bit_operations", "weight_bytes", "seconds", "images", "reconstruction")


def main() -> None:
    options = parse()
    rows: list[dict[str, Any]] = []
    for budget, metric in [(plan, None) for plan in options.plans] + [
        (budget, metric) for metric in options.metrics for budget in options.mixed
    ]:
        for reconstruct in (False, True):
            if reconstruct and budget in options.plain_only:
                continue
            result = measure(options, budget, metric, reconstruct)
            if not rows:
                rows.append({"budget": "float", "top1": result["float_accuracy"], "agreement": 100.0})
            row = {"budget": budget, "metric": metric, "reconstruct": reconstruct, "top1": result["accuracy"]}
            rows.append(row | {key: result[key] for key in KEYS})
            sys.stderr.write(json.dumps(rows[-1]) + "\n")
            write(options, rows)


def config_of(
    options: argparse.Namespace, budget: str, method_options: dict[str, Any], data: str, eval_data: str
) -> TrainConfig:
    """The run of one row."""
    return TrainConfig.create(
        model=options.model,
        weights=options.weights,
        method="ptq",
        method_options=method_options,
        budget=budget,
        data=data,
        eval_data=eval_data,
        class_map=options.class_map,
        calibration_images=options.calibration_images,
        batch_size=50,
        seed=options.seed,
        device=options.device,
        threads=options.threads,
    )


def measure(options: argparse.Namespace, budget: str, metric: str | None, reconstruct: bool) -> dict[str, Any]:
    """The result of one run; what is there already is read."""
    run = options.runs / "-".join(filter(None, (budget, metric, "reconstructed" if reconstruct else "plain")))
    if (run / RESULT).is_file():
        return json.loads((run / RESULT).read_text(encoding="utf-8"))
    method_options: dict[str, Any] = {"metric": metric, "reconstruct": reconstruct}
    for name in ("steps", "recon_images", "recon_batch"):
        method_options[name] = getattr(options, name)
    shared = options.runs / f"sensitivity-{budget}-{metric}.json"  # one for plain and reconstructed
    if metric is not None:
        method_options["sensitivity_images"] = options.kl_images if metric == "kl" else None
        method_options["sensitivity"] = str(shared) if shared.is_file() else None
    config = config_of(options, budget, method_options, options.data, options.eval_data)
    result = train(config, run, overwrite=True, quiet=True)
    if metric is not None:
        shutil.copyfile(run / SENSITIVITY, shared)
        result["seconds"]["sensitivity"] = json.loads(shared.read_text(encoding="utf-8"))["seconds"]
        write_json(run / RESULT, result)
    return result


def write(options: argparse.Namespace, rows: list[dict[str, Any]], packages: Sequence[str] = ()) -> None:
    """Writes the results file, with the versions of further packages."""
    names = {name: Path(str(getattr(options, name))).name for name in ("weights", "data", "eval_data", "class_map")}
    data = {
        "model": options.model,
        **names,
        "calibration_images": options.calibration_images,
        "seed": options.seed,
        **record_of(device=options.device, packages=packages),
        "threads": torch.get_num_threads(),
        "rows": rows,
    }
    write_json(options.out, data)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="deit_tiny_patch16_224")
    for name in ("weights", "data", "eval-data", "class-map"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--plans", nargs="*", default=["w8a8", "w6a6", "w4a4", "w3a3"])
    parser.add_argument("--plain-only", nargs="*", default=["w8a8"], help="budgets that are not reconstructed")
    parser.add_argument("--metrics", nargs="*", default=[])
    parser.add_argument("--mixed", nargs="*", default=["4bit"], help="budgets for the metrics")
    parser.add_argument("--kl-images", type=int, default=16, help="images of the metric kl")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--recon-images", type=int, default=256)
    parser.add_argument("--recon-batch", type=int, default=8)
    parser.add_argument("--calibration-images", type=int, default=128)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--runs", type=Path, default=Path("runs/ptq"))
    parser.add_argument("--out", type=Path, default=RESULTS / "ptq.json")
    return parser.parse_args()


if __name__ == "__main__":
    main()
