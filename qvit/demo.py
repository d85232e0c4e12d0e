"""The demo: LSQ+ and Q-ViT on handwritten digits, at the same bit operations, over several seeds.

A small ViT is trained in float first; both methods start from its weights.

    for every seed    float → { lsq+, qvit } × { 3bit, 2bit }       4 quantized runs, one schedule, one learning rate

The images are real scans (scikit-learn's digits, 8×8): 1,200 to train and calibrate, 597 to test, which no run sees
before its last line. Runs are ordinary run directories under DIR/runs, made by as many processes as there are cores,
one thread each. A demo that was stopped goes on where it was; one that is complete is only shown again. Nothing here
knows who wins: the table and the sentence below it are computed from the runs.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import statistics
import time
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from qvit.errors import UsageError
from qvit.files import write_json
from qvit.run import resume, train
from qvit.rundir import CONFIG, LOG, RESULT, forget_progress
from qvit.training.checkpoint import last_checkpoint
from qvit.training.config import TrainConfig

METHODS, BUDGETS = ("lsq+", "qvit"), ("3bit", "2bit")
RESULTS, REPORT = "results.json", "report.html"
_SHARED: dict[str, Any] = {
    "model": "vit_digits",
    "data": "digits",
    "device": "cpu",
    "threads": 1,
    "checkpoint_every": 10,
}
_FLOAT: dict[str, Any] = {"method": "float", "epochs": 80, "batch_size": 50, "lr": 3e-3, "warmup_epochs": 10}
_QUANTIZED: dict[str, Any] = {
    "epochs": 40,
    "batch_size": 50,
    "lr": 2e-3,
    "distill": 1.0,
    "calibration_images": 512,
}


@dataclass(frozen=True)
class Job:
    """One run of the demo."""

    name: str
    config: TrainConfig
    after: str | None = None


def jobs(out: Path, seeds: list[int], *, short: bool = False) -> list[Job]:
    """All runs of the demo, each after the float run that it starts from."""
    cut = {"epochs": 2} if short else {}
    listed = [
        Job(
            f"float-seed{seed}",
            TrainConfig.create(**{**_SHARED, **_FLOAT, **cut, "warmup_epochs": 0 if short else 10, "seed": seed}),
        )
        for seed in seeds
    ]
    for seed in seeds:
        for budget in BUDGETS:
            for method in METHODS:
                config = TrainConfig.create(
                    **{
                        **_SHARED,
                        **_QUANTIZED,
                        **cut,
                        "method": method,
                        "budget": budget,
                        "seed": seed,
                        "weights": str((out / "runs" / f"float-seed{seed}").absolute()),
                    }
                )
                listed.append(Job(f"{method}-{budget}-seed{seed}", config, f"float-seed{seed}"))
    return listed


def run_demo(
    out: str | Path,
    *,
    seeds: int = 3,
    workers: int | None = None,
    overwrite: bool = False,
    short: bool = False,
    console: Console | None = None,
) -> dict[str, Any]:
    """Runs what is missing of the demo, writes `results.json` and `report.html`.

    Args:
        out: The demo's directory.
        seeds: Number of seeds, counted from 0.
        workers: Processes; None: one per core.
        overwrite: Runs everything again.
        short: Two epochs per run, to try the machinery; the numbers mean nothing.
        console: Where progress goes.

    Returns:
        The content of `results.json`: `{"float_accuracy_mean", "rows": [{"method", "budget", "bit_operations",
        "weight_bytes", "accuracy_mean", "accuracy_std", "train_loss_mean", "seeds"}], ...}`.
    """
    if seeds < 1:
        raise UsageError(f"a demo needs at least one seed, not {seeds}")
    if workers is not None and workers < 1:
        raise UsageError(f"a demo needs at least one process, not {workers}")
    folder = Path(out)
    (folder / "runs").mkdir(parents=True, exist_ok=True)
    console = console or Console(stderr=True)
    started = time.perf_counter()
    listed = jobs(folder, list(range(seeds)), short=short)
    again = {job.name for job in listed if overwrite or not _same_config(folder / "runs" / job.name, job.config)}
    again |= {job.name for job in listed if job.after in again}  # what started from other weights is another run
    for name in again:
        forget_progress(folder / "runs" / name)
    todo = [job for job in listed if not (folder / "runs" / job.name / RESULT).is_file()]
    if todo:
        processes = min(workers or os.cpu_count() or 1, len(todo))
        console.print(f"{len(todo)} training runs in {processes} process(es), one thread each", highlight=False)
        _run_all(folder / "runs", todo, workers or os.cpu_count() or 1, console)
    results = summarize(folder, listed)
    results["seconds"] = round(time.perf_counter() - started, 1) if todo else _previous_seconds(folder)
    write_json(folder / RESULTS, results)
    from qvit.report import load_runs, write_page

    write_page(load_runs([folder]), folder / REPORT, title="Q-ViT beside LSQ+ on handwritten digits", summary=results)
    return results


def summarize(folder: Path, listed: list[Job]) -> dict[str, Any]:
    """The table of the demo from the runs' results. Accuracies in percent, deviation over seeds (n - 1)."""
    results = {
        job.name: json.loads((folder / "runs" / job.name / RESULT).read_text(encoding="utf-8")) for job in listed
    }
    floats = [result["accuracy"] for result in results.values() if result["method"] == "float"]
    rows = []
    for budget in BUDGETS:
        for method in METHODS:
            names = [name for name, own in results.items() if (own["method"], own["budget"]) == (method, budget)]
            group = [results[name] for name in names]
            accuracies = [result["accuracy"] for result in group]
            rows.append(
                {
                    "method": method,
                    "budget": budget,
                    "bit_operations": max(result["bit_operations"] for result in group),
                    "weight_bytes": round(statistics.mean(result["weight_bytes"] for result in group)),
                    "accuracy_mean": statistics.mean(accuracies),
                    "accuracy_std": statistics.stdev(accuracies) if len(accuracies) > 1 else 0.0,
                    "train_loss_mean": _final_loss([folder / "runs" / name for name in names]),
                    "seeds": [result["seed"] for result in group],
                }
            )
    return {
        "float_accuracy_mean": statistics.mean(floats),
        "float_accuracy_std": statistics.stdev(floats) if len(floats) > 1 else 0.0,
        "rows": rows,
    }


