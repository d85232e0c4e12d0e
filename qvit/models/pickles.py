"""Tensors in files of `torch.save`, read without torch and without pickle: nothing in them can be executed or crash.

Such a file is a pickle, a program for a small stack machine, beside the raw bytes of storages. Here a machine runs it
that knows how to make numbers, texts, lists, tuples, dictionaries and dense tensors; for anything else that a program
asks for (other classes, functions, sparse or quantized tensors) it puts an `Unread` in its place, which says what it
would have been. So `{"model": weights, "args": Namespace(...)}` is read, and its arguments are not.

    zip       NAME/data.pkl, and NAME/data/KEY with the bytes of each storage, none of them compressed
    legacy    before torch 1.6: five pickles (a magic number, the version, the machine, the data, the keys of the
              storages), then for each storage its length and its bytes

Work and memory are bounded by the size of the file: a program has at most a million instructions, keys of dictionaries
are texts and numbers, storages lie within the file, and a tensor within its storage, of which it has no more elements.
"""

from __future__ import annotations

import io
import math
import pickletools
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import IO, Any, cast

import torch
from torch import Tensor

from qvit.errors import QvitError, first_line

_MAGIC, _PROTOCOL = 0x1950A86A20F9469CFC6C, 1001
_MOST_INSTRUCTIONS, _MOST_RECORDS, _LARGEST_PROGRAM = 1_000_000, 100_000, 64 << 20
_LARGEST, _MOST_DIMENSIONS = 1 << 48, 8
_STORAGES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
    "ComplexFloatStorage": torch.complex64,
    "ComplexDoubleStorage": torch.complex128,
    "QInt8Storage": torch.qint8,
    "QUInt8Storage": torch.quint8,
    "QInt32Storage": torch.qint32,
}
_NOT_WEIGHTS = {torch.complex64, torch.complex128, torch.qint8, torch.quint8, torch.qint32}
_PLAIN = {
    "INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT", "STRING", "BINSTRING",
    "SHORT_BINSTRING", "UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "BINBYTES", "SHORT_BINBYTES",
    "BINBYTES8",
}  # fmt: skip
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
_NO_EFFECT = {"PROTO", "FRAME"}
_FROM_MARK = {"TUPLE", "LIST", "DICT", "APPENDS", "SETITEMS", "POP_MARK", "INST", "OBJ", "FROZENSET", "ADDITEMS"}


@dataclass(frozen=True)
class Unread:
    """What stands for an object that is not made."""

    name: str

    def __str__(self) -> str:
        return self.name


@dataclass(eq=False)
class _Storage:
    """Bytes that tensors lie in; they are known once the whole file has been looked through."""

    key: str
    dtype: torch.dtype
    count: int
    content: memoryview | None = None
    values: Tensor | None = None

    def tensor(self) -> Tensor:
        if self.dtype in _NOT_WEIGHTS:
            raise QvitError(f"it is of type {self.dtype}, which weights are not")
        if self.values is None:
            size = self.count * self.dtype.itemsize
            if self.content is None or len(self.content) != size:
                found = "none" if self.content is None else f"{len(self.content)}"
                raise QvitError(f"storage {self.key!r:.40} should have {size} bytes, and has {found}")
            if self.dtype == torch.bool and bytes(self.content).translate(None, b"\0\1"):
                raise QvitError(f"storage {self.key!r:.40} has truth values that are neither 0 nor 1")
            raw = torch.frombuffer(bytearray(self.content), dtype=torch.uint8) if size else torch.empty(0).byte()
            self.values = raw.view(self.dtype)
        return self.values


