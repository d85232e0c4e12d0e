"""The C++ reader of packed files: as strict as the Python one, and without harm whatever the bytes."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_native import frozen, images_for

from qvit.deploy.native import NativeModel, load
from qvit.errors import QvitError

pytestmark = pytest.mark.skipif(not (shutil.which("g++") or os.environ.get("CXX")), reason="needs a C++ compiler")
META = "__metadata__"
FILES = Path(__file__).parents[1] / "files"


@pytest.fixture(scope="module")
def whole() -> bytes:
    """A small model with tensors of every kind."""
    return frozen("w3a3", images_for(), init_values=0.1, reg_tokens=2, qk_norm=True).to_bytes()


@pytest.fixture(scope="module")
def tower() -> bytes:
    """One that pools by attention, without a classifier."""
    return frozen("w4a4", images_for(), qk_norm=True, global_pool="map", reg_tokens=2, num_classes=0).to_bytes()


def opened(content: bytes) -> tuple[dict[str, Any], bytes]:
    """Header and data of a file; plan and network as objects."""
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    for name in ("plan", "network"):
        header[META][name] = json.loads(header[META][name])
    return header, content[8 + length :]


def sealed(header: dict[str, Any], data: bytes) -> bytes:
    """The file of a header and data, with a valid checksum."""
    header = json.loads(json.dumps(header))
    metadata = header[META]
    metadata |= {name: json.dumps(value) for name, value in metadata.items() if not isinstance(value, str)}
    metadata["sha256"] = "0" * 64
    text = json.dumps(header, separators=(",", ":")).encode()
    return resealed((len(text)).to_bytes(8, "little") + text + data)


def resealed(content: bytes) -> bytes:
    begin = content.find(b'"sha256":"') + 10
    blank = content[:begin] + b"0" * 64 + content[begin + 64 :]
    return content[:begin] + hashlib.sha256(blank).hexdigest().encode() + content[begin + 64 :]


def refused(content: bytes, message: str) -> None:
    with pytest.raises(QvitError, match=message):
        NativeModel(content)


def test_a_file_needs_no_artifact(whole: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").write_bytes(whole)
    model = load(tmp_path / "a.safetensors", threads=1)
    assert (model.shape, model.answer, model.class_names) == ((3, 32, 32), (7,), [])
    assert model.data_config["input_size"] == [3, 32, 32]
    images = images_for(3).numpy()
    assert np.array_equal(model(images), NativeModel(whole)(images)) and model(images).shape == (3, 7)


def test_files_that_are_none(tmp_path: Path, whole: bytes) -> None:
    with pytest.raises(QvitError, match="no packed model at"):
        load(tmp_path / "missing")
    (tmp_path / "a").write_bytes(b"x" * 100)
    with pytest.raises(QvitError, match=r"cannot load .*a: it is no safetensors file"):
        load(tmp_path / "a")
    refused(b"", "it is no safetensors file")
    refused((FILES / "packed-v1.safetensors").read_bytes(), "it is of format 1")
    refused((FILES / "packed-v2.safetensors").read_bytes(), "a model that the native engine does not run")


def test_damage_is_noticed(whole: bytes) -> None:
    for content in (whole[:-1], whole + b"\0", whole[:-5] + bytes([whole[-5] ^ 1]) + whole[-4:]):
        refused(content, "damaged")


def change(path: str, value: Any) -> Callable[[dict[str, Any]], None]:
    """Sets, or with `...` deletes, what lies at a path of keys separated by `|`."""

    def apply(header: dict[str, Any]) -> None:
        *way, last = path.split("|")
        place: Any = header
        for key in way:
            place = place[int(key) if isinstance(place, list) else key]
        if value is ...:
            del place[last]
        else:
            place[int(last) if isinstance(place, list) else last] = value

    return apply


FC1 = "blocks.0.mlp.fc1.weight.packed"
CHANGES: dict[str, tuple[Callable[[dict[str, Any]], None], str]] = {
    "newer": (change(f"{META}|version", "3"), "does not know"),
    "other format": (change(f"{META}|format", "gguf"), "no packed model"),
    "unknown metadata": (change(f"{META}|extra", "x"), "unknown key"),
    "missing metadata": (change(f"{META}|provenance", ...), "lack the key 'provenance'"),
    "no network": (change(f"{META}|network", "null"), "does not run"),
    "unknown key": (change(f"{META}|network|extra", 1), "unknown key 'extra'"),
    "unknown kind": (change(f"{META}|network|kind", "cnn"), "unknown kind 'cnn'"),
    "more heads": (change(f"{META}|network|stages|0|heads", 4), "'blocks.0.attn.key' has|do not fit|channel"),
    "another width": (change(f"{META}|network|stages|0|dim", 96), "bytes of codes, not|numbers, not"),
    "deeper": (change(f"{META}|network|stages|0|depth", 3), "lacks the site|lacks the tensor"),
    "shallower": (change(f"{META}|network|stages|0|depth", 1), "has no use for|its network lacks"),
    "much deeper": (change(f"{META}|network|stages|0|depth", 10**9), "no whole number"),
    "huge images": (change(f"{META}|network|image", [3, 8192, 8192]), "impossible number of tokens"),
    "no images": (change(f"{META}|network|image", [3, 4, 32]), "impossible images"),
    "no patch": (change(f"{META}|network|patch", [0, 8]), "no whole number"),
    "no forms": (change(f"{META}|network|nonlinear", ["i-vit"]), "impossible forms"),
    "an unknown form": (change(f"{META}|network|nonlinear", {"gelu": "i-sqrt"}), "'i-sqrt', which the native engine"),
    "a form elsewhere": (change(f"{META}|network|nonlinear", {"blocks.7.norm1": "i-vit"}), "has no 'blocks.7.norm1'"),
    "no epsilon": (change(f"{META}|network|epsilon", "x"), "impossible epsilon"),
    "fewer tokens": (change(f"{META}|network|prefix", 2), "more prefix tokens"),
    "more tokens": (change(f"{META}|network|prefix", 4), "fewer prefix tokens"),
    "no kinds": (change(f"{META}|plan|kinds", {}), "no list of kinds"),
    "site of no kind": (change(f"{META}|plan|sites|head.weight", 99), "no kind that is listed"),
    "site in float": (change(f"{META}|plan|kinds|0", None), "stays in float|scales"),
    "unknown site": (change(f"{META}|plan|sites|blocks.9.x", 0), "scales|lacks"),
    "no width": (change(f"{META}|plan|kinds|0|bit_width", 0), "no whole number"),
    "many widths": (change(f"{META}|plan|kinds|0|bit_width", [8] * 2000), "no widths"),
    "long scales": (change(f"{META}|plan|kinds|0|scale", [1 << 24, 1 << 24]), "no shape"),
    "another type": (change(f"{FC1}|dtype", "I8"), "type I8"),
    "no type": (change(f"{FC1}|dtype", "F3"), "unknown type"),
    "a shape": (change(f"{FC1}|shape", [1 << 45]), "no whole number"),
    "an overlap": (change("norm.bias|data_offsets", [0, 192]), "overlap"),
}


@pytest.mark.parametrize("case", CHANGES)
def test_sealed_changes(case: str, whole: bytes) -> None:
    header, data = opened(whole)
    apply, message = CHANGES[case]
    apply(header)
    refused(sealed(header, data), message)


POOLINGS: dict[str, tuple[Callable[[dict[str, Any]], None], str]] = {
    "no pooling": (change(f"{META}|network|pool", "none"), "impossible pooling"),
    "another pooling": (change(f"{META}|network|pool", "avg"), "impossible pooling"),
    "no description": (change(f"{META}|network|map", ...), "impossible pooling"),
    "unknown key": (change(f"{META}|network|map|extra", 1), "unknown key"),
    "more heads": (change(f"{META}|network|map|heads", 5), "multiple of 4 channels"),
    "wider": (change(f"{META}|network|map|hidden", 96), "bytes of codes, not|numbers, not"),
    "fewer tokens": (change(f"{META}|network|map|skip", 4), "no whole number"),
    "a classifier": (change(f"{META}|network|classes", 7), "lacks the"),
    "two MLPs": (change(f"{META}|network|mlp", "glu"), "bytes of codes, not|numbers, not|another kind"),
}


@pytest.mark.parametrize("case", POOLINGS)
def test_sealed_changes_of_the_pooling(case: str, tower: bytes) -> None:
    header, data = opened(tower)
    apply, message = POOLINGS[case]
    apply(header)
    refused(sealed(header, data), message)


def test_numbers_that_are_none(whole: bytes) -> None:
    header, data = opened(whole)
    for name, value, message in (
        ("norm.bias", b"\0\0\xc0\x7f", "NaN"),
        ("scales", b"\0\0\x80\x7f", "infinite"),
        ("scales", b"\0\0\0\0", "not positive"),
    ):
        begin = header[name]["data_offsets"][0]
        refused(sealed(header, data[:begin] + value + data[begin + 4 :]), message)


def test_texts_that_are_no_json(whole: bytes) -> None:
    length = int.from_bytes(whole[:8], "little")
    text, data = whole[8 : 8 + length].rstrip(), whole[8 + length :]
    for changed in (
        text[:-1],
        text + b"x",
        b"[" + text + b"]",
        text.replace(b'"version":"2"', b'"version":"2","version":"2"'),
        text.replace(b'"version":"2"', b'"version":' + b"[" * 5000 + b"]" * 5000),
        text.replace(b'"version":"2"', b'"version":NaN'),
        text.replace(b'"version":"2"', b'"version":"\xff"'),
        text.replace(b'"version":"2"', b'"version":"\\ud800"'),
        text.replace(b'"version":"2"', b'"version":01'),
    ):
        refused(resealed(len(changed).to_bytes(8, "little") + changed + data), "JSON|UTF-8|twice")


def mutations(content: bytes, count: int) -> Any:
    """Files with a valid seal in which bytes of the header or the data were changed, cut or repeated."""
    random_ = random.Random(11)
    length = int.from_bytes(content[:8], "little") + 8
    for _ in range(count):
        found = bytearray(content)
        for _ in range(random_.randint(1, 4)):
            place = random_.randrange(8, length) if random_.random() < 0.8 else random_.randrange(len(found))
            kind = random_.randrange(4)
            if kind == 0:
                found[place] = random_.randrange(256)
            elif kind == 1:
                found[place : place + 1] = random_.choice([b"9", b"-", b"[", b"1e9", b"0", b'"', b"null"])
            elif kind == 2:
                del found[place : place + random_.randint(1, 20)]
            else:
                found[place:place] = found[place : place + random_.randint(1, 20)]
        if (at := bytes(found).find(b'"sha256":"')) >= 0 and at + 74 < len(found):
            grown = len(found) - len(content)
            declared = int.from_bytes(content[:8], "little") + (grown if random_.random() < 0.7 else 0)
            found[:8] = max(0, declared).to_bytes(8, "little")
            yield resealed(bytes(found))


@pytest.mark.parametrize("name", ["whole", "tower"])
@pytest.mark.parametrize("count", [200, pytest.param(20_000, marks=pytest.mark.slow)])
def test_mutated_files_are_refused_or_run(count: int, name: str, request: pytest.FixtureRequest) -> None:
    whole: bytes = request.getfixturevalue(name)
    images = images_for(1).numpy()
    refusals = 0
    for content in mutations(whole, count):
        try:
            model = NativeModel(content, threads=1)
        except QvitError:
            refusals += 1
            continue
        if model.shape == (3, 32, 32):
            assert model(images).shape == (1, *model.answer)
    assert refusals > count / 4


@pytest.mark.parametrize("model", ["whole", "tower"])
def test_answers_are_those_of_the_loaded_file(model: str, request: pytest.FixtureRequest) -> None:
    """Every packed code and every float tensor is used: changing one changes the answer or is refused."""
    whole: bytes = request.getfixturevalue(model)
    header, data = opened(whole)
    images = torch.randn(16, 3, 32, 32).numpy()
    expected = NativeModel(whole)(images)
    for name, entry in header.items():
        if name == META:
            continue
        begin, end = entry["data_offsets"]
        changed = bytearray(data)
        if entry["dtype"] == "F32":
            values = np.frombuffer(changed, np.float32, (end - begin) // 4, begin)
            values[:] = values * 3 + 1
        else:
            changed[begin:end] = bytes(255 - byte for byte in changed[begin:end])
        assert not np.array_equal(NativeModel(sealed(header, bytes(changed)))(images), expected), name
