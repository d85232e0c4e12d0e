"""Finished runs on other images: folders of some of their classes, their own set aside, whatever the batch."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tiny_models import make_images, small_config

from qvit.errors import QvitError
from qvit.runs.finished import evaluate_run, load_run
from qvit.runs.run import train


@pytest.fixture(scope="module")
def folder_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on JPEGs of four classes, in the folder beside its images."""
    root = tmp_path_factory.mktemp("folder")
    make_images(root / "images", {"ant": 12, "bee": 12, "cow": 12, "dog": 12}, size=16)
    config = small_config(method="float", data=str(root / "images"), batch_size=6, epochs=3, lr=3e-3)
    train(config, root / "run", quiet=True)
    return root


def test_evaluation_on_folders_that_are_some_of_the_classes(folder_run: Path, tmp_path: Path) -> None:
    """Numbered by the names of the run's classes, or by a class map: the same images, the same labels."""
    images = make_images(tmp_path / "some", {"bee": 5, "dog": 5}, size=16, seed=7)
    (tmp_path / "classes.txt").write_text("0\tant\n1\tbee\n2\tcow\n3\tdog\n")
    by_name = evaluate_run(folder_run / "run", str(images))
    by_map = evaluate_run(folder_run / "run", str(images), class_map=tmp_path / "classes.txt")
    assert by_name == by_map and by_map["images"] == 10
    (tmp_path / "wrong.txt").write_text("0\tbee\n1\tant\n2\tdog\n3\tcow\n")
    model = load_run(folder_run / "run")
    with torch.no_grad():
        model.get_parameter("head.weight").zero_()
        model.get_parameter("head.bias").copy_(torch.tensor([0.0, 1.0, 0.0, 0.5]))
    state = model.state_dict()
    copy = tmp_path / "copy"
    copy.mkdir()
    for name in ("config.json", "plan.json", "result.json"):
        (copy / name).write_bytes((folder_run / "run" / name).read_bytes())
    save_file(state, copy / "model.safetensors")  # answers bee for every image
    assert evaluate_run(copy, str(images))["top1"] == 50.0
    assert evaluate_run(copy, str(images), class_map=tmp_path / "classes.txt")["top1"] == 50.0
    assert evaluate_run(copy, str(images), class_map=tmp_path / "wrong.txt")["top1"] == 0.0


def test_evaluation_on_unknown_classes_is_refused(folder_run: Path, tmp_path: Path) -> None:
    images = make_images(tmp_path / "other", {"bee": 2, "emu": 2}, size=16)
    with pytest.raises(QvitError, match="emu"):
        evaluate_run(folder_run / "run", str(images))


def test_evaluation_counts_every_image_once_whatever_the_batch(folder_run: Path, tmp_path: Path) -> None:
    images = make_images(tmp_path / "others", {"ant": 6, "bee": 6, "cow": 6, "dog": 6}, size=16, seed=8)
    for batch_size in (5, 24):
        seen: list[int] = []
        scores = evaluate_run(folder_run / "run", str(images), batch_size=batch_size, progress=seen.append)
        assert scores["images"] == 24 and seen == list(range(batch_size, 24, batch_size)) + [24]


@pytest.mark.parametrize("relative", [False, True])
def test_a_run_s_own_data_are_scored_on_the_share_that_was_set_aside(
    folder_run: Path, monkeypatch: pytest.MonkeyPatch, relative: bool
) -> None:
    monkeypatch.chdir(folder_run)
    scores = evaluate_run(folder_run / "run", "images" if relative else str(folder_run / "images"))
    result = json.loads((folder_run / "run" / "result.json").read_text())
    assert scores == {"top1": result["accuracy"], "top5": result["top5"], "images": result["images"]}
    assert result["images"] == 10, "a fifth of 48"
