"""The demo: its table from its runs, going on where it stopped, and the whole of it in short."""

from __future__ import annotations

import io
import json
import statistics
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from qvit.errors import QvitError, UsageError
from qvit.runs import jobs as jobs_module
from qvit.runs.demo import BUDGETS, METHODS, RESULTS, Job, jobs, packed_in_words, run_demo, summarize, verdict
from qvit.runs.run import RESULT
from qvit.training.checkpoint import FOLDER
from qvit.training.config import TrainConfig

ROW_KEYS = {"method", "budget", "bit_operations", "weight_bytes", "accuracy_mean", "accuracy_std", "seeds"}


def assert_contract(results: dict[str, Any], seeds: int) -> None:
    """What scripts rely on in `results.json`."""
    assert {"float_accuracy_mean", "rows"} <= set(results)
    assert 0 <= results["float_accuracy_mean"] <= 100
    assert {(row["method"], row["budget"]) for row in results["rows"]} == {
        (method, budget) for method in ("lsq+", "qvit") for budget in ("3bit", "2bit")
    }
    assert len(results["rows"]) == 4
    for row in results["rows"]:
        assert set(row) >= ROW_KEYS
        assert type(row["bit_operations"]) is int and type(row["weight_bytes"]) is int
        assert isinstance(row["accuracy_mean"], float) and 0 <= row["accuracy_mean"] <= 100
        assert isinstance(row["accuracy_std"], float) and row["accuracy_std"] >= 0
        assert row["seeds"] == list(range(seeds))


# ------------------------------------------------------------------------------------------------------------ the jobs


def test_every_seed_compares_both_methods_at_equal_terms(tmp_path: Path) -> None:
    listed = {job.name: job for job in jobs(tmp_path, [0, 1])}
    assert len(listed) == 2 * (1 + len(METHODS) * len(BUDGETS))
    for seed in (0, 1):
        source = listed[f"float-seed{seed}"]
        assert source.config.method == "float" and source.after is None and source.config.seed == seed
        for budget in BUDGETS:
            ours, base = (listed[f"{method}-{budget}-seed{seed}"] for method in ("qvit", "lsq+"))
            assert ours.after == base.after == source.name
            assert ours.config.weights == base.config.weights == str(tmp_path / "runs" / source.name)
            own, other = (job.config.model_dump() for job in (ours, base))
            differ = {key for key in own if own[key] != other[key]}
            assert differ == {"method"}, "same weights, schedule, learning rate, seed, data"
            assert own["budget"] == budget and own["seed"] == seed


def test_no_run_of_the_demo_monitors_test_images(tmp_path: Path) -> None:
    for job in jobs(tmp_path, [0]):
        assert job.config.data == "digits" and job.config.eval_data is None and job.config.monitor_share == 0


def test_a_demo_without_seeds_or_processes_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="at least one seed, not 0"):
        run_demo(tmp_path, seeds=0)
    with pytest.raises(UsageError, match="at least one process, not 0"):
        run_demo(tmp_path, seeds=1, workers=0)
    assert not (tmp_path / RESULTS).exists()


# ----------------------------------------------------------------------------------------------------------- the table


#: What is recorded beside the options.
RECORD = {"num_classes": 10, "class_names": list("0123456789")}


def write_results(folder: Path, accuracies: dict[str, list[float]]) -> list[Job]:
    """Made-up results for every job: `{"qvit 3bit": [one per seed]}`; 500 bytes and 1000 BOPs, more for later seeds."""
    listed = jobs(folder, list(range(len(accuracies["float"]))))
    for job in listed:
        config = job.config
        name = "float" if config.method == "float" else f"{config.method} {config.budget}"
        result = {
            "method": config.method,
            "budget": config.budget,
            "accuracy": accuracies[name][config.seed],
            "bit_operations": 1000 - config.seed,
            "weight_bytes": 500 + 10 * config.seed,
            "seed": config.seed,
        }
        run = folder / "runs" / job.name
        run.mkdir(parents=True, exist_ok=True)
        (run / RESULT).write_text(json.dumps(result))
        (run / "config.json").write_text(json.dumps(config.model_dump() | RECORD))
    return listed


ACCURACIES = {
    "float": [97.0, 98.0, 96.0],
    "lsq+ 3bit": [94.0, 95.0, 96.0],
    "qvit 3bit": [96.0, 96.0, 96.0],
    "lsq+ 2bit": [90.0, 92.0, 94.0],
    "qvit 2bit": [91.0, 90.0, 89.0],
}


def test_the_table_is_computed_from_the_runs(tmp_path: Path) -> None:
    results = summarize(tmp_path, write_results(tmp_path, ACCURACIES))
    assert_contract(results, 3)
    assert results["float_accuracy_mean"] == 97.0 and results["float_accuracy_std"] == 1.0
    for row in results["rows"]:
        own = ACCURACIES[f"{row['method']} {row['budget']}"]
        assert row["accuracy_mean"] == pytest.approx(statistics.mean(own))
        assert row["accuracy_std"] == pytest.approx(statistics.stdev(own)), "the deviation of a sample, n - 1"
        assert row["bit_operations"] == 1000 and row["weight_bytes"] == 510


