"""Files of strangers, mutated by the thousand: no crash, no hang, no defect, no value that is not finite.

`make test` runs a few cases of each kind, `make test-all` all of them. A case is its target and its number:
`python tests/fuzz/worker.py Packed FOLDER 1234 1` runs one again, in a folder that shows the file.
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


def attack(name: str, folder: Path, first: int, count: int) -> Iterator[dict[str, Any]]:
    """The verdict of each case; a process that dies or says nothing is replaced, and the case it died of named."""
    end = first + count
    while first < end:
        worker = subprocess.Popen(
            [sys.executable, str(WORKER), name, str(folder / str(first)), str(first), str(end - first)],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=WORKER.parents[2],
            env=os.environ | {"PYTHONPATH": str(WORKER.parents[2]), "OMP_NUM_THREADS": "1", "COLUMNS": "200"},
        )  # fmt: skip
        assert worker.stdout is not None
        begun, hung = None, False
        with selectors.DefaultSelector() as ready:
            ready.register(worker.stdout, selectors.EVENT_READ)
            while True:
                if not ready.select(PREPARATION if begun is None else PATIENCE):
                    hung = True
                    worker.kill()
                line = worker.stdout.readline()
                if not line:
                    break
                said = json.loads(line)
                begun, first = said["case"], said["case"] + ("verdict" in said)
                if "verdict" in said:
                    yield said
        _, errors = worker.communicate()
        if first < end:
            assert begun is not None and begun == first, f"{name} could not be prepared: {errors[-2000:]}"
            yield {"case": first, "verdict": "hang" if hung else "crash", "why": f"{worker.returncode} {errors[-500:]}"}
            first += 1


def holds(name: str, folder: Path, first: int, count: int) -> None:
    verdicts = list(attack(name, folder, first, count))
    wrong = [said for said in verdicts if said["verdict"] not in ("read", "refused")]
    counts = Counter(said["verdict"] for said in verdicts)
    assert sum(counts.values()) == count
    assert not wrong, f"{dict(counts)}, first: {json.dumps(wrong[:5], indent=1)}"


@pytest.mark.parametrize("name", NAMES)
def test_a_few_mutations_are_read_or_refused(name: str, tmp_path: Path) -> None:
    holds(name, tmp_path, 0, FEW)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_twenty_thousand_mutations_are_read_or_refused(name: str, tmp_path: Path) -> None:
    sys.path.insert(0, str(WORKER.parent))
    from targets import TARGETS

    assert set(TARGETS) == set(NAMES) and sum(target.cases for target in TARGETS.values()) >= 20_000
    holds(name, tmp_path, FEW, TARGETS[name].cases)
