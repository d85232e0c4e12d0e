"""One writer at a time: the second is told who the first is, the dead lock nobody out, and their leftovers go."""

from __future__ import annotations

import contextlib
import errno
import logging
import multiprocessing
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from qvit import locks
from qvit.errors import QvitError
from qvit.files import write_atomically, write_json
from qvit.locks import LOCK, TEMPORARY, BeingWritten, is_leftover, remove_leftovers, writer_of, writing, writing_file

pytestmark = [
    pytest.mark.skipif(locks.fcntl is None, reason="no locks on this system"),
    # From Python 3.12 on, where a library has started threads: what is forked here does not use them.
    pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning"),
]
FORK = multiprocessing.get_context("fork") if hasattr(os, "fork") else None


@contextlib.contextmanager
def process(work: Callable[..., Any], *arguments: Any) -> Iterator[Any]:
    """A process that works until the block ends; its pipe is yielded as well, with what it says first received."""
    assert FORK is not None
    ours, theirs = FORK.Pipe()
    started = FORK.Process(target=work, args=(*arguments, theirs))
    started.start()
    theirs.close()
    assert ours.poll(60)
    try:
        yield started, ours.recv()
    finally:
        started.kill()
        started.join()
        started.close()
        ours.close()


def hold(folder: Path, pipe: Any) -> None:
    with writing(folder):
        pipe.send(os.getpid())
        time.sleep(600)


def hold_with_a_worker(folder: Path, pipe: Any) -> None:
    """As a training does whose loader has a worker: this one outlives its parent."""
    with writing(folder):
        child = os.fork()
        if child == 0:
            time.sleep(600)
            os._exit(0)
        program = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], close_fds=False)
        pipe.send([child, program.pid])
        time.sleep(600)


def kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def test_the_second_is_told_who_the_first_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tmp_path / "runs" / "a"
    monkeypatch.setattr(sys, "argv", ["/usr/bin/qvit", "train", "vit_digits", "--out", "my runs"])
    with process(hold, run) as (_, pid):
        with pytest.raises(BeingWritten) as caught, writing(run):
            raise AssertionError("two hold it")
        assert re.fullmatch(
            re.escape(f"{run} is being written by process {pid} on {socket.gethostname()} since ")
            + r"\d{4}-\d\d-\d\d \d\d:\d\d \(qvit train vit_digits --out 'my runs'\): "
            "wait for it, or choose another --out",
            str(caught.value),
        )
        assert writer_of(run) and f"process {pid} " in str(writer_of(run))
        assert [path.name for path in run.iterdir()] == [LOCK]
    assert writer_of(run) is None


def test_the_lock_goes_with_its_process(tmp_path: Path) -> None:
    with process(hold, tmp_path / "run") as (started, pid):
        kill(pid)
        started.join()
        assert [path.name for path in (tmp_path / "run").iterdir()] == [LOCK]
        with writing(tmp_path / "run"):
            assert (tmp_path / "run" / LOCK).exists()
    assert not list((tmp_path / "run").iterdir())


def test_what_a_process_has_started_does_not_hold_its_lock(tmp_path: Path) -> None:
    with process(hold_with_a_worker, tmp_path / "run") as (started, others):
        try:
            with pytest.raises(BeingWritten), writing(tmp_path / "run"):
                pass
            started.kill()
            started.join()
            with writing(tmp_path / "run"):
                pass
            for pid in others:
                os.kill(pid, 0)  # they are still there
        finally:
            for pid in others:
                kill(pid)


def test_a_forked_process_does_not_let_go_of_it(tmp_path: Path) -> None:
    with writing(tmp_path):
        child = os.fork()
        if child == 0:
            sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115
            with contextlib.suppress(BaseException):
                locks._close_in_child()
            os._exit(0 if (tmp_path / LOCK).exists() else 1)
        assert os.waitpid(child, 0)[1] == 0
        with pytest.raises(BeingWritten), writing(tmp_path):
            pass


def test_threads_exclude_each_other_too(tmp_path: Path) -> None:
    found: list[str] = []

    def second() -> None:
        try:
            with writing(tmp_path):
                found.append("both")
        except BeingWritten as error:
            found.append(str(error))

    with writing(tmp_path):
        thread = threading.Thread(target=second)
        thread.start()
        thread.join()
    assert len(found) == 1 and f"process {os.getpid()} " in found[0]


def count(folder: Path, times: int, pipe: Any) -> None:
    pipe.send("begun")
    for _ in range(times):
        with writing(folder / "inner", patience=120):
            number = int((folder / "count").read_text())
            time.sleep(0.001)
            (folder / "count").write_text(str(number + 1))


def test_nobody_slips_in_while_locks_come_and_go(tmp_path: Path) -> None:
    (tmp_path / "count").write_text("0")
    with contextlib.ExitStack() as stack:
        for started, _ in [stack.enter_context(process(count, tmp_path, 20)) for _ in range(6)]:
            started.join(120)
            assert started.exitcode == 0
    assert (tmp_path / "count").read_text() == "120"


def test_waiting_for_a_writer(tmp_path: Path) -> None:
    with process(hold, tmp_path) as (started, _):
        threading.Timer(0.5, started.kill).start()
        with writing(tmp_path, patience=60):
            pass


