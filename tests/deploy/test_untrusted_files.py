"""Packed files that were damaged or made to do harm: QvitError, always, with the file named; bounded memory and time.

Damage (cut, changed, extended) is found by the checksum. Intent writes a valid checksum, so the second half seals each
mutated file again and counts on the checks of what the file says.
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
import random
import re
import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import SMALL, calibrated_model, digit_batches, digits_model

from qvit.deploy.file import container, versions
from qvit.deploy.file.artifact import Artifact
from qvit.deploy.file.summary import describe, describe_file
from qvit.errors import QvitError
from qvit.models.calibrate import calibrate
from qvit.models.convert import quantize
from qvit.plan.quant_plan import QuantPlan, Rule
from qvit.training.checkpoint import save_weights

Header = dict[str, Any]
DOCUMENTS = ("plan", "model", "data_config", "class_names", "provenance", "network")
PLAN = QuantPlan.preset("w3a3").with_rules(
    Rule("blocks.*.attn.query", {"bit_width": [2, 3], "switchable_scale": True, "granularity": "per-tensor"}),
    Rule("blocks.*.attn.key", {"quantizer": "irm"}),
    Rule("blocks.*.mlp.fc1.weight", {"quantizer": "statsq"}),
    Rule("blocks.*.attn.qkv.input", {"switchable_scale": True, "token_bit_width": {"share": 0.5, "low": 2}}),
)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A packed model with everything that a file can have."""
    torch.manual_seed(0)
    model = calibrate(quantize(digits_model(), PLAN), digit_batches())
    target = tmp_path_factory.mktemp("whole") / "a.safetensors"
    Artifact.from_model(
        model, model_name="vit_digits", model_kwargs=SMALL, class_names=("a", "b"), provenance={"method": "lsq"}
    ).save(target)
    return target.read_bytes()


def opened(content: bytes) -> tuple[Header, bytes]:
    """Header and data; the documents in the metadata as objects."""
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    for name in DOCUMENTS:
        header["__metadata__"][name] = json.loads(header["__metadata__"][name])
    return header, content[8 + length :]


def sealed(header: Header, data: bytes, digest: bool = True) -> bytes:
    """The file of a header and data, with a valid checksum."""
    header = copy.deepcopy(header)
    metadata = header.get("__metadata__")
    if isinstance(metadata, dict):
        for name in DOCUMENTS:
            if name in metadata and not isinstance(metadata[name], str):
                metadata[name] = json.dumps(metadata[name], separators=(",", ":"))
        metadata["sha256"] = "0" * 64
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    content = len(text).to_bytes(8, "little") + text + data
    if not digest:
        return content
    return content.replace(b"0" * 64, hashlib.sha256(content).hexdigest().encode(), 1)


def refused(path: Path, content: bytes, message: str | None = None) -> None:
    path.write_bytes(content)
    with pytest.raises(QvitError, match=message) as caught:
        Artifact.load(path)
    assert str(path) in str(caught.value) and caught.value.__cause__ is None, caught.value.__cause__
    described(path)


def described(path: Path) -> Any:
    """What is said of a file without its model; a refusal is one that names the file."""
    try:
        return describe_file(path)
    except QvitError as error:
        assert str(path) in str(error) and error.__cause__ is None, error.__cause__
        return None


