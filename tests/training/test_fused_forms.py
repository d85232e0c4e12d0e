"""Forms of whole models that a GPU may have: the same training with them, and with the formulas in their place."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from grids import needs_kernels
from tiny_models import small_config, tiny_trainer

from qvit.kernels import gpu_attention, gpu_norm, gpu_weights
from qvit.kernels.fake_quantize import FakeQuantize
from qvit.runs.run import train


@needs_kernels
@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_training_whose_weights_are_quantized_together(
    accumulate: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same run with every form that a GPU may have, the formulas in the kernels' place."""
    launched: list[int] = []

    def together(weights: list[gpu_weights.Weight], tables: gpu_weights.Tables) -> list[torch.Tensor]:
        launched.append(len(weights))
        return [FakeQuantize.apply(tensor, *own[:3], *own.meta[:4], own.meta.first) for tensor, own in weights]

    results = []
    for on in (False, True):
        options = {
            "method": "lsq",
            "budget": "4bit",
            "accumulate": accumulate,
            "batch_size": 8 * accumulate,
            "epochs": 1,
        }
        trainer, _, model = tiny_trainer(tmp_path / str(on), steps=4, **options)
        trainer.fuses = on
        monkeypatch.setattr(gpu_norm, "ENABLED", on)
        monkeypatch.setattr(gpu_weights, "ENABLED", on)
        monkeypatch.setattr(gpu_weights, "handles", gpu_weights.fits if on else lambda *_: False)
        monkeypatch.setattr(gpu_weights, "quantize_together", together)
        trainer.fit(quiet=True)
        results.append(model.state_dict())
    assert launched == [8] * trainer.step and trainer.step == 4 // accumulate
    for name, value in results[0].items():
        torch.testing.assert_close(results[1][name], value, rtol=1e-5, atol=1e-7)


@pytest.mark.gpu
@pytest.mark.parametrize("graphs", [True, False])
@pytest.mark.parametrize("method", ["lsq+", "qvit"])
def test_the_same_training_on_a_gpu(method: str, graphs: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All forms in bf16, recorded and not."""
    losses = []
    for on in (False, True):
        for module in (gpu_attention, gpu_norm, gpu_weights):
            monkeypatch.setattr(module, "ENABLED", on)
        options: dict[str, Any] = {"budget": "3bit", "epochs": 3, "device": "cuda", "precision": "bf16"}
        train(small_config(method=method, cuda_graphs=graphs, **options), tmp_path / str(on), quiet=True)
        lines = (tmp_path / str(on) / "log.jsonl").read_text(encoding="utf-8").splitlines()
        losses.append([line["train_loss"] for line in map(json.loads, lines) if line["event"] == "epoch"])
    assert losses[0] == pytest.approx(losses[1], rel=0.05), losses
