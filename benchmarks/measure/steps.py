"""Multi-step distillation beside direct training, with as many epochs in all.

For every seed a float model is trained; then each row starts from it with the same schedule, learning rate and number
of epochs, and learns from soft labels alone:

    direct       the uniform widths from the beginning, the float model as teacher
    8, 4, ...    an equal share of the epochs at each width, each step's teacher the one before (`runs/steps.py`)

Nothing here was chosen by test images. Finished runs are not run again.

    python benchmarks/measure/steps.py --set digits --runs DIR
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from record import RESULTS, record_of
from rich.console import Console
from sets import SETS, add_arguments, common_of, float_jobs, float_of, parsed, spread

from qvit.documents.base import read_document
from qvit.documents.run import Outcome
from qvit.files import write_json
from qvit.runs.directory import RESULT
from qvit.runs.jobs import Job, run_jobs
from qvit.training.config import TrainConfig

#: Widths of the blocks, and chains that end there; one width is the direct run.
CHAINS = {"w3a3": ("w3a3", "w8a8,w3a3"), "w2a2": ("w2a2", "w8a8,w4a4,w2a2")}


def main() -> None:
    options = parse()
    console = Console(stderr=True)
    settings, common = SETS[options.set], common_of(options)
    cut = {"epochs": 3, "warmup_epochs": 0} if options.short else {}
    run_jobs(options.runs, float_jobs(options, cut), workers=options.workers, console=console)
    runs, listed = options.runs.absolute(), {}
    for chain in (chain for chains in CHAINS.values() for chain in chains):
        widths = {"steps": chain} if "," in chain else {"plan": chain}
        for seed in options.seeds:
            values = {**common, **settings["quantized"], **cut, **widths, "method": "lsq+", "distill": 1.0}
            values |= {"weights": str(runs / float_of(options, seed)), "seed": seed}
            name = f"{chain.replace(',', '-')}-seed{seed}"
            listed.setdefault(chain, []).append(Job(name, TrainConfig.create(**values), float_of(options, seed)))
    jobs = [job for own in listed.values() for job in own]
    run_jobs(options.runs, jobs, workers=options.workers, console=console)
    rows = [
        summary(runs, target, chain, listed[chain], listed[target])
        for target, chains in CHAINS.items()
        for chain in chains
    ]
    data = {"set": options.set, "settings": settings, "method": "lsq+", "distill": 1.0, "rows": rows}
    data |= record_of(device=options.device, threads=1)
    write_json(options.out or RESULTS / f"steps_{options.set}.json", data)


def summary(runs: Path, target: str, chain: str, jobs: list[Job], direct: list[Job]) -> dict[str, Any]:
    """A row: accuracies in percent with deviation over seeds (n - 1), and what they are above the direct runs'."""
    results = [read_document(Outcome, runs / job.name / RESULT, "result") for job in jobs]
    accuracies = [result["accuracy"] for result in results]
    others = [read_document(Outcome, runs / job.name / RESULT, "result")["accuracy"] for job in direct]
    return {
        "widths": target,
        "steps": chain.split(","),
        **spread("accuracy", accuracies),
        **spread("above_direct", [own - other for own, other in zip(accuracies, others, strict=True)]),
        "accuracies": accuracies,
        "accuracies_by_step": [[step["accuracy"] for step in result.get("steps", [])] for result in results],
        "float_accuracies": [result["float_accuracy"] for result in results],
        "epochs": results[0]["epochs"],
        "images": results[0]["images"],
        "seeds": [result["seed"] for result in results],
    }


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument("--runs", type=Path, default=Path("runs/steps"))
    return parsed(parser)


if __name__ == "__main__":
    main()