def test_the_file_is_whole_and_can_be_sealed_again(whole: bytes, tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(sealed(*opened(whole)))
    assert torch.isfinite(Artifact.load(tmp_path / "a").model()(digit_batches()[0])).all()


# Damage


def test_every_cut_is_refused(whole: bytes, tmp_path: Path) -> None:
    for length in [*range(0, 300), *range(300, len(whole), 23), len(whole) - 1]:
        refused(tmp_path / "a", whole[:length])
        assert described(tmp_path / "a") is None


def test_every_changed_byte_is_refused(whole: bytes, tmp_path: Path) -> None:
    chance = random.Random(0)
    for position in [*range(300), *range(300, len(whole), 2)]:
        changed = bytearray(whole)
        changed[position] ^= 1 << chance.randrange(8)
        refused(tmp_path / "a", bytes(changed))
        assert described(tmp_path / "a") is None


def test_bytes_that_are_moved_added_or_taken_are_refused(whole: bytes, tmp_path: Path) -> None:
    chance = random.Random(1)
    for _ in range(1000):
        begin, end = sorted(chance.sample(range(len(whole) + 1), 2))
        some = chance.randbytes(chance.randrange(1, 9))
        changed = chance.choice(
            [
                whole[:begin] + whole[end:],
                whole[:begin] + some + whole[begin:],
                whole[:begin] + some + whole[begin + len(some) :],
                whole[:end] + whole[begin:],
                whole + some,
            ]
        )
        if changed != whole:
            refused(tmp_path / "a", changed)


def test_what_is_no_file_of_ours(tmp_path: Path, whole: bytes) -> None:
    for content in (b"", b"\0" * 8, b"\0" * 100, b"{}", (2).to_bytes(8, "little") + b"{}", os.urandom(5000)):
        refused(tmp_path / "a", content)
    refused(tmp_path / "a", (1 << 63).to_bytes(8, "little") + b"{}" * 100, "no safetensors file")
    none, null = tmp_path / "none", Path("/dev/null")
    for path, message in ((tmp_path, "directory"), (none, "no packed model at"), (null, "no regular file")):
        with pytest.raises(QvitError, match=message):
            Artifact.load(path)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(QvitError, match="no regular file"):
        Artifact.load(tmp_path / "pipe")
    save_weights(tmp_path / "b", calibrated_model())
    with pytest.raises(QvitError, match=r"no checksum of a packed model; `qvit pack RUN` writes one"):
        Artifact.load(tmp_path / "b")


# Intent: what the container says


def change(path: str, value: Any) -> Callable[[Header], None]:
    """Sets, or with `...` deletes, what lies at a path of keys separated by `|`."""

    def apply(header: Header) -> None:
        *way, last = path.split("|")
        place: Any = header
        for key in way:
            place = place[int(key) if isinstance(place, list) else key]
        key = int(last) if isinstance(place, list) else last
        if value is ...:
            del place[key]
        elif callable(value):
            place[key] = value(place[key])
        else:
            place[key] = value

    return apply


META = "__metadata__"
PATCH, BIAS = "patch_embed.proj.weight.packed", "norm.bias"
DEEP = json.loads("[" * 400 + "]" * 400)
HEADERS: dict[str, tuple[Callable[[Header], None], str]] = {
    "newer": (change(f"{META}|version", "3"), "made by a newer qvit"),
    "older": (change(f"{META}|version", "0"), "format 0 is not known"),
    "no number": (change(f"{META}|version", "1.0"), "is no number"),
    "no version": (change(f"{META}|version", ...), "is no number"),
    "other format": (change(f"{META}|format", "gguf"), "no packed model"),
    "unknown metadata": (change(f"{META}|extra", "x"), "unknown key 'extra'"),
    "missing metadata": (change(f"{META}|provenance", ...), "lack the key 'provenance'"),
    "another network": (change(f"{META}|network", {"kind": "vit"}), "its network is not that of"),
    "a network of text": (change(f"{META}|network", '"vit"'), "its network is no object"),
    "metadata no text": (change(f"{META}|format", 1), "texts by key"),
    "metadata a list": (change(META, []), "checksum"),
    "unknown tensor": (change("zz.bias", {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}), "unknown tensor"),
    "missing tensor": (change(f"{BIAS}", ...), "gap"),
    "renamed tensor": (lambda h: h.update({"norm.bios": h.pop(BIAS)}), "lacks the tensor 'norm.bias'"),
    "renamed codes": (lambda h: h.update({"x.packed": h.pop(PATCH)}), f"lacks the tensor '{PATCH}'"),
    "renamed scales": (lambda h: h.update({"scale": h.pop("scales")}), "lacks the tensor 'scales'"),
    "unknown type": (change(f"{BIAS}|dtype", "F8_E4M3"), "unknown type"),
    "type no text": (change(f"{BIAS}|dtype", ["F32"]), "unknown type"),
    "type of the same size": (change(f"{BIAS}|dtype", "I32"), "not .* of torch.float32"),
    "codes of another type": (change(f"{PATCH}|dtype", "I8"), "of torch.int8"),
    "scales of another type": (change("scales|dtype", "I32"), "float32 numbers"),
    "another shape": (change(f"{BIAS}|shape", [4, 4]), r"\(4, 4\)"),
    "absurd shape": (change(f"{BIAS}|shape", [1 << 40, 1 << 40]), "which its shape"),
    "huge number": (change(f"{BIAS}|shape", [10**30]), "beyond 64 bits"),
    "many dimensions": (change(f"{BIAS}|shape", [1] * 60 + [16]), "impossible shape"),
    "negative shape": (change(f"{BIAS}|shape", [-4, -4]), "impossible shape"),
    "fractional shape": (change(f"{BIAS}|shape", [16.0]), "impossible shape"),
    "truth as a shape": (change(f"{BIAS}|shape", [True, 16]), "impossible shape"),
    "shape no list": (change(f"{BIAS}|shape", "16"), "impossible shape"),
    "offsets beyond the end": (
        change(f"{BIAS}|data_offsets", lambda o: [v + (1 << 30) for v in o]), "leaves a gap|take",
    ),
    "negative offsets": (change(f"{BIAS}|data_offsets", lambda o: [-64, 0]), "impossible offsets"),
    "reversed offsets": (change(f"{BIAS}|data_offsets", lambda o: o[::-1]), "bytes"),
    "three offsets": (change(f"{BIAS}|data_offsets", lambda o: [*o, 0]), "impossible offsets"),
    "overlap": (change(f"{BIAS}|data_offsets", lambda o: [v - 64 for v in o]), "overlaps"),
    "entry no object": (change(BIAS, [1]), "not described"),
    "entry with more": (change(f"{BIAS}|more", 1), "not described"),
    "deep": (change(f"{BIAS}|shape", DEEP), "more than 64 levels"),
}  # fmt: skip


@pytest.mark.parametrize("case", HEADERS)
def test_sealed_headers(whole: bytes, tmp_path: Path, case: str) -> None:
    mutate, message = HEADERS[case]
    header, data = opened(whole)
    mutate(header)
    refused(tmp_path / "a", sealed(header, data), message)


def test_sealed_texts_that_are_no_header(whole: bytes, tmp_path: Path) -> None:
    header, data = opened(whole)
    text = sealed(header, b"", digest=False)[8:].rstrip(b" ")
    name = b'"version":"2"'

    def seal(text: bytes) -> bytes:
        content = len(text).to_bytes(8, "little") + text + data
        return content.replace(b"0" * 64, hashlib.sha256(content).hexdigest().encode(), 1)

    digest = b'"sha256":"' + b"0" * 64 + b'"'
    for changed, message in {
        text + b"x": "JSON",
        text[:-1]: "JSON",
        b"[" + text + b"]": "no JSON object",
        text.replace(name, name + b"," + name): "the key 'version' is there twice",
        text.replace(name, b'"version":NaN'): "NaN is no number",
        text.replace(name, b'"version":"\xff"'): "JSON",
        text.replace(name, b'"version":' + b"9" * 5000): "JSON",
        text.replace(name, b'"version":' + b"[" * 100_000 + b"]" * 100_000): "JSON",
        text.replace(name, name + b"," + digest): "checksum",
        text + b" " * (container.MAX_HEADER + 1): "header takes",
    }.items():
        refused(tmp_path / "a", seal(changed), message)


# Intent: what the documents say

KINDS, SITES = f"{META}|plan|kinds", f"{META}|plan|sites"
DOCUMENT_CASES: dict[str, tuple[Callable[[Header], None], str | None]] = {
    "no plan": (change(f"{META}|plan", "{"), "JSON"),
    "plan a list": (change(f"{META}|plan", []), "plan is not an object"),
    "plan deep": (change(f"{META}|plan", DEEP), "plan"),
    "plan with more": (change(f"{META}|plan|rules", []), "plan is not an object"),
    "plan name": (change(f"{META}|plan|name", 3), "no text"),
    "no kinds": (change(KINDS, {}), "no list of kinds"),
    "kind a number": (change(f"{KINDS}|0", 3), "no scale"),
    "kind without scale": (change(f"{KINDS}|0|scale", ...), "no scale"),
    "kind with more numbers": (change(f"{KINDS}|0|gain", []), "float32 numbers"),
    "values of negative size": (change(f"{KINDS}|0|scale", [-1, -1]), "no shape"),
    "values of huge size": (change(f"{KINDS}|0|scale", [1 << 23] * 30), "float32 numbers"),
    "values of another shape": (change(f"{KINDS}|0|scale", [1]), r"number of site .*\(1,\)"),
    "unknown key": (change(f"{KINDS}|0|bit_widht", 3), "unknown key 'bit_widht'.*did you mean"),
    "other width": (change(f"{KINDS}|0|bit_width", 7), "packed codes of"),
    "no width": (change(f"{KINDS}|0|bit_width", 0), "between 1 and 16"),
    "wide": (change(f"{KINDS}|0|bit_width", 10**9), "between 1 and 16"),
    "width as a text": (change(f"{KINDS}|0|bit_width", "8"), "between 1 and 16"),
    "widths for no heads": (change(f"{KINDS}|0|bit_width", [8, 8]), "head"),
    "width null": (change(f"{KINDS}|0|bit_width", None), "between 1 and 16"),
    "width an object": (change(f"{KINDS}|0|bit_width", {"a": 1}), "between 1 and 16"),
    "learned": (change(f"{KINDS}|0|learn_bit_width", True), "still to be learned"),
    "unknown quantizer": (change(f"{KINDS}|0|quantizer", "lsqq"), "unknown quantizer"),
    "granularity": (change(f"{KINDS}|0|granularity", "per-head"), "needs a tensor with heads"),
    "granularity a list": (change(f"{KINDS}|0|granularity", []), "granularity"),
    "float instead": (change(f"{KINDS}|0", None), "lacks|float32 numbers"),
    "site of no kind": (change(f"{SITES}|head.weight", 99), "no kind"),
    "site of kind true": (change(f"{SITES}|head.weight", True), "no kind"),
    "site of a negative kind": (change(f"{SITES}|head.weight", -1), "no kind"),
    "unknown site": (change(f"{SITES}|head.wait", 0), "float32 numbers|does not have"),
    "missing site": (change(f"{SITES}|head.weight", ...), "lacks 1 site"),
    "site twice": (change(f"{SITES}|blocks.0.attn.query", 0), "twice"),
    "list without a place": (change(f"{SITES}|head.weight", [0]), "no place"),
    "list with two places": (change(f"{SITES}|#.#.head.weight", [0]), "no place"),
    "longer list": (change(f"{SITES}|blocks.#.attn.query", "2*0"), "float32 numbers|does not have"),
    "very long list": (change(f"{SITES}|blocks.#.attn.query", "9999*0"), "float32 numbers|does not have"),
    "far too many sites": (
        lambda h: h[META]["plan"]["sites"].update({f"b{n}.#.x": "9999*0" for n in range(50)}), "more than 20000 sites",
    ),
    "too long a list": (change(f"{SITES}|blocks.#.attn.query", "99999*0"), "no kind"),
    "no list": (change(f"{SITES}|blocks.#.attn.query", "x"), "no kind"),
    "unknown model": (change(f"{META}|model|name", "vit_digit"), "unknown model"),
    "model of another family": (change(f"{META}|model", {"name": "resnet18", "kwargs": {}}), "not supported"),
    "another model": (change(f"{META}|model", {"name": "deit_tiny_patch16_224", "kwargs": {}}), "does not have|lacks"),
    "model from the hub": (change(f"{META}|model|name", "hf-hub:someone/something"), "no name of a timm model"),
    "model from a folder": (change(f"{META}|model|name", "local-dir:/tmp"), "no name of a timm model"),
    "model name no text": (change(f"{META}|model|name", 3), "no name and no arguments"),
    "pretrained": (change(f"{META}|model|kwargs|pretrained", True), "no argument 'pretrained'"),
    "checkpoint": (change(f"{META}|model|kwargs|checkpoint_path", "/x.pth"), "no argument 'checkpoint_path'"),
    "device": (change(f"{META}|model|kwargs|device", "cuda"), "no argument 'device'"),
    "huge depth": (change(f"{META}|model|kwargs|depth", 10**9), "'depth' = 1000000000 is larger"),
    "many blocks": (change(f"{META}|model|kwargs|depth", 1000), "asks for 1000 blocks, and the file has 23 tensors"),
    "many stages": (change(f"{META}|model|kwargs|depths", [20] * 20), "asks for 400 blocks"),
    "more depth": (change(f"{META}|model|kwargs|depth", 2), "lacks"),
    "huge width": (change(f"{META}|model|kwargs|embed_dim", 10**9), "larger than"),
    "more width": (change(f"{META}|model|kwargs|embed_dim", 1 << 24), "lacks|is|not"),
    "no heads": (change(f"{META}|model|kwargs|num_heads", 0), "cannot"),
    "negative heads": (change(f"{META}|model|kwargs|num_heads", -2), None),
    "more heads": (change(f"{META}|model|kwargs|num_heads", 4), "head"),
    "huge image": (change(f"{META}|model|kwargs|img_size", 1 << 24), "pos_embed|cannot|packed"),
    "negative image": (change(f"{META}|model|kwargs|img_size", -8), None),
    "classes": (change(f"{META}|model|kwargs|num_classes", 1 << 24), "'num_classes' = 16777216: .* 65536"),
    "no classes": (change(f"{META}|model|kwargs|num_classes", 0), "does not have"),
    "an object": (change(f"{META}|model|kwargs|num_heads", {"a": 1}), "neither a number nor a text"),
    "a long list": (change(f"{META}|model|kwargs|img_size", [8] * 100), "100 entries"),
    "a list of lists": (change(f"{META}|model|kwargs|img_size", [[8, 8]]), "list of lists"),
    "a long text": (change(f"{META}|model|kwargs|act_layer", "x" * 99), "99 characters"),
    "unknown activation": (change(f"{META}|model|kwargs|act_layer", "gelux"), "cannot"),
    "a text for a layer": (change(f"{META}|model|kwargs|block_fn", "os.system"), "cannot"),
    "large number": (change(f"{META}|model|kwargs|mlp_ratio", 1e300), "larger than"),
    "infinite": (change(f"{META}|model", '{"name":"vit_digits","kwargs":{"mlp_ratio":1e999}}'), "beyond the range"),
    "arguments a list": (change(f"{META}|model|kwargs", []), "no name and no arguments"),
    "data keys": (change(f"{META}|data_config|file", "/etc/passwd"), "keys that are none"),
    "data size": (change(f"{META}|data_config|input_size", [1, 10**9, 8]), "input_size"),
    "data mean": (change(f"{META}|data_config|mean", ["x"]), "mean"),
    "data std": (change(f"{META}|data_config|std", [0]), "std"),
    "data crop": (change(f"{META}|data_config|crop_pct", 0), "crop_pct"),
    "data a list": (change(f"{META}|data_config", []), "keys that are none"),
    "class names": (change(f"{META}|class_names", ["a", 3]), "no list of texts"),
    "class names an object": (change(f"{META}|class_names", {}), "no list of texts"),
    "many class names": (change(f"{META}|class_names", ["a"] * 11), "11 classes, the model has 10"),
    "no Unicode": (change(f"{META}|class_names", ["\ud800"]), "not Unicode"),
    "provenance": (change(f"{META}|provenance", ["a"]), "no object"),
    "provenance deep": (change(f"{META}|provenance", {"a": DEEP}), "nested"),
    "provenance large": (change(f"{META}|provenance", {"a": 10**40}), "beyond 64 bits"),
}  # fmt: skip


@pytest.mark.parametrize("case", DOCUMENT_CASES)
@pytest.mark.filterwarnings("ignore:::timm")
def test_sealed_documents(whole: bytes, tmp_path: Path, case: str) -> None:
    mutate, message = DOCUMENT_CASES[case]
    header, data = opened(whole)
    mutate(header)
    begun = time.perf_counter()
    refused(tmp_path / "a", sealed(header, data), message)
    assert time.perf_counter() - begun < 20


# Intent: what the numbers say


def with_numbers(whole: bytes, tensor: str, index: int, value: float) -> bytes:
    header, data = opened(whole)
    begin = header[tensor]["data_offsets"][0] + 4 * index
    return sealed(header, data[:begin] + torch.tensor([value]).numpy().tobytes() + data[begin + 4 :])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1.0, 0.0, 1e-9, 1e38])
