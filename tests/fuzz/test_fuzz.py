"""Files of strangers, mutated by the thousand: no crash, no hang, no defect, no value that is not finite.

`make test` runs a few cases of each kind, `make test-all` all of them. A case is its target and its number:
`python tests/fuzz/worker.py FOLDER Packed 1234 1` runs one again, in a folder that shows the file.
"""

from __future__ import annotations

import json
import os
import selectors
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

WORKER = Path(__file__).with_name("worker.py")
NAMES = (
    *("Packed", "Plan", "Recipe", "Sensitivities", "Run", "LoadedRun", "InterruptedRun", "Labels", "ClassMap"),
    *("Weights", "PickledWeights", "Tar", "Shards", "Picture"),
)
FEW = 25
#: Seconds without a sign of life. A case may turn `compile` on, and then a compiler runs.
PATIENCE, PREPARATION = 90, 180


Job = tuple[str, int, int]  # target, first case, how many


def attack(folder: Path, jobs: list[Job]) -> Iterator[dict[str, Any]]:
    """The verdict of each case; a process that dies or says nothing is replaced, and the case it died of named."""
    while jobs:
        words = [str(word) for job in jobs for word in job]
        worker = subprocess.Popen(
            [sys.executable, str(WORKER), str(folder / "-".join(words[:2])), *words],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=WORKER.parents[2],
            env=os.environ | {"PYTHONPATH": str(WORKER.parents[2]), "OMP_NUM_THREADS": "1", "COLUMNS": "200"},
        )  # fmt: skip
        assert worker.stdout is not None
        begun, hung = False, False
        with selectors.DefaultSelector() as ready:
            ready.register(worker.stdout, selectors.EVENT_READ)
            while True:
                # Between two targets files are made, as at the start.
                if not ready.select(PATIENCE if begun else PREPARATION):
                    hung = True
                    worker.kill()
                line = worker.stdout.readline()
                if not line:
                    break
                said = json.loads(line)
                begun = "verdict" not in said
                if not begun:
                    jobs = without_first(jobs)
                    yield said
        _, errors = worker.communicate()
        if jobs:
            assert begun, f"{jobs[0][0]} could not be prepared: {errors[-2000:]}"
            why = f"{worker.returncode} {errors[-500:]}"
            yield {"name": jobs[0][0], "case": jobs[0][1], "verdict": "hang" if hung else "crash", "why": why}
            jobs = without_first(jobs)


def without_first(jobs: list[Job]) -> list[Job]:
    (name, first, count), *rest = jobs
    return [(name, first + 1, count - 1), *rest] if count > 1 else rest


def holds(folder: Path, jobs: list[Job]) -> None:
    verdicts = list(attack(folder, jobs))
    wrong = [said for said in verdicts if said["verdict"] not in ("read", "refused")]
    counts = Counter(said["verdict"] for said in verdicts)
    assert Counter(said["name"] for said in verdicts) == {name: count for name, _, count in jobs}
    assert not wrong, f"{dict(counts)}, first: {json.dumps(wrong[:5], indent=1)}"


@pytest.mark.parametrize("start", range(3))
def test_a_few_mutations_are_read_or_refused(start: int, tmp_path: Path) -> None:
    holds(tmp_path, [(name, 0, FEW) for name in NAMES[start::3]])  # a process for each would import torch 14 times


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_twenty_thousand_mutations_are_read_or_refused(name: str, tmp_path: Path) -> None:
    sys.path.insert(0, str(WORKER.parent))
    from targets import TARGETS

    assert set(TARGETS) == set(NAMES) and sum(target.cases for target in TARGETS.values()) >= 20_000
    holds(tmp_path, [(name, FEW, TARGETS[name].cases)])
