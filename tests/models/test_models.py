"""Float weights: files of every kind, what does not fit, what is not executed, and models by name."""

from __future__ import annotations

import argparse
import logging
import math
import pickle
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file
from tiny_models import (
    SMALL,
    Evil,
    digits_model,
)
from torch import Tensor, nn

from qvit.errors import QvitError, UsageError
from qvit.models.create import create_model, load_weights, vit_digits


def weights_file(folder: Path, kind: str, state: dict[str, Tensor]) -> Path:
    if kind == "safetensors":
        save_file(state, folder / "weights.safetensors")
        return folder / "weights.safetensors"
    wrapped: Any = {
        "pth": state,
        "pt": state,
        "model.pth": {"model": state, "epoch": 3},
        "state_dict.pth": {"state_dict": state},
        "module.pth": {"state_dict": {f"module.{key}": value for key, value in state.items()}},
    }[kind]
    path = folder / f"weights.{kind}"
    torch.save(wrapped, path)
    return path


@pytest.mark.parametrize("kind", ["safetensors", "pth", "pt", "model.pth", "state_dict.pth", "module.pth"])
def test_weights_of_every_kind_are_loaded(tmp_path: Path, kind: str) -> None:
    source = digits_model(seed=4)
    path = weights_file(tmp_path, kind, source.state_dict())
    loaded = create_model("vit_digits", weights=path, **SMALL)
    assert all(torch.equal(value, source.state_dict()[key]) for key, value in loaded.state_dict().items())


def test_a_pickle_with_code_is_refused_and_not_executed(tmp_path: Path) -> None:
    target = tmp_path / "executed"
    path = tmp_path / "weights.pth"
    for archive in (True, False):
        if archive:
            torch.save({"state_dict": Evil(target)}, path)
        else:
            path.write_bytes(pickle.dumps(Evil(target)))
        with pytest.raises(QvitError, match=f"cannot read the weights {path}") as caught:
            create_model("vit_digits", weights=path, **SMALL)
        assert "\n" not in str(caught.value) and not target.exists()
    pickle.loads(path.read_bytes())
    assert target.exists(), "the file was harmless: this test would prove nothing"


def test_a_whole_pickled_model_is_refused(tmp_path: Path) -> None:
    torch.save(digits_model(), tmp_path / "model.pth")
    with pytest.raises(QvitError, match=r"cannot read the weights .*model\.pth"):
        create_model("vit_digits", weights=tmp_path / "model.pth", **SMALL)


def _quantized() -> Tensor:
    return torch.quantize_per_tensor(torch.zeros(16), 0.1, 0, torch.qint8)


ODD_VALUES: dict[str, tuple[Callable[[], Any], str]] = {
    "a number": (lambda: 3, "'norm.bias' in it is a int, not a dense tensor"),
    "a list": (lambda: [0.0] * 16, "'norm.bias' in it is a list"),
    "nothing": (lambda: None, "'norm.bias' in it is a NoneType"),
    "sparse": (lambda: torch.zeros(16).to_sparse(), "'norm.bias' in it is torch._utils._rebuild_sparse_tensor"),
    "quantized": (_quantized, "'norm.bias' in it is torch._utils._rebuild_qtensor"),
    "without storage": (lambda: torch.zeros(16, device="meta"), "'norm.bias' in it is torch._utils._rebuild_meta"),
    "complex": (lambda: torch.zeros(16, dtype=torch.complex64), "tensor 'norm.bias': it is of type torch.complex64"),
    "integers": (lambda: torch.zeros(16, dtype=torch.int64), "'norm.bias' is torch.int64, not torch.float32"),
    "truth values": (lambda: torch.zeros(16, dtype=torch.bool), "'norm.bias' is torch.bool, not torch.float32"),
    "too large": (
        lambda: torch.full((16,), 1e300, dtype=torch.float64),
        "NaN or infinite values, first in 'norm.bias'",
    ),
    "huge": (lambda: torch.zeros(1).expand(10**6, 10**6), "tensor 'norm.bias': 1000000000000 elements"),
}


@pytest.mark.filterwarnings("ignore:.*quantized tensor creation functions")
@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("kind", ODD_VALUES)
def test_values_that_are_no_weights_are_refused_by_name(tmp_path: Path, kind: str, legacy: bool) -> None:
    make, message = ODD_VALUES[kind]
    path = tmp_path / "weights.pth"
    state = digits_model(seed=4).state_dict() | {"norm.bias": make()}
    torch.save({"model": state}, path, _use_new_zipfile_serialization=not legacy)
    with pytest.raises(QvitError, match=re.escape(message)) as caught:
        create_model("vit_digits", weights=path, **SMALL)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("legacy", [False, True])