def verdict(results: dict[str, Any]) -> list[str]:
    """One sentence per budget that compares the two methods, from the numbers alone."""
    sentences = []
    for budget in BUDGETS:
        base, ours = (
            next(row for row in results["rows"] if (row["method"], row["budget"]) == (method, budget))
            for method in METHODS
        )
        gain = ours["accuracy_mean"] - base["accuracy_mean"]
        spread = max(ours["accuracy_std"], base["accuracy_std"])
        relation = "above" if gain > 0 else "below" if gain < 0 else "level with"
        certainty = "more than" if abs(gain) > spread else "within"
        amount = f"{abs(gain):.2f} points {relation}" if gain else relation
        sentences.append(f"{budget}: qvit is {amount} lsq+, {certainty} the deviation over seeds ({spread:.2f}).")
    return sentences


def _previous_seconds(folder: Path) -> float | None:
    try:
        return json.loads((folder / RESULTS).read_text(encoding="utf-8")).get("seconds")
    except (OSError, json.JSONDecodeError):
        return None


def _same_config(run: Path, config: TrainConfig) -> bool:
    try:
        record = json.loads((run / CONFIG).read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError):
        return False
    wanted = config.model_dump(mode="json")
    for values in (record, wanted):
        values["weights"] = values.get("weights") and Path(values["weights"]).name  # the folder may have been moved
    return all(record.get(key) == value for key, value in wanted.items())


def _work(run: str, values: dict[str, Any]) -> dict[str, Any]:
    """One run, in a process of the pool: resumed if it can be."""
    folder, config = Path(run), TrainConfig.create(**values)
    if last_checkpoint(folder) and not (folder / RESULT).is_file():
        return resume(folder, quiet=True)
    return train(config, folder, overwrite=True, quiet=True)


def _run_all(runs: Path, todo: list[Job], workers: int, console: Console) -> None:
    """Runs the jobs, each as soon as the one that it starts from is done."""
    total = sum(job.config.epochs for job in todo)
    waiting = {job.name: job for job in todo}
    active: dict[Future[dict[str, Any]], Job] = {}
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=30),
        TextColumn("{task.percentage:>3.0f} %"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
    )
    with bar, ProcessPoolExecutor(min(workers, len(todo)), mp_context=multiprocessing.get_context("spawn")) as pool:
        task = bar.add_task("training", total=total)
        try:
            while waiting or active:
                unfinished = set(waiting) | {job.name for job in active.values()}
                for job in [job for job in waiting.values() if job.after not in unfinished]:
                    active[pool.submit(_work, str(runs / job.name), job.config.model_dump())] = waiting.pop(job.name)
                done, _ = wait(active, timeout=0.5, return_when=FIRST_COMPLETED)
                for future in done:
                    _announce(active.pop(future), future.result(), console)
                bar.update(
                    task,
                    completed=sum(_epochs_done(runs / job.name) for job in todo),
                    description=f"{len(active) + len(waiting)} runs left",
                )
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _announce(job: Job, result: dict[str, Any], console: Console) -> None:
    console.print(f"{job.name:<18} {result['accuracy']:6.2f} %   {result['seconds']:5.1f} s", highlight=False)


def _final_loss(runs: list[Path]) -> float | None:
    """Mean training loss over the last five epochs of some runs: what accuracy on few test images cannot resolve."""
    losses: list[float] = []
    for run in runs:
        lines = (run / LOG).read_text(encoding="utf-8").splitlines() if (run / LOG).is_file() else []
        epochs = [json.loads(line) for line in lines if line.startswith('{"event": "epoch"')]
        losses += [epoch["train_loss"] for epoch in epochs[-5:]]
    return statistics.mean(losses) if losses else None


def _epochs_done(run: Path) -> int:
    """Epochs in the log of a run that may be writing it."""
    try:
        return sum(
            line.startswith('{"event": "epoch"') for line in (run / LOG).read_text(encoding="utf-8").splitlines()
        )
    except OSError:
        return 0
