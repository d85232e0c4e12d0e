"""Commands on images without labels: what they print and write, and what they refuse."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from command_line import QUICK, SMALL_DIGITS, Qvit, qvit  # noqa: F401  (a fixture)
from image_sets import make_images
from tiny_models import events

SMALL_VIT = ["deit_tiny_patch16_224"]
for _argument in ("img_size=16", "patch_size=4", "embed_dim=16", "depth=1", "num_heads=2", "num_classes=5"):
    SMALL_VIT += ["-m", _argument]


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    return make_images(tmp_path / "set", {"photos": 50}) / "photos"


@pytest.fixture
def ptq(qvit: Qvit, float_run: Path, tmp_path: Path) -> Any:  # noqa: F811
    """Runs `qvit ptq` on digits without their labels into `tmp_path/run`."""
    given = ["--weights", float_run, "--out", tmp_path / "run", "--device", "cpu", "--threads", "1"]

    def call(*arguments: Any) -> Any:
        options = ["--unlabelled", "--calibration-images", "32", "--budget", "w3a3"]
        return qvit("ptq", *SMALL_DIGITS, *given, *options, *arguments)

    return call


def test_ptq_judges_by_agreement_and_divergence(ptq: Any, qvit: Qvit, tmp_path: Path) -> None:  # noqa: F811
    run = tmp_path / "run"
    answer = ptq()
    assert answer.code == 0 and "top-1" not in answer.out and "accuracy" not in answer.out
    result = json.loads((run / "result.json").read_text())
    assert result["accuracy"] is result["top5"] is result["float_accuracy"] is None
    assert 20 < result["agreement"] <= 100 and 0 < result["divergence"] < 1 and result["images"] == 597
    assert (
        f"same answer as the float model on {result['agreement']:.2f} % of 597 images without labels, divergence "
        f"{result['divergence']:.3g} nats"
    ) in answer.out
    assert events(run, "end")[0]["accuracy"] is None
    labelled = ptq("--no-unlabelled", "--overwrite", "--json").json
    assert labelled["agreement"] == result["agreement"] and labelled["divergence"] == result["divergence"]


def test_report_and_pack_of_such_a_run(ptq: Any, qvit: Qvit, tmp_path: Path) -> None:  # noqa: F811
    run, page = tmp_path / "run", tmp_path / "page.html"
    result = ptq("--json").json
    table = qvit("report", run, "--out", page).out
    assert "no labels" in table and f"{result['agreement']:.2f}" in table and "finished run" not in table
    text = page.read_text()
    assert f"answers as the float model on {result['agreement']:.2f} % of images without labels" in text
    (row,) = qvit("report", run, "--out", page, "--json").json["rows"]
    assert row["accuracy_mean"] is None and row["agreement"] == pytest.approx(result["agreement"])
    assert qvit("pack", run).code == 0
    scores = qvit("evaluate", run / "packed.safetensors", "--data", "digits", "--json").json
    assert scores["images"] == 597 and 0 < scores["top1"] <= 100, "the model has its classes without labels"
    said = qvit("inspect", run / "packed.safetensors", "--json").json["provenance"]
    assert said["agreement"] == result["agreement"]


def test_evaluate_needs_labels(ptq: Any, qvit: Qvit, photos: Path, tmp_path: Path) -> None:  # noqa: F811
    run = tmp_path / "run"
    assert ptq().code == 0 and qvit("pack", run).code == 0
    for model in (run, run / "packed.safetensors"):
        message = qvit("evaluate", model, "--data", photos, "--device", "cpu").failed(2)
        assert "photos has no labels to score by; `qvit ptq` judges without labels" in message
        pets = make_images(tmp_path / "pets", {"cat": 2, "dog": 2})
        message = qvit("evaluate", model, "--data", pets, "--device", "cpu").failed(2)
        assert "pets has 2 class folders, and the model 10 classes whose folders it does not know" in message


def test_training_needs_labels_or_a_teacher(qvit: Qvit, photos: Path, tmp_path: Path) -> None:  # noqa: F811
    command = ["train", *SMALL_VIT, "--method", "float", "--data", photos, *QUICK, "--out", tmp_path / "run"]
    message = qvit(*command).failed(2)
    assert "photos (train) has no labels to train by: give class folders, or learn from a teacher's answers" in message
    assert "no labels to train by" in qvit(*command, "--dry-run").failed(2)
    assert "no labels to train by" in qvit(*command, "--distill", "1", "--teacher", "vit_digits").failed(2)
    assert not (tmp_path / "run").exists()
    store, teacher = tmp_path / "labels", ["--teacher", tmp_path / "teacher"]
    folders = make_images(tmp_path / "five", {name: 4 for name in "abcde"})
    assert qvit("train", *SMALL_VIT, "--method", "float", "--data", folders, *QUICK, "--out", teacher[1]).code == 0
    written = qvit("labels", *SMALL_VIT, *teacher, "--data", photos, "--crops", "2", "--out", store, "--json").json
    assert written["images"] == 40 and written["crops"] == 80
    learn = ["--set", f"labels={store}", "--set", "crops_per_image=2"]
    result = qvit(*command, *learn, "--json").json
    assert result["accuracy"] is None and result["agreement"] is None and result["images"] == 10
    (epoch,) = events(tmp_path / "run", "epoch")
    assert 0 <= epoch["train_accuracy"] <= 100, "how often the first class is the teacher's"
    again = qvit("train", *SMALL_VIT, "--method", "lsq", "--plan", "w4a4", "--weights", tmp_path / "run", "--data",
                 photos, *QUICK, *learn, "--out", tmp_path / "lsq")  # fmt: skip
    assert again.code == 0, again.err
    assert "of 10 images without labels, divergence" in again.out


def test_sensitivity_and_bench(qvit: Qvit, photos: Path, float_run: Path, tmp_path: Path) -> None:  # noqa: F811
    options = ["--weights", float_run, "--images", "4", "--device", "cpu"]
    table = tmp_path / "s.json"
    broken = [photos / f"cut_{number}.jpg" for number in range(5)]
    for path in broken:
        path.write_bytes(b"no image")
    grey = ["sensitivity", *SMALL_DIGITS, "--data", photos, *options, "--images", "44", "--out", table]
    assert "cannot read image 'cut_" in qvit(*grey).failed(1)
    assert qvit(*grey, "--on-bad-image", "skip").code == 0
    assert qvit("allocate", table, "--budget", "4bit", "--out", tmp_path / "plan.json",
                *SMALL_DIGITS[1:]).code == 0  # fmt: skip
    for path in broken:
        path.unlink()
    bench = ["bench", *SMALL_VIT, "--data", photos, "--engine", "qvit-reference", "--calibration-images", "8"]
    result = qvit(*bench, "--rounds", "1", "--seconds", "0.01", "--json").json
    assert result["compared_images"] == 10 and "without labels" in result["images"]
    assert "go with --data" in qvit("bench", *SMALL_VIT, "--unlabelled").failed(2)


def test_analyses_of_accuracy_need_labels(qvit: Qvit, photos: Path, tmp_path: Path) -> None:  # noqa: F811
    message = qvit("analyze", *SMALL_VIT, "--data", photos, "--what", "widths", "--out", tmp_path / "a").failed(2)
    assert "photos (test) has no labels to judge by" in message


def test_albums_taken_for_classes_are_no_silent_loss(
    qvit: Qvit, photos: Path, float_run: Path, tmp_path: Path  # noqa: F811
) -> None:  # fmt: skip
    albums = make_images(tmp_path / "albums", {"may": 20, "june": 20})
    options = ["--weights", float_run, "--budget", "w8a8", "--calibration-images", "8", "--device", "cpu"]
    command = ["ptq", *SMALL_DIGITS, "--data", albums, *options, "--out", tmp_path / "run"]
    message = qvit(*command).failed(1)
    assert "have 10 classes, the model 2, and nothing trains its classifier" in message and "--unlabelled" in message
    assert qvit(*command, "--unlabelled", "--json").json["images"] == 8
