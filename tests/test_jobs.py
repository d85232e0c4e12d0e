"""Lists of runs: in order, not again, with plans that other runs make."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from rich.console import Console
from tiny_models import small_config

from qvit.errors import QvitError
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


def test_a_job_that_fails_takes_with_it_those_that_start_from_it(tmp_path: Path) -> None:
    start = {"weights": str(tmp_path / "missing"), "epochs": 1}
    jobs = [
        Job("broken", small_config(method="lsq+", plan="w4a4", **start)),
        Job("after", small_config(method="lsq+", plan="w4a4", **start), "broken"),
        Job("last", small_config(method="lsq+", plan="w4a4", **start), "after"),
        Job("fine", small_config(method="float", epochs=1)),
    ]
    with pytest.raises(QvitError) as error:
        run_jobs(tmp_path, jobs, workers=2, console=Console(quiet=True))
    first, *others = str(error.value).splitlines()
    assert first == "3 of 4 runs failed:"
    assert [line.split(":")[0].strip() for line in others] == ["broken", "after", "last"]
    assert "missing" in others[0] and "because after failed" in others[2]
    assert (tmp_path / "fine" / "result.json").is_file()