def test_one_seed_has_no_deviation(tmp_path: Path) -> None:
    single = {name: values[:1] for name, values in ACCURACIES.items()}
    results = summarize(tmp_path, write_results(tmp_path, single))
    assert_contract(results, 1)
    assert all(row["accuracy_std"] == 0.0 for row in results["rows"])


def test_the_verdict_says_who_is_better_whoever_it_is(tmp_path: Path) -> None:
    three, two = verdict(summarize(tmp_path, write_results(tmp_path, ACCURACIES)))
    assert "1.00 points above" in three and "within the deviation over seeds (1.00)" in three
    assert "2.00 points below" in two and "within the deviation over seeds (2.00)" in two
    better = ACCURACIES | {"qvit 2bit": [99.0, 99.0, 99.0], "lsq+ 3bit": [96.0, 96.0, 96.0]}
    three, two = verdict(summarize(tmp_path, write_results(tmp_path, better)))
    assert "level with" in three and "7.00 points above" in two and "more than the deviation" in two


# ------------------------------------------------------------------------------------------------ going on, short runs


def fake_page(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qvit.report.load_runs", lambda paths: [SimpleNamespace(log=SimpleNamespace(epochs=()))])
    monkeypatch.setattr("qvit.report.write_page", lambda runs, path, **_: Path(path).write_text("<html>"))
    monkeypatch.setattr("qvit.runs.demo.pack", lambda folder, listed: [])


def test_a_complete_demo_is_only_shown_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_results(tmp_path, ACCURACIES)
    fake_page(monkeypatch)
    monkeypatch.setattr(jobs_module, "_run_all", lambda *_: pytest.fail("a complete demo was run again"))
    results = run_demo(tmp_path, seeds=3)
    assert_contract(json.loads((tmp_path / RESULTS).read_text()), 3)
    assert results["rows"] == json.loads((tmp_path / RESULTS).read_text())["rows"]


def test_what_is_missing_or_made_with_other_options_is_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_results(tmp_path, ACCURACIES)
    fake_page(monkeypatch)
    (tmp_path / "runs" / "qvit-2bit-seed1" / RESULT).unlink()
    changed = tmp_path / "runs" / "lsq+-3bit-seed0" / "config.json"
    changed.write_text(json.dumps(json.loads(changed.read_text()) | {"lr": 123.0}))
    asked: list[str] = []

    def note(runs: Path, todo: list[Job], *_: Any) -> None:
        asked.extend(job.name for job in todo)
        write_results(tmp_path, ACCURACIES)

    monkeypatch.setattr(jobs_module, "_run_all", note)
    run_demo(tmp_path, seeds=3)
    assert sorted(asked) == ["lsq+-3bit-seed0", "qvit-2bit-seed1"]


def test_the_page_has_a_panel_or_says_why_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is made once: with the models in it a page takes longer than everything else that a complete demo does."""
    write_results(tmp_path, ACCURACIES)
    fake_page(monkeypatch)
    runs = [SimpleNamespace(method=method, log=SimpleNamespace(epochs=())) for method in ("float", "lsq+", "qvit")]
    written: list[Any] = []

    def write(_: Any, path: Path, *, trial: Any, **__: Any) -> None:
        written.append(trial)
        path.write_text(f'<div id="trial-panel">{trial}</div>' if trial == "the panel" else str(trial))

    def without_npm(given: list[Any], **_: Any) -> Any:
        raise QvitError("npm is not installed")

    monkeypatch.setattr("qvit.report.load_runs", lambda paths: runs)
    monkeypatch.setattr("qvit.report.write_page", write)
    monkeypatch.setattr("qvit.runs.trial.trial_of", without_npm)
    run_demo(tmp_path, seeds=3, console=silent())
    run_demo(tmp_path, seeds=3, try_it=True, console=silent())
    assert written == [None, "The models cannot be tried out in this page: npm is not installed."]
    monkeypatch.setattr("qvit.runs.trial.trial_of", lambda given, **_: "the panel" if given == runs[2:] else None)
    for _ in range(2):
        run_demo(tmp_path, seeds=3, try_it=True, console=silent())
    assert written[2:] == ["the panel"]


class InThisProcess:
    """Stands for the pool of processes."""

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def __enter__(self) -> InThisProcess:
        return self

    def __exit__(self, *_: Any) -> None: ...

    def submit(self, function: Callable[..., Any], *arguments: Any) -> Future[Any]:
        future: Future[Any] = Future()
        future.set_result(function(*arguments))
        return future


@pytest.fixture
def done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """A complete demo in `tmp_path`, and what is done with each of its runs from now on: "train" or "resume"."""
    actions: dict[str, str] = {}
    for job in write_results(tmp_path, ACCURACIES):
        (tmp_path / "runs" / job.name / FOLDER).mkdir()
        (tmp_path / "runs" / job.name / FOLDER / f"step-{1:09d}-{0:016x}.safetensors").write_bytes(b"")

    def act(what: str) -> Callable[..., dict[str, Any]]:
        def action(*arguments: Any, **_: Any) -> dict[str, Any]:
            run = Path(arguments[-1])
            actions[run.name] = what
            result = {"accuracy": 50.0, "seconds": {"total": 1.0}} | results[run.name]
            (run / RESULT).write_text(json.dumps(result))
            return result

        return action

    results = {run.name: json.loads((run / RESULT).read_text()) for run in (tmp_path / "runs").iterdir()}
    monkeypatch.setattr(jobs_module, "ProcessPoolExecutor", InThisProcess)
    monkeypatch.setattr(jobs_module, "train", act("train"))
    monkeypatch.setattr(jobs_module, "resume", act("resume"))
    fake_page(monkeypatch)
    return actions


def silent() -> Console:
    return Console(file=io.StringIO())


def test_overwriting_trains_everything_again(tmp_path: Path, done: dict[str, str]) -> None:
    run_demo(tmp_path, seeds=3, overwrite=True, console=silent())
    assert done == {job.name: "train" for job in jobs(tmp_path, [0, 1, 2])}


def test_an_interrupted_run_is_resumed(tmp_path: Path, done: dict[str, str]) -> None:
    (tmp_path / "runs" / "qvit-2bit-seed1" / RESULT).unlink()
    run_demo(tmp_path, seeds=3, console=silent())
    assert done == {"qvit-2bit-seed1": "resume"}


def test_runs_that_start_from_a_float_run_that_is_redone_are_redone_too(tmp_path: Path, done: dict[str, str]) -> None:
    """Else the table would compare runs that started from different weights."""
    config = tmp_path / "runs" / "float-seed1" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"lr": 0.123}))
    run_demo(tmp_path, seeds=3, console=silent())
    names = ["float-seed1", *(f"{method}-{budget}-seed1" for method in METHODS for budget in BUDGETS)]
    assert done == dict.fromkeys(names, "train")


def test_a_run_that_fails_stops_the_demo_with_its_message(tmp_path: Path) -> None:
    config = TrainConfig.create(model="vit_digits", method="qvit", budget="0.1M", device="cpu", threads=1)
    with pytest.raises(QvitError, match="impossible"):
        jobs_module._run_all(tmp_path, [Job("broken", config), Job("waits", config, "broken")], 1, silent())


def assert_packed(folder: Path, results: dict[str, Any], names: set[str]) -> None:
    """Every quantized run has a packed file of the size that is told, far below float's, with the same answers."""
    assert {Path(row["file"]).parent.name for row in results["packed"]} == {n for n in names if "float" not in n}
    for row in results["packed"]:
        assert (folder / row["file"]).stat().st_size == row["file_bytes"]
        assert row["weight_bytes"] < row["file_bytes"] < row["float_bytes"] / 4
        own = json.loads((folder / row["file"]).parent.joinpath(RESULT).read_text())
        assert row["top1_simulated"] == pytest.approx(own["accuracy"]), "the packed model is the run's"
        assert row["agreement"] >= 99 and row["images"] == 597 and row["engine"] == "reference"
        assert row["arithmetic"].startswith("all 26 products in integers")
    lines = packed_in_words(results)
    for budget, line in zip(BUDGETS, lines, strict=False):
        (row,) = [row for row in results["packed"] if (row["method"], row["budget"]) == ("qvit", budget)]
        assert row["file"] in line and f"{row['file_bytes'] / 1e3:.1f} kB" in line and f"{row['top1']:.2f} %" in line
    assert lines[-1].startswith("All 4 files")


def test_the_whole_demo_in_short(tmp_path: Path) -> None:
    """Five runs of two epochs, in processes; then again, when there is nothing left to do."""
    text = io.StringIO()
    results = run_demo(tmp_path, seeds=1, workers=2, short=True, console=Console(file=text, width=120))
    written = json.loads((tmp_path / RESULTS).read_text())
    assert written == results
    assert_contract(written, 1)
    page = (tmp_path / "report.html").read_text()
    assert "<html" in page and len(page) > 100_000
    names = {job.name for job in jobs(tmp_path, [0], short=True)}
    assert {folder.name for folder in (tmp_path / "runs").iterdir()} == names
    assert all(name in text.getvalue() for name in names)
    operations = {(row["method"], row["budget"]): row["bit_operations"] for row in written["rows"]}
    for budget in BUDGETS:
        assert operations["qvit", budget] <= operations["lsq+", budget], "no more bit operations than the baseline"
        assert operations["qvit", budget] > 0.98 * operations["lsq+", budget], "and nearly as many"
    assert_packed(tmp_path, written, names)
    floats = {json.loads((tmp_path / "runs" / name / RESULT).read_text())["float_accuracy"] for name in names}
    assert len(floats) == 1, "all start from the same float model"
    again = run_demo(tmp_path, seeds=1, workers=2, short=True, console=silent())
    assert again == results
