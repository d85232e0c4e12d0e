"""The scripts of examples/: a segmentation head on a quantized backbone, in a few steps."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

FILE = Path(__file__).resolve().parents[1] / "examples" / "segmentation.py"


@pytest.fixture(scope="module")
def segmentation() -> Any:
    spec = importlib.util.spec_from_file_location("segmentation", FILE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
@pytest.mark.parametrize("model", ["vit", "swin"])
def test_a_dense_head_on_a_quantized_backbone(model: str, segmentation: Any, tmp_path: Path) -> None:
    found = segmentation.run(model, "w8a8", steps=30, images=4, seed=0, out=tmp_path / "backbone.safetensors")
    assert found["file_bytes"] == (tmp_path / "backbone.safetensors").stat().st_size
    assert [row["size"] for row in found["mean_iou"]] == [[32, 48], [48, 64]]
    for row in found["mean_iou"]:
        assert row["float"] > 19, "only the background, most of the pixels, is 25 at most"
        assert abs(row["quantized"] - row["float"]) < 2
        assert abs(row["packed"] - row["head_trained"]) < 1


def test_mean_iou_by_hand(segmentation: Any) -> None:
    images, truth = segmentation.scenes(3, (8, 12), torch.Generator().manual_seed(0))
    assert images.shape == (3, 3, 8, 12) and set(truth.unique().tolist()) <= {0, 1, 2, 3}
    by_pixel = F.one_hot(truth, 4).float()
    right, nothing = by_pixel.flatten(1, 2), torch.zeros(3, 96, 4)
    kinds = len(truth.unique())
    assert segmentation.mean_iou(lambda _: right, nn.Identity(), images, truth) == pytest.approx(25 * kinds)
    assert segmentation.mean_iou(lambda _: by_pixel, nn.Identity(), images, truth) == pytest.approx(25 * kinds)
    share = float((truth == 0).double().mean())
    assert segmentation.mean_iou(lambda _: nothing, nn.Identity(), images, truth) == pytest.approx(25 * share)
