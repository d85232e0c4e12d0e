"""Models of `transformers` all the way: ptq, pack, evaluate and bench, of features and with the weights of DeiT-T."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import Qvit, qvit  # noqa: F401  (a fixture)
from image_sets import make_images
from tiny_models import shake

from qvit.models.transformers import open_checkpoint
from qvit.tensors import decode, encode

transformers: Any = pytest.importorskip("transformers")
OPTIONS = ["--device", "cpu", "--threads", "1", "--calibration-images", "16", "--budget", "w8a8", "--json"]
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 32, "patch_size": 8}
TOWERS = {
    "dinov2": ("Dinov2Model", "Dinov2Config", SIZES | {"mlp_ratio": 2}),
    "dinov2 with registers": ("Dinov2WithRegistersModel", "Dinov2WithRegistersConfig", SIZES | {"mlp_ratio": 2}),
    "siglip": ("SiglipVisionModel", "SiglipVisionConfig", SIZES | {"intermediate_size": 64}),
}
#: The images of ImageNet's training split that are judged here.
PHOTOGRAPHS = 100


@pytest.mark.parametrize("tower", TOWERS)
def test_towers_are_walked_through(tower: str, qvit: Qvit, tmp_path: Path) -> None:  # noqa: F811
    cls, config, kwargs = TOWERS[tower]
    torch.manual_seed(0)
    model: Any = shake(getattr(transformers, cls)(getattr(transformers, config)(**kwargs)))
    folder, run, photos = tmp_path / "model", tmp_path / "run", make_images(tmp_path / "set", {"photos": 40}) / "photos"
    model.save_pretrained(folder)
    size = {"size": {"height": 32, "width": 32}, "do_center_crop": False}
    (folder / "preprocessor_config.json").write_text(json.dumps(size))
    result = qvit("ptq", folder, "--data", photos, "--out", run, *OPTIONS).json
    assert result["agreement"] is None and result["features"]["cosine"] > 0.995
    assert result["features"]["neighbour_images"] == result["images"] == 8
    packed = qvit("pack", run, "--json").json["file"]
    scores = qvit("evaluate", packed, "--data", photos, "--weights", folder, "--engine", "reference", "--json").json
    assert scores["cosine"] > 0.995 and scores["images"] == 40 and scores["engine"] == "reference"
    timed = qvit(
        "bench", packed, "--weights", folder, "--data", photos, "--engine", "qvit-reference", "--rounds", "1",
        "--seconds", "0.01", "--images", "4", "--json",
    ).json  # fmt: skip
    (row,) = timed["rows"]
    assert row["cosine_to_float"] > 0.995 and row["cosine_to_simulated"] > 0.9999 and timed["right_cosine"] == 0.99


@pytest.mark.slow
def test_deit_of_transformers_is_as_accurate_as_that_of_timm(
    qvit: Qvit,  # noqa: F811
    real_data: Path,
    tmp_path: Path,
) -> None:
    """The folder has ViTForImageClassification, as DeiT-T's on the hub; its processor prepares images as timm does."""
    weights, classes = real_data / "deit_tiny_patch16_224.safetensors", real_data / "imagenet-classes.txt"
    names = [line.split("\t")[2] for line in classes.read_text().splitlines()]
    folder = tmp_path / "deit"
    config = transformers.ViTConfig(
        hidden_size=192, num_hidden_layers=12, num_attention_heads=3, intermediate_size=768, layer_norm_eps=1e-6,
        id2label=dict(enumerate(names)),
    )  # fmt: skip
    transformers.ViTForImageClassification(config).save_pretrained(folder)
    state = open_checkpoint(folder).to_transformers(decode(weights.read_bytes()).tensors)
    (folder / "model.safetensors").write_bytes(b"".join(encode(state, {"format": "pt"})))
    preparation = {
        "size": {"shortest_edge": 248}, "crop_size": {"height": 224, "width": 224}, "do_center_crop": True,
        "image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225], "resample": 3,
    }  # fmt: skip
    (folder / "preprocessor_config.json").write_text(json.dumps(preparation))
    with tarfile.open(real_data / "imagenet-sample.tar") as archive:
        for member in [own for own in archive.getmembers() if own.isfile()][::5][:PHOTOGRAPHS]:
            archive.extract(member, tmp_path / "photographs", filter="data")
    data = ["--data", real_data / "tiny-imagenet-train-0.tar", "--class-map", classes]
    judged = ["--eval-data", tmp_path / "photographs", "--batch-size", "25", *OPTIONS]
    results, files = {}, {}
    for name, model in {"timm": ["deit_tiny_patch16_224", "--weights", weights], "transformers": [folder]}.items():
        results[name] = qvit("ptq", *model, *data, *judged, "--out", tmp_path / name).json
        files[name] = qvit("pack", tmp_path / name, "--json").json["file"]
    for key in ("accuracy", "float_accuracy", "top5", "agreement"):
        assert results["transformers"][key] == results["timm"][key], key
    assert results["transformers"]["images"] == PHOTOGRAPHS and results["transformers"]["float_accuracy"] > 65
    where = ["--data", tmp_path / "photographs", "--class-map", classes, "--json"]
    scores = {name: qvit("evaluate", file, *where).json for name, file in files.items()}
    assert scores["transformers"]["top1"] == scores["timm"]["top1"] > 65
    features = qvit("evaluate", files["transformers"], *where, "--features", "--weights", folder).json
    assert features["cosine"] > 0.98 and features["tokens"] == 1
    timed = qvit(
        "bench", files["transformers"], "--engine", "qvit-reference", "--engine", "qvit-native", "--rounds", "1",
        "--seconds", "0.1", "--weights", folder, *data, "--eval-data", tmp_path / "photographs", "--images", "8",
        "--json",
    ).json  # fmt: skip
    assert timed["rows"] and all(row["error_to_simulated"] < 0.1 for row in timed["rows"])
