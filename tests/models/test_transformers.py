"""Checkpoints of `transformers`: the converted model answers as the original, weights go back as they came, and what is
wrong with a folder is said.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import shake
from torch import Tensor, nn

from qvit.data.open import data_config_of
from qvit.errors import QvitError, UsageError
from qvit.models.create import create_model, create_shapes
from qvit.models.transformers import open_checkpoint
from qvit.models.transformers.base import CONVERTERS
from qvit.tensors import decode, encode

transformers: Any = pytest.importorskip("transformers")

SIZES = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48, "image_size": 32,
    "patch_size": 8,
}  # fmt: skip
TEXT = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16, "vocab_size": 99}
TEXT |= {"bos_token_id": 0, "eos_token_id": 1}
DINO = {key: SIZES[key] for key in SIZES if key != "intermediate_size"} | {"mlp_ratio": 2}
LABELS = {"id2label": {index: f"class {index}" for index in range(5)}}
SWIN = {
    "image_size": 32, "patch_size": 2, "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4,
}  # fmt: skip
Answer = Callable[[Any], Tensor]


def _logits(output: Any) -> Tensor:
    return output.logits


def _pooled(output: Any) -> Tensor:
    return output.pooler_output


def _class_token(output: Any) -> Tensor:
    return output.last_hidden_state[:, 0]


def _tower(text: bool = True, **kwargs: Any) -> dict[str, Any]:
    return {"vision_config": SIZES, **({"text_config": TEXT} if text else {}), **kwargs}


# Class, config class, its arguments, and what timm's model should answer.
CASES: dict[str, tuple[str, str, dict[str, Any], Answer]] = {
    "vit": ("ViTForImageClassification", "ViTConfig", SIZES | LABELS, _logits),
    "vit features": ("ViTModel", "ViTConfig", SIZES | {"qkv_bias": False, "hidden_act": "quick_gelu"}, _class_token),
    "deit": ("DeiTForImageClassification", "DeiTConfig", SIZES | LABELS, _logits),
    "deit distilled": ("DeiTForImageClassificationWithTeacher", "DeiTConfig", SIZES | LABELS, _logits),
    "swin": ("SwinForImageClassification", "SwinConfig", SWIN | LABELS, _logits),
    "swin features": ("SwinModel", "SwinConfig", SWIN | {"image_size": 24}, _pooled),
    "dinov2": ("Dinov2Model", "Dinov2Config", DINO, _pooled),
    "dinov2 registers": ("Dinov2WithRegistersModel", "Dinov2WithRegistersConfig", DINO, _pooled),
    "dinov2 gated": ("Dinov2Model", "Dinov2Config", DINO | {"use_swiglu_ffn": True, "mlp_ratio": 3}, _pooled),
    "dinov3": ("DINOv3ViTModel", "DINOv3ViTConfig", SIZES | {"num_register_tokens": 4}, _pooled),
    "dinov3 gated": (
        "DINOv3ViTModel", "DINOv3ViTConfig", SIZES | {"use_gated_mlp": True, "hidden_act": "silu"}, _pooled,
    ),
    "clip": ("CLIPVisionModel", "CLIPVisionConfig", SIZES, _pooled),
    "clip projection": (
        "CLIPVisionModelWithProjection", "CLIPVisionConfig", SIZES | {"projection_dim": 24}, lambda o: o.image_embeds,
    ),
    "clip classes": ("CLIPForImageClassification", "CLIPConfig", _tower() | LABELS, _logits),
    "siglip": ("SiglipVisionModel", "SiglipVisionConfig", SIZES, _pooled),
    "siglip classes": ("SiglipForImageClassification", "SiglipConfig", _tower() | LABELS, _logits),
    "beit": (
        "BeitForImageClassification", "BeitConfig", SIZES | LABELS | {"use_relative_position_bias": True}, _logits,
    ),
    "beit features": (
        "BeitModel",
        "BeitConfig",
        SIZES | {"use_shared_relative_position_bias": True, "use_mean_pooling": False, "layer_scale_init_value": 0.0}
        | {"use_absolute_position_embeddings": True},
        _pooled,
    ),
}  # fmt: skip


def original(case: str = "vit") -> Any:
    """A small random model of `transformers`, in eval mode."""
    cls, config, kwargs, _ = CASES[case]
    torch.manual_seed(3)
    return shake(getattr(transformers, cls)(getattr(transformers, config)(**kwargs))).eval()


def saved(folder: Path, case: str = "vit", **preparation: Any) -> Path:
    original(case).save_pretrained(folder)
    if preparation:
        (folder / "preprocessor_config.json").write_text(json.dumps(preparation))
    return folder


def changed(folder: Path, change: Callable[[dict[str, Any]], Any]) -> Path:
    """The same folder with another config."""
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def with_tensors(folder: Path, change: Callable[[dict[str, Tensor]], Any]) -> Path:
    file = folder / "model.safetensors"
    tensors = dict(decode(file.read_bytes()).tensors)
    change(tensors)
    file.write_bytes(b"".join(encode(tensors, {"format": "pt"})))
    return folder


@torch.no_grad()
def answers(model: nn.Module, size: int = 32) -> Tensor:
    return model(torch.randn(3, 3, size, size, generator=torch.Generator().manual_seed(1)))


@pytest.mark.parametrize("case", CASES)
def test_the_converted_model_answers_as_the_original(case: str, tmp_path: Path) -> None:
    size = CASES[case][2].get("image_size", 32)
    theirs = CASES[case][3](answers(original(case), size))
    converted = create_model(str(saved(tmp_path, case))).eval()
    ours = answers(converted, size)
    assert theirs.std() > 0.01
    assert ours.shape == theirs.shape
    assert (ours - theirs).abs().max() < 1e-5 * max(1.0, float(theirs.abs().max()))


@pytest.mark.parametrize("case", CASES)
def test_weights_go_back(case: str, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(saved(tmp_path, case))
    back = checkpoint.to_transformers(create_model(str(tmp_path)).state_dict())
    expected = CASES[case][3](answers(original(case), CASES[case][2].get("image_size", 32)))

    def replace(tensors: dict[str, Tensor]) -> None:
        for key in list(tensors):
            if {key, f"vision_model.{key}"} & set(back):
                del tensors[key]
        assert all(re.search(checkpoint.converter.unused, key) for key in tensors)
        tensors.update(back)

    with_tensors(tmp_path, replace)
    returned = getattr(transformers, CASES[case][0]).from_pretrained(tmp_path).eval()
    found = CASES[case][3](answers(returned, CASES[case][2].get("image_size", 32)))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_every_type_is_compared_with_its_original(tmp_path: Path) -> None:
    seen = set()
    for case in CASES:
        seen.add(json.loads((saved(tmp_path / case, case) / "config.json").read_text())["model_type"])
    assert seen | {"clip", "siglip"} >= set(CONVERTERS)


@pytest.mark.parametrize("case", ["dinov2", "dinov2 registers"])
def test_position_embeddings_are_resampled_to_the_crop_as_the_original_does(case: str, tmp_path: Path) -> None:
    crop = {"height": 48, "width": 48}
    saved(tmp_path, case, size={"shortest_edge": 56}, crop_size=crop, do_center_crop=True, resample=3)
    model = create_model(str(tmp_path)).eval()
    config = data_config_of(model)
    assert config["input_size"] == (3, 48, 48)
    assert int(48 / config["crop_pct"]) == 56
    theirs = answers(original(case), 48).pooler_output
    torch.testing.assert_close(answers(model, 48), theirs, rtol=1e-5, atol=1e-5)


def test_the_image_processor_becomes_the_transform(tmp_path: Path) -> None:
    processor = transformers.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    processor.save_pretrained(tmp_path)
    config = data_config_of(create_model(str(saved(tmp_path, "clip"))))
    assert config["input_size"] == (3, 32, 32)
    assert config["mean"] == tuple(processor.image_mean) and config["std"] == tuple(processor.image_std)
    assert (config["interpolation"], config["crop_pct"], config["crop_mode"]) == ("bicubic", 1.0, "center")
    for key, value in {"resample": 7, "rescale_factor": 2.0, "size": {"longest_edge": 3}}.items():
        (tmp_path / "preprocessor_config.json").write_text(json.dumps({key: value}))
        with pytest.raises(QvitError, match=f"preprocessor_config.json: '{key}'"):
            create_model(str(tmp_path))


def test_classes_are_those_of_the_labels(tmp_path: Path) -> None:
    saved(tmp_path)
    assert create_model(str(tmp_path)).get_parameter("head.weight").shape[0] == 5
    assert create_shapes(str(tmp_path)).get_parameter("head.weight").shape[0] == 5
    assert not hasattr(create_model(str(tmp_path), num_classes=0).get_submodule("head"), "weight")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.update(model_type="llama"), "models of type 'llama' are not read"),
        (lambda c: c.update(architectures=["ViTForMaskedImageModeling"]), "its decoder of pixels is no part of timm"),
        (lambda c: c.update(architectures=[["x"]]), "is not read"),
        (lambda c: c.update(hidden_size=-4), "'hidden_size' is -4, not a whole number"),
        (lambda c: c.update(num_hidden_layers=100_000), "depth"),
        (lambda c: c.update(hidden_size=1 << 19), "embed_dim"),
        (lambda c: c.update(image_size=[1, 2, 3]), "'image_size'"),
        (lambda c: c.update(hidden_act={"a": 1}), "the activation"),
        (lambda c: c.update(qkv_bias="yes"), "'qkv_bias' is 'yes', neither true nor false"),
        (lambda c: c.update(layer_norm_eps=1e400), "config"),
        (lambda c: c.update(layer_norm_eps=-1), "norm_eps"),
        (lambda c: c.update(num_attention_heads=5), "cannot make"),
        (lambda c: c.update(hidden_size=64), "do not fit"),
        (lambda c: c.update(num_hidden_layers=3), "lack 'vit.encoder.layer.2"),
        (lambda c: c.update(num_hidden_layers=1), "have the unknown 'vit.encoder.layer.1"),
        (lambda c: c.update(id2label=7), "'id2label' is 7, no object"),
    ],
)  # fmt: skip
def test_a_wrong_config_is_refused_in_a_sentence(
    change: Callable[[dict[str, Any]], Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(QvitError, match=message) as caught:
        create_model(str(changed(saved(tmp_path), change)))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("vit.layernorm.weight"), "lack 'vit.layernorm.weight'"),
        (lambda t: t.update(more=torch.zeros(2)), "have the unknown 'more'"),
        (lambda t: t.update({"vit.layernorm.weight": torch.zeros(7)}), "wrong shape"),
        (lambda t: t.update({"vit.layernorm.weight": torch.full((32,), torch.nan)}), "NaN"),
        (
            lambda t: t.update({"vit.encoder.layer.0.attention.attention.key.weight": torch.zeros(32, 7)}),
            "do not fit together",
        ),
    ],
)
def test_wrong_weights_are_refused_in_a_sentence(
    change: Callable[[dict[str, Tensor]], Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(QvitError, match=message) as caught:
        create_model(str(with_tensors(saved(tmp_path), change)))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("case", "change", "message"),
    [
        ("dinov3", {"key_bias": True}, "biases of q and v"),
        ("swin", {"use_absolute_embeddings": True}, "no position embedding"),
        ("siglip", {"vision_use_head": False}, "no single vector"),
        ("dinov2", {"architectures": ["Dinov2ForImageClassification"]}, "side by side"),
    ],
)
def test_what_timm_cannot_express_is_refused_with_the_reason(
    case: str, change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(QvitError, match=message):
        create_model(str(changed(saved(tmp_path, case), lambda config: config.update(change))))


def test_a_folder_without_weights_says_so(tmp_path: Path) -> None:
    (saved(tmp_path) / "model.safetensors").unlink()
    with pytest.raises(QvitError, match=r"has no model\.safetensors"):
        create_model(str(tmp_path))


def test_repositories_of_the_hub_are_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    asked: list[str] = []

    def download(name: str, **_: Any) -> str:
        asked.append(name)
        return str(saved(tmp_path))

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    model = create_model("someone/tiny-vit").eval()
    assert asked == ["someone/tiny-vit"]
    torch.testing.assert_close(answers(model), answers(original()).logits, rtol=1e-5, atol=1e-5)

    def offline(name: str, **_: Any) -> str:
        raise OSError("no network\nat all")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(QvitError, match="cannot get 'someone/other': no such folder, and from the hub: no network$"):
        create_model("someone/other")
    for name in ("no/such/folder", "x" * 300, "timm/nothing"):
        with pytest.raises(UsageError):
            create_model(name)