@dataclass(frozen=True, eq=False)
class PickledTensor:
    """A dense tensor of a file: where it lies."""

    storage: _Storage = field(repr=False)
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    def tensor(self) -> Tensor:
        """The tensor, in memory that it may share with others of the file. Raises QvitError."""
        places = (self.offset, *self.shape, *self.strides)
        if not all(type(place) is int and 0 <= place < _LARGEST for place in places):
            raise QvitError("its offset, shape or strides are impossible")
        if len(self.shape) != len(self.strides) or len(self.shape) > _MOST_DIMENSIONS:
            raise QvitError(f"it has {len(self.shape)} axes and {len(self.strides)} strides")
        count = math.prod(self.shape)
        last = self.offset + sum((size - 1) * stride for size, stride in zip(self.shape, self.strides, strict=True))
        if count > self.storage.count or (count and last >= self.storage.count):
            raise QvitError(f"{count} elements of shape {self.shape} are asked of {self.storage.count} stored ones")
        if not count:
            return torch.empty(self.shape, dtype=self.storage.dtype)
        return self.storage.tensor().as_strided(self.shape, self.strides, self.offset)


def read_pickled(content: bytes) -> Any:
    """The data in the bytes of a file of `torch.save`, tensors as `PickledTensor`.

    Raises QvitError with what is wrong, not with the path.
    """
    try:
        return _from_zip(content) if content[:2] == b"PK" else _from_legacy(content)
    except QvitError:
        raise
    except Exception as error:  # of a damaged archive or program: whatever the line raises that it makes stumble
        raise QvitError(f"it is damaged: {first_line(error):.200}") from None


def _from_zip(content: bytes) -> Any:
    if content.count(b"PK\1\2") > _MOST_RECORDS:
        raise QvitError(f"it is an archive of more than {_MOST_RECORDS} files")
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        records = {record.filename: record for record in archive.infolist()}
    programs = [name for name in records if name.endswith("/data.pkl") or name == "data.pkl"]
    if len(programs) != 1:
        raise QvitError("it is no file of torch.save: it is an archive without data.pkl")
    root = programs[0].removesuffix("data.pkl")
    found = {name: _record(content, record) for name, record in records.items() if name.startswith(root)}
    if sum(map(len, found.values())) > len(content):
        raise QvitError("its parts overlap")
    if bytes(found.get(f"{root}byteorder", b"little")) != b"little":
        raise QvitError("it was written on a big-endian machine")
    machine = _Machine()
    data, _ = machine.run(found[programs[0]])
    for storage in machine.storages.values():
        storage.content = found.get(f"{root}data/{storage.key}")
    return data


def _record(content: bytes, record: zipfile.ZipInfo) -> memoryview:
    """The bytes of a file in the archive."""
    if record.compress_type != zipfile.ZIP_STORED or record.compress_size != record.file_size:
        raise QvitError(f"{record.filename!r:.60} in it is compressed, which torch.save does not do")
    place = record.header_offset
    if content[place : place + 4] != b"PK\3\4":
        raise QvitError(f"{record.filename!r:.60} is not where the archive says")
    name, extra = (int.from_bytes(content[place + at : place + at + 2], "little") for at in (26, 28))
    begin = place + 30 + name + extra
    if begin + record.file_size > len(content):
        raise QvitError(f"{record.filename!r:.60} is cut off")
    return memoryview(content)[begin : begin + record.file_size]


def _from_legacy(content: bytes) -> Any:
    data, place = memoryview(content), 0
    machine = _Machine()
    parts: list[Any] = []
    for number in range(5):
        part, size = machine.run(data[place:])
        parts.append(part)
        place += size
        if number == 0 and part != _MAGIC:
            raise QvitError("it is no file of torch.save")
    _, protocol, system, found, keys = parts
    if protocol != _PROTOCOL or not isinstance(system, dict) or system.get("little_endian") is not True:
        raise QvitError("it was written by another version of torch.save, or on a big-endian machine")
    if not isinstance(keys, list) or len(keys) != len({key for key in keys if isinstance(key, str)}):
        raise QvitError("it has no list of storages")
    for key in keys:
        storage = machine.storages.get(key)
        if storage is None or int.from_bytes(data[place : place + 8], "little") != storage.count:
            raise QvitError(f"storage {key!r:.40} is not as long as it should be")
        place += 8
        storage.content = data[place : place + storage.count * storage.dtype.itemsize]
        place += len(storage.content)
    return found


