"""What each part of VVTQ does at 2 and 3 bits, one at a time and together, beside its rivals.

For every seed a float model and a stronger teacher are trained, the teacher labels crops of the training images once,
and all rows start from the same float weights with the same schedule, learning rate and number of crops:

    lsq+            hard labels                        + module        gradient factors and scales of VVTQ
    + labels        soft labels of several crops       + regularizer   bin regularizer
    vvtq            all three                          and, with soft labels: other remedies, rivals, learned widths

Sets of images: `sets.py`. Nothing here was chosen by test images. Finished runs are not run again.

    python benchmarks/measure/two_bits.py --set digits --runs DIR
    python benchmarks/measure/two_bits.py --set cifar10 --data FOLDER --rows parts --budgets 2bit --runs DIR
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

from record import RESULTS, record_of
from rich.console import Console
from sets import SETS, SMALL, add_arguments, common_of, float_jobs, parsed, spread

from qvit.documents.base import read_document
from qvit.documents.run import Outcome
from qvit.files import write_json
from qvit.runs.directory import LOG, RESULT
from qvit.runs.jobs import Job, run_jobs
from qvit.runs.labels import LabelRequest, write_labels
from qvit.training.config import TrainConfig

Row = tuple[str, dict[str, Any], bool]
SOFT, HARD = True, False
NO_NORM = {"scale_gradient": "count", "activation_scale_gradient": "count", "scales": "per-head"}
#: name: (method, options, whether it learns from the stored soft labels)
PARTS: dict[str, Row] = {
    "lsq+": ("lsq+", {}, HARD),
    "+ module-dependent": ("vvtq", {"oscillation": "none"}, HARD),
    "+ regularizer": ("vvtq", NO_NORM, HARD),
    "+ soft labels": ("lsq+", {}, SOFT),
    "vvtq (all three)": ("vvtq", {}, SOFT),
}
OTHERS: dict[str, Row] = {
    "vvtq, freezing instead": ("vvtq", {"oscillation": "freezing"}, SOFT),
    "vvtq, annealing instead": ("vvtq", {"oscillation": "annealing"}, SOFT),
    "qvit": ("qvit", {}, SOFT),
    "qvit+vvtq": ("qvit+vvtq", {}, SOFT),
    "ofq": ("ofq", {}, SOFT),
    "irm": ("irm", {}, SOFT),
}
#: What the sets add to their settings (`sets.py`): a teacher, and how many crops of what size it labels.
TEACHERS: dict[str, dict[str, Any]] = {
    "digits": {
        "teacher": {"model_kwargs": {"embed_dim": 64}, "epochs": 80, "lr": 2e-3, "warmup_epochs": 10},
        "labels": {"crops": 40, "scale": (0.5, 1.0)},
    },
    "cifar10": {
        "teacher": {"model_kwargs": {**SMALL, "embed_dim": 96}, "epochs": 30, "lr": 2e-3, "warmup_epochs": 2},
        "labels": {"crops": 12, "scale": (0.35, 1.0)},
    },
}


def main() -> None:
    options = parse()
    console, started = Console(stderr=True), time.perf_counter()
    settings, common = SETS[options.set] | TEACHERS[options.set], common_of(options) | {"diagnostics": True}
    cut = {"epochs": 1, "warmup_epochs": 0} if options.short else {}
    listed = float_jobs(options, cut)
    for seed in options.seeds:
        values = {**common, **settings["teacher"], **cut, "method": "float", "seed": seed}
        listed.append(Job(f"teacher-seed{seed}", TrainConfig.create(**values)))
    run_jobs(options.runs, listed, workers=options.workers, console=console)
    if any(row[2] for row in options.rows.values()):
        for seed in options.seeds:
            label(options, common, settings["labels"], seed, console)
    runs = options.runs.absolute()
    students: dict[tuple[str, str], list[Job]] = {}
    for seed in options.seeds:
        for budget in options.budgets:
            for name, (method, method_options, soft) in options.rows.items():
                values = {**common, **settings["quantized"], **cut, "method": method, "method_options": method_options}
                values |= {
                    "budget": budget,
                    "seed": seed,
                    "weights": str(runs / f"float-seed{seed}"),
                }
                values |= {"labels": str(runs / f"labels-seed{seed}")} if soft else {}
                place = f"{budget}-{'-'.join(''.join(c if c.isalnum() else ' ' for c in name).split())}-seed{seed}"
                job = Job(place, TrainConfig.create(**values), f"float-seed{seed}")
                students.setdefault((budget, name), []).append(job)
    run_jobs(
        options.runs, [job for jobs in students.values() for job in jobs], workers=options.workers, console=console
    )
    rows = [summary(runs, budget, name, options.rows[name], jobs) for (budget, name), jobs in students.items()]
    write(options, common, rows, time.perf_counter() - started)


def label(options: argparse.Namespace, common: dict[str, Any], labels: dict[str, Any], seed: int, out: Console) -> None:
    """The teacher's soft labels for crops of the training images."""
    request = {key: common[key] for key in ("model", "model_kwargs", "data", "eval_data") if key in common}
    request |= {"teacher": str(options.runs / f"teacher-seed{seed}"), "seed": seed, "batch_size": 200, **labels}
    made = write_labels(LabelRequest.create(**request, device="cpu"), options.runs / f"labels-seed{seed}")
    out.print(f"labels-seed{seed}: {made['crops']} crops, {made['bytes_per_crop']:.1f} bytes each", highlight=False)


