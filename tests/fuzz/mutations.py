"""Seeded mutations: of bytes, of JSON and TOML texts, of safetensors with valid checksums, of tars and zips.

A mutation of bytes alone is caught by the first checksum. Those that know a format change what it says and make the
checksums right again, as somebody would who means harm.
"""

from __future__ import annotations

import copy
import hashlib
import io
import json
import random
import tarfile
import zipfile
from collections.abc import Callable
from typing import Any

#: Values that a reader may not expect where it finds them.
STRANGE: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 3, 7, 9, 1.5, -0.0, 1e-300, 1e300, 2**31, 2**53, 2**63 - 1, -(2**63),
    10**6, 10**9, "", "x", "3", "nan", "../../etc/passwd", "/dev/zero", "a" * 5000, "\u0000", "\ud800", "\u202e",
    "blocks.0.attn.query", [], [[]], [None], [0] * 300, [1e300, -1], ["a", "b"], {}, {"a": 1}, {"": {}},
    [[[[[[[[[1]]]]]]]]],
)  # fmt: skip
#: Texts that are no value of JSON, or one beyond its usual limits.
RAW = ("NaN", "Infinity", "-Infinity", "1e999", "9" * 5000, "[" * 3000 + "]" * 3000, '{"a":1,"a":2}', "nul", "'x'", "")
_MARK = "\ue000"


def bytes_of(chance: random.Random, content: bytes) -> bytes:
    """One to eight changes of single bytes, or a part cut, doubled, moved or replaced."""
    changed = bytearray(content)
    if not changed:
        return chance.randbytes(chance.randrange(1, 50))
    kind = chance.randrange(6)
    begin, end = sorted(chance.randrange(len(changed) + 1) for _ in range(2))
    end = min(end, begin + chance.choice((1, 4, 64, 100_000)))
    if kind < 2:
        for _ in range(chance.randrange(1, 9)):
            changed[chance.randrange(len(changed))] = chance.choice((0, 0xFF, 0x7F, 0x80, chance.randrange(256)))
    elif kind == 2:
        del changed[begin:]
    elif kind == 3:
        del changed[begin:end]
    elif kind == 4:
        changed[begin:begin] = changed[begin:end]
    else:
        changed[begin:end] = chance.randbytes(chance.randrange(20))
    return bytes(changed)


def json_of(chance: random.Random, content: bytes) -> bytes:
    """A JSON text with one to three places changed; sometimes bytes instead."""
    if chance.random() < 0.15:
        return bytes_of(chance, content)
    data = json.loads(content)
    raw = []
    for _ in range(chance.choice((1, 1, 1, 2, 3))):
        data, text = data_of(chance, data)
        raw.append(text)
    written = json.dumps(data)
    for text in filter(None, raw):
        written = written.replace(f'"\\u{ord(_MARK):04x}"', text, 1)
    return written.encode()


def lines_of(chance: random.Random, content: bytes) -> bytes:
    """JSON lines with some changed, doubled, cut or moved."""
    lines = content.splitlines()
    for _ in range(chance.choice((1, 1, 2, 5))):
        index = chance.randrange(len(lines))
        kind = chance.randrange(5)
        if kind < 3:
            lines[index] = line_of(chance, lines[index])
        elif kind == 3:
            lines.insert(chance.randrange(len(lines)), lines[index])
        elif len(lines) > 1:
            del lines[index]
    return b"\n".join(lines)


def line_of(chance: random.Random, content: bytes) -> bytes:
    """One JSON line changed as such, or as bytes if a change before has left it no JSON."""
    try:
        return json_of(chance, content)
    except (ValueError, RecursionError):
        return bytes_of(chance, content)