def test_other_objects_beside_the_weights_are_left_alone(tmp_path: Path, legacy: bool) -> None:
    source = digits_model(seed=4)
    optimizer = torch.optim.AdamW(source.parameters())
    strided = nn.Parameter(source.state_dict()["head.weight"].T.contiguous().T)
    file: dict[str, Any] = {
        "model": source.state_dict() | {"head.weight": strided},
        "args": argparse.Namespace(lr=1e-3), "optimizer": optimizer.state_dict(), "scores": [np.float64(1.0), {1, 2}],
        "harm": Evil(tmp_path / "executed"),
    }  # fmt: skip
    torch.save(file, tmp_path / "w.pth", _use_new_zipfile_serialization=not legacy)
    loaded = create_model("vit_digits", weights=tmp_path / "w.pth", **SMALL).state_dict()
    assert all(torch.equal(value, source.state_dict()[key]) for key, value in loaded.items())
    assert not (tmp_path / "executed").exists()


def _rewritten(path: Path, change: Callable[[str, bytes], bytes], compression: int = zipfile.ZIP_STORED) -> None:
    with zipfile.ZipFile(path) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in parts.items():
            archive.writestr(name, change(name, content))


def test_archives_that_torch_does_not_write_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"

    def refused(message: str) -> None:
        with pytest.raises(QvitError, match=message):
            create_model("vit_digits", weights=path, **SMALL)

    def whole() -> None:
        torch.save(digits_model(seed=4).state_dict(), path)

    whole()
    _rewritten(path, lambda _, content: content, zipfile.ZIP_DEFLATED)
    refused("compressed, which torch.save does not do")
    whole()
    _rewritten(path, lambda name, content: content[:-4] if name.endswith("/data/0") else content)
    refused("storage '0' should have 64 bytes, and has 60")
    whole()
    _rewritten(path, lambda name, content: b"big" if name.endswith("byteorder") else content)
    refused("big-endian")
    whole()
    endless = b"\x80\x02" + b"]" * 1_000_001 + b"."
    _rewritten(path, lambda name, content: endless if name.endswith("data.pkl") else content)
    refused("more than 1,000,000 instructions")
    whole()
    nested = b"\x80\x02}" + b")" + b"\x85" * 100_000 + b"K\x01s."  # a key that Python hashes until its stack is full
    _rewritten(path, lambda name, content: nested if name.endswith("data.pkl") else content)
    refused("1 missing|missing, first")
    path.write_bytes(b"PK" + bytes(100))
    refused("it is damaged")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.update({"blocks.0.mlp.fc1.weight": torch.zeros(3, 3)}), r"1 wrong shape, first blocks\.0\.mlp"),
        (lambda s: s.pop("norm.bias"), r"1 missing, first norm\.bias"),
        (lambda s: s.update({"neck.weight": torch.zeros(2)}), r"1 unknown, first neck\.weight"),
        (lambda s: s["norm.bias"].fill_(math.nan), "NaN or infinite"),
        (lambda s: s["norm.bias"].fill_(math.inf), "NaN or infinite"),
        (lambda s: s.update({"norm_quantizer.scale": torch.ones(1)}), "a quantized model"),
        (lambda s: s.pop("head.weight"), r"1 missing, first head\.weight"),
    ],
)
def test_weights_that_do_not_fit_are_refused_and_change_nothing(
    tmp_path: Path, change: Callable[[dict[str, Tensor]], Any], message: str
) -> None:
    state = {key: value.clone() for key, value in digits_model(seed=4).state_dict().items()}
    change(state)
    path = weights_file(tmp_path, "safetensors", state)
    model = digits_model()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(QvitError, match=message) as caught:
        load_weights(model, path)
    assert str(path) in str(caught.value)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


TINY = {"embed_dim": 24, "depth": 1, "num_heads": 2, "num_classes": 3}