def summary(runs: Path, budget: str, name: str, row: Row, jobs: list[Job]) -> dict[str, Any]:
    """A row of the table: accuracies in percent with deviation over seeds (n - 1), and oscillation in percent."""
    results = [read_document(Outcome, runs / job.name / RESULT, "result") for job in jobs]
    shares = [oscillating(runs / job.name) for job in jobs]
    return {
        "budget": budget,
        "row": name,
        "method": row[0],
        "method_options": row[1],
        "soft_labels": row[2],
        **spread("accuracy", [result["accuracy"] for result in results]),
        **spread("oscillating_middle", [share[0] for share in shares]),
        **spread("oscillating_end", [share[1] for share in shares]),
        "bit_operations": max(result["bit_operations"] for result in results),
        "accuracies": [result["accuracy"] for result in results],
        "float_accuracies": [result["float_accuracy"] for result in results],
        "images": results[0]["images"],
        "seconds_mean": statistics.mean(result["seconds"]["total"] for result in results),
        "seeds": [result["seed"] for result in results],
    }


def oscillating(run: Path) -> tuple[float, float]:
    """The share of oscillating weights in percent, mean of the inner sites: in the middle of training, at its end."""
    lines = [json.loads(line) for line in (run / LOG).read_text(encoding="utf-8").splitlines()]
    found = [
        statistics.mean(own["oscillating"] for site, own in line["sites"].items() if site.startswith("blocks."))
        for line in lines
        if line["event"] == "diagnostics"
    ]
    return 100 * found[len(found) // 2], 100 * found[-1]


def write(options: argparse.Namespace, common: dict[str, Any], rows: list[dict[str, Any]], seconds: float) -> None:
    data = {
        "set": options.set,
        "settings": SETS[options.set] | TEACHERS[options.set],
        "teacher_accuracies": [
            json.loads((options.runs / f"teacher-seed{seed}" / RESULT).read_text(encoding="utf-8"))["accuracy"]
            for seed in options.seeds
        ],
        "train_images": 1200 if options.set == "digits" else options.train_images,
        "rows": rows,
        "seconds": round(seconds, 1),
        **record_of(device=options.device),
    }
    write_json(options.out or RESULTS / f"two_bits_{options.set}.json", data)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument("--rows", choices=["parts", "all"], default="all", help="the parts of vvtq, or others, too")
    parser.add_argument("--budgets", nargs="+", default=["3bit", "2bit"])
    parser.add_argument("--runs", type=Path, default=Path("runs/two-bits"))
    options = parsed(parser)
    options.rows = PARTS if options.rows == "parts" else PARTS | OTHERS
    return options


if __name__ == "__main__":
    main()
