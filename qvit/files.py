"""Files that survive a kill and a full disk: written beside, flushed, renamed."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

from qvit.errors import QvitError


def write_atomically(path: Path, write: Callable[[IO[bytes]], Any]) -> None:
    """Writes a file so that a reader sees the old content or the new, whatever happens in between.

    Raises QvitError naming the file if the disk is full.
    """
    temporary = ""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
            temporary = file.name
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:
        raise QvitError(f"cannot write {path}: {error}; the previous file is untouched") from error
    finally:
        if temporary:
            Path(temporary).unlink(missing_ok=True)


def write_json(path: Path, data: Any) -> None:
    """Writes JSON atomically; NaN is refused rather than written as something that is not JSON."""
    text = json.dumps(data, indent=1, allow_nan=False) + "\n"
    write_atomically(path, lambda file: file.write(text.encode()))
