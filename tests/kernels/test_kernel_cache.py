"""Compiled code: from the cache only what this user has put there, unchanged; else compiled, here and now."""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import logging
import multiprocessing
import os
import random
import shutil
import stat
import time
from pathlib import Path

import pytest

from qvit.deploy.packages import has_compiler
from qvit.files import cache_folder
from qvit.kernels import build

pytestmark = [
    pytest.mark.skipif(not has_compiler(), reason="no C++ compiler"),
    pytest.mark.skipif(not hasattr(os, "geteuid"), reason="files have no owners here"),
]
AS_ROOT = pytest.mark.skipif(getattr(os, "geteuid", lambda: 1)() != 0, reason="only root can give files away")
SOMEBODY = 12345
CODE = 'extern "C" int answer() { return 7; }\n'


class Case:
    """A source, a cache, and the content of every library that was loaded."""

    def __init__(self, folder: Path) -> None:
        self.source, self.home = folder / "tiny.cpp", folder / "home"
        self.cache = self.home / "qvit"
        self.source.write_text(CODE)
        self.loaded: list[tuple[Path, bytes]] = []

    def answer(self) -> int:
        return build.library(self.source).answer()

    def kept(self) -> list[Path]:
        return sorted(self.cache.glob("tiny-*.so"))

    def left(self) -> list[str]:
        """What is in the cache besides libraries."""
        return [file.name for file in self.cache.iterdir() if file.suffix != ".so"]


