"""The bytes of a packed file: safetensors (`qvit.tensors`) with a seal.

One metadata entry is `sha256`: the digest of the whole file with the 64 characters of the digest itself replaced by
the character 0. A file that was cut, changed or extended anywhere is refused before anything in it is interpreted.

The digest protects against accidents, not against intent: everything else is checked as well.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qvit.errors import QvitError, UsageError
from qvit.files import read_bytes, write_atomically
from qvit.tensors import MAX_FILE, PREFIX, Contents, decode, encode, header_of

if TYPE_CHECKING:
    from torch import Tensor

#: The longest header that is read. That of DeiT-T is 20 kB, that of ViT-H below 100 kB; class names are in it, too.
MAX_HEADER = 4 << 20
_DIGEST = re.compile(rb'"sha256":"([0-9a-f]{64})"')
_ZEROS = "0" * 64


def write(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Writes a file, atomically; equal tensors and metadata give equal bytes.

    Raises:
        QvitError: The file cannot be written; what was there before is untouched.
        UsageError: See `sealed`.
    """
    blocks = sealed(tensors, metadata)

    def save(file: Any) -> None:
        for block in blocks:
            file.write(block)

    write_atomically(path, save)


def sealed(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> list[bytes | memoryview]:
    """The bytes of a file, in parts. Raises UsageError for a text that is not Unicode, a type that no file has."""
    first, *blocks = encode(tensors, {**metadata, "sha256": _ZEROS}, max_header=MAX_HEADER)
    header = bytes(first)
    if len(_DIGEST.findall(header)) != 1 or header.count(_ZEROS.encode()) != 1:
        raise UsageError("a text of the packed file looks like its checksum")
    digest = hashlib.sha256(header)
    for block in blocks:
        digest.update(block)
    return [header.replace(_ZEROS.encode(), digest.hexdigest().encode(), 1), *blocks]


@contextmanager
def opened(path: str | Path) -> Iterator[Contents]:
    """What is in a file; the metadata are without the seal. Whatever goes wrong inside is an error that names the file.

    Raises QvitError for anything that `write` did not write.
    """
    content = read_bytes(path, "packed model", limit=MAX_FILE)
    try:
        _check_digest(content, header_of(content, max_header=MAX_HEADER))
        found = decode(content, max_header=MAX_HEADER)
        yield replace(found, metadata={key: text for key, text in found.metadata.items() if key != "sha256"})
    except QvitError as error:
        raise QvitError(f"cannot load {path}: {error}") from None
    except Exception as error:
        raise QvitError(f"cannot load {path}: {type(error).__name__}: {error}") from error


def is_packed(path: Path) -> bool:
    """Whether a file is one that `write` wrote."""
    try:
        with opened(path):
            return True
    except QvitError:
        return False


def _check_digest(content: bytes, header: bytes) -> None:
    found = list(_DIGEST.finditer(header))
    if len(found) != 1:
        raise QvitError("it has no checksum of a packed model; `qvit pack RUN` writes one")
    begin, end = (PREFIX + position for position in found[0].span(1))
    digest = hashlib.sha256(memoryview(content)[:begin])
    digest.update(_ZEROS.encode())
    digest.update(memoryview(content)[end:])
    if digest.hexdigest().encode() != found[0][1]:
        raise QvitError("it is damaged: its content does not have the checksum in its header")
