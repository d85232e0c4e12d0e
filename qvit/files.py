"""Files: written so that they survive a kill and a full disk, read without trusting what is in them.

Writing: beside the old file, flushed, renamed; a reader sees the old content or the new. What a killed writer leaves
beside it is deleted by the next one (`qvit.locks`).

Reading: whoever wrote a file may have been a stranger, another version or a failing disk. Only regular files are
opened, their size is limited before memory is taken, text is UTF-8, and JSON is plain data: every key once, no NaN or
infinity, no integers beyond 64 bits, at most 64 levels of nesting. Every refusal is a `QvitError` that names the file.
What the data mean is checked by the reader of each format, which names the key.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import stat
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, NoReturn

from qvit.errors import QvitError
from qvit.locks import TEMPORARY, announce, remove_leftovers

#: The largest JSON or TOML file that is read, unless its format has another limit.
TEXT_LIMIT = 16 << 20
MAX_DEPTH = 64
_LARGEST_INTEGER, _MOST_DIGITS = 2**63 - 1, 20


class MissingFile(QvitError):
    """There is no file where one is asked for."""


def read_bytes(path: str | Path, what: str, *, limit: int) -> bytes:
    """The content of a regular file.

    Args:
        path: Where it is.
        what: What it should be, for messages: `plan`.
        limit: The largest number of bytes.

    Raises:
        MissingFile: There is none.
        QvitError: A directory or device, too large, or it cannot be read.
    """
    try:
        with open(path, "rb", opener=_without_waiting) as file:
            about = os.fstat(file.fileno())
            if not stat.S_ISREG(about.st_mode):
                raise QvitError(f"cannot read the {what} {path}: it is no regular file")
            if about.st_size > limit:
                raise QvitError(f"the {what} {path} has {about.st_size:,} bytes; at most {limit:,} are read")
            content = file.read(about.st_size + 1)  # as much memory is taken at once
    except FileNotFoundError:
        raise MissingFile(f"no {what} at {path}") from None
    except MemoryError:
        raise QvitError(f"the {what} {path} does not fit into memory") from None
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the path
        reason = getattr(error, "strerror", None) or str(error)
        raise QvitError(f"cannot read the {what} {path}: {reason}") from None
    if len(content) > limit:
        raise QvitError(f"the {what} {path} grew beyond {limit:,} bytes while it was read")
    return content


def _without_waiting(path: str, flags: int) -> int:
    """Opens a file; a pipe without a writer is not waited for."""
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0))


def read_text(path: str | Path, what: str, *, limit: int = TEXT_LIMIT, errors: str = "strict") -> str:
    """The text of a UTF-8 file; see `read_bytes`, and `bytes.decode` for `errors`."""
    try:
        return read_bytes(path, what, limit=limit).decode("utf-8-sig", errors)
    except UnicodeDecodeError as error:
        raise QvitError(f"the {what} {path} is not UTF-8 (byte {error.start}): it cannot be read") from None


def parse_json(text: str | bytes, *, gaps: bool = False) -> Any:
    """Plain data of a JSON text. Raises ValueError, with the reason, for anything outside the limits above.

    Args:
        text: As text or UTF-8.
        gaps: Puts None for numbers that are none or too large, as logs of diverged runs have them.
    """
    number: Callable[[Callable[[str], Any]], Callable[[str], Any]] = _or_none if gaps else lambda parse: parse
    try:
        data = json.loads(
            text,
            object_pairs_hook=_unique,
            parse_constant=number(_no_constant),
            parse_int=number(_integer),
            parse_float=number(_finite),
        )
    except RecursionError:
        data = None
        _too_deep()
    except UnicodeDecodeError as error:
        raise ValueError(f"it is not UTF-8 (byte {error.start})") from None
    _check_nesting(data)
    return data


def read_json(path: str | Path, what: str, *, limit: int = TEXT_LIMIT) -> Any:
    """The data of a JSON file; see `read_bytes` and `parse_json`."""
    text = read_text(path, what, limit=limit)
    try:
        return parse_json(text)
    except ValueError as error:
        raise QvitError(f"cannot read the {what} {path}: {error}") from None


def read_object(path: str | Path, what: str, *, limit: int = TEXT_LIMIT) -> dict[str, Any]:
    """The object of a JSON file; see `read_json`."""
    data = read_json(path, what, limit=limit)
    if not isinstance(data, dict):
        raise QvitError(f"the {what} {path} must hold a JSON object, not {_kind(data)}")
    return data


def _kind(value: Any) -> str:
    kinds = {list: "a list", str: "a text", bool: "true or false", int: "a number", float: "a number"}
    return kinds.get(type(value), "null")


def _or_none(parse: Callable[[str], Any]) -> Callable[[str], Any]:
    def parsed(digits: str) -> Any:
        try:
            return parse(digits)
        except ValueError:
            return None

    return parsed


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {twice[:60]!r} is there twice")
    return found


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number of JSON")


def _integer(digits: str) -> int:
    if len(digits) > _MOST_DIGITS or abs(int(digits)) > _LARGEST_INTEGER:
        raise ValueError(f"the number {digits[:24]}{'...' if len(digits) > 24 else ''} is beyond 64 bits")
    return int(digits)


def _finite(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise ValueError(f"the number {digits[:24]} is beyond the range of floating point")
    return value


def _check_nesting(data: Any) -> None:
    level, depth = [data], 0
    while level:
        if depth > MAX_DEPTH:
            _too_deep()
        level = [
            inner
            for outer in level
            if isinstance(outer, (dict, list))
            for inner in (outer.values() if isinstance(outer, dict) else outer)
            if isinstance(inner, (dict, list))
        ]
        depth += 1


def _too_deep() -> NoReturn:
    raise ValueError(f"it is nested more than {MAX_DEPTH} levels deep")


def write_atomically(path: Path, write: Callable[[IO[bytes]], Any]) -> None:
    """Writes a file so that a reader sees the old content or the new, whatever happens in between.

    Raises QvitError naming the file if the disk is full.
    """
    temporary = ""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers(path.parent, (path.name,))
        with _new_file_beside(path) as file:
            temporary = file.name
            write(file)
            file.flush()
            os.fsync(file.fileno())
            if os.name == "nt":  # where open files cannot be renamed; elsewhere its lock is kept until it has its name
                file.close()
            os.chmod(temporary, 0o644)
            os.replace(temporary, path)
    except (OSError, RuntimeError) as error:
        raise QvitError(f"cannot write {path}: {error}; the previous file is untouched") from error
    finally:
        if temporary:
            Path(temporary).unlink(missing_ok=True)


def _new_file_beside(path: Path) -> IO[bytes]:
    """An empty temporary file that others know to be in use."""
    while True:
        file = tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", suffix=TEMPORARY, delete=False)  # noqa: SIM115
        if announce(file.fileno()):
            return file
        file.close()
        Path(file.name).unlink(missing_ok=True)


def write_json(path: Path, data: Any) -> None:
    """Writes JSON atomically; NaN is refused rather than written as something that is not JSON."""
    text = json.dumps(data, indent=1, allow_nan=False) + "\n"
    write_atomically(path, lambda file: file.write(text.encode()))


def cache_folder() -> Path:
    """Where this user's caches are: `$XDG_CACHE_HOME/qvit`, or `~/.cache/qvit`; it need not be there.

    As the standard has it, a path that is not absolute counts as none. Raises QvitError if there is no home directory.
    """
    given = Path(os.environ.get("XDG_CACHE_HOME") or "")
    try:
        return (given if given.is_absolute() else Path.home() / ".cache") / "qvit"
    except RuntimeError:
        raise QvitError("there is no home directory for a cache: set XDG_CACHE_HOME to a folder") from None


def make_private(folder: Path) -> None:
    """Makes a folder, and those above it that are missing, so that no other user can write there."""
    for place in reversed((folder, *folder.parents)):
        with contextlib.suppress(FileExistsError):
            if not place.is_dir():
                place.mkdir(mode=0o700)