@pytest.fixture
def case(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Case:
    own = Case(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(own.home))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(build.tempfile, "tempdir", None)
    monkeypatch.delenv("CXX", raising=False)
    original = ctypes.CDLL

    def load(path: str) -> ctypes.CDLL:
        own.loaded.append((Path(path), Path(path).read_bytes()))
        return original(path)

    monkeypatch.setattr(build.ctypes, "CDLL", load)
    return own


def no_compiling(monkeypatch: pytest.MonkeyPatch) -> None:
    def compiled(*_: object) -> str:
        raise AssertionError("it is compiled anew")

    monkeypatch.setattr(build, "_run", compiled)


def test_compiled_once_and_kept_private(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    before = os.umask(0o002)
    try:
        assert case.answer() == 7
    finally:
        os.umask(before)
    [path] = case.kept()
    assert path.stem.endswith(hashlib.sha256(path.read_bytes()).hexdigest())
    assert all(not stat.S_IMODE(place.stat().st_mode) & 0o022 for place in (path, case.cache, case.home))
    no_compiling(monkeypatch)
    assert case.answer() == 7 and not case.left()


def test_a_flipped_bit_is_never_loaded(
    case: Case, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    case.answer()
    [path] = case.kept()
    good, draw = path.read_bytes(), random.Random(0)
    monkeypatch.setattr(build, "_run", lambda command, until: Path(command[-1]).write_bytes(good) and "")
    for _ in range(200):
        damaged = bytearray(good)
        damaged[draw.randrange(len(good))] ^= 1 << draw.randrange(8)
        path.unlink()  # the file that this process has mapped stays as it is
        path.touch(0o600)
        path.write_bytes(draw.choice([bytes(damaged), good[: draw.randrange(len(good))], good + b"\0"]))
        caplog.clear()
        assert case.answer() == 7 and path.read_bytes() == good
        assert [
            record.message for record in caplog.records if "does not have the checksum in its name" in record.message
        ]
    assert {content for _, content in case.loaded} == {good}


def foreign(path: Path) -> str:
    os.chown(path, SOMEBODY, SOMEBODY)
    return "belongs to another user"


def open_to_all(path: Path) -> str:
    path.chmod(path.stat().st_mode | 0o022)
    return "others can write"


def a_link(path: Path) -> str:
    path.rename(path.with_name("elsewhere"))
    path.symlink_to("elsewhere")
    return "is not loaded"


def a_pipe(path: Path) -> str:
    path.unlink()
    os.mkfifo(path)
    return "no regular file"


@pytest.mark.parametrize("spoil", [pytest.param(foreign, marks=AS_ROOT), open_to_all, a_link, a_pipe])
def test_files_that_are_not_ours_alone_are_compiled_anew(case: Case, spoil, caplog: pytest.LogCaptureFixture) -> None:
    case.answer()
    [path] = case.kept()
    reason = spoil(path)
    case.loaded.clear()
    assert case.answer() == 7
    about = path.lstat()
    assert stat.S_ISREG(about.st_mode) and about.st_uid == os.geteuid() and not about.st_mode & 0o022
    assert [record for record in caplog.records if reason in record.message and path.name in record.message]
    assert len(case.loaded) == 1


@pytest.mark.parametrize("place", ["cache", "home"])
@pytest.mark.parametrize("spoil", [pytest.param(foreign, marks=AS_ROOT), open_to_all])
def test_folders_that_are_not_ours_alone_are_not_used(
    case: Case, spoil, place: str, caplog: pytest.LogCaptureFixture
) -> None:
    case.answer()
    reason = spoil(getattr(case, place))
    before = {path: path.stat().st_mtime_ns for path in case.kept()}
    case.loaded.clear()
    caplog.clear()
    assert case.answer() == 7
    [(path, _)] = case.loaded
    assert case.home not in path.parents and not path.exists() and not path.parent.exists(), "private, and gone"
    [line] = caplog.messages
    assert "compiled for this process alone" in line and reason in line
    assert {path: path.stat().st_mtime_ns for path in case.kept()} == before


def test_a_sticky_folder_above_is_fine(case: Case, caplog: pytest.LogCaptureFixture) -> None:
    case.home.mkdir()
    case.home.chmod(0o1777)
    assert case.answer() == 7 and case.kept() and not caplog.messages


@pytest.mark.parametrize("kind", ["none", "no folder", "relative"])
def test_without_a_home_directory(
    case: Case, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def nowhere() -> Path:
        raise RuntimeError("Could not determine home directory.")

    if kind == "none":
        monkeypatch.delenv("XDG_CACHE_HOME")
        monkeypatch.setattr(Path, "home", nowhere)
    elif kind == "no folder":
        monkeypatch.setenv("XDG_CACHE_HOME", str(case.source))
    else:  # a path that is not absolute counts as none
        monkeypatch.setenv("XDG_CACHE_HOME", "caches")
        monkeypatch.setenv("HOME", str(tmp_path))
        monkeypatch.chdir(tmp_path)
        assert cache_folder() == tmp_path / ".cache" / "qvit"
    assert case.answer() == 7
    if kind == "relative":
        assert not (tmp_path / "caches").exists() and not caplog.messages
    else:
        [line] = caplog.messages
        assert "compiled for this process alone" in line


def test_a_compiler_that_hangs_is_given_up_with_all_it_started(
    case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pids = tmp_path / "pids"
    slow = tmp_path / "slow"
    slow.write_text(f"#!/bin/sh\nsleep 600 &\necho $$ $! >> {pids}\nwait\n")
    slow.chmod(0o755)
    monkeypatch.setenv("CXX", str(slow))
    monkeypatch.setattr(build, "TIME_LIMIT", 1.0)
    start = time.monotonic()
    with pytest.raises(build.CannotBuild, match="given up after 1 s"):
        case.answer()
    assert time.monotonic() - start < 20, "all choices of options share the time"
    for pid in map(int, pids.read_text().split()):
        for _ in range(100):
            if not _runs(pid):
                break
            time.sleep(0.05)
        assert not _runs(pid)
    assert not case.kept() and not case.left()


def _runs(pid: int) -> bool:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def test_a_compiler_of_several_words(case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wrapper, notes = tmp_path / "my ccache", tmp_path / "notes"
    wrapper.write_text(f'#!/bin/sh\necho "$1" >> {notes}\nexec "$@"\n')
    wrapper.chmod(0o755)
    monkeypatch.setenv("CXX", f"'{wrapper}' {shutil.which(build.cxx()[0])}")
    assert case.answer() == 7 and notes.read_text()
    assert has_compiler()
    monkeypatch.setenv("CXX", "'no end")
    with pytest.raises(build.CannotBuild, match="cannot compile tiny.cpp"):
        case.answer()
    assert not has_compiler()


def _load_together(source: str, barrier) -> None:
    barrier.wait(60)
    assert build.library(Path(source)).answer() == 7


@pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")
def test_processes_that_compile_at_once(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    context = multiprocessing.get_context("fork")
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(case.home))
    barrier = context.Barrier(4)
    started = [context.Process(target=_load_together, args=(str(case.source), barrier)) for _ in range(4)]
    for process in started:
        process.start()
    for process in started:
        process.join(120)
    assert [process.exitcode for process in started] == [0] * 4
    assert case.kept() and not case.left()


def test_a_full_disk_keeps_nothing_and_harms_nothing(
    case: Case, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("qvit.files.os.replace", full)
    with caplog.at_level(logging.WARNING):
        assert case.answer() == 7
    assert not case.kept() and not case.left() and "No space left" in caplog.text
