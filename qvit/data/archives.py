"""Tar archives, read header by header without trusting them.

A header is a block of 512 bytes: the name, the size and the kind of what follows it, and a checksum of itself. Names
that are too long for it stand in a block of their own before it (GNU's `L`, POSIX's `x`). Read are regular files, by
offset, wherever they lie in an archive; links, folders and devices are passed over, sparse files are refused: their
size has nothing to do with that of the archive.

No memory is taken and no byte is looked for on the word of a header alone: a file ends within the archive, a name has
4,096 bytes at most, a header of POSIX's 1 MiB; sizes are whole numbers from 0. So there is at most a file for every 512
bytes. What is compressed is read up to 64 times its size and 256 MiB: images hardly compress.
"""

from __future__ import annotations

import gzip
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from qvit.errors import QvitError

BLOCK = 512
#: The largest file that is read from an archive, or from a folder of images.
LARGEST_IMAGE = 256 << 20
_LONGEST_NAME, _LARGEST_EXTENSION = 4096, 1 << 20
_MOST_UNPACKED, _MOST_TIMES = 256 << 20, 64
_REGULAR, _WITHOUT_DATA = (b"0", b"\0", b"7"), (b"1", b"2", b"3", b"4", b"5", b"6")
_GNU = (b"L", b"K", b"S")
_OCTAL = re.compile(rb" *([0-7]*)[ \0]*")
_RECORD = re.compile(rb"(\d{1,7}) ")


class DamagedArchive(QvitError):
    """An archive that cannot be read on; the message says why, for the middle of a sentence."""


@dataclass(frozen=True)
class Member:
    """A regular file in an archive: its name, where its bytes begin, and how many there are."""

    name: str
    offset: int
    size: int


def unpacked_limit(path: Path) -> int:
    """The most bytes that a compressed archive is unpacked to."""
    return _MOST_UNPACKED + _MOST_TIMES * path.stat().st_size


def open_archive(path: Path) -> tuple[IO[bytes], int]:
    """An archive, compressed with gzip or not, opened for reading, and the position where it ends at the latest."""
    file = path.open("rb")
    compressed = file.read(2) == b"\x1f\x8b"
    if not compressed:
        return file, path.stat().st_size
    file.close()
    return gzip.open(path, "rb"), unpacked_limit(path)  # type: ignore[return-value]


class Unpacking:
    """A compressed archive, read up to its limit."""

    def __init__(self, source: IO[bytes], path: Path) -> None:
        self.source, self.path, self.left = source, path, unpacked_limit(path)

    def read(self, size: int) -> bytes:
        """Some bytes. Raises QvitError beyond the limit."""
        content = self.source.read(size)
        self.left -= len(content)
        if self.left < 0:
            raise QvitError(
                f"{self.path} unpacks to more than {unpacked_limit(self.path):,} bytes: unpack it, and name the folder"
            )
        return content


