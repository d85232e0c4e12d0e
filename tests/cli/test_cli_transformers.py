"""A folder of `transformers` as MODEL: quantized, packed and judged as timm's model is, and never asked for again."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import Qvit, qvit  # noqa: F401  (a fixture)
from image_sets import make_images
from tiny_models import shake

from qvit.deploy.engines import load
from qvit.errors import QvitError
from qvit.runs.directory import read_config
from qvit.runs.finished import load_run

transformers: Any = pytest.importorskip("transformers")
OPTIONS = ["--device", "cpu", "--threads", "1", "--calibration-images", "16", "--budget", "w8a8", "--json"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A small ViT of two classes with an image processor."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    labels = {"id2label": {0: "a", 1: "b"}}
    torch.manual_seed(0)
    config = transformers.ViTConfig(**sizes, image_size=32, patch_size=8, **labels)
    path = tmp_path / "vit"
    shake(transformers.ViTForImageClassification(config)).save_pretrained(path)
    preparation = {"size": {"height": 32, "width": 32}, "image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]}
    (path / "preprocessor_config.json").write_text(json.dumps(preparation))
    return path


@pytest.fixture
def images(tmp_path: Path) -> Path:
    return make_images(tmp_path / "images", {"a": 20, "b": 20})


def test_a_folder_is_quantized_and_packed_and_then_not_needed(
    qvit: Qvit,  # noqa: F811
    folder: Path,
    images: Path,
    tmp_path: Path,
) -> None:
    run = tmp_path / "run"
    with torch.no_grad():
        batch = torch.nn.functional.interpolate(torch.rand(2, 3, 4, 4), size=32, mode="bicubic")
        expected = transformers.ViTForImageClassification.from_pretrained(folder).eval()(batch).logits
    result = qvit("ptq", folder, "--data", images, "--out", run, *OPTIONS).json
    packed = qvit("pack", run, "--json").json["file"]
    shutil.rmtree(folder)
    assert result["agreement"] >= 80
    scores = qvit("evaluate", packed, "--data", images, "--json").json
    assert scores["images"] == 40
    artifact = load(packed, "reference").artifact
    assert artifact.data_config["mean"] == (0.1, 0.2, 0.3) and artifact.data_config["crop_mode"] == "squash"
    for model in (artifact.model(), load_run(run)):
        with torch.no_grad():
            error = (model(batch) - expected).norm() / expected.norm()
        assert 0 < error < 0.1
    assert load_run(run).get_submodule("norm").eps == 1e-12
    by_engine = load(packed, "reference")(batch)
    torch.testing.assert_close(by_engine, artifact.model()(batch), rtol=0.05, atol=0.05)


def test_other_commands_take_it(qvit: Qvit, folder: Path, images: Path, tmp_path: Path) -> None:  # noqa: F811
    assert qvit("cost", folder, "--json").json["macs"] > 0
    found = qvit(
        "sensitivity", folder, "--data", images, "--images", "8", "--widths", "4", "--device", "cpu", "--out",
        tmp_path / "s.json", "--json",
    ).json  # fmt: skip
    assert found["images"] == 8
    rows = qvit(
        "bench", folder, "--engine", "qvit-reference", "--no-peers", "--seconds", "0.01", "--rounds", "1", "--json"
    ).json
    assert rows


def test_more_classes_than_the_data_have_are_not_guessed(
    qvit: Qvit,  # noqa: F811
    folder: Path,
    tmp_path: Path,
) -> None:
    three = make_images(tmp_path / "three", {"a": 8, "b": 8, "c": 8})
    failed = qvit("ptq", folder, "--data", three, "--out", tmp_path / "run", *OPTIONS)
    assert "have 2 classes, the model 3" in failed.failed(1)


def test_a_run_of_a_stranger_opens_no_folder(
    qvit: Qvit,  # noqa: F811
    folder: Path,
    images: Path,
    tmp_path: Path,
) -> None:
    run = tmp_path / "run"
    qvit("ptq", folder, "--data", images, "--out", run, *OPTIONS)
    record = json.loads((run / "config.json").read_text())
    assert record["model"] == "vit_base_patch16_224" and record["weights"] == str(folder.resolve())
    for model in (str(folder), "someone/model"):
        (run / "config.json").write_text(json.dumps(record | {"model": model}))
        with pytest.raises(QvitError, match="is no name of timm's registry"):
            read_config(run)


def test_a_vision_tower_gives_features_from_its_packed_file(
    qvit: Qvit,  # noqa: F811
    tmp_path: Path,
) -> None:
    photos = make_images(tmp_path / "photos", {"all": 40})
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    torch.manual_seed(0)
    tower = transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**sizes, image_size=32, patch_size=8))
    shake(tower).eval().save_pretrained(tmp_path / "siglip")
    run = tmp_path / "run"
    qvit("ptq", tmp_path / "siglip", "--data", photos, "--unlabelled", "--out", run, *OPTIONS)
    packed = qvit("pack", run, "--json").json["file"]
    batch = torch.nn.functional.interpolate(torch.rand(4, 3, 4, 4) * 2 - 1, size=32, mode="bicubic")
    with torch.no_grad():
        expected = tower(batch).pooler_output
    features = load(packed, "reference")(batch)
    assert features.shape == (4, 32)
    assert torch.nn.functional.cosine_similarity(features, expected).min() > 0.98


def test_a_teacher_may_be_a_folder(
    qvit: Qvit,  # noqa: F811
    folder: Path,
    images: Path,
    tmp_path: Path,
) -> None:
    """Named by timm's name from then on; another's run names neither a folder of a model nor a repository."""
    run = tmp_path / "run"
    small = [word for pair in ("img_size=32", "depth=1", "embed_dim=24") for word in ("-m", pair)]
    student = ["train", "vit_tiny_patch16_224", *small, "--method", "float", "--epochs", "1", "--device", "cpu"]
    assert not qvit(*student, "--data", images, "--out", run, "--distill", "1", "--teacher", folder).code
    record = json.loads((run / "config.json").read_text())
    assert record["teacher"] == "vit_base_patch16_224" and record["teacher_weights"] == str(folder.resolve())
    assert record["teacher_kwargs"]["embed_dim"] == 32
    for teacher in (str(folder), "someone/model"):
        (run / "config.json").write_text(json.dumps(record | {"teacher": teacher}))
        with pytest.raises(QvitError, match="is no name of timm's registry"):
            read_config(run)