def test_what_nothing_came_of_leaves_no_folder(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), writing(tmp_path / "a"):
        raise ZeroDivisionError
    with writing_file(tmp_path / "b.json"):
        assert [path.name for path in tmp_path.iterdir()] == [f".b.json{LOCK}"]
        with (
            pytest.raises(BeingWritten, match=r"b\.json is being written by process"),
            writing_file(tmp_path / "b.json"),
        ):
            pass
    (tmp_path / "there").mkdir()
    with writing(tmp_path / "there"):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["there"], "a folder of somebody else stays"
    (tmp_path / "file").write_text("")
    with pytest.raises(QvitError, match="cannot make"), writing(tmp_path / "file"):
        pass


@pytest.mark.parametrize("kind", ["symbolic link", "hard link", "pipe", "folder"])
def test_lock_files_that_somebody_else_laid_out(tmp_path: Path, kind: str) -> None:
    victim, run = tmp_path / "victim", tmp_path / "run"
    victim.write_text("precious")
    run.mkdir()
    {
        "symbolic link": lambda path: path.symlink_to(victim),
        "hard link": lambda path: path.hardlink_to(victim),
        "pipe": os.mkfifo,
        "folder": lambda path: path.mkdir(),
    }[kind](run / LOCK)
    with pytest.raises(QvitError, match="cannot write in|is not a lock file of qvit"), writing(run):
        pass
    assert victim.read_text() == "precious" and (run / LOCK).exists()


@pytest.mark.parametrize("content", ["", "{}", "[1]", '{"pid": "x"}', "\0" * 9000, '{"pid": 1, "host": "\\u001b[2J"'])
def test_a_lock_that_says_nothing(tmp_path: Path, content: str) -> None:
    with process(hold, tmp_path):
        (tmp_path / LOCK).write_text(content)
        with pytest.raises(BeingWritten, match="is being written by another process: "), writing(tmp_path):
            pass


def test_what_a_lock_says_is_printable(tmp_path: Path) -> None:
    with process(hold, tmp_path):
        write = '{"pid": 1, "host": "a\\u001b[2J", "since": "now", "command": "x\\ny"}'
        (tmp_path / LOCK).write_text(write)
        with pytest.raises(BeingWritten, match=r"process 1 on a\?\[2J since now \(x\?y\)"), writing(tmp_path):
            pass


def test_file_systems_without_locks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def none(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    left = tmp_path / f".plan.json.abcd_123{TEMPORARY}"
    left.write_text("")
    monkeypatch.setattr(locks.fcntl, "flock", none)
    with caplog.at_level(logging.WARNING), writing(tmp_path), writing(tmp_path):
        write_json(tmp_path / "plan.json", {})
    assert {"one process at a time" in message for message in caplog.messages} == {True}
    assert sorted(path.name for path in tmp_path.iterdir()) == [left.name, "plan.json"], "nobody knows whose it is"


def test_only_own_leftovers_of_dead_writers_are_deleted(tmp_path: Path) -> None:
    own = [
        f".plan.json.abcd_123{TEMPORARY}",
        f".step-000000001-0f3ac41d9e2b77a1.pt.zzzzzzzz{TEMPORARY}",
        f".a b.c\n.00000000{TEMPORARY}",
        f".model.xml{LOCK}",
    ]
    foreign = [
        ".plan.json.swp", ".plan.json.original", ".plan.json", "plan.json.abcd_123.qvit-tmp", f".{TEMPORARY}",
        f".plan.json.ABCD_123{TEMPORARY}", f".plan.json.abcd_123{TEMPORARY}.bak", "qvit-lock", f"x{LOCK}", ".bashrc",
    ]  # fmt: skip
    for name in [*own, *foreign]:
        (tmp_path / name).write_text("")
    unnamed = tmp_path / ".plan.json.k1_9zz0a"  # as versions before the suffix named them
    unnamed.touch(0o600)
    strangers = tmp_path / ".thesis.tex.k1_9zz0a"
    strangers.touch(0o600)
    assert [is_leftover(tmp_path / name) for name in [*own, *foreign]] == [True] * len(own) + [False] * len(foreign)
    remove_leftovers(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {*foreign, unnamed.name, strangers.name}
    remove_leftovers(tmp_path, ("plan.json",))
    assert {path.name for path in tmp_path.iterdir()} == {*foreign, strangers.name}


def test_links_are_not_followed(tmp_path: Path) -> None:
    victim, folder = tmp_path / "victim", tmp_path / "folder"
    victim.write_text("precious")
    folder.mkdir()
    link = folder / f".plan.json.abcd_123{TEMPORARY}"
    link.symlink_to(victim)
    remove_leftovers(folder)
    assert victim.read_text() == "precious" and link.is_symlink()


def write_slowly(path: Path, pipe: Any) -> None:
    def write(file: Any) -> None:
        file.write(b"half")
        file.flush()
        pipe.send("half")
        time.sleep(600)

    write_atomically(path, write)


def test_a_file_that_is_being_written_is_left_alone_until_its_writer_is_dead(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    with process(write_slowly, path) as (started, _):
        write_json(path, {})
        [temporary] = [own for own in tmp_path.iterdir() if own != path]
        assert is_leftover(temporary) and temporary.read_bytes() == b"half"
        started.kill()
        started.join()
        write_json(path, {})
    assert list(tmp_path.iterdir()) == [path]


def write_many(path: Path, pipe: Any) -> None:
    pipe.send("begun")
    for number in range(40):
        write_json(path, {"number": number, "pid": os.getpid()})


def test_writers_of_one_file_do_not_take_each_other_for_dead(tmp_path: Path) -> None:
    with contextlib.ExitStack() as stack:
        for started, _ in [stack.enter_context(process(write_many, tmp_path / "a.json")) for _ in range(4)]:
            started.join(120)
            assert started.exitcode == 0
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]
