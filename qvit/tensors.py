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
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qvit.errors import QvitError, UsageError
from qvit.files import parse_json

#: The longest header that is read. A training checkpoint of ViT-L has 1 MB: names of 5,000 tensors.
MAX_HEADER = 16 << 20
#: The largest file that is read; ViT-G has 7 GB, and a checkpoint of its training four times that.
MAX_FILE = 64 << 30
PREFIX = 8
_ALIGNMENT, _MAX_DIMENSIONS = 8, 8
_DTYPES = {
    "F64": torch.float64,
    "I64": torch.int64,
    "F32": torch.float32,
    "I32": torch.int32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


@dataclass(frozen=True, eq=False)
class Contents:
    """What is in a file.

    Attributes:
        metadata: Texts by key.
        tensors: Tensors by name, on the CPU, in memory of their own.
        header_bytes: Bytes before the data.
        file_bytes: Bytes of the whole file.
    """

    metadata: dict[str, str]
    tensors: dict[str, Tensor]
    header_bytes: int
    file_bytes: int


def encode(
    tensors: Mapping[str, Tensor], metadata: Mapping[str, str], *, max_header: int = MAX_HEADER
) -> list[memoryview]:
    """The bytes of a file: its header, with the eight bytes before it, then the data of each tensor.

    Equal tensors and metadata give equal bytes. Raises UsageError for a text that is not Unicode, a tensor of a type
    that safetensors does not have, and a header that would not be read.
    """
    ordered = sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0]))
    entries, offset = {}, 0
    for name, tensor in ordered:
        if tensor.dtype not in _NAMES or tensor.layout != torch.strided:
            raise UsageError(f"there is no type for '{name}' ({tensor.dtype}, {tensor.layout}) in a file of tensors")
        end = offset + tensor.numel() * tensor.element_size()
        entries[name] = {
            "dtype": _NAMES[tensor.dtype],
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
    tensors = {
        name: from_bytes(data[begin:end], dtype, f"tensor {name!r}").reshape(shape)
        for name, (dtype, shape, begin, end) in _places(parsed, len(data)).items()
    }
    return Contents(metadata, tensors, start, len(content))


def parse(text: bytes | str) -> Any:
    """Plain data of an untrusted JSON text, see `files.parse_json`. Raises QvitError."""
    try:
        return parse_json(text)
    except ValueError as error:
        raise QvitError(f"its JSON cannot be read: {error}") from None


Place = tuple[torch.dtype, tuple[int, ...], int, int]


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
    if end - begin != math.prod(shape) * _DTYPES[dtype].itemsize:
        raise QvitError(f"tensor {name!r} has {end - begin} bytes, which its shape and type do not take")
    return _DTYPES[dtype], tuple(shape), begin, end


def _sizes(values: Any) -> bool:
    return isinstance(values, list) and all(
        isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 48 for value in values
    )


def from_bytes(content: memoryview, dtype: torch.dtype, what: str) -> Tensor:
    """A flat tensor with a copy of some bytes; `what` names it in the QvitError for truth values that are none."""
    if not content:
        return torch.empty(0, dtype=dtype)
    raw = torch.frombuffer(bytearray(content), dtype=torch.uint8)
    if dtype == torch.bool and int(raw.max()) > 1:
        raise QvitError(f"{what} has truth values that are neither 0 nor 1")
    return raw.view(dtype)


def total_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of some tensors' data."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def not_finite(tensors: Mapping[str, Tensor]) -> str | None:
    """The name of the first tensor that holds NaN or an infinite value."""
    floats = ((name, tensor) for name, tensor in tensors.items() if tensor.is_floating_point() or tensor.is_complex())
    return next((name for name, tensor in floats if not bool(torch.isfinite(tensor).all())), None)
