"""Tables 1 and 3 and Figure 5 of the Q-ViT paper in small: do the methods do what it says?

Every row starts from the same float weights per seed, with the same images, schedule and learning rate.

    budgets      LSQ+ and Q-ViT at the bit operations of w4a4, w3a3, w2a2                              (Table 1)
    ablations    at one budget: widths per head, switchable scales, the length of the search, and what the paper leaves
                 open: shared scales, width gradient by interpolation (FracBits)                       (Table 3)
    widths       the mean width that Q-ViT learns for each kind of tensor                              (Figure 5)

Sets of images: `sets.py`. Nothing here was chosen by test images. Finished runs are not run again, so a run that was
stopped goes on.

    python benchmarks/accuracy/evidence.py --set digits --runs DIR
    python benchmarks/accuracy/evidence.py --set cifar10 --data FOLDER --train-images 2500 --test-images 2000 --runs DIR
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from sets import SETS, add_arguments, common_of, float_jobs, parsed, record_of, spread

from qvit.files import write_json
from qvit.jobs import Job, run_jobs
from qvit.plan import QuantPlan
from qvit.rundir import RESULT
from qvit.training.config import TrainConfig

#: name: (method, options)
BUDGETS: dict[str, tuple[str, dict[str, Any]]] = {"lsq+": ("lsq+", {}), "qvit": ("qvit", {})}
ABLATIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "one width for all heads": ("qvit", {"head_wise": False}),
    "one scale for all widths": ("qvit", {"switchable_scale": False}),
    "σ = 0.5": ("qvit", {"searching_ratio": 0.5}),
    "σ = 0.7": ("qvit", {"searching_ratio": 0.7}),
    "σ = 0.9": ("qvit", {"searching_ratio": 0.9}),
    "one scale for all heads": ("qvit", {"scales": "shared"}),
    "width gradient by interpolation": ("qvit", {"width_gradient": "interpolation"}),
}


def main() -> None:
    options = parse()
    console, started = Console(stderr=True), time.perf_counter()
    cut = {"epochs": 1, "warmup_epochs": 0} if options.short else {}
    settings, common, runs = SETS[options.set], common_of(options), options.runs.absolute()
    run_jobs(runs, float_jobs(options, cut), workers=options.workers, console=console)
    wanted = [(budget, name, row) for budget in options.budgets for name, row in BUDGETS.items()]
    if options.ablations:
        wanted += [(options.ablations, name, row) for name, row in ABLATIONS.items()]
    listed: dict[tuple[str, str], list[Job]] = {}
    for seed in options.seeds:
        for budget, name, (method, own) in wanted:
            values = {**common, **settings["quantized"], **cut, "method": method, "method_options": own, "seed": seed}
            values |= {"budget": budget, "weights": str(runs / f"float-seed{seed}")}
            place = f"{budget}-{'-'.join(''.join(c if c.isalnum() else ' ' for c in name).split())}-seed{seed}"
            listed.setdefault((budget, name), []).append(Job(place, TrainConfig.create(**values), f"float-seed{seed}"))
    run_jobs(runs, [job for jobs in listed.values() for job in jobs], workers=options.workers, console=console)
    rows = []
    for budget, name, (method, own) in wanted:
        part = "budgets" if name in BUDGETS else "ablations"
        rows.append({"part": part, "budget": budget, "row": name, "method": method, "method_options": own})
        rows[-1] |= summary(runs, listed[budget, name])
    data = {
        "set": options.set,
        "settings": settings,
        "train_images": 1200 if options.set == "digits" else options.train_images,
        "rows": rows,
        "seconds": round(time.perf_counter() - started, 1),
        **record_of("evidence.py"),
    }
    write_json(options.out or Path(__file__).parents[1] / "results" / f"evidence_{options.set}.json", data)


def summary(runs: Path, jobs: list[Job]) -> dict[str, Any]:
    """Accuracies in percent with their deviation over seeds (n - 1), costs, and the mean width by kind of tensor."""
    results = [json.loads((runs / job.name / RESULT).read_text(encoding="utf-8")) for job in jobs]
    widths = [mean_widths(QuantPlan.load(runs / job.name / "plan.json")) for job in jobs]
    return {
        **spread("accuracy", [result["accuracy"] for result in results]),
        "accuracies": [result["accuracy"] for result in results],
        "float_accuracies": [result["float_accuracy"] for result in results],
        "bit_operations": max(result["bit_operations"] for result in results),
        "weight_bytes": statistics.mean(result["weight_bytes"] for result in results),
        "mean_widths": {kind: statistics.mean(own[kind] for own in widths) for kind in widths[0]},
        "images": results[0]["images"],
        "seconds_mean": statistics.mean(result["seconds"] for result in results),
        "seeds": [result["seed"] for result in results],
    }


def mean_widths(plan: QuantPlan) -> dict[str, float]:
    """The mean width of the blocks' tensors by kind, such as `attn.probs`; heads count alike."""
    found: dict[str, list[int]] = {}
    for site, spec in plan.sites.items():
        inner = re.fullmatch(r"blocks\.\d+\.(.+)", site)
        if inner and spec is not None:
            found.setdefault(inner.group(1), []).extend(spec.widths)
    return {kind: statistics.mean(widths) for kind, widths in found.items()}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument("--budgets", nargs="+", default=["4bit", "3bit", "2bit"])
    parser.add_argument("--ablations", default="3bit", help="the budget of the ablations; an empty text for none")
    parser.add_argument("--runs", type=Path, default=Path("runs/evidence"))
    return parsed(parser)


if __name__ == "__main__":
    main()
