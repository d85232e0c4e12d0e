"""Lists of runs: in order, not again, with plans that other runs make."""

from __future__ import annotations

import json
from pathlib import Path

from rich.console import Console
from tiny_models import small_config

from qvit.jobs import Job, run_jobs


def test_runs_that_start_from_the_plan_of_another(tmp_path: Path) -> None:
    start = {"weights": str(tmp_path / "float"), "epochs": 1}
    plan = {"method": "ptq", "budget": "w4a4", "method_options": {"weights": "per-head", "probs": "uniform"}}
    jobs = [
        Job("trained", small_config(method="lsq+", plan=str(tmp_path / "plan" / "plan.json"), **start), "plan"),
        Job("plan", small_config(**plan, **start), "float"),
        Job("float", small_config(method="float", epochs=1)),
    ]
    console = Console(quiet=True)
    assert run_jobs(tmp_path, jobs, workers=1, console=console)
    results = {job.name: json.loads((tmp_path / job.name / "result.json").read_text(encoding="utf-8")) for job in jobs}
    assert results["plan"]["method"] == "ptq"
    assert (
        results["trained"]["bit_operations"] == results["plan"]["bit_operations"] < results["float"]["bit_operations"]
    )
    assert not run_jobs(tmp_path, jobs, workers=1, console=console)
    moved = tmp_path.with_name("moved")
    tmp_path.rename(moved)
    try:
        assert not run_jobs(moved, jobs, workers=1, console=console), "a folder may be moved"
    finally:
        moved.rename(tmp_path)
