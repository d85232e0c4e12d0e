"""Tensors in files: safetensors, written the same way every time, and read without trusting a single byte.

    8 bytes    length n of the header, little-endian
    n bytes    the header: JSON in UTF-8, {"__metadata__": {key: text}, name: {"dtype", "shape", "data_offsets"}},
               filled up with spaces so that the data begin at a multiple of 8
    the rest   the data: tensors without gaps, little-endian, row by row; larger element types first, then by name

Any safetensors reader opens what is written here, and what other writers wrote is read here. safetensors' own writer
is not used because it writes the metadata in random order; its reader, because it says less about what is wrong.

A reader is told nothing by a file that it does not check: the header's length before it is parsed, each name, type,
shape and offset, and that the tensors cover the data exactly, without overlap. Memory: the file's content, its header
as Python objects, and one copy of the tensors. What the numbers mean is for the reader of each format to check;
`not_finite` is what all of them ask first.

Reading needs no torch: an entry is bytes with a type and a shape until a tensor is made of it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from qvit.errors import QvitError, UsageError
from qvit.files import parse_json

if TYPE_CHECKING:
    from torch import Tensor

#: The longest header that is read. A training checkpoint of ViT-L has 1 MB: names of 5,000 tensors.
MAX_HEADER = 16 << 20
#: The largest file that is read; ViT-G has 7 GB, and a checkpoint of its training four times that.
MAX_FILE = 64 << 30
PREFIX = 8
_ALIGNMENT, _MAX_DIMENSIONS = 8, 8
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

    def floats(self) -> np.ndarray:
        """Its floating-point numbers in a row, in float32 or float64; none of other types."""
        if self.dtype == "BF16":
            return (np.frombuffer(self.data, "<u2").astype("<u4") << 16).view("<f4")
        if self.dtype not in ("F64", "F32", "F16"):
            return np.empty(0, "<f4")
        values = np.frombuffer(self.data, f"<f{_DTYPES[self.dtype][1]}")
        return values.astype("<f4") if self.dtype == "F16" else values


@dataclass(frozen=True, eq=False)
class Contents:
    """What is in a file.

    Attributes:
        metadata: Texts by key.
        entries: What is stored, by name.
        header_bytes: Bytes before the data.
        file_bytes: Bytes of the whole file.
    """

    metadata: dict[str, str]
    entries: dict[str, Entry]
    header_bytes: int
    file_bytes: int

    @cached_property
    def tensors(self) -> dict[str, Tensor]:
        """Tensors by name, on the CPU, in memory of their own."""
        return {name: entry.tensor() for name, entry in self.entries.items()}


def encode(
    tensors: Mapping[str, Tensor], metadata: Mapping[str, str], *, max_header: int = MAX_HEADER
) -> list[memoryview]:
    """The bytes of a file: its header, with the eight bytes before it, then the data of each tensor.

    Equal tensors and metadata give equal bytes. Raises UsageError for a text that is not Unicode, a tensor of a type
    that safetensors does not have, and a header that would not be read.
    """
    import torch

    ordered = sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0]))
    entries, offset = {}, 0
    for name, tensor in ordered:
        if str(tensor.dtype) not in _NAMES or tensor.layout != torch.strided:
            raise UsageError(f"there is no type for '{name}' ({tensor.dtype}, {tensor.layout}) in a file of tensors")
        end = offset + tensor.numel() * tensor.element_size()
        entries[name] = {
            "dtype": _NAMES[str(tensor.dtype)],
            "shape": list(tensor.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    header = _header(metadata, entries, max_header)
    blocks = [tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data for _, tensor in ordered]
    return [memoryview(header), *blocks]


def _header(metadata: Mapping[str, str], entries: Mapping[str, Any], longest: int) -> bytes:
    try:
        text = compact({"__metadata__": dict(sorted(metadata.items())), **entries}).encode()
    except UnicodeEncodeError as error:
        raise UsageError(f"a text of the file is not Unicode: {error.object!r}") from None
    text += b" " * (-(PREFIX + len(text)) % _ALIGNMENT)
    if len(text) > longest:
        raise UsageError(f"the header of the file would take {len(text)} bytes, more than {longest}")
    return len(text).to_bytes(PREFIX, "little") + text


def compact(data: Any) -> str:
    """JSON without spaces; NaN is refused."""
    return json.dumps(data, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def header_of(content: bytes | memoryview, *, max_header: int = MAX_HEADER) -> bytes:
    """The text of the header. Raises QvitError if there is none, or a longer one."""
    length = int.from_bytes(content[:PREFIX], "little")
    if len(content) < PREFIX + 2 or not 2 <= length <= len(content) - PREFIX:
        raise QvitError("it is no safetensors file, or it was cut off")
    if length > max_header:
        raise QvitError(f"its header takes {length} bytes, more than {max_header}")
    return bytes(content[PREFIX : PREFIX + length])


def decode(content: bytes | memoryview, *, max_header: int = MAX_HEADER) -> Contents:
    """What is in the bytes of a file. Raises QvitError with what is wrong, not with the path."""
    header = header_of(content, max_header=max_header)
    parsed = parse(header)
    if not isinstance(parsed, dict):
        raise QvitError("its header is no JSON object")
    metadata = parsed.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise QvitError("its metadata are not texts by key")
    start = PREFIX + len(header)
    data = memoryview(content)[start:]
    entries = {name: _entry(name, *place, data) for name, place in _places(parsed, len(data)).items()}
    return Contents(metadata, entries, start, len(content))


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


def not_finite(tensors: Mapping[str, Tensor]) -> str | None:
    """The name of the first tensor that holds NaN or an infinite value."""
    import torch

    floats = ((name, tensor) for name, tensor in tensors.items() if tensor.is_floating_point() or tensor.is_complex())
    return next((name for name, tensor in floats if not bool(torch.isfinite(tensor).all())), None)
