"""Calls that are killed before any of their operations on files: the same call again succeeds, and nothing is left.

A process counts what it is about to do to files in one folder (make, open for writing, rename, delete) and kills itself
with SIGKILL before the n-th; which n is drawn by seed, and all of them are tried where tests may be slow.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
from command_line import QUICK, SMALL_DIGITS, Qvit, qvit  # noqa: F401
from safetensors.torch import load_file
from tiny_models import small_config

from qvit import locks
from qvit.runs.jobs import _context
from qvit.runs.run import train

pytestmark = [
    pytest.mark.skipif(locks.fcntl is None, reason="no locks on this system"),
    pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no SIGKILL"),
]
#: Moments that are drawn in the quick tests, and in the slow ones of commands that write a file or two.
QUICKLY, FEW = 2, 8
COMMANDS: dict[str, list[str]] = {
    "train": ["train", *SMALL_DIGITS, *QUICK, "--method", "lsq+", "--plan", "w4a4", "--weights", "{float}"],
    "ptq": ["ptq", *SMALL_DIGITS, "--weights", "{float}", "--budget", "6bit", "--metric", "fisher"],
    "ptq with a preset": ["ptq", *SMALL_DIGITS, "--weights", "{float}", "--budget", "w8a8"],
    "labels": ["labels", *SMALL_DIGITS, "--teacher", "{float}", "--crops", "2", "--images-per-shard", "400"],
    "analyze": ["analyze", *SMALL_DIGITS, "--weights", "{float}", "--data", "digits", "--what", "widths",
                "--widths", "2,8", "--images", "20"],
    "sensitivity": ["sensitivity", *SMALL_DIGITS, "--weights", "{float}", "--data", "digits", "--widths", "2,8"],
    "pack": ["pack", "{quantized}"],
    "export": ["export", "{packed}", "--to", "openvino", "--no-check", "--overwrite"],
    "report": ["report", "{float}"],
}  # fmt: skip
#: What is different in two calls that do the same.
OF_THE_MOMENT = ("started", "seconds", "command", "weights", "data_note", "time", "page")


def killed_at(moment: int, folder: str, arguments: list[str], pipe: Any) -> None:
    """Runs a command in this process, which ends before the operation of this number on files in `folder`."""
    done = 0
    names = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.chmod", "os.truncate", "shutil.rmtree"}

    def count(event: str, details: tuple[Any, ...]) -> None:
        nonlocal done
        if event == "open":
            path, _, flags = details
            if not isinstance(flags, int) or not flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
                return
        elif event in names:
            path = details[0]
        else:
            return
        if isinstance(path, (str, os.PathLike)) and os.fspath(path).startswith(folder):
            done += 1
            if done == moment:
                os.kill(os.getpid(), signal.SIGKILL)

    from qvit import cli

    sys.addaudithook(count)
    sys.argv = ["qvit", *arguments]
    sys.stdout = sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    code: Any = 0
    try:
        cli.main()
    except SystemExit as end:
        code = end.code
    pipe.send((done, code))


def attempt(moment: int, folder: Path, arguments: list[str]) -> tuple[int, int] | None:
    """How many operations a call did, and its exit code; None if it was killed."""
    context = _context()
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=killed_at, args=(moment, str(folder), arguments, theirs))  # type: ignore[attr-defined]
    process.start()
    theirs.close()
    process.join(300)
    answer = None
    with contextlib.suppress(EOFError):
        answer = ours.recv()
    assert answer is not None or process.exitcode == -signal.SIGKILL, process.exitcode
    return answer


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("made")
    train(small_config(method="float", epochs=1), root / "float", quiet=True)
    quantized = small_config(method="lsq+", plan="w4a4", epochs=1, weights=str(root / "float"))
    train(quantized, root / "quantized", quiet=True)
    return {name: str(root / name) for name in ("float", "quantized")}


def arguments_of(command: str, made: dict[str, str], folder: Path) -> list[str]:
    """The call, with everything that it writes below `folder`."""
    if command in ("pack", "report", "export"):
        folder.mkdir(exist_ok=True)
        target = folder / {"pack": "a.safetensors", "report": "a.html", "export": "a.xml"}[command]
    else:
        target = folder / "s.json" if command == "sensitivity" else folder
    return [part.format(**made) for part in COMMANDS[command]] + ["--out", str(target)]


def content(folder: Path) -> dict[str, Any]:
    """What is in the files that a call has made, without what differs from call to call."""
    found: dict[str, Any] = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.suffix == ".json":
            found[name] = _lasting(json.loads(path.read_text(encoding="utf-8")))
        elif path.suffix == ".safetensors":
            found[name] = {key: value.tolist() for key, value in load_file(path).items()}
        elif path.suffix == ".bin":
            found[name] = path.read_bytes()
        elif path.is_file() and "checkpoints" not in path.parts:
            found[name] = "there"
    return found


def _lasting(data: Any) -> Any:
    if isinstance(data, dict):
        return {key: _lasting(value) for key, value in data.items() if key not in OF_THE_MOMENT}
    return [_lasting(value) for value in data] if isinstance(data, list) else data


def again(qvit: Qvit, arguments: list[str], folder: Path) -> None:  # noqa: F811
    """The same call; one that is killed at its very end is complete, and one after a checkpoint says how to go on."""
    answer = qvit(*arguments)
    if answer.code and "holds a finished run" not in answer.err:
        assert f"--resume {folder}" in answer.failed(2)
        answer = qvit("train", "--resume", folder)
    assert answer.code == 0 or "holds a finished run" in answer.failed(2), answer.err


def killed_and_repeated(
    command: str,
    moments: int | None,
    made: dict[str, str],
    qvit: Qvit,  # noqa: F811
    tmp_path: Path,
) -> None:
    if command == "export":
        pytest.importorskip("openvino")
        packed = f"{made['quantized']}.packed.safetensors"
        assert qvit("pack", made["quantized"], "--out", packed, "--overwrite").code == 0
        made = made | {"packed": packed}
    whole = tmp_path / "whole"
    arguments = arguments_of(command, made, whole)
    counted = attempt(0, whole, arguments)
    assert counted is not None and counted[1] in (0, None), counted
    wanted, operations = content(whole), counted[0]
    assert operations > 5 and not hidden(whole)
    every = range(1, operations + 1)
    for moment in every if moments is None else sorted(random.Random(0).sample(every, min(moments, operations))):
        folder = tmp_path / f"run{moment}"
        arguments = arguments_of(command, made, folder)
        assert attempt(moment, folder, arguments) is None
        again(qvit, arguments, folder)
        assert content(folder) == wanted, moment
        assert not hidden(folder), moment


def hidden(folder: Path) -> list[str]:
    return [path.name for path in folder.rglob("*") if path.name.startswith(".")]


@pytest.mark.parametrize("command", ["train", "ptq", "labels", "pack"])
def test_a_killed_call_is_repeated(
    command: str,
    made: dict[str, str],
    qvit: Qvit,  # noqa: F811
    tmp_path: Path,
) -> None:
    killed_and_repeated(command, QUICKLY, made, qvit, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
def test_a_call_killed_at_any_moment_is_repeated(
    command: str,
    made: dict[str, str],
    qvit: Qvit,  # noqa: F811
    tmp_path: Path,
) -> None:
    whole_directories = command in ("train", "ptq", "labels", "analyze")
    killed_and_repeated(command, None if whole_directories else FEW, made, qvit, tmp_path)


OLD_LEFTOVERS = (".plan.json.k1_9zz0a", ".config.json.0123abcd")


def test_leftovers_of_versions_before_the_suffix(made: dict[str, str], qvit: Qvit, tmp_path: Path) -> None:  # noqa: F811
    run = tmp_path / "run"
    run.mkdir()
    for name in OLD_LEFTOVERS:
        (run / name).touch(0o600)
    arguments = [part.format(**made) for part in COMMANDS["ptq with a preset"]] + ["--out", run]
    assert qvit(*arguments).code == 0 and not hidden(run)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / ".thesis.tex.k1_9zz0a").touch(0o600)
    arguments[-1] = tmp_path / "other"
    assert "is not empty and holds no run" in qvit(*arguments).failed(2)
    assert hidden(tmp_path / "other") == [".thesis.tex.k1_9zz0a"]
