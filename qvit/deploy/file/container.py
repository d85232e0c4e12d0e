"""The bytes of a packed file: safetensors (`qvit.tensors`) with a seal.

One metadata entry is `sha256`: the digest of the whole file with the 64 characters of the digest itself replaced by
the character 0. A file that was cut, changed or extended anywhere is refused before anything in it is interpreted.

The digest protects against accidents, not against intent: everything else is checked as well.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from qvit.errors import QvitError, UsageError
from qvit.files import read_bytes, write_atomically
from qvit.tensors import MAX_FILE, PREFIX, Contents, decode, encode, header_of

#: The longest header that is read. That of DeiT-T is 20 kB, that of ViT-H below 100 kB; class names are in it, too.
MAX_HEADER = 4 << 20
_DIGEST = re.compile(rb'"sha256":"([0-9a-f]{64})"')
_ZEROS = "0" * 64


def write(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Writes a file, atomically; equal tensors and metadata give equal bytes.

    Raises:
        QvitError: The file cannot be written; what was there before is untouched.
        UsageError: A text that is not Unicode, a tensor of a type that safetensors does not have.
    """
    first, *blocks = encode(tensors, {**metadata, "sha256": _ZEROS}, max_header=MAX_HEADER)
    header = bytes(first)
    if len(_DIGEST.findall(header)) != 1 or header.count(_ZEROS.encode()) != 1:
        raise UsageError("a text of the packed file looks like its checksum")
    digest = hashlib.sha256(header)
    for block in blocks:
        digest.update(block)
    sealed = header.replace(_ZEROS.encode(), digest.hexdigest().encode(), 1)

    def save(file: Any) -> None:
        file.write(sealed)
        for block in blocks:
            file.write(block)

    write_atomically(path, save)


def read(path: Path) -> Contents:
    """Reads a file; see `opened`. Raises QvitError naming the file."""
    content = read_bytes(path, "packed model", limit=MAX_FILE)
    try:
        return opened(content)
    except QvitError as error:
        raise QvitError(f"cannot load {path}: {error}") from None


def opened(content: bytes) -> Contents:
    """What is in the bytes of a file; the metadata are without the seal.

    Raises QvitError for anything that `write` did not write, with what is wrong, not with the path.
    """
    _check_digest(content, header_of(content, max_header=MAX_HEADER))
    found = decode(content, max_header=MAX_HEADER)
    return replace(found, metadata={key: text for key, text in found.metadata.items() if key != "sha256"})


def is_packed(path: Path) -> bool:
    """Whether a file is one that `write` wrote."""
    try:
        read(path)
    except QvitError:
        return False
    return True


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