def test_sealed_scales(whole: bytes, tmp_path: Path, value: float) -> None:
    (count,) = opened(whole)[0]["scales"]["shape"]
    told = 0
    for index in range(count):
        (tmp_path / "a").write_bytes(with_numbers(whole, "scales", index, value))
        try:
            Artifact.load(tmp_path / "a").model()
        except QvitError as error:
            assert "site '" in str(error) and error.__cause__ is None
            told += 1
        else:
            assert value in (-1.0, 0.0, 1e-9, 1e38), "an offset, a gain or a shift may have this value"
    assert told == count if value != value or value == float("inf") else told > count / 2


def test_sealed_floats_and_codes(whole: bytes, tmp_path: Path) -> None:
    for value in (float("nan"), float("-inf")):
        refused(tmp_path / "a", with_numbers(whole, BIAS, 3, value), f"'{BIAS}' has NaN or infinite values")
        assert described(tmp_path / "a") is None
    header, data = opened(whole)
    model = calibrate(quantize(digits_model(num_classes=3), "w3a3"), digit_batches())
    Artifact.from_model(model, model_name="vit_digits", model_kwargs=SMALL | {"num_classes": 3}).save(tmp_path / "b")
    header, data = opened((tmp_path / "b").read_bytes())
    header[META]["plan"]["kinds"].append({"bit_width": 5, "scale": []})
    header[META]["plan"]["sites"]["head.weight"] = len(header[META]["plan"]["kinds"]) - 1
    begin, end = header["head.weight.packed"]["data_offsets"]
    size = end - begin - 48 * 5 // 8
    for name, entry in header.items():
        if name != META and entry["data_offsets"][0] >= end:
            entry["data_offsets"] = [value - size for value in entry["data_offsets"]]
    header["head.weight.packed"].update({"shape": [30], "data_offsets": [begin, end - size]})
    shorter = data[: end - size] + data[end:]
    (tmp_path / "c").write_bytes(sealed(header, shorter))
    Artifact.load(tmp_path / "c")