def data_of(chance: random.Random, data: Any) -> tuple[Any, str]:
    """Plain data with one place changed, and what stands for the mark in its text, if anything."""
    data = copy.deepcopy(data)
    places: list[tuple[Any, Any]] = []
    waiting = [data]
    while waiting:
        node = waiting.pop()
        keys = list(node) if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else ()
        for key in keys:
            places.append((node, key))
            if isinstance(node[key], (dict, list)):
                waiting.append(node[key])
    if not places or chance.random() < 0.02:
        return chance.choice(STRANGE), ""
    by_depth = chance.random() < 0.5
    node, key = chance.choice(places if not by_depth else places[: max(4, len(places) // 20)])
    kind, raw = chance.randrange(8), ""
    if kind == 0:
        del node[key]
    elif kind == 1 and isinstance(node, dict):
        node[chance.choice(("unknown", "Bit_width", "", "a" * 300, "checkpoint_path"))] = node[key]
    elif kind == 2:
        node[key], raw = _MARK, chance.choice(RAW)
    elif kind == 3 and isinstance(node[key], (int, float)) and not isinstance(node[key], bool):
        node[key] = chance.choice(
            (-node[key], node[key] * 2, node[key] + 1, node[key] * 10**6, float(node[key]), str(node[key]))
        )
    elif kind == 4 and isinstance(node[key], list) and node[key]:
        node[key] = node[key] * chance.choice((2, 3, 1000)) if len(node[key]) < 100 else node[key][:-1]
    elif kind == 5:
        node[key] = copy.deepcopy(chance.choice(places)[0])
        if len(json.dumps(data)) > 1 << 20:
            node[key] = None
    elif kind == 6:
        node[key] = {"a": node[key]} if chance.random() < 0.5 else [node[key]]
    else:
        node[key] = copy.deepcopy(chance.choice(STRANGE))
    return data, raw


def toml_of(chance: random.Random, content: bytes) -> bytes:
    """A TOML text with a line changed, doubled or left out."""
    if chance.random() < 0.3:
        return bytes_of(chance, content)
    lines = content.decode().splitlines()
    rows = [i for i, line in enumerate(lines) if "=" in line and not line.startswith("#")]
    for _ in range(chance.choice((1, 1, 2))):
        index = chance.choice(rows)
        name = lines[index].partition("=")[0]
        values = [json.dumps(v) for v in STRANGE if not isinstance(v, dict)] + [
            "nan",
            "inf",
            "9" * 5000,
            "1979-05-27",
            "{ a = 1 }",
        ]
        lines[index] = chance.choice(
            (f"{name}= {chance.choice(values)}", f"x{lines[index]}", lines[index] + "\n" + lines[index])
        )
    return "\n".join(lines).encode("utf-8", "surrogatepass")


def safetensors_of(chance: random.Random, content: bytes, reseal: Callable[[bytes], bytes] | None = None) -> bytes:
    """A safetensors file with header or numbers changed, and its checksum made right again by `reseal`."""
    if chance.random() < 0.15:
        return bytes_of(chance, content)
    length = int.from_bytes(content[:8], "little")
    header, data = json.loads(content[8 : 8 + length]), bytearray(content[8 + length :])
    kind = chance.randrange(3)
    if kind == 0 and data:
        _numbers(chance, header, data)
    else:
        metadata = header.get("__metadata__", {})
        documents = [key for key, text in metadata.items() if text[:1] in ("{", "[")]
        if kind == 1 and documents:
            key = chance.choice(documents)
            changed = json_of(chance, metadata[key].encode())
            metadata[key] = changed.decode("utf-8", "replace")
        else:
            changed_header, raw = data_of(chance, header)
            text = json.dumps(changed_header).replace(f'"\\u{ord(_MARK):04x}"', raw, 1).encode()
            return (reseal or _same)(len(text).to_bytes(8, "little") + text + bytes(data))
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return (reseal or _same)(len(text).to_bytes(8, "little") + text + bytes(data))


def _same(content: bytes) -> bytes:
    return content


_EXTREMES = {
    "F32": [0x7FC00000, 0x7F800000, 0xFF800000, 0x7F7FFFFF, 0, 0x80000000, 1, 0xBF800000, 0x00800000],
    "BF16": [0x7FC0, 0x7F80, 0xFF80, 0x7F7F, 0, 0x8000, 1, 0xBF80],
    "F16": [0x7E00, 0x7C00, 0xFC00, 0x7BFF, 0, 0x8000, 1, 0xBC00],
}
_SIZES = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "BF16": 2, "F16": 2, "I16": 2}


def _numbers(chance: random.Random, header: dict[str, Any], data: bytearray) -> None:
    """Replaces numbers of one tensor by NaN, infinities, zeros and extremes, in place."""
    entries = [
        entry
        for name, entry in header.items()
        if name != "__metadata__" and entry["data_offsets"][1] > entry["data_offsets"][0]
    ]
    entry = chance.choice(entries)
    begin, end = entry["data_offsets"]
    size = _SIZES.get(entry["dtype"], 1)
    for _ in range(chance.choice((1, 1, 10, 10_000))):
        position = begin + chance.randrange((end - begin) // size) * size
        value = chance.choice(_EXTREMES.get(entry["dtype"], [0, 1, 2 ** (8 * size) - 1, 2 ** (8 * size - 1)]))
        data[position : position + size] = value.to_bytes(size, "little")


def sealed(content: bytes) -> bytes:
    """The same with the `sha256` in the metadata of its header made right, where it has one."""
    length = int.from_bytes(content[:8], "little")
    text = content[8 : 8 + length]
    marker = text.find(b'"sha256"')
    begin = text.find(b'"', text.find(b":", marker)) + 1 if marker >= 0 else 0
    if not begin or len(text) < begin + 64:
        return content
    blank = content[: 8 + begin] + b"0" * 64 + content[8 + begin + 64 :]
    return blank[: 8 + begin] + hashlib.sha256(blank).hexdigest().encode() + blank[8 + begin + 64 :]


def tar_of(chance: random.Random, content: bytes) -> bytes:
    """A tar whose headers or members are changed, with checksums of headers that are right."""
    if chance.random() < 0.2:
        return bytes_of(chance, content)
    changed = bytearray(content)
    starts = []
    with tarfile.open(fileobj=io.BytesIO(content)) as tar:
        starts = [(member.offset, member.offset_data, member.size) for member in tar]
    for _ in range(chance.choice((1, 1, 2, 4))):
        offset, data, size = chance.choice(starts)
        kind = chance.randrange(7)
        if kind == 0 and size:
            position = data + chance.randrange(size)
            changed[position : position + 1] = chance.randbytes(1)
            continue
        if kind == 1:  # the size
            number = chance.choice((0, size - 1, size + 1, size + 511, 8**11 - 1, 10**9, 512 * 1000)) % 8**11
            changed[offset + 124 : offset + 136] = b"%011o\0" % max(number, 0)
        elif kind == 2:  # the size in base 256, which may be negative
            first = chance.choice((0x80, 0xFF))
            changed[offset + 124 : offset + 136] = bytes([first]) + chance.choice(
                (b"\xff" * 11, b"\0" * 3 + b"\x7f" * 8, chance.randbytes(11))
            )
        elif kind == 3:  # the type: links, devices, sparse, long names, extended headers
            changed[offset + 156] = chance.choice(b"01234567gxLKSMVNX\0\xff")
        elif kind == 4:  # the name
            name = chance.choice(
                (b"../" * 20, b"/etc/passwd", b"\xff" * 100, b"", b"a" * 100, b"x.cls", b"x.jpg", b"cat/0.jpg")
            )
            changed[offset : offset + 100] = name[:100].ljust(100, b"\0")
        elif kind == 5:
            position = offset + chance.randrange(512)
            changed[position] = chance.randrange(256)
        else:
            records = chance.choice(
                (
                    b"30 size=99999999999999999999\n",
                    b"17 path=../../xyz\n",
                    b"28 GNU.sparse.major=1000000\n",
                    b"9" * 400,
                )
            )
            changed[data : data + len(records)] = records
            changed[offset + 156] = chance.choice(b"xg")
        block = changed[offset : offset + 512]
        block[148:156] = b" " * 8
        changed[offset + 148 : offset + 156] = b"%06o\0 " % sum(block)
    return bytes(changed)


def zip_of(chance: random.Random, content: bytes) -> bytes:
    """A zip, such as PyTorch's, with a member changed and checksums that are right."""
    if chance.random() < 0.2:
        return bytes_of(chance, content)
    target = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(target, "w", zipfile.ZIP_STORED) as new:
        names = old.namelist()
        chosen = chance.choice([name for name in names if name.endswith("data.pkl")] * 3 + names)
        for name in names:
            data = old.read(name)
            if name == chosen:
                if chance.random() < 0.1:
                    continue
                data = bytes_of(chance, data)
            method = zipfile.ZIP_DEFLATED if chance.random() < 0.02 else zipfile.ZIP_STORED
            new.writestr(name, data, compress_type=method)
    return target.getvalue()
