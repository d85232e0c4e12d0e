"""Commands that meet in one place: the second ends with a sentence about the first, and touches nothing."""

from __future__ import annotations

import json
import multiprocessing
import shutil
from pathlib import Path
from typing import Any

import pytest
from command_line import QUICK, SMALL_DIGITS, Qvit, qvit  # noqa: F401
from test_locks import hold, process
from tiny_models import small_config

from qvit import locks
from qvit.errors import QvitError
from qvit.locks import LOCK, writing, writing_file
from qvit.runs.jobs import _context
from qvit.runs.run import resume, train

pytestmark = pytest.mark.skipif(locks.fcntl is None, reason="no locks on this system")
FROM_FLOAT = [*SMALL_DIGITS, "--weights", "{float}", "--data", "digits"]
COMMANDS: dict[str, list[str]] = {
    "train": ["train", *SMALL_DIGITS, *QUICK, "--method", "float", "--out", "{out}"],
    "overwrite": ["train", *SMALL_DIGITS, *QUICK, "--method", "float", "--out", "{out}", "--overwrite"],
    "resume": ["train", "--resume", "{interrupted}"],
    "ptq": ["ptq", *FROM_FLOAT, "--budget", "w8a8", "--out", "{out}"],
    "labels": ["labels", *SMALL_DIGITS, "--teacher", "{float}", "--crops", "1", "--out", "{out}"],
    "pack": ["pack", "{quantized}"],
    "pack elsewhere": ["pack", "{quantized}", "--out", "{file}"],
    "export": ["export", "{packed}", "--to", "onnx", "--out", "{file}"],
    "demo": ["demo", "--short", "--no-try-it", "--seeds", "1", "--out", "{out}"],
    "runs of a demo": ["demo", "--short", "--no-try-it", "--seeds", "1", "--out", "{out}"],
    "analyze": ["analyze", *FROM_FLOAT, "--what", "widths", "--out", "{out}"],
    "patchwise": ["patchwise", *FROM_FLOAT, "--budget", "4bit", "--out", "{out}"],
    "sensitivity": ["sensitivity", *FROM_FLOAT, "--out", "{file}"],
}
#: What is taken, where it is not the directory `{out}`.
TAKEN = {"resume": "interrupted", "pack": "quantized", "runs of a demo": "runs"}


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("places")
    found = {name: root / name for name in ("float", "quantized", "interrupted")}
    train(small_config(method="float", epochs=1), found["float"], quiet=True)
    train(
        small_config(method="lsq+", plan="w4a4", epochs=1, weights=str(found["float"])), found["quantized"], quiet=True
    )
    shutil.copytree(found["float"], found["interrupted"])
    (found["interrupted"] / "result.json").unlink()
    return found | {"packed": found["quantized"] / "packed.safetensors"}


@pytest.mark.parametrize("command", COMMANDS)
def test_the_second_ends_with_a_sentence(
    command: str,
    places: dict[str, Path],
    qvit: Qvit,  # noqa: F811
    tmp_path: Path,
) -> None:
    if command == "export":
        pytest.importorskip("onnxscript")
        assert qvit("pack", places["quantized"]).code == 0
    places = places | {"out": tmp_path / "out", "runs": tmp_path / "out" / "runs", "file": tmp_path / "a.json"}
    arguments = [part.format(**places) for part in COMMANDS[command]]
    file = any("{file}" in part for part in COMMANDS[command])
    taken = places["file" if file else TAKEN.get(command, "out")]
    with writing_file(taken) if file else writing(taken):
        before = content(taken.parent)
        line = qvit(*arguments).failed(1)
        assert f"{taken} is being written by process " in line and " since " in line, line
        assert content(taken.parent) == before
    assert not list(tmp_path.rglob(f"*{LOCK}"))


def content(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")
def test_readers_of_a_run_that_is_going_on_hear_of_its_writer(places: dict[str, Path], qvit: Qvit) -> None:  # noqa: F811
    run = places["interrupted"]
    with process(hold, run) as (_, pid):
        line = qvit("evaluate", run, "--data", "digits").failed(1)
        assert f"is being written by process {pid} " in line
    with writing(run):  # who holds the lock is not kept from reading
        assert "--resume" in qvit("evaluate", run, "--data", "digits").failed(1)
    assert "--resume" in qvit("evaluate", run, "--data", "digits").failed(1)


def race(work: str, run: str, seed: int, barrier: Any, pipe: Any) -> None:
    """One of two that begin at the same moment; says how it ended."""
    barrier.wait(120)
    try:
        if work == "resume":
            resume(run, quiet=True)
        else:
            config = small_config(method="lsq+", plan="w4a4" if seed else "w3a3", epochs=1, seed=seed)
            train(config, run, overwrite=work == "overwrite", quiet=True)
    except QvitError as error:
        pipe.send(str(error))
    else:
        pipe.send(seed)
    pipe.close()


@pytest.mark.parametrize("work", ["train", "overwrite", "resume"])
def test_of_two_that_start_together_one_wins_the_whole(work: str, places: dict[str, Path], tmp_path: Path) -> None:
    run = tmp_path / "run"
    if work != "train":
        shutil.copytree(places["interrupted" if work == "resume" else "quantized"], run)
    context = _context()
    barrier, pipes = context.Barrier(2), [multiprocessing.Pipe(duplex=False) for _ in range(2)]
    started = [
        context.Process(target=race, args=(work, str(run), seed, barrier, theirs))  # type: ignore[attr-defined]
        for seed, (_, theirs) in enumerate(pipes)
    ]
    for own in started:
        own.start()
    for _, theirs in pipes:
        theirs.close()
    answers = [ours.recv() for ours, _ in pipes]
    for own in started:
        own.join(120)
    winners = [answer for answer in answers if isinstance(answer, int)]
    losers = [answer for answer in answers if isinstance(answer, str)]
    assert winners and len(answers) == 2
    for loser in losers:  # on a machine that is busy the first may be done before the second begins
        assert f"{run} is being written by process " in loser or f"{run} holds a finished run" in loser
    assert losers or work != "train"
    result, config = (json.loads((run / name).read_text()) for name in ("result.json", "config.json"))
    assert result["seed"] == config["seed"]
    if work != "resume" and losers:
        assert config["seed"] == winners[0]
        assert ('"bit_width": 3' in (run / "plan.json").read_text()) == (winners[0] == 0)
    assert not [path for path in run.iterdir() if path.name.startswith(".")]
