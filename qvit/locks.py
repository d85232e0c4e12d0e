"""Who writes where: one writer at a time in a directory, and what writers that were killed have left behind.

    RUN/.qvit-lock                    held while a process writes in RUN; it says, for people, which one
    .FILE.qvit-lock                   the same for a result in one file, or a few of the same name
    .FILE.k2_x81ab.qvit-tmp           a file that is being written (`files.write_atomically`)

A lock is the system's own (`flock`) on that file: it goes with the process that holds it, however that ends, and a lock
file of a dead process locks nobody out. `flock` rather than POSIX record locks, because those are lost when any
descriptor of the file is closed, and do not hold between threads of a process. What `flock` alone would get wrong:
descriptors are inherited, so a process that was forked (a worker of a loader, which may outlive a killed parent) closes
its copies at once, and programs that are started never see them.

A temporary file is locked while its writer lives. So whoever can lock one has found a leftover, on this machine or,
over a network file system with locks, on another one, and may delete it. The names are nobody else's: files under other
names are never deleted. Where a file system has no locks there is one warning; then nobody is kept out, and leftovers
stay. On Windows, which has no `flock`, nobody is kept out either.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import shlex
import socket
import stat
import sys
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

from qvit.errors import QvitError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

_log = logging.getLogger(__name__)
LOCK, TEMPORARY = ".qvit-lock", ".qvit-tmp"
_LEFT_OVER = re.compile(rf"\..+\.[a-z0-9_]{{8}}\{TEMPORARY}|(\..+)?\{LOCK}", re.DOTALL)
_UNNAMED = re.compile(r"\.(.+)\.[a-z0-9_]{8}", re.DOTALL)
#: Seconds after which a lock that is taken is another writer's, and not that of somebody who only looks.
_A_LOOK = 0.25
_OPEN = os.O_RDWR | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
_HELD: set[int] = set()


class BeingWritten(QvitError):
    """Another process writes there at the moment."""


def _close_in_child() -> None:
    for descriptor in _HELD:
        with contextlib.suppress(OSError):
            os.close(descriptor)
    _HELD.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_close_in_child)


@contextmanager
def writing(folder: Path, *, formerly: Collection[str] = (), patience: float = 0) -> Iterator[None]:
    """Holds the lock of a directory, which is made if it is not there, and removed if nothing came of it.

    Args:
        folder: The directory; leftovers in it are deleted first.
        formerly: See `remove_leftovers`.
        patience: Seconds to wait for another writer.

    Raises:
        BeingWritten: Another process holds it; the message names it.
        QvitError: The directory cannot be made, or nothing can be written there.
    """
    there = folder.is_dir()
    try:
        with _held(folder / LOCK, folder, patience):
            remove_leftovers(folder, formerly)
            yield
    finally:
        if not there:
            with contextlib.suppress(OSError):  # only an empty one goes
                folder.rmdir()


@contextmanager
def writing_file(path: Path) -> Iterator[None]:
    """Holds the lock of a file that is about to be written, beside it; see `writing`."""
    with _held(path.with_name(f".{path.name}{LOCK}"), path, 0):
        yield


def writer_of(folder: Path) -> str | None:
    """The other process that writes in a directory at the moment, in words; None if there is none."""
    descriptor = None
    try:
        descriptor = os.open(folder / LOCK, _OPEN & ~os.O_RDWR)
        if any(os.path.samestat(os.fstat(descriptor), os.fstat(own)) for own in _HELD):
            return None
        return None if _lock(descriptor, shared=True) else _holder(descriptor)
    except OSError:
        return None
    finally:
        if descriptor is not None:
            os.close(descriptor)


def announce(descriptor: int) -> bool:
    """Locks a temporary file that was just made, until it is closed. False if it was taken for a leftover before."""
    try:
        return _lock(descriptor) and os.fstat(descriptor).st_nlink > 0
    except OSError:  # no locks here: nobody will take it for one
        return True


def is_leftover(path: Path) -> bool:
    """Whether this is, by its name, a lock or a temporary file of qvit."""
    return _LEFT_OVER.fullmatch(path.name) is not None


def remove_leftovers(folder: Path, formerly: Collection[str] = ()) -> None:
    """Deletes the temporary files and locks in a directory whose writers are gone.

    Args:
        folder: The directory.
        formerly: Names of files whose temporary files may be there without the suffix `.qvit-tmp`.
    """
    with contextlib.suppress(OSError):
        hidden = [folder / name for name in os.listdir(folder) if name.startswith(".")]
        for path in hidden:
            if is_leftover(path) or _is_unnamed(path, formerly):
                _remove_if_free(path)


def _is_unnamed(path: Path, names: Collection[str]) -> bool:
    """A temporary file without suffix: its name alone could be a person's, but not with the mode that it is made in."""
    match = _UNNAMED.fullmatch(path.name)
    if match is None or match[1] not in names:
        return False
    with contextlib.suppress(OSError):
        return stat.S_IMODE(path.lstat().st_mode) == 0o600
    return False


