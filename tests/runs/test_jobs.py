"""Lists of runs: in order, not again, with plans that other runs make."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console
from tiny_models import small_config

from qvit.errors import QvitError
from qvit.runs.jobs import Job, run_jobs


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


ENDLESS = """
import sys
from pathlib import Path
from rich.console import Console
from qvit.runs.jobs import Job, run_jobs
from tiny_models import small_config
if __name__ == "__main__":
    jobs = [Job(name, small_config(method="float", epochs=100_000)) for name in "ab"]
    run_jobs(Path(sys.argv[1]), jobs, workers=2, console=Console(quiet=True))
"""


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads /proc")
@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGTERM], ids=lambda sent: sent.name)
def test_a_killed_list_leaves_nobody_at_work(tmp_path: Path, sent: signal.Signals) -> None:
    script = tmp_path / "endless.py"
    script.write_text(ENDLESS)
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[1]), *filter(None, sys.path)])
    }
    process = subprocess.Popen([sys.executable, str(script), str(tmp_path / "runs")], env=environment)
    try:
        _until(lambda: len(list(tmp_path.glob("runs/*/log.jsonl"))) == 2, "the runs have begun")
        started = _descendants(process.pid)
        assert len(started) >= 3, "two runs, and who starts them"
    finally:
        process.send_signal(sent)
        process.wait()
    _until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in started), "all have ended")


def _until(holds: Callable[[], bool], what: str) -> None:
    for _ in range(600):
        if holds():
            return
        time.sleep(0.1)
    raise AssertionError(f"not within a minute: {what}")


def _descendants(pid: int) -> set[int]:
    """Processes that this one has started, and those that they have started."""
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            parents[int(stat.parent.name)] = int(stat.read_text().rpartition(")")[2].split()[1])
    found: set[int] = set()
    while more := {own for own, parent in parents.items() if parent in found | {pid}} - found:
        found |= more
    return found