class _Machine:
    """Runs programs; see the module's docstring."""

    def __init__(self) -> None:
        self.storages: dict[str, _Storage] = {}
        self.left = _MOST_INSTRUCTIONS

    def run(self, program: memoryview) -> tuple[Any, int]:
        """What a program leaves on the stack, and its length in bytes."""
        stack: list[Any] = []
        marks: list[int] = []
        memo: dict[Any, Any] = {}
        for opcode, argument, position in pickletools.genops(cast(IO[bytes], _Reader(program))):
            self.left -= 1
            if self.left < 0:
                raise QvitError(f"its program has more than {_MOST_INSTRUCTIONS:,} instructions")
            name = opcode.name
            if name in _PLAIN:
                huge = isinstance(argument, int) and argument != _MAGIC and argument.bit_length() > 64
                stack.append(Unread("a number beyond 64 bits") if huge else argument)
            elif name in _CONSTANTS:
                stack.append(_CONSTANTS[name])
            elif name == "MARK":
                marks.append(len(stack))
            elif name == "STOP":
                return stack.pop(), (position or 0) + 1
            elif name in ("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"):
                memo[len(memo) if name == "MEMOIZE" else argument] = stack[-1]
            elif name in ("GET", "BINGET", "LONG_BINGET"):
                stack.append(memo[argument])
            elif name not in _NO_EFFECT:
                mark = marks.pop() if name in _FROM_MARK else len(stack)
                above = stack[mark:]
                del stack[mark:]
                self._step(name, argument, stack, above)
        raise QvitError("its program does not end")

    def _step(self, name: str, argument: Any, stack: list[Any], above: list[Any]) -> None:
        """An instruction that makes or fills something; `above` is what lay above the last mark."""
        if name == "EMPTY_DICT":
            stack.append({})
        elif name == "EMPTY_LIST":
            stack.append([])
        elif name in ("TUPLE1", "TUPLE2", "TUPLE3"):
            count = int(name[-1])
            items = tuple(stack[-count:])
            del stack[-count:]
            stack.append(items)
        elif name == "TUPLE":
            stack.append(tuple(above))
        elif name == "LIST":
            stack.append(above)
        elif name == "DICT":
            stack.append({})
            _fill(stack[-1], above)
        elif name == "APPEND":
            _extend(stack[-2], [stack.pop()])
        elif name == "APPENDS":
            _extend(stack[-1], above)
        elif name == "SETITEM":
            value, key = stack.pop(), stack.pop()
            _fill(stack[-1], [key, value])
        elif name == "SETITEMS":
            _fill(stack[-1], above)
        elif name in ("GLOBAL", "INST"):
            stack.append(Unread(str(argument).replace(" ", ".")))
        elif name == "STACK_GLOBAL":
            last, first = stack.pop(), stack.pop()
            stack.append(Unread(f"{first}.{last}"[:200]))
        elif name == "REDUCE":
            arguments, function = stack.pop(), stack.pop()
            stack.append(_called(function, arguments))
        elif name == "BINPERSID":
            stack.append(self._storage(stack.pop()))
        elif name in ("POP", "NEWOBJ", "BUILD"):  # BUILD: state of an object that is not made, or a dictionary's
            stack.pop()
        elif name == "NEWOBJ_EX":
            del stack[-2:]
        elif name in ("EMPTY_SET", "FROZENSET"):
            stack.append(Unread("a set"))
        elif name == "OBJ":
            stack.append(above[0] if above else Unread("an object"))
        elif name not in ("POP_MARK", "ADDITEMS"):
            raise QvitError(f"its program has the instruction {name}, which torch.save does not write")

    def _storage(self, reference: Any) -> Any:
        """The storage that a reference of torch's names."""
        if not isinstance(reference, tuple) or not 5 <= len(reference) <= 6 or reference[0] != "storage":
            raise QvitError("it refers to something that is no storage")
        kind, key, count = reference[1], reference[2], reference[4]
        if not isinstance(key, str) or type(count) is not int or not 0 <= count < _LARGEST:
            raise QvitError("it refers to an impossible storage")
        dtype = _STORAGES.get(str(kind).removeprefix("torch."))
        if dtype is None or (len(reference) == 6 and reference[5] is not None):
            return Unread(f"{kind}")
        storage = self.storages.setdefault(key, _Storage(key, dtype, count))
        if (storage.dtype, storage.count) != (dtype, count):
            raise QvitError(f"storage {key!r:.40} is described in two ways")
        return storage