def members(file: IO[bytes], end: int, start: int = 0) -> Iterator[Member]:
    """The regular files of an archive in their order.

    Args:
        file: Where it is read from; it may be read elsewhere in between.
        end: Where it ends at the latest.
        start: Where it begins.

    Raises:
        DamagedArchive: It is damaged, cut off, or no archive.
    """
    place, long_name, size_said = start, None, None
    while block := _block(file, place, end):
        kind, size = block[156:157], _size(block[124:136])
        place += BLOCK
        if kind in _REGULAR and size_said is not None:
            size = size_said
        if place + (0 if kind in _WITHOUT_DATA else size) > end:
            raise DamagedArchive(f"the file at byte {place} should have {size} bytes, and {end - place} are left")
        if kind in (b"L", b"x"):
            if size > (_LONGEST_NAME + 1 if kind == b"L" else _LARGEST_EXTENSION):
                raise DamagedArchive(f"the header at byte {place} has {size} bytes, too many for a name")
            content = read_exactly(file, place, size)
            if kind == b"L":
                long_name = content.partition(b"\0")[0]
            else:
                name, size_said = _extension(content)
                long_name = name or long_name
        elif kind == b"S" or kind == b"M":
            raise DamagedArchive(f"the file at byte {place} is sparse, or a part of one")
        elif kind not in (b"K", b"g"):
            regular = kind in _REGULAR and not (kind == b"\0" and block[:100].partition(b"\0")[0].endswith(b"/"))
            if regular:
                yield Member(_name(block, long_name), place, size)
            long_name, size_said = None, None
        if kind not in _WITHOUT_DATA:
            place += -(-size // BLOCK) * BLOCK


def read_exactly(file: IO[bytes], place: int, size: int) -> bytes:
    """Some bytes of an archive. Raises DamagedArchive if it ends before."""
    content = file.read(size) if file.seek(place) == place else b""
    if len(content) != size:
        raise DamagedArchive("it is cut off")
    return content


def content_of(file: IO[bytes], member: Member) -> bytes:
    """The bytes of a file in an archive. Raises DamagedArchive if it ends before, or it is no image by its size."""
    if member.size > LARGEST_IMAGE:
        raise DamagedArchive(f"'{member.name}' has {member.size:,} bytes; at most {LARGEST_IMAGE:,} are read")
    return read_exactly(file, member.offset, member.size)


def _block(file: IO[bytes], place: int, end: int) -> bytes:
    """The header at a place; empty at the end of the archive. Raises DamagedArchive for what is no header."""
    if place > end or file.seek(place) != place:
        raise DamagedArchive("it is cut off")
    block = file.read(min(BLOCK, end - place))
    if place > 0 and (not block or not block.strip(b"\0")):
        return b""
    if not block:
        raise DamagedArchive("it is empty")
    if len(block) < BLOCK:
        raise DamagedArchive("it is cut off")
    if not block.strip(b"\0"):
        return b""
    unsigned = sum(block) - sum(block[148:156]) + 8 * ord(" ")
    signed = unsigned - 256 * sum(byte > 127 for byte in block[:148] + block[156:])
    if _size(block[148:156]) not in (unsigned, signed):
        raise DamagedArchive(f"there is no header at byte {place}")
    return block


def _size(digits: bytes) -> int:
    """A number of a header: octal digits, or binary where the first bit is set."""
    if digits[0] == 0x80:
        return int.from_bytes(digits[1:], "big")
    match = _OCTAL.match(digits)
    if match is None or (match.end() != len(digits) and digits[match.end() - 1 : match.end()] not in (b" ", b"\0")):
        raise DamagedArchive("a number in it is none")
    return int(match[1] or b"0", 8)


def _name(block: bytes, long_name: bytes | None) -> str:
    name = block[:100].partition(b"\0")[0]
    prefix = block[345:500].partition(b"\0")[0]
    if long_name is not None:
        name = long_name
    elif prefix and block[156:157] not in _GNU:
        name = prefix + b"/" + name
    return name.decode("utf-8", "surrogateescape")


def _extension(content: bytes) -> tuple[bytes | None, int | None]:
    """Name and size in a header of POSIX's: records of a length, a key and a value."""
    place, name, size = 0, None, None
    while place < len(content) and content[place] != 0:
        match = _RECORD.match(content, place)
        end = place + int(match[1]) if match else 0
        if match is None or not match.end() < end <= len(content) or content[end - 1 : end] != b"\n":
            raise DamagedArchive("a header has a record that is none")
        key, equals, value = content[match.end() : end - 1].partition(b"=")
        if not equals or key.startswith(b"GNU.sparse"):
            raise DamagedArchive("a file is sparse, or its header is damaged")
        if key == b"path":
            if len(value) > _LONGEST_NAME or b"\0" in value:
                raise DamagedArchive(f"a name has {len(value)} bytes, or a zero byte")
            name = value
        elif key == b"size":
            if not value.isdigit() or len(value) > 18:
                raise DamagedArchive("a size is no whole number")
            size = int(value)
        place = end
    return name, size
