"""The demo: LSQ+ and Q-ViT on handwritten digits, at the same bit operations, over several seeds.

A small ViT is trained in float first; both methods start from its weights.

    for every seed    float → { lsq+, qvit } × { 3bit, 2bit }       4 quantized runs, one schedule, one learning rate

The images are real scans (scikit-learn's digits, 8×8): 1,200 to train and calibrate, 597 to test, which no run sees
before its last line. At the end every quantized model is packed, and its integers are scored beside the simulated
model; those of Q-ViT are put into the page, to be tried out. Runs are ordinary run directories under DIR/runs, made by
as many processes as there are cores, one thread each. A demo that was stopped goes on where it was; one that is
complete is only shown again. Nothing here knows who wins: the table and the sentences below it are computed from the
runs.
"""

from __future__ import annotations

import statistics
import time
from pathlib import Path
from typing import Any

from rich.console import Console

from qvit.data.open import open_data
from qvit.deploy.file.summary import describe
from qvit.documents.base import read_document
from qvit.documents.demo import DemoResults
from qvit.documents.run import Result
from qvit.errors import QvitError, UsageError
from qvit.files import write_json
from qvit.locks import writing
from qvit.models.create import WEIGHTS_FILE
from qvit.runs.directory import RESULT
from qvit.runs.jobs import Job, run_jobs
from qvit.runs.packed import compare_packed, write_packed
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
    try_it: bool = False,
    console: Console | None = None,
) -> dict[str, Any]:
    """Runs what is missing of the demo, writes `results.json` and `report.html`.

    Args:
        out: The demo's directory.
        seeds: Number of seeds, counted from 0.
        workers: Processes; None: one per core.
        overwrite: Runs everything again.
        short: Two epochs per run, to try the machinery; the numbers mean nothing.
        try_it: Puts the models of Q-ViT into the page, to try them there, or the reason why that is not possible.
        console: Where progress goes.

    Returns:
        The content of `results.json`: `{"float_accuracy_mean", "rows": [{"method", "budget", "bit_operations",
        "weight_bytes", "accuracy_mean", "accuracy_std", "train_loss_mean", "seeds"}], ...}`.
    """
    if seeds < 1:
        raise UsageError(f"a demo needs at least one seed, not {seeds}")
    if workers is not None and workers < 1:
        raise UsageError(f"a demo needs at least one process, not {workers}")
    with writing(Path(out)):
        return _run(Path(out), seeds, workers, overwrite, short, try_it, console or Console(stderr=True))


def _run(
    folder: Path, seeds: int, workers: int | None, overwrite: bool, short: bool, try_it: bool, console: Console
) -> dict[str, Any]:
    started = time.perf_counter()
    listed = jobs(folder, list(range(seeds)), short=short)
    ran = run_jobs(folder / "runs", listed, workers=workers, overwrite=overwrite, console=console)
    results = summarize(folder, listed)
    before = {} if ran else _previous(folder)
    results["packed"] = before.get("packed") or []
    if not results["packed"] or not all((folder / row["file"]).is_file() for row in results["packed"]):
        console.print("packing every model, and running it on integers", highlight=False)
        results["packed"] = pack(folder, listed)
    results["seconds"] = round(time.perf_counter() - started, 1) if ran else before.get("seconds")
    write_json(folder / RESULTS, results)
    if ran or not (try_it and _has_panel(folder / REPORT)):
        _write_page(folder, results, try_it, console)
    return results


def _write_page(folder: Path, results: dict[str, Any], try_it: bool, console: Console) -> None:
    """The report, with the models of Q-ViT in it if that is asked for and possible."""
    from qvit.report import load_runs, write_page
    from qvit.runs.trial import trial_of

    runs, trial = load_runs([folder]), None
    if try_it:
        try:
            ours = [run for run in runs if run.method == "qvit"]
            trial = trial_of(ours, notify=lambda text: console.print(text, markup=False, highlight=False))
        except QvitError as error:
            trial = f"The models cannot be tried out in this page: {error}."
            console.print(trial, markup=False, highlight=False)
    title = "Q-ViT beside LSQ+ on handwritten digits"
    write_page(runs, folder / REPORT, title=title, summary=results, trial=trial)