@pytest.mark.filterwarnings("ignore::UserWarning")  # of timm, in its resampling of Swin's tables
@pytest.mark.parametrize(
    ("name", "changes", "said"),
    [
        ("vit_tiny_patch16_224", {"img_size": 64}, "pos_embed"),
        ("vit_tiny_patch16_224", {"patch_size": 4}, "pos_embed, patch_embed.proj.weight"),
        ("swin_tiny_patch4_window7_224", {"img_size": 64, "window_size": 8}, "relative_position_bias_table"),
    ],
)
def test_weights_for_another_size_are_resampled_as_timm_does(
    name: str, changes: dict[str, Any], said: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    swin = name.startswith("swin")
    own = TINY | ({"img_size": 32, "window_size": 4} if swin else {"img_size": 32, "patch_size": 8})
    own |= {"depths": (1, 1), "num_heads": (2, 2)} if swin else {}
    own = {key: value for key, value in own.items() if not (swin and key == "depth")}
    torch.manual_seed(0)
    source = timm.create_model(name, **own)
    for parameter in source.parameters():
        torch.nn.init.normal_(parameter)
    file = weights_file(tmp_path, "safetensors", {key: value.clone() for key, value in source.state_dict().items()})
    wanted = timm.create_model(name, **(own | changes), pretrained=True, pretrained_cfg_overlay={"file": str(file)})
    with caplog.at_level(logging.INFO, logger="qvit"):
        model = create_model(name, weights=file, **(own | changes))
    assert said.split(",")[0] in caplog.text and said.split(" ")[-1] in caplog.text
    for key, value in wanted.state_dict().items():
        assert torch.equal(model.state_dict()[key], value) or key.startswith("head."), key


def test_another_number_of_classes_leaves_the_classifier_untrained_and_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source = digits_model(seed=4).state_dict()
    path = weights_file(tmp_path, "pth", source)
    with caplog.at_level(logging.WARNING, "qvit"):
        create_model("vit_digits", weights=path, **SMALL)
    assert not caplog.records
    torch.manual_seed(7)
    fresh = create_model("vit_digits", num_classes=4, **SMALL).state_dict()
    torch.manual_seed(7)
    with caplog.at_level(logging.WARNING, "qvit"):
        loaded = create_model("vit_digits", weights=path, num_classes=4, **SMALL).state_dict()
    assert [record.message for record in caplog.records if "head.weight, head.bias" in record.message]
    for key, value in loaded.items():
        assert torch.equal(value, fresh[key] if key.startswith("head.") else source[key]), key


@pytest.mark.parametrize(
    ("name", "kwargs", "classifiers"),
    [
        ("swin_tiny_patch4_window7_224", {"depths": (1, 1), "embed_dim": 12, "num_heads": (1, 2)}, ["head.fc"]),
        ("eva02_tiny_patch14_224", {"depth": 1, "embed_dim": 12, "num_heads": 1}, ["head"]),
        ("deit_tiny_distilled_patch16_224", {"depth": 1, "embed_dim": 12}, ["head", "head_dist"]),
    ],
)
def test_classifiers_of_all_families_may_have_another_size(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str, kwargs: dict[str, Any], classifiers: list[str]
) -> None:
    source = create_model(name, num_classes=3, **kwargs).state_dict()
    path = weights_file(tmp_path, "safetensors", source)
    with caplog.at_level(logging.WARNING, "qvit"):
        loaded = create_model(name, weights=path, num_classes=4, **kwargs).state_dict()
    keys = [f"{classifier}.{leaf}" for classifier in classifiers for leaf in ("weight", "bias")]
    assert [record.message for record in caplog.records if ", ".join(keys) in record.message]
    assert all(torch.equal(value, source[key]) for key, value in loaded.items() if key not in keys)


@pytest.mark.parametrize("name", ["weights.safetensors", "weights.pth"])
def test_damaged_and_missing_weights_are_named(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    with pytest.raises(QvitError, match=f"no weights at {path}"):
        create_model("vit_digits", weights=path, **SMALL)
    for content in (b"", b"nonsense" * 99):
        path.write_bytes(content)
        with pytest.raises(QvitError, match=f"cannot read the weights {path}: .+"):
            create_model("vit_digits", weights=path, **SMALL)
    with pytest.raises(QvitError, match="no weights at"):
        create_model("vit_digits", weights=tmp_path, **SMALL)


def test_unknown_models_and_arguments() -> None:
    with pytest.raises(UsageError, match="unknown model 'deit_tinny_.*; did you mean 'deit_tiny_patch16_224'"):
        create_model("deit_tinny_patch16_224")
    with pytest.raises(UsageError, match="unknown model 'vit_digit'.*'vit_digits'"):
        create_model("vit_digit")
    with pytest.raises(UsageError, match="no argument 'embed_dimm'; did you mean 'embed_dim'"):
        create_model("vit_digits", embed_dimm=4)
    with pytest.raises(UsageError, match="no argument 'features_only'.*num_classes=0.*`forward_intermediates`"):
        create_model("vit_digits", features_only=True)
    with pytest.raises(UsageError, match="cannot make 'vit_digits'"):
        create_model("vit_digits", embed_dim=5, num_heads=2)
    with pytest.raises(UsageError, match="no pretrained weights"):
        create_model("vit_digits", pretrained=True)


def test_without_a_network_the_way_out_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*_: Any, **__: Any) -> None:
        raise OSError("We couldn't connect to the hub\nand more lines")

    monkeypatch.setattr(timm, "create_model", offline)
    with pytest.raises(QvitError, match="cannot fetch the pretrained weights of 'deit_tiny_patch16_224'.*--weights"):
        create_model("deit_tiny_patch16_224", pretrained=True)


def test_names_with_tag_and_prefix_are_understood() -> None:
    model = create_model("timm/vit_tiny_patch16_224.augreg_in21k", depth=1, img_size=32, embed_dim=24)
    assert type(model).__name__ == "VisionTransformer"


def test_vit_digits_is_what_its_description_says() -> None:
    model: Any = create_model("vit_digits")
    described = " ".join((vit_digits.__doc__ or "").split())
    thousands = round(sum(parameter.numel() for parameter in model.parameters()) / 1000)
    heads = model.blocks[0].attn.num_heads
    expected = f"width {model.embed_dim}, depth {len(model.blocks)}, {heads} heads, {thousands} thousand parameters"
    assert expected in described
    assert model(torch.zeros(2, 1, 8, 8)).shape == (2, 10)
    assert timm.create_model("vit_digits", num_classes=3)(torch.zeros(1, 1, 8, 8)).shape == (1, 3)
