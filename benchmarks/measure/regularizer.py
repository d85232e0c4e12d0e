"""What VVTQ's bin regularizer, and the diagnostics of every run, add to a training step.

Step, regularizer (forward and backward) and diagnostics are timed in turn, so that a busy machine slows all of them;
shares are those of the medians. The step is that of `lsq+` and of the float model, as `train_step.py` measures them.

    python benchmarks/measure/regularizer.py                               DeiT-T, batch 16, 224 px, fp32
    python benchmarks/measure/regularizer.py --threads 1 --rounds 3 --bits 2
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from record import RESULTS, record_of
from train_step import make_step

from qvit.data.open import data_config_of
from qvit.files import write_json
from qvit.models.calibrate import calibrate
from qvit.models.convert import quantize
from qvit.models.create import create_model
from qvit.training.oscillation import Diagnostics, RemedyOptions
from qvit.training.oscillation.remedies import Freezing, Regularizer


def make_parts(options: argparse.Namespace) -> dict[str, Callable[[], None]]:
    """What is timed, each as a function without arguments."""
    model = create_model(options.model).to(options.device)
    images = torch.randn(2, *data_config_of(model)["input_size"], device=options.device)
    model = calibrate(quantize(model, f"w{options.bits}a{options.bits}", in_place=True), [images])
    regularizer, diagnostics = Regularizer(model, RemedyOptions()), Diagnostics(model)
    freezing = Freezing(model, RemedyOptions(oscillation="freezing"))

    def regularize() -> None:
        penalty = regularizer.penalty(1.0)
        assert penalty is not None
        penalty.backward()
        model.zero_grad(set_to_none=True)

    steps = {name: make_step(name, "eager", "fp32", options) for name in ("float", "lsq+")}
    return steps | {
        "regularizer": regularize,
        "diagnostics": diagnostics.observe,
        "freezing": lambda: freezing.after_step(0.5),
    }


def measure(options: argparse.Namespace) -> dict[str, float]:
    """Median milliseconds of each part, parts interleaved."""
    parts = make_parts(options)
    times: dict[str, list[float]] = {name: [] for name in parts}
    for round_ in range(options.rounds + 2):
        for name, part in parts.items():
            start = time.perf_counter()
            part()
            if options.device.startswith("cuda"):
                torch.cuda.synchronize()
            if round_ >= 2:
                times[name].append(1000 * (time.perf_counter() - start))
    return {name: statistics.median(values) for name, values in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="deit_tiny_patch16_224")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path, default=RESULTS / "regularizer.json")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    times = measure(options)
    result = {
        **record_of(device=options.device),
        "model": options.model,
        "batch": options.batch,
        "bits": options.bits,
        "milliseconds": {name: round(value, 2) for name, value in times.items()},
        "share_of_step": {
            name: {step: round(times[name] / times[step], 4) for step in ("float", "lsq+")}
            for name in ("regularizer", "diagnostics", "freezing")
        },
    }
    write_json(options.out, result)
    sys.stdout.write(json.dumps(result["milliseconds"]) + "\n" + json.dumps(result["share_of_step"]) + "\n")


if __name__ == "__main__":
    main()