def _has_panel(page: Path) -> bool:
    """Whether a page has models to try out: making them takes longer than all the rest of it."""
    return page.is_file() and b'id="trial-panel"' in page.read_bytes()


def summarize(folder: Path, listed: list[Job]) -> dict[str, Any]:
    """The table of the demo from the runs' results. Accuracies in percent, deviation over seeds (n - 1)."""
    results = {job.name: read_document(Result, folder / "runs" / job.name / RESULT, "result") for job in listed}
    floats = [results[job.name]["accuracy"] for job in listed if job.config.method == "float"]
    rows = []
    for budget in BUDGETS:
        for method in METHODS:
            own = [job for job in listed if (job.config.method, job.config.budget) == (method, budget)]
            group = [results[job.name] for job in own]
            accuracies = [result["accuracy"] for result in group]
            rows.append(
                {
                    "method": method,
                    "budget": budget,
                    "bit_operations": max(result["bit_operations"] for result in group),
                    "weight_bytes": round(statistics.mean(result["weight_bytes"] for result in group)),
                    "accuracy_mean": statistics.mean(accuracies),
                    "accuracy_std": statistics.stdev(accuracies) if len(accuracies) > 1 else 0.0,
                    "train_loss_mean": _final_loss([folder / "runs" / job.name for job in own]),
                    "seeds": [job.config.seed for job in own],
                }
            )
    return {
        "float_accuracy_mean": statistics.mean(floats),
        "float_accuracy_std": statistics.stdev(floats) if len(floats) > 1 else 0.0,
        "rows": rows,
    }


def pack(folder: Path, listed: list[Job]) -> list[dict[str, Any]]:
    """Packs every quantized run, and scores the integer engine beside the simulated model on the test images.

    Returns:
        A row for each file: its path below `folder`, method, budget, seed, true bytes, the bytes of its float model,
        and the scores of `compare_packed`.
    """
    test, rows = open_data("digits").test, []
    for job in listed:
        if job.after is None:
            continue
        run = folder / "runs" / job.name
        artifact, file = write_packed(run)
        of_float = (folder / "runs" / job.after / WEIGHTS_FILE).stat().st_size
        rows.append(
            {
                "file": str(file.relative_to(folder)),
                "method": job.config.method,
                "budget": job.config.budget,
                "seed": job.config.seed,
                "file_bytes": file.stat().st_size,
                "float_bytes": of_float,
                "weight_bytes": describe(artifact, file.stat().st_size)["payload_bytes"],
                **compare_packed(file, test),
            }
        )
    return rows


def packed_in_words(results: dict[str, Any]) -> list[str]:
    """What the packed files are: one line for each budget, of the first seed of Q-ViT, and one for all files."""
    rows = results["packed"]
    first = min(row["seed"] for row in rows)
    shown = [row for row in rows if row["method"] == "qvit" and row["seed"] == first]
    lines = [
        f"packed: {row['file']}: {row['file_bytes'] / 1e3:.1f} kB, float {row['float_bytes'] / 1e3:.1f} kB; "
        f"on integers {row['top1']:.2f} %, simulated {row['top1_simulated']:.2f} %, "
        f"{row['agreement']:.2f} % equal answers"
        for row in shown
    ]
    worst = min(rows, key=lambda row: row["agreement"])
    return [
        *lines,
        f"All {len(rows)} files, {rows[0]['arithmetic']}: the integer model answers as the simulated one on at least "
        f"{worst['agreement']:.2f} % of {worst['images']} images.",
    ]


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


def _previous(folder: Path) -> dict[str, Any]:
    """What a complete demo has written already."""
    try:
        return read_document(DemoResults, folder / RESULTS, "results")
    except QvitError:
        return {}


def _final_loss(runs: list[Path]) -> float | None:
    """Mean training loss over the last five epochs of some runs: what accuracy on few test images cannot resolve."""
    from qvit.report import load_runs

    epochs = [epoch for run in load_runs(runs) for epoch in run.log.epochs[-5:]]
    losses = [epoch.train_loss for epoch in epochs if epoch.train_loss is not None]
    return statistics.mean(losses) if losses else None