def _remove_if_free(path: Path) -> None:
    with contextlib.suppress(OSError):
        if fcntl is None:
            path.unlink()  # Windows does not delete a file that is open
            return
        descriptor = os.open(path, _OPEN)
        try:
            if _is_plain(descriptor) and _lock(descriptor) and _is_at(descriptor, path):
                path.unlink()
        finally:
            os.close(descriptor)


@contextmanager
def _held(path: Path, what: Path, patience: float) -> Iterator[None]:
    _make(path.parent)
    descriptor = _acquire(path, what, time.monotonic() + max(patience, _A_LOOK)) if fcntl is not None else None
    if descriptor is None:
        yield
        return
    _HELD.add(descriptor)
    try:
        _sign(descriptor)
        yield
    finally:
        if descriptor in _HELD:  # and not in a process that was forked meanwhile
            _HELD.discard(descriptor)
            with contextlib.suppress(OSError):
                if _is_at(descriptor, path):
                    path.unlink()
            os.close(descriptor)


def _acquire(path: Path, what: Path, until: float) -> int | None:
    """An open, locked file; None where there are no locks."""
    while True:
        descriptor = None
        try:
            descriptor = os.open(path, _OPEN | os.O_CREAT, 0o666)
            if not _is_plain(descriptor):
                raise QvitError(f"{path} is not a lock file of qvit: move it away")
            try:
                locked = _lock(descriptor)
            except OSError as error:
                reason = error.strerror or str(error)
                _log.warning("%s cannot be locked (%s): write it with one process at a time", what, reason)
                path.unlink()
                return None
            if locked and _is_at(descriptor, path):
                kept, descriptor = descriptor, None
                return kept
            if not locked and time.monotonic() >= until:
                raise BeingWritten(
                    f"{what} is being written by {_holder(descriptor)}: wait for it, or choose another --out"
                )
        except FileNotFoundError:  # another writer, of whom nothing came, has just removed the directory
            _make(path.parent)
        except OSError as error:
            raise QvitError(f"cannot write in {path.parent}: {error.strerror or error}") from error
        finally:
            if descriptor is not None:
                os.close(descriptor)
        time.sleep(0.02)


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise QvitError(f"cannot make {folder}: {error}") from error


def _lock(descriptor: int, *, shared: bool = False) -> bool:
    """Whether the lock could be taken. Raises OSError where there are none."""
    if fcntl is None:
        raise OSError("no locks on this system")
    try:
        fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _is_plain(descriptor: int) -> bool:
    """A regular file of one name: what is written there is not a file of somebody else."""
    about = os.fstat(descriptor)
    return stat.S_ISREG(about.st_mode) and about.st_nlink <= 1


def _is_at(descriptor: int, path: Path) -> bool:
    """Whether the open file is still the one under its name."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.lstat(path))
    except FileNotFoundError:
        return False


def _sign(descriptor: int) -> None:
    """Writes down who holds the lock; it holds without that, too, such as on a full disk."""
    about = {
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "since": time.strftime("%Y-%m-%d %H:%M"),
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])[:200],
    }
    with contextlib.suppress(OSError):
        os.ftruncate(descriptor, 0)
        os.write(descriptor, json.dumps(about).encode())


def _holder(descriptor: int) -> str:
    """The process that holds a lock, in words."""
    try:
        about = json.loads(os.pread(descriptor, 4096, 0))
        host, since, command = (_printable(about[key]) for key in ("host", "since", "command"))
        return f"process {int(about['pid'])} on {host} since {since} ({command})"
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return "another process"


def _printable(text: object) -> str:
    return "".join(char if char.isprintable() else "?" for char in str(text)[:200])
