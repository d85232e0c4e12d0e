"""Teachers: soft and hard labels by hand, other normalisations and sizes, and what cannot teach."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tiny_models import SMALL, digits_model, small_config
from torch import Tensor, nn
from torch.nn import functional as F

from qvit.errors import UsageError
from qvit.runs.run import train
from qvit.training.distill import Teacher, distillation_loss, feature_loss


def data_config(mean: float = 0.3, std: float = 0.4, size: int = 8, channels: int = 1) -> dict[str, Any]:
    return {"input_size": (channels, size, size), "mean": (mean,) * channels, "std": (std,) * channels}


def test_soft_labels_by_hand() -> None:
    student, taught = torch.randn(5, 7, requires_grad=True), torch.randn(5, 7)
    for temperature in (1.0, 3.0):
        expected = 0.0
        for own, other in zip(student, taught, strict=True):
            target = torch.exp(other / temperature) / torch.exp(other / temperature).sum()
            log = own / temperature - torch.logsumexp(own / temperature, 0)
            expected -= (target * log).sum().item() * temperature**2 / 5
        assert distillation_loss(student, taught, "soft", temperature).item() == pytest.approx(expected, rel=1e-5)


def test_hard_labels_are_the_teacher_s_decisions() -> None:
    student, taught = torch.randn(5, 7), torch.randn(5, 7)
    assert torch.equal(distillation_loss(student, taught, "hard"), F.cross_entropy(student, taught.argmax(-1)))


def test_a_teacher_sees_its_own_normalisation_and_size() -> None:
    seen: list[Tensor] = []

    class Watcher(nn.Module):
        num_classes = 3

        def forward(self, images: Tensor) -> Tensor:
            seen.append(images)
            return images.new_zeros(len(images), 3)

    pixels = torch.rand(2, 1, 8, 8)
    student = (pixels - 0.3) / 0.4
    Teacher(Watcher(), student_data=data_config(), own_data=data_config(0.5, 0.25), num_classes=3)(student)
    torch.testing.assert_close(seen[0], (pixels - 0.5) / 0.25)
    Teacher(Watcher(), student_data=data_config(), own_data=data_config(size=16), num_classes=3)(student)
    assert seen[1].shape == (2, 1, 16, 16)
    torch.testing.assert_close(seen[1].mean(), student.mean(), rtol=0.05, atol=0.02)
    Teacher(Watcher(), student_data=data_config(), own_data=data_config(), num_classes=3)(student)
    assert seen[2] is student, "nothing is done where nothing differs"


def test_a_teacher_is_never_trained() -> None:
    model = digits_model(seed=4)
    model.train()
    teacher = Teacher(model)
    teacher.train()
    assert not teacher.model.training and not any(p.requires_grad for p in teacher.parameters())
    assert not teacher(torch.randn(2, 1, 8, 8)).requires_grad


def test_who_cannot_teach_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="teacher has 10 classes, the student 7"):
        Teacher(digits_model(), num_classes=7)
    with pytest.raises(UsageError, match="3 channel.*of 1"):
        Teacher(digits_model(), student_data=data_config(), own_data=data_config(channels=3))
    with pytest.raises(UsageError, match="without --distill teaches nothing"):
        train(small_config(method="lsq", budget="4bit", teacher="vit_digits"), tmp_path / "a", quiet=True)
    with pytest.raises(UsageError, match="no float model to learn from.*--teacher"):
        train(small_config(method="float", distill=1.0), tmp_path / "b", quiet=True)
    unknown = small_config(method="lsq", budget="4bit", teacher="vit_digit", distill=1.0)
    with pytest.raises(UsageError, match="unknown model 'vit_digit'.*vit_digits"):
        train(unknown, tmp_path / "c", quiet=True)


@pytest.mark.parametrize("kind", ["soft", "hard"])
def test_runs_learn_from_a_run_or_from_a_timm_model_with_weights(tmp_path: Path, kind: str) -> None:
    """The same teacher by two ways gives the same model; another one does not."""
    train(small_config(method="float", epochs=1, lr=5e-3), tmp_path / "teacher", quiet=True)
    torch.manual_seed(3)
    save_file(digits_model(seed=8).state_dict(), tmp_path / "other.safetensors")
    file = tmp_path / "teacher" / "model.safetensors"
    common = {"method": "lsq", "budget": "4bit", "epochs": 1, "distill": 1.0, "distill_kind": kind, "lr": 5e-3}
    named: dict[str, Any] = {"teacher": "vit_digits", "teacher_kwargs": SMALL}
    ways: dict[str, dict[str, Any]] = {
        "run": {"teacher": str(tmp_path / "teacher")},
        "file": named | {"teacher_weights": str(file)},
        "other": named | {"teacher_weights": str(tmp_path / "other.safetensors")},
    }
    for name, way in ways.items():
        train(small_config(**common, **way), tmp_path / name, quiet=True)
    weights = {name: (tmp_path / name / "model.safetensors").read_bytes() for name in ways}
    assert weights["run"] == weights["file"] != weights["other"]
    assert json.loads((tmp_path / "run" / "config.json").read_text())["teacher"] == str(tmp_path / "teacher")


def test_features_by_hand() -> None:
    """The squared error of every token over the squared length of the float model's."""
    taught = torch.tensor([[[3.0, 4.0], [1.0, 0.0]]])
    student = torch.tensor([[[3.0, 5.0], [0.0, 1.0]]], requires_grad=True)
    loss = feature_loss(student, taught)
    assert loss.item() == pytest.approx((1 / 25 + 2 / 1) / 2)
    loss.backward()
    assert student.grad is not None
    torch.testing.assert_close(student.grad, (2 * (student - taught) / torch.tensor([[[25.0], [1.0]]]) / 2).detach())
