"""From a C++ file to a library in this process: compiled once, kept in the user's cache, loaded only if it is our own.

    $XDG_CACHE_HOME/qvit/cpu-<key>-<sha256>.so

The key is a hash of source, flags, compiler and processor; the second part is the checksum of the file. A library is
code, so one is loaded only

- from a folder that belongs to this user and that nobody else can write to, and so for the folders above it, which may
  belong to root, too, or keep others from other people's files (as /tmp does);
- if it is a regular file of this user that nobody else can write to, and its content has the checksum in its name.

A file that fails the second is compiled anew in its place. Where there is no such folder (none can be made, there is no
home directory, others can write there) the library is compiled for this process alone, in a private folder that is gone
once it is loaded, and the log says why. Processes that compile at the same time do so in folders of their own, and what
they put into the cache appears there whole.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import shlex
import signal
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from qvit.errors import QvitError
from qvit.files import cache_folder, make_private, write_atomically

_log = logging.getLogger(__name__)
FLAGS = (
    "-std=c++17",
    "-O3",
    "-ffp-contract=off",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-pthread",
    "-shared",
    "-fPIC",
)
#: Tried in this order: threads need OpenMP, and not every compiler knows every processor by `native`.
CHOICES = (("-march=native", "-fopenmp"), ("-march=native",), ())
#: Seconds after which a compiler is given up, with all choices together.
TIME_LIMIT = 60.0


class CannotBuild(QvitError):
    """The library cannot be compiled or loaded here."""


def cxx() -> list[str]:
    """The C++ compiler that torch.compile calls, as the words of a command: `CXX` may be `ccache g++`."""
    text = os.environ.get("CXX") or ("clang++" if sys.platform == "darwin" else "g++")
    try:
        return shlex.split(text) or [text]
    except ValueError:
        return [text]


def library(
    source: Path, *headers: Path, choices: Sequence[Sequence[str]] = CHOICES, time_limit: float | None = None
) -> ctypes.CDLL:
    """The library of a C++ file, from the cache or compiled now. Raises CannotBuild with the reason.

    Args:
        source: The file.
        headers: Files of ours that it includes.
        choices: Options beside `FLAGS`; the first that the compiler takes.
        time_limit: Seconds after which the compiler is given up; None for `TIME_LIMIT`.
    """
    time_limit = TIME_LIMIT if time_limit is None else time_limit
    try:
        text = b"".join(file.read_bytes() for file in (source, *headers))
        about = f"{text!r} {FLAGS} {choices} {cxx()} {platform.machine()} {_processor()}"
    except OSError as error:
        raise CannotBuild(f"cannot read {source}: {error}") from error
    stem = f"{source.stem}-{hashlib.sha256(about.encode()).hexdigest()[:20]}"
    try:
        folder = _own_folder()
    except QvitError as error:
        _log.warning("kernels are compiled for this process alone: %s", error)
        folder = None
    if folder is not None and (found := _from_cache(folder, stem)):
        return found
    try:
        with tempfile.TemporaryDirectory(prefix="qvit-kernels-", ignore_cleanup_errors=True) as private:
            return _compiled(source, Path(private) / f"{stem}.so", folder, choices, time_limit)
    except OSError as error:
        raise CannotBuild(f"no place to compile in: {error}") from error


def _compiled(
    source: Path, made: Path, folder: Path | None, choices: Sequence[Sequence[str]], time_limit: float
) -> ctypes.CDLL:
    """The library as the first choice of options that works makes it, by way of the cache where there is one."""
    until, reason = time.monotonic() + time_limit, ""
    for choice in choices:
        try:
            reason = _run([*cxx(), *FLAGS, *choice, str(source), "-o", str(made)], until)
            if not reason:
                kept = None if folder is None else _keep(made, folder)
                return ctypes.CDLL(str(kept or made))
        except subprocess.TimeoutExpired:
            reason = f"it was given up after {time_limit:.0f} s"
            break
        except OSError as error:
            reason = str(error)
    raise CannotBuild(f"{shlex.join(cxx())} cannot compile {source.name}: {reason}")


def _own_folder() -> Path:
    """The cache. Raises QvitError if there can be none that is ours alone."""
    if not hasattr(os, "geteuid"):
        raise QvitError("this system does not say whose a file is")
    try:
        make_private(cache_folder())
        folder = cache_folder().resolve(strict=True)
        for place in (folder, *folder.parents):
            about = place.stat()
            sticky = place != folder and about.st_mode & stat.S_ISVTX
            if about.st_uid not in ({os.geteuid()} if place == folder else {os.geteuid(), 0}):
                raise QvitError(f"{place} belongs to another user: set XDG_CACHE_HOME to a folder of your own")
            if about.st_mode & 0o022 and not sticky:
                raise QvitError(f"others can write in {place}: `chmod go-w {place}` or set XDG_CACHE_HOME to another")
    except OSError as error:
        raise QvitError(f"no cache: {error}") from None
    return folder


def _from_cache(folder: Path, stem: str) -> ctypes.CDLL | None:
    for path in sorted(folder.glob(f"{stem}-*.so")):
        try:
            _require_own(path)
            return ctypes.CDLL(str(path))
        except OSError as error:
            _log.warning("%s is not loaded, but compiled anew: %s", path, error)
            with suppress(OSError):
                path.unlink()
    return None


def _require_own(path: Path) -> None:
    """Raises OSError, with the reason, for a file that is not what this user has compiled."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    with os.fdopen(descriptor, "rb") as file:
        about = os.fstat(descriptor)
        if not stat.S_ISREG(about.st_mode):
            raise OSError("it is no regular file")
        if about.st_uid != os.geteuid():
            raise OSError("it belongs to another user")
        if about.st_mode & 0o022:
            raise OSError("others can write to it")
        if path.stem.rpartition("-")[2] != hashlib.file_digest(file, "sha256").hexdigest():
            raise OSError("it is damaged: its content does not have the checksum in its name")


def _keep(made: Path, folder: Path) -> Path | None:
    """Puts a new library into the cache; None, and a line in the log, where that fails."""
    content = made.read_bytes()
    path = folder / f"{made.stem}-{hashlib.sha256(content).hexdigest()}.so"
    try:
        write_atomically(path, lambda file: file.write(content))
        _require_own(path)
    except (OSError, QvitError) as error:
        _log.warning("kernels are compiled for this process alone: %s", error)
        return None
    return path


def _run(command: list[str], until: float) -> str:
    """Runs a compiler; why it failed, or nothing. What it has started ends with it."""
    with subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        start_new_session=True,
    ) as done:
        try:
            _, errors = done.communicate(timeout=max(0.0, until - time.monotonic()))
        except BaseException:
            with suppress(OSError):
                os.killpg(done.pid, signal.SIGKILL)
            done.kill()
            raise
    if done.returncode == 0:
        return ""
    return errors.strip().splitlines()[-1] if errors.strip() else f"exit code {done.returncode}"


def _processor() -> str:
    """What `-march=native` depends on, as far as the system tells."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return platform.processor()
    lines = (line for line in text.splitlines() if line.startswith(("model name", "flags", "Features", "CPU part")))
    return " ".join(sorted(set(lines)))
