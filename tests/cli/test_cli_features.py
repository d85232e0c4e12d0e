"""Models that answer with features: quantized, judged, packed and measured without labels."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import Qvit, qvit  # noqa: F401  (a fixture)
from image_sets import make_images
from tiny_models import events, shake

from qvit.models.create import create_model
from qvit.tensors import encode

SIZES = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
HEADLESS = {"num_classes": 0, "global_pool": ""}
OPTIONS = ["--device", "cpu", "--threads", "1", "--calibration-images", "16"]


def arguments(**more: Any) -> list[str]:
    return [word for key, value in (SIZES | more).items() for word in ("-m", f"{key}={value}")]


def weights_of(path: Path, **more: Any) -> Path:
    torch.manual_seed(0)
    architecture: dict[str, Any] = SIZES | more
    model = shake(create_model("vit_small_patch16_224", **architecture))
    path.write_bytes(b"".join(encode(model.state_dict(), {})))
    return path


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    return make_images(tmp_path / "set", {"photos": 40}) / "photos"


def test_tokens_are_judged_by_cosine_and_the_worst_is_named(
    qvit: Qvit,  # noqa: F811
    photos: Path,
    tmp_path: Path,
) -> None:
    weights = weights_of(tmp_path / "w.safetensors", **HEADLESS)
    run = tmp_path / "run"
    command = ["ptq", "vit_small_patch16_224", *arguments(**HEADLESS), "--weights", weights, "--data", photos]
    answer = qvit(*command, "--budget", "w4a4", "--out", run, *OPTIONS)
    assert answer.code == 0, answer.err
    result = json.loads((run / "result.json").read_text())
    features = result["features"]
    assert result["agreement"] is result["divergence"] is result["accuracy"] is None and result["images"] == 8
    assert 0.8 < features["cosine"] < 1 and features["cosine_least"] < features["cosine"]
    assert 0 < features["relative_error"] < 0.6 and features["tokens"] == 17
    assert features["neighbour_images"] == 8 and "knn" not in features
    assert f"worst token: {features['worst_token']['name']}" in answer.out and "same nearest neighbour" in answer.out
    packed = qvit("pack", run, "--json").json["file"]
    for model, images, more in ((run, 8, []), (packed, 40, ["--weights", weights, "--engine", "reference"])):
        scores = qvit("evaluate", model, "--data", photos, *more, "--json").json
        assert scores["images"] == images and len(scores["by_token"]) == 17
        assert scores["by_token"][0]["name"] == "class token" and scores["by_token"][6]["name"] == "patch (1, 1)"
        assert scores["worst_token"] == min(scores["by_token"], key=lambda row: row["cosine"])
        text = qvit("evaluate", model, "--data", photos, *more).out
        assert "the worst of 17 tokens" in text and scores["worst_token"]["name"] in text
    assert qvit("evaluate", run, "--data", photos, "--json").json["cosine"] == pytest.approx(features["cosine"])
    exported = qvit("export", packed, "--to", "onnx")
    assert exported.code == 0 and "the features have a cosine of 1.0000" in exported.out
    assert "give its weights with --weights" in qvit("evaluate", packed, "--data", photos).failed(2)
    page = qvit("report", run, "--out", tmp_path / "page.html")
    assert f"{features['cosine']:.4f}" in page.out
    assert f"cosine of {features['cosine']:.4f}" in (tmp_path / "page.html").read_text()


def test_labels_say_how_well_neighbours_classify(qvit: Qvit, tmp_path: Path) -> None:  # noqa: F811
    weights = weights_of(tmp_path / "w.safetensors", num_classes=0)
    data = make_images(tmp_path / "set", {"a": 20, "b": 20})
    run = tmp_path / "run"
    result = qvit(
        "ptq", "vit_small_patch16_224", *arguments(num_classes=0), "--weights", weights, "--data", data, "--budget",
        "w8a8", "--out", run, *OPTIONS, "--json",
    ).json  # fmt: skip
    assert json.loads((run / "config.json").read_text())["num_classes"] == 0
    features = result["features"]
    assert features["cosine"] > 0.999 and features["tokens"] == 1 and features["worst_token"] is None
    assert 0 <= features["knn_reference"] <= 100 and abs(features["knn"] - features["knn_reference"]) <= 25
    other = make_images(tmp_path / "other", {"c": 5, "d": 5, "e": 5})
    scores = qvit("evaluate", run, "--data", other, "--json").json
    assert scores["images"] == 15 and scores["knn"] >= 0


def test_features_in_front_of_a_classifier_come_back_from_a_rotation(
    qvit: Qvit,  # noqa: F811
    tmp_path: Path,
) -> None:
    weights = weights_of(tmp_path / "w.safetensors", num_classes=2)
    data = make_images(tmp_path / "set", {"a": 20, "b": 20})
    run = tmp_path / "run"
    given = [*arguments(), "--weights", weights, "--data", data, "--out", run, *OPTIONS]
    result = qvit("ptq", "vit_small_patch16_224", *given, "--budget", "w5a8", "--rotate", "all", "--json").json
    assert "features" not in result
    packed = qvit("pack", run, "--json").json["file"]
    for model, more in ((run, []), (packed, ["--weights", weights])):
        scores = qvit("evaluate", model, "--data", data, "--features", *more, "--json").json
        assert scores["cosine"] > 0.97 and scores["relative_error"] < 0.3, "far off in another basis"
        assert "top1" in qvit("evaluate", model, "--data", data, "--json").json
    answer = qvit("evaluate", packed, "--data", data, "--features", "--weights", weights, "--engine", "torch")
    assert "answers with classes" in answer.failed(2)


def test_bench_judges_features_by_cosine(qvit: Qvit, photos: Path, tmp_path: Path) -> None:  # noqa: F811
    weights, page = weights_of(tmp_path / "w.safetensors", num_classes=0), tmp_path / "bench.html"
    command = [
        "bench", "vit_small_patch16_224", *arguments(num_classes=0), "--weights", weights, "--data", photos, "--engine",
        "qvit-reference", "--engine", "pytorch", "--rounds", "1", "--seconds", "0.01", "--calibration-images", "8",
        "--images", "4", "--out", page,
    ]  # fmt: skip
    answer = qvit(*command)
    assert answer.code == 0, answer.err
    result = json.loads(page.with_suffix(".json").read_text())
    assert result["right_cosine"] == 0.99 and "right_percent" not in result
    ours = next(row for row in result["rows"] if row["ours"])
    assert ours["top1_agreement"] is ours["agreement_with_simulated"] is None
    assert 0.99 < ours["cosine_to_float"] < 1 and ours["cosine_to_simulated"] > 0.999
    peers = [row for row in result["rows"] if not row["ours"]]
    assert peers and all(row["right"] is (row["cosine_to_float"] >= 0.99) for row in peers)
    assert "a mean cosine of at least 0.99 with the float features" in answer.out
    assert "as float %" not in answer.out and f"{ours['cosine_to_float']:.4f}" in answer.out
    text = page.read_text()
    assert f"{ours['cosine_to_float']:.4f}" in text and "same first class" not in text


def test_weights_of_a_classifier_serve_a_model_without(
    qvit: Qvit,  # noqa: F811
    photos: Path,
    tmp_path: Path,
) -> None:
    weights = weights_of(tmp_path / "w.safetensors", num_classes=7)
    result = qvit(
        "ptq", "vit_small_patch16_224", *arguments(num_classes=0), "--weights", weights, "--data", photos, "--budget",
        "w8a8", "--out", tmp_path / "run", *OPTIONS, "--json",
    ).json  # fmt: skip
    assert result["features"]["cosine"] > 0.999


def test_widths_are_chosen_by_the_features(qvit: Qvit, photos: Path, tmp_path: Path) -> None:  # noqa: F811
    weights, table = weights_of(tmp_path / "w.safetensors", **HEADLESS), tmp_path / "s.json"
    given = ["vit_small_patch16_224", *arguments(**HEADLESS), "--weights", weights, "--data", photos]
    measure = ["sensitivity", *given, "--images", "8", "--widths", "3,8", "--device", "cpu", "--out", table]
    assert qvit(*measure, "--json").json["metric"] == "features"
    assert "take the metric 'features' or 'cosine'" in qvit(*measure, "--metric", "fisher").failed(2)
    plan = ["allocate", table, "--budget", "4bit", "--out", tmp_path / "plan.json", *arguments(**HEADLESS)]
    assert qvit(*plan).code == 0
    mixed = ["ptq", *given, "--budget", "5bit", "--metric", "cosine", "--sensitivity-images", "4", *OPTIONS]
    assert qvit(*mixed, "--out", tmp_path / "mixed", "--json").json["metric"] == "cosine"
    other = ["--weights", weights_of(tmp_path / "c.safetensors", num_classes=3), "-m", "num_classes=3"]
    refused = [*given[:1], *arguments(), *other, "--data", photos, "--images", "8", "--metric", "features"]
    answer = qvit("sensitivity", *refused, "--device", "cpu", "--out", tmp_path / "t.json")
    assert "take the metric 'fisher', 'hessian' or 'kl'" in answer.failed(2)
    analyzed = qvit("analyze", *given, "--eval-data", make_images(tmp_path / "e", {"a": 4, "b": 4}), "--out",
                    tmp_path / "analysis")  # fmt: skip
    assert "answers with features, not with classes" in analyzed.failed(2)


def test_a_gate_of_features(qvit: Qvit, tmp_path: Path) -> None:  # noqa: F811
    photos = make_images(tmp_path / "set", {"photos": 120}) / "photos"
    weights, run = weights_of(tmp_path / "w.safetensors", num_classes=0), tmp_path / "run"
    command = ["ptq", "vit_small_patch16_224", *arguments(num_classes=0), "--weights", weights, "--data", photos]
    command += ["--deciding-images", "64", "--out", run, *OPTIONS]
    answer = qvit(*command, "--max-drop", "1")
    assert answer.code == 0, answer.err
    gate = json.loads((run / "result.json").read_text())["gate"]
    assert gate["measure"] == "features" and 0 < gate["drop"] <= 1 and 0.5 < gate["confidence"] <= 1
    assert gate["drop"] < gate["drop_at_most"] and all(trial["deviation"] > 0 for trial in gate["trials"])
    assert "moves features by" in answer.out and "points of top-1" not in answer.out + answer.err
    assert qvit("report", run, "--out", tmp_path / "page.html").code == 0
    assert "moves features by" in (tmp_path / "page.html").read_text()
    assert "even w8a8 moves features by" in qvit(*command, "--max-drop", "0", "--overwrite").failed(1)


def test_training_learns_the_float_models_features(
    qvit: Qvit,  # noqa: F811
    photos: Path,
    tmp_path: Path,
) -> None:
    """Without labels; what is learned is the features, so that they come nearer than calibration brought them."""
    weights = weights_of(tmp_path / "w.safetensors", **HEADLESS)
    command = ["train", "vit_small_patch16_224", *arguments(**HEADLESS), "--weights", weights, "--data", photos]
    command += ["--method", "lsq", "--plan", "w3a3", "--batch-size", "8", "--device", "cpu", "--augment", "none"]
    command += ["--set", "threads=1", "--set", "calibration_images=16"]
    assert "--distill-features learns those" in qvit(*command, "--out", tmp_path / "a").failed(2)
    learn = [*command, "--distill-features", "--lr", "1e-3"]
    assert "leave out mixup=0.2" in qvit(*learn, "--set", "mixup=0.2", "--out", tmp_path / "a").failed(2)
    assert qvit(*learn, "--dry-run", "--json").json["classes"] == 0
    few, many = (
        qvit(*learn, "--epochs", epochs, "--out", tmp_path / f"run{epochs}", "--json").json["features"]
        for epochs in (1, 12)
    )
    assert many["cosine"] > few["cosine"] and many["relative_error"] < few["relative_error"]
    assert events(tmp_path / "run1", "epoch")[0]["train_accuracy"] is None
    losses = [event["train_loss"] for event in events(tmp_path / "run12", "epoch")]
    assert losses[-1] < 0.7 * losses[0]
    assert qvit("report", tmp_path / "run1", tmp_path / "run12", "--out", tmp_path / "page.html").code == 0
    assert qvit("pack", tmp_path / "run12").code == 0


def test_features_are_learned_beside_classes(qvit: Qvit, photos: Path, tmp_path: Path) -> None:  # noqa: F811
    weights = weights_of(tmp_path / "w.safetensors", num_classes=3)
    data = make_images(tmp_path / "set", {"a": 20, "b": 20, "c": 20})
    command = [
        "train",
        "vit_small_patch16_224",
        *arguments(),
        "--weights",
        weights,
        "--method",
        "lsq",
        "--plan",
        "w3a3",
    ]
    command += ["--batch-size", "16", "--device", "cpu", "--epochs", "1", "--set", "threads=1", "--set", "log_every=1"]
    command += ["--set", "calibration_images=16", "--augment", "none"]
    first: dict[str, float] = {}
    for name, more in {"usual": [], "both": ["--distill-features"]}.items():
        result = qvit(*command, "--data", data, *more, "--out", tmp_path / name, "--json").json
        assert result["accuracy"] is not None and "features" not in result
        first[name] = events(tmp_path / name, "step")[0]["task_loss"]
    assert first["both"] > first["usual"]
    unlabelled = [*command, "-m", "num_classes=3", "--data", photos, "--distill-features", "--out", tmp_path / "u"]
    assert "no labels to train by" in qvit(*unlabelled).failed(2)
    assert qvit(*unlabelled, "--distill", "1", "--json").json["agreement"] >= 0
    assert "no labels to mix" in qvit(*unlabelled, "--distill", "1", "--set", "mixup=0.8", "--overwrite").failed(2)
    compiled = qvit(*command, "--data", data, "--distill-features", "--set", "compile=true", "--out", tmp_path / "c")
    assert "leave out compile, or distill_features" in compiled.failed(2)
