"""The bytes of a packed file: safetensors, written the same way every time, and read without trusting a single byte.

    8 bytes    length n of the header, little-endian
    n bytes    the header: JSON in UTF-8, {"__metadata__": {key: text}, name: {"dtype", "shape", "data_offsets"}},
               filled up with spaces so that the data begin at a multiple of 8
    the rest   the data: tensors without gaps, little-endian, row by row; larger element types first, then by name

Any safetensors reader opens it. safetensors' own writer is not used because it writes the metadata in random order.

One metadata entry is `sha256`: the digest of the whole file with the 64 characters of the digest itself replaced by
the character 0. A file that was cut, changed or extended anywhere is refused before anything in it is interpreted.

The digest protects against accidents, not against intent, so what follows it is checked as well: the header's length
before it is parsed, each name, type, shape and offset, and that the tensors cover the data exactly, without overlap.
Memory: the file, its header as Python objects (4 MiB of header at most), and one copy of the tensors.

Reading needs no torch: an entry is bytes with a type and a shape until `Contents.tensors` makes a tensor of it.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import stat
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qvit.errors import QvitError, UsageError
from qvit.files import parse_json, write_atomically

if TYPE_CHECKING:
    from torch import Tensor

#: The longest header that is read. That of DeiT-T is 20 kB, that of ViT-H below 100 kB; class names are in it, too.
MAX_HEADER = 4 << 20
_PREFIX, _ALIGNMENT, _MAX_DIMENSIONS = 8, 8, 8
_DIGEST = re.compile(rb'"sha256":"([0-9a-f]{64})"')
_ZEROS = "0" * 64
_DTYPES = {
    "F64": ("float64", 8),
    "I64": ("int64", 8),
    "F32": ("float32", 4),
    "I32": ("int32", 4),
    "F16": ("float16", 2),
    "BF16": ("bfloat16", 2),
    "I16": ("int16", 2),
    "I8": ("int8", 1),
    "U8": ("uint8", 1),
    "BOOL": ("bool", 1),
}
_NAMES = {f"torch.{dtype}": name for name, (dtype, _) in _DTYPES.items()}


@dataclass(frozen=True, eq=False)
class Entry:
    """One tensor in a file.

    Attributes:
        dtype: Its type as safetensors calls it: `F32`.
        shape: Its shape.
        data: Its bytes, a part of the file.
    """

    dtype: str
    shape: tuple[int, ...]
    data: memoryview

    def tensor(self) -> Tensor:
        """A tensor on the CPU, in memory of its own."""
        import torch

        dtype = getattr(torch, _DTYPES[self.dtype][0])
        if not self.data:
            return torch.empty(self.shape, dtype=dtype)
        return torch.frombuffer(bytearray(self.data), dtype=torch.uint8).view(dtype).reshape(self.shape)

    def is_finite(self) -> bool:
        """Whether no number is NaN or infinite."""
        import numpy as np

        if self.dtype == "BF16":
            return not bool((np.frombuffer(self.data, "<u2") & 0x7F80 == 0x7F80).any())
        if self.dtype not in ("F64", "F32", "F16"):
            return True
        return bool(np.isfinite(np.frombuffer(self.data, f"<f{_DTYPES[self.dtype][1]}")).all())


@dataclass(frozen=True, eq=False)
class Contents:
    """What is in a file.

    Attributes:
        metadata: Texts by key, without the digest.
        entries: What is stored, by name.
        header_bytes: Bytes before the data.
        file_bytes: Bytes of the whole file.
    """

    metadata: dict[str, str]
    entries: dict[str, Entry]
    header_bytes: int
    file_bytes: int

    def tensors(self) -> dict[str, Tensor]:
        """Tensors by name, on the CPU, in memory of their own."""
        return {name: entry.tensor() for name, entry in self.entries.items()}


def write(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Writes a file, atomically; equal tensors and metadata give equal bytes.

    Raises:
        QvitError: The file cannot be written; what was there before is untouched.
        UsageError: A text that is not Unicode, a tensor of a type that safetensors does not have.
    """
    import torch

    ordered = sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0]))
    entries, offset = {}, 0
    for name, tensor in ordered:
        if str(tensor.dtype) not in _NAMES:
            raise UsageError(f"a packed file has no type for '{name}' ({tensor.dtype})")
        end = offset + tensor.numel() * tensor.element_size()
        entries[name] = {
            "dtype": _NAMES[str(tensor.dtype)],
            "shape": list(tensor.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    header = _header({**metadata, "sha256": _ZEROS}, entries)
    digest = hashlib.sha256(header)
    blocks = [tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy() for _, tensor in ordered]
    for block in blocks:
        digest.update(block.data)
    sealed = header.replace(_ZEROS.encode(), digest.hexdigest().encode(), 1)

    def save(file: Any) -> None:
        file.write(sealed)
        for block in blocks:
            file.write(block)

    write_atomically(path, save)


def _header(metadata: Mapping[str, str], entries: Mapping[str, Any]) -> bytes:
    try:
        text = compact({"__metadata__": dict(sorted(metadata.items())), **entries}).encode()
    except UnicodeEncodeError as error:
        raise UsageError(f"a text of the packed file is not Unicode: {error.object!r}") from None
    if len(re.findall(_DIGEST, text)) != 1 or text.count(_ZEROS.encode()) != 1:
        raise UsageError("a text of the packed file looks like its checksum")
    text += b" " * (-(_PREFIX + len(text)) % _ALIGNMENT)
    if len(text) > MAX_HEADER:
        raise UsageError(f"the header of the packed file would take {len(text)} bytes, more than {MAX_HEADER}")
    return len(text).to_bytes(_PREFIX, "little") + text


def compact(data: Any) -> str:
    """JSON without spaces; NaN is refused."""
    return json.dumps(data, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def read(path: Path) -> Contents:
    """Reads a file. Raises QvitError for anything that `write` did not write, with what is wrong, not with the path."""
    content = _bytes_of(path)
    length = int.from_bytes(content[:_PREFIX], "little")
    if len(content) < _PREFIX + 2 or not 2 <= length <= len(content) - _PREFIX:
        raise QvitError("it is no safetensors file, or it was cut off")
    if length > MAX_HEADER:
        raise QvitError(f"its header takes {length} bytes, more than {MAX_HEADER}")
    start = _PREFIX + length
    header = bytes(content[_PREFIX:start])
    _check_digest(content, header)
    parsed = parse(header)
    if not isinstance(parsed, dict):
        raise QvitError("its header is no JSON object")
    metadata = parsed.pop("__metadata__", None)
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise QvitError("its metadata are not texts by key")
    metadata.pop("sha256", None)
    data = memoryview(content)[start:]
    entries = {name: _entry(name, *place, data) for name, place in _places(parsed, len(data)).items()}
    return Contents(metadata, entries, start, len(content))


@contextmanager
def reading(path: str | Path) -> Iterator[None]:
    """Whatever goes wrong inside is a QvitError that names the file."""
    try:
        yield
    except QvitError as error:
        raise QvitError(f"cannot load {path}: {error}") from None
    except Exception as error:
        raise QvitError(f"cannot load {path}: {type(error).__name__}: {error}") from error


def is_packed(path: Path) -> bool:
    """Whether a file is one that `write` wrote."""
    try:
        read(path)
    except QvitError:
        return False
    return True


def _bytes_of(path: Path) -> bytearray:
    """The content of a regular file; pipes and devices, which may never end, are not opened."""
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise QvitError("it is a directory" if stat.S_ISDIR(status.st_mode) else "it is no file")
        content = bytearray(status.st_size)
        with path.open("rb") as file:
            if file.readinto(content) != status.st_size or file.read(1):
                raise QvitError("it changed while it was read")
        return content
    except FileNotFoundError:
        raise QvitError("there is no such file") from None
    except (OSError, ValueError, MemoryError) as error:
        raise QvitError(str(error) or "it does not fit into memory") from None


def _check_digest(content: bytearray, header: bytes) -> None:
    found = list(_DIGEST.finditer(header))
    if len(found) != 1:
        raise QvitError("it has no checksum of a packed model; `qvit pack RUN` writes one")
    begin, end = (_PREFIX + position for position in found[0].span(1))
    digest = hashlib.sha256(memoryview(content)[:begin])
    digest.update(_ZEROS.encode())
    digest.update(memoryview(content)[end:])
    if digest.hexdigest().encode() != found[0][1]:
        raise QvitError("it is damaged: its content does not have the checksum in its header")


def parse(text: bytes | str) -> Any:
    """Plain data of an untrusted JSON text, see `files.parse_json`. Raises QvitError."""
    try:
        return parse_json(text)
    except ValueError as error:
        raise QvitError(f"its JSON cannot be read: {error}") from None


Place = tuple[str, tuple[int, ...], int, int]


def _places(entries: Mapping[str, Any], available: int) -> dict[str, Place]:
    """Type, shape, begin and end of every tensor, checked against each other and the length of the data."""
    places = {name: _place(name, entry) for name, entry in entries.items()}
    position = 0
    for name, (_, _, begin, end) in sorted(places.items(), key=lambda item: item[1][2:]):
        if begin != position:
            raise QvitError(f"tensor {name!r} {'overlaps another' if begin < position else 'leaves a gap before it'}")
        position = end
    if position != available:
        raise QvitError(f"its tensors take {position} bytes, and there are {available}")
    return places


def _place(name: str, entry: Any) -> Place:
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise QvitError(f"tensor {name!r} is not described by dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _DTYPES:
        raise QvitError(f"tensor {name!r} has the unknown type {dtype!r}")
    if not _sizes(shape) or len(shape) > _MAX_DIMENSIONS:
        raise QvitError(f"tensor {name!r} has an impossible shape")
    if not _sizes(offsets) or len(offsets) != 2:
        raise QvitError(f"tensor {name!r} has impossible offsets")
    begin, end = offsets
    if end - begin != math.prod(shape) * _DTYPES[dtype][1]:
        raise QvitError(f"tensor {name!r} has {end - begin} bytes, which its shape and type do not take")
    return dtype, tuple(shape), begin, end


def _sizes(values: Any) -> bool:
    return isinstance(values, list) and all(
        isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 48 for value in values
    )


def _entry(name: str, dtype: str, shape: tuple[int, ...], begin: int, end: int, data: memoryview) -> Entry:
    if dtype == "BOOL" and bytes(data[begin:end]).translate(None, b"\0\1"):
        raise QvitError(f"tensor {name!r} has truth values that are neither 0 nor 1")
    return Entry(dtype, shape, data[begin:end])


def total_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of some tensors' data."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