class _Reader(io.RawIOBase):
    """A program as a file, without a copy of what follows it."""

    def __init__(self, content: memoryview) -> None:
        super().__init__()
        self.content, self.place = content[:_LARGEST_PROGRAM], 0

    def read(self, size: int = -1) -> bytes:
        end = len(self.content) if size < 0 else min(len(self.content), self.place + size)
        found = bytes(self.content[self.place : end])
        self.place = end
        return found

    def readline(self, size: int | None = -1) -> bytes:
        begin, step = self.place, 256
        while (end := bytes(self.content[begin : begin + step]).find(b"\n")) < 0 and step < len(self.content) - begin:
            step *= 2
        return self.read(end + 1 if end >= 0 else -1)

    def tell(self) -> int:
        return self.place


def _extend(target: Any, items: list[Any]) -> None:
    if isinstance(target, list):
        target.extend(items)


def _fill(target: Any, pairs: list[Any]) -> None:
    """Sets items of a dictionary; those with other keys than texts and numbers are left out."""
    if isinstance(target, dict):
        for key, value in zip(pairs[::2], pairs[1::2], strict=True):
            if isinstance(key, (str, int)):
                target[key] = value


def _called(function: Any, arguments: Any) -> Any:
    """What a function would return: one of the few that are known, or an `Unread`."""
    name = function.name if isinstance(function, Unread) else ""
    if not isinstance(arguments, tuple):
        raise QvitError("its program calls something without arguments")
    if name in ("collections.OrderedDict", "collections.defaultdict"):
        found: dict[Any, Any] = {}
        for pair in arguments[0] if arguments and isinstance(arguments[0], list) else ():
            _fill(found, list(pair) if isinstance(pair, (list, tuple)) and len(pair) == 2 else [])
        return found
    if name in ("torch._utils._rebuild_parameter", "torch._utils._rebuild_parameter_with_state") and arguments:
        return arguments[0]
    if name in ("torch._utils._rebuild_tensor", "torch._utils._rebuild_tensor_v2") and len(arguments) >= 4:
        storage, offset, shape, strides = arguments[:4]
        if isinstance(storage, Unread):
            return storage
        if not isinstance(storage, _Storage) or not isinstance(shape, tuple) or not isinstance(strides, tuple):
            raise QvitError("it describes a tensor that is none")
        return PickledTensor(storage, offset, shape, strides)
    return Unread(name or "an object")


def weights_in(data: Any) -> dict[str, Tensor]:
    """The tensors of a state dict: that in `state_dict` or `model`, else the data themselves.

    Raises QvitError naming what is no dense tensor.
    """
    chosen = data
    if isinstance(data, Mapping):
        chosen = next((data[key] for key in ("state_dict", "model") if key in data), data)
    if not isinstance(chosen, Mapping):
        raise QvitError(f"it holds {_said(chosen)}, not tensors by name")
    found = {}
    for key, value in chosen.items():
        if not isinstance(key, str) or not isinstance(value, PickledTensor):
            raise QvitError(f"{key!r:.100} in it is {_said(value)}, not a dense tensor of numbers")
        try:
            found[key] = value.tensor()
        except QvitError as error:
            raise QvitError(f"tensor {key!r:.100}: {error}") from None
    return found


def _said(value: Any) -> str:
    return str(value)[:100] if isinstance(value, Unread) else f"a {type(value).__name__}"
