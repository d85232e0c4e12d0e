"""Similarity and ranking loss by hand, and scales against a search of the whole grid."""

from __future__ import annotations

import numpy as np
import pytest
import timm
import torch
from tiny_models import digit_batches, digits_model

import qvit
from qvit.deploy.file.grids import grid_values
from qvit.methods.ptq.class_token import with_class_token
from qvit.methods.ptq.similarity_scales import (
    FACTORS,
    agreement,
    best_factors,
    fit_similarity_scales,
    pearson,
    ranking_loss,
    scores,
)
from qvit.methods.ptq.stages import ptq, ptq_plan
from qvit.models.families import inspect_model


def test_similarity_is_that_of_numpy() -> None:
    a, b = torch.randn(2, 3, 50, generator=torch.Generator().manual_seed(0))
    wanted = [np.corrcoef(a[row], b[row])[0, 1] for row in range(3)]
    np.testing.assert_allclose(pearson(a, b).numpy(), wanted, rtol=1e-6)
    assert float(pearson(a[0], 3 * a[0] + 1)) == pytest.approx(1)
    assert float(pearson(a[0], torch.ones(50))) == 0


def test_the_ranking_loss_of_three_tokens() -> None:
    """Pairs (0, 1), (0, 2), (1, 2): the first is in order by 0.3, the others are not, by 0.2 and 0.5."""
    exact, found = torch.tensor([0.5, 0.3, 0.2]), torch.tensor([0.4, 0.1, 0.6])
    assert float(ranking_loss(exact, found, theta=0.0)) == pytest.approx((0 + 0.2 + 0.5) / 3)
    assert float(ranking_loss(exact, found, theta=0.4)) == pytest.approx((0.1 + 0.6 + 0.9) / 3)
    assert float(ranking_loss(exact, exact, theta=0.1)) == 0


def test_with_the_ranking_loss_order_counts() -> None:
    """Of two answers of equal similarity the one that keeps the order agrees more."""
    exact = torch.tensor([1.0, 2.0, 10.0]).view(1, 1, 1, 3)
    swapped, kept = (torch.tensor(own).view(1, 1, 1, 3) for own in ([2.0, 1.0, 10.0], [1.0, 2.0, 10.0]))
    gap = [float(agreement(exact, own, True) - agreement(exact, own, False)) for own in (swapped, kept)]
    assert gap[0] < gap[1] <= 0


@pytest.mark.parametrize("ranking", [False, True])
@torch.no_grad()
def test_each_head_of_q_gets_the_best_of_the_grid(ranking: bool) -> None:
    model = digits_model()
    images = digit_batches(1, 8)[0]
    quantized = qvit.calibrate(qvit.quantize(model, ptq_plan(model, "w3a3")), [images])
    query = quantized.blocks[0].attn.query_quantizer
    start = query.grid()[0].clone()
    q, k = torch.randn(2, 4, 2, 5, 8, generator=torch.Generator().manual_seed(3))
    exact = scores(q, k)
    found = best_factors(query, start, lambda: agreement(exact, scores(query(q), k), ranking))
    for head in range(2):
        values = []
        for factor in FACTORS:
            query.restore({"scale": start * factor})
            values.append(float(agreement(exact, scores(query(q), k), ranking)[head]))
        assert float(found.flatten()[head]) == pytest.approx(FACTORS[int(np.argmax(values))])


@pytest.mark.parametrize("ranking", [False, True])
def test_outputs_are_at_least_as_similar_as_calibrated(ranking: bool) -> None:
    model, images = digits_model(), digit_batches(1, 8)[0]
    quantized = qvit.calibrate(qvit.quantize(model, ptq_plan(model, "w3a3")), [images])
    caught = {}
    fc1 = model.blocks[0].mlp.fc1
    fc1.register_forward_hook(lambda _m, inputs, output: caught.update(x=inputs[0], y=output))
    model(images)

    def similarity() -> float:
        with torch.no_grad():
            return float(pearson(caught["y"].flatten(), quantized.blocks[0].mlp.fc1(caught["x"]).flatten()))

    before = similarity()
    paths = fit_similarity_scales(quantized, [images[:3], images[3:]], ranking=ranking)
    assert {"blocks.0.attn", "blocks.0.attn.qkv", "blocks.0.mlp.fc1", "head"} <= set(paths)
    assert similarity() > before
    assert all(quantizer.enabled for _, quantizer in qvit.quantizers.quantizers_of(quantized))


@torch.no_grad()
def test_where_the_class_token_has_a_width_of_its_own_the_others_scales_are_searched() -> None:
    """Each head gets the best of the grid for them; the scales of 8 bits stay as calibrated."""
    model, images = digits_model(), digit_batches(1, 8)[0]
    plan = with_class_token(ptq_plan(model, "w3a3"), inspect_model(model), 8)
    assert plan is not None
    quantized = qvit.calibrate(qvit.quantize(model, plan), [images])
    query = quantized.blocks[0].attn.query_quantizer
    calibrated = grid_values(query)
    assert {"blocks.0.attn", "blocks.0.mlp.fc1"} <= set(fit_similarity_scales(quantized, [images]))
    start = grid_values(query)
    assert torch.equal(start["scale"], calibrated["scale"])
    for ratio in (start["low_scale"] / calibrated["low_scale"]).flatten().tolist():
        assert min(abs(ratio - factor) for factor in FACTORS) < 1e-6
    assert not torch.equal(start["low_scale"], calibrated["low_scale"])
    q, k = torch.randn(2, 4, 2, 17, 8, generator=torch.Generator().manual_seed(3))
    exact = scores(q, k)
    found = best_factors(query, start["low_scale"], lambda: agreement(exact, scores(query(q), k), False))
    for head in range(2):
        values = []
        for factor in FACTORS:
            query.restore(start | {"low_scale": start["low_scale"] * factor})
            values.append(float(agreement(exact, scores(query(q), k), False)[head]))
        assert float(found.flatten()[head]) == pytest.approx(FACTORS[int(np.argmax(values))])


@pytest.mark.parametrize("plan", ["w4a4", "w8a8"])
def test_windows_and_one_scale_for_all_heads(plan: str) -> None:
    """The whole path: scales of the search, then rounding and biases; finite, and other scales than calibrated."""
    torch.manual_seed(0)
    arguments = {"img_size": 32, "patch_size": 4, "window_size": 4, "embed_dim": 16, "depths": (1,), "num_heads": (2,)}
    model = timm.create_model("swin_tiny_patch4_window7_224", num_classes=5, **arguments).eval()
    images = torch.randn(4, 3, 32, 32)
    plain, searched = (
        ptq(model, plan, [images], heads="per-tensor", scale_search=search) for search in ("error", "ranking")
    )
    a, b = (own.layers[0].blocks[0].attn.query_quantizer.grid()[0] for own in (plain, searched))
    assert a.shape == b.shape and float(b / a) == pytest.approx(min(FACTORS, key=lambda own: abs(own - float(b / a))))
    assert bool(torch.isfinite(searched(images)).all())
    changed = [
        not torch.equal(own.grid()[0], other.grid()[0])
        for (_, own), (_, other) in zip(
            qvit.quantizers.quantizers_of(plain), qvit.quantizers.quantizers_of(searched), strict=True
        )
    ]
    assert any(changed)
