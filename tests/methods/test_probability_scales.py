"""Scales of attention probabilities against a search by hand, and on windows."""

from __future__ import annotations

import pytest
import timm
import torch

import qvit
from qvit.methods.ptq.probability_scales import FACTORS, IMAGES, fit_probability_scales
from qvit.methods.ptq.stages import ptq_plan
from qvit.methods.ptq.token_weights import Worth

VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 5}
SWIN = {"img_size": 32, "patch_size": 4, "window_size": 4, "embed_dim": 16, "depths": (1, 1), "num_heads": (2, 4)}


def made(
    name: str, arguments: dict, plan: str, **options: str
) -> tuple[torch.nn.Module, torch.nn.Module, torch.Tensor]:
    """A float model, the same calibrated, and images."""
    torch.manual_seed(0)
    model = timm.create_model(name, **arguments).eval()
    for parameter in model.parameters():
        parameter.data.mul_(3)
    images = torch.randn(IMAGES, 3, 32, 32)
    quantized = qvit.quantize(model, ptq_plan(model, plan, **options))
    return model, qvit.calibrate(quantized, [images]), images


@pytest.mark.parametrize("plan", ["w3a3", "w6a6"])
def test_each_head_gets_the_candidate_whose_weighted_values_are_nearest(plan: str) -> None:
    model, quantized, images = made("vit_tiny_patch16_224", VIT, plan)
    worth = Worth(torch.linspace(0.1, 1.9, 17), torch.ones(32))
    quantizer = quantized.blocks[1].attn.probs_quantizer
    start = quantizer.grid()[0].clone()
    caught = {}
    model.blocks[1].attn.qkv.register_forward_hook(lambda _m, _i, qkv: caught.update(qkv=qkv))
    model(images)
    q, k, v = caught["qkv"].unflatten(2, (3, 2, -1)).permute(2, 0, 3, 1, 4)
    probs = (q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(-1)
    errors = []
    for factor in FACTORS:
        quantizer.restore({"scale": start * factor})
        rows = ((quantizer(probs) - probs) @ v).square().sum(-1) * worth.tokens
        errors.append(rows.sum((0, 2)))
    wanted = torch.tensor(FACTORS)[torch.stack(errors).argmin(0)]
    quantizer.restore({"scale": start})

    found = fit_probability_scales(quantized, [images[:3], images[3:]], {"blocks.1.attn.proj": worth})

    assert found == ["blocks.0.attn", "blocks.1.attn"]
    torch.testing.assert_close(quantizer.grid()[0].flatten() / start.flatten(), wanted, rtol=1e-5, atol=0)


def test_windows_and_one_scale_for_all_heads() -> None:
    _, quantized, images = made("swin_tiny_patch4_window7_224", SWIN, "w3a3", heads="per-tensor")
    quantizer = quantized.layers[0].blocks[0].attn.probs_quantizer
    start = quantizer.grid()[0].clone()

    found = fit_probability_scales(quantized, [images], {})

    assert found == ["layers.0.blocks.0.attn", "layers.1.blocks.0.attn"]
    assert quantizer.grid()[0].shape == start.shape
    assert float(quantizer.grid()[0] / start) in [pytest.approx(factor, rel=1e-5) for factor in FACTORS]


def test_probabilities_without_a_quantizer_are_left_alone() -> None:
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", **VIT).eval()
    plan = qvit.QuantPlan.preset("w4a4").with_rules(qvit.plan.quant_plan.Rule("*.probs", None))
    quantized = qvit.calibrate(qvit.quantize(model, plan), [torch.randn(2, 3, 32, 32)])
    assert fit_probability_scales(quantized, [torch.randn(2, 3, 32, 32)], {}) == []