def test_two_scales_in_one_place_of_a_bank(whole: bytes, tmp_path: Path) -> None:
    """Heads of equal width share the scale of that width where scales are switchable and per tensor."""
    header, data = opened(whole)
    for kind in header[META]["plan"]["kinds"]:
        if kind.get("bit_width") == [2, 3]:
            kind["bit_width"] = [3, 3]
    refused(tmp_path / "a", sealed(header, data), "its scale cannot be that of its widths")


# Chance

HOSTILE = [
    None, True, False, 0, 1, -1, 2, 3, 17, 1 << 20, 1 << 31, 1 << 62, 10**30, 0.5, -0.0, 1e300, "", "1", "x", "NaN",
    "per-head", "per-channel", "irm", "statsq", "log2", "a" * 5000, [], [1], [[]], {}, {"a": 1}, [3, 1, 1], [2, 1],
    "F32", "U8", "BOOL", [0, 0], "\x00", "ß",
]  # fmt: skip


def places(data: Any, way: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The ways to all values of a JSON document."""
    found = [way] if way else []
    children = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    for key, value in children:
        found += places(value, (*way, key))
    return found


def scramble(header: Header, chance: random.Random) -> None:
    """Replaces, deletes, doubles, moves or renames something anywhere in the header."""
    way = chance.choice(places(header))
    place: Any = header
    for key in way[:-1]:
        place = place[key]
    key = way[-1]
    action = chance.randrange(6)
    if action == 0:
        del place[key]
    elif action == 1 and isinstance(place, dict):
        place[str(chance.choice(HOSTILE))[:99]] = place.pop(key)
    elif action == 2:
        other = chance.choice(places(header))
        value: Any = header
        for step in other:
            value = value[step]
        place[key] = copy.deepcopy(value)
    elif action == 3 and isinstance(place[key], int):
        place[key] = place[key] + chance.choice([-8, -1, 1, 8, 64, 1 << 32])
    elif action == 4 and isinstance(place[key], list):
        place[key] = place[key] * 2
    else:
        place[key] = copy.deepcopy(chance.choice(HOSTILE))


def check_scrambled(whole: bytes, path: Path, seeds: range) -> int:
    loaded = 0
    for seed in seeds:
        chance = random.Random(seed)
        header, data = opened(whole)
        for _ in range(chance.choice([1, 1, 1, 2, 5])):
            scramble(header, chance)
        if chance.random() < 0.1:
            position = chance.randrange(len(data))
            data = data[:position] + chance.randbytes(4) + data[position + 4 :]
        path.write_bytes(sealed(header, data))
        try:
            artifact = Artifact.load(path)
        except QvitError as error:
            assert error.__cause__ is None, (seed, error.__cause__)
            assert str(path) in str(error)
            continue
        loaded += 1
        assert artifact.model()(digit_batches()[0]).shape == (8, 10), seed
        assert described(path) == describe(artifact, path.stat().st_size), seed
    return loaded


@pytest.mark.filterwarnings("ignore:::timm")
def test_sealed_files_scrambled_by_chance(whole: bytes, tmp_path: Path) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    loaded = check_scrambled(whole, tmp_path / "a", range(600))
    assert 5 < loaded < 200, "changed provenance is harmless, a changed plan is not"
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 400_000, "kB"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:::timm")
def test_many_sealed_files_scrambled_by_chance(whole: bytes, tmp_path: Path) -> None:
    check_scrambled(whole, tmp_path / "a", range(1000, 6000))


# Memory that a model computes for itself


@pytest.mark.filterwarnings("ignore:::timm")
def test_a_small_file_cannot_ask_for_large_masks(tmp_path: Path) -> None:
    """Swin stores neither masks nor position indices: nothing in the file grows with the size of the image."""
    from qvit.models.create import create_model

    kwargs = {"depths": [2], "embed_dim": 16, "num_heads": [2], "img_size": 32, "window_size": 4, "num_classes": 5}
    model = calibrate(
        quantize(create_model("swin_tiny_patch4_window7_224", **kwargs).eval(), "w4a4"), [torch.randn(2, 3, 32, 32)]
    )
    Artifact.from_model(model, model_name="swin_tiny_patch4_window7_224", model_kwargs=kwargs).save(tmp_path / "a")
    header, data = opened((tmp_path / "a").read_bytes())
    header[META]["model"]["kwargs"]["img_size"] = 4096
    refused(tmp_path / "a", sealed(header, data), "bytes of indices, too many for this file")


# Versions


def test_an_older_version_goes_through_its_upgraders(
    whole: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A made-up format 0 called the scales otherwise and had no provenance; format 1 has no network."""
    header, data = opened(whole)
    header[META]["version"] = "0"
    del header[META]["provenance"], header[META]["network"]
    header["steps"] = header.pop("scales")
    (tmp_path / "a").write_bytes(sealed(header, data))

    def first(texts: dict[str, str], tensors: dict[str, Any]) -> versions.Parts:
        tensors["scales"] = tensors.pop("steps")
        return texts | {"version": "1", "provenance": "{}"}, tensors

    monkeypatch.setitem(versions.UPGRADERS, 0, first)
    assert Artifact.load(tmp_path / "a").provenance == {}
    monkeypatch.setitem(versions.UPGRADERS, 1, lambda texts, tensors: (texts, tensors))
    refused(tmp_path / "b", sealed(header, data), "did not give format 2")
    monkeypatch.delitem(versions.UPGRADERS, 0)
    refused(tmp_path / "b", sealed(header, data), "format 0 is not known")


def test_messages_name_the_file_once(whole: bytes, tmp_path: Path) -> None:
    (tmp_path / "cut.safetensors").write_bytes(whole[:-1])
    with pytest.raises(QvitError) as caught:
        Artifact.load(tmp_path / "cut.safetensors")
    assert len(re.findall("cut.safetensors", str(caught.value))) == 1
