"""Stores of soft labels that several tests make: a teacher that keeps what it saw, images, requests, loaders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from image_sets import CONFIG, make_images
from safetensors.torch import save_file
from tiny_models import SMALL, digits_model
from torch import Tensor, nn

from qvit.data.labels import SoftLabelStore
from qvit.data.labels.loading import StoredLabels
from qvit.data.open import open_data, train_loader
from qvit.runs import labels as labels_run
from qvit.runs.labels import LabelRequest


class Watcher(nn.Module):
    """A teacher that keeps what it saw and answers with averages over parts of the image."""

    num_classes = 3
    pretrained_cfg = {key: CONFIG[key] for key in ("input_size", "mean", "std", "interpolation")}

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Tensor] = []
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, images: Tensor) -> Tensor:
        self.seen.append(images.clone())
        return self.scale * 3 * images[:, :, :8].mean((2, 3))


@pytest.fixture
def teacher(monkeypatch: pytest.MonkeyPatch) -> Watcher:
    watcher = Watcher()
    monkeypatch.setattr(labels_run, "teacher_model", lambda *_: watcher)
    return watcher


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_images(tmp_path / "pets", {"cat": 8, "dog": 9, "eel": 9})


STUDENT = {"img_size": 16, "patch_size": 8, "depth": 1, "embed_dim": 16, "num_heads": 2}


def request_of(folder: Path, **changes: Any) -> LabelRequest:
    values: dict[str, Any] = {
        "model": "vit_tiny_patch16_224",
        "model_kwargs": STUDENT,
        "teacher": "watcher",
        "data": str(folder),
        "crops": 6,
        "top_k": 2,
        "scale": (0.3, 1.0),
        "images_per_shard": 8,
        "batch_size": 7,
        "device": "cpu",
    }
    return LabelRequest.create(**(values | changes))


def content(store: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in store.iterdir()}


def loader_of(folder: Path, store: Path, config: Any = CONFIG, **options: Any) -> Any:
    source = open_data(str(folder)).train
    plan = {key: options.pop(key) for key in ("crops_per_image", "single_from", "interpolation") if key in options}
    labels = StoredLabels(SoftLabelStore(store), 3, **({"crops_per_image": 4} | plan))
    return train_loader(source, config, **({"batch_size": 6, "labels": labels} | options))


class Killed(BaseException):
    pass


def digits_request(tmp_path: Path, **changes: Any) -> dict[str, Any]:
    weights = tmp_path / "teacher.safetensors"
    if not weights.is_file():
        save_file(digits_model(seed=5).state_dict(), weights)
    values: dict[str, Any] = {"model": "vit_digits", "model_kwargs": SMALL, "teacher": "vit_digits"}
    values |= {"teacher_kwargs": SMALL, "teacher_weights": str(weights), "data": "digits", "device": "cpu"}
    return values | {"crops": 6, "scale": (0.5, 1.0), "images_per_shard": 100, "batch_size": 200} | changes
