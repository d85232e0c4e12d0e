"""Evaluation: top-1 and top-5 by hand, modes, saved weights."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import (
    digits_model,
)
from torch import Tensor, nn

from qvit.errors import QvitError
from qvit.training.checkpoint import (
    save_weights,
)
from qvit.training.evaluate import evaluate


class Fixed(nn.Module):
    """Returns what it is given."""

    def forward(self, x: Tensor) -> Tensor:
        return x


def test_top1_and_top5_by_hand() -> None:
    logits = torch.arange(8.0).repeat(4, 1)  # class 7 first, then 6, 5, 4, 3
    batches = [(logits, torch.tensor([7, 6, 3, 2])), (logits[:1], torch.tensor([0]))]
    seen: list[int] = []
    scores = evaluate(Fixed().train(), batches, progress=seen.append)
    assert scores == {"top1": 20.0, "top5": 60.0, "images": 5} and seen == [4, 5]
    assert isinstance(scores["images"], int)


def test_fewer_than_five_classes_are_all_in_the_top_five() -> None:
    assert evaluate(Fixed(), [(torch.eye(3), torch.tensor([0, 1, 1]))]) == {
        "top1": pytest.approx(200 / 3), "top5": 100.0, "images": 3
    }  # fmt: skip


@pytest.mark.parametrize("training", [True, False])
def test_evaluation_restores_the_mode_even_after_an_error(training: bool) -> None:
    model = Fixed().train(training)
    bad = torch.eye(6)
    bad[2, 2] = math.nan
    for batches, message in (([], "no images"), ([(bad, torch.zeros(6, dtype=torch.long))], "1 of 6 images")):
        with pytest.raises(QvitError, match=message):
            evaluate(model, batches)
        assert model.training is training


def test_saved_weights_are_what_the_model_has(tmp_path: Path) -> None:
    model = digits_model()
    save_weights(tmp_path / "model.safetensors", model)
    state = load_file(tmp_path / "model.safetensors")
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in state.items())


def test_divergence_by_hand_and_without_labels() -> None:
    """KL(p_reference || p) of two classes, on logits that the reference halves."""

    class Half(Fixed):
        def forward(self, x: Tensor) -> Tensor:
            return x / 2

    logits = torch.tensor([[2.0, 0.0], [0.0, 4.0], [0.0, 0.0]])
    batches = [(logits[:2], torch.tensor([0, 0])), (logits[2:], torch.tensor([-1]))]
    expected = 0.0
    for gap in (2.0, 4.0):
        p, q = (1 / (1 + math.exp(-own)) for own in (gap / 2, gap))
        expected += p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))
    scores = evaluate(Fixed(), batches, reference=Half(), labelled=False)
    assert scores == {"agreement": 100.0, "divergence": pytest.approx(expected / 3, abs=1e-9), "images": 3}
    assert evaluate(Fixed(), batches, reference=Fixed(), labelled=False)["divergence"] == 0
    twice = evaluate(Fixed(), batches, reference=Half(), labelled=False, reduce=lambda counts: 2 * counts)
    assert twice == {**scores, "images": 6}, "a mean over the images of all processes"
