"""The measure of features: values worked out by hand, batches of any size, and what rows are called."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from family_models import images_for, tiny
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import digit_batches, digits_model
from torch import Tensor

from qvit.errors import QvitError
from qvit.measure import agreement_of, measure_sensitivity
from qvit.measure.distance import COSINE, DIVERGENCE, distance_of
from qvit.measure.features import (
    FeatureScores,
    cosine_distances,
    cosines,
    judge_features,
    nearest_neighbours,
    signed_features,
)
from qvit.methods.ptq.residual_rotation import rotate_residual, unrotated
from qvit.models.create import create_model
from qvit.models.features import answers_with_features, feature_function, token_names


def record(reference: Tensor, found: Tensor, names: list[str], classes: Any = None, split: int = 100) -> dict[str, Any]:
    scores = FeatureScores()
    targets = torch.full((len(reference),), -1) if classes is None else torch.tensor(classes)
    for parts in zip(reference.split(split), found.split(split), targets.split(split), strict=True):
        scores.add(*parts, names)
    return scores.record(by_token=True)


def test_cosine_and_relative_error_by_hand() -> None:
    f = torch.tensor([[[3.0, 4.0], [1.0, 0.0]], [[0.0, 2.0], [1.0, 0.0]]])
    q = torch.tensor([[[3.0, 4.0], [0.0, 1.0]], [[0.0, 1.0], [1.0, 1.0]]])
    found = record(f, q, ["class token", "patch (0, 0)"])
    right = [1.0, (0 + math.sqrt(0.5)) / 2]
    assert [row["cosine"] for row in found["by_token"]] == pytest.approx(right)
    assert found["cosine"] == pytest.approx(sum(right) / 2) and found["cosine_least"] == pytest.approx(0, abs=1e-12)
    assert found["relative_error"] == pytest.approx(math.sqrt((2 + 1 + 1) / (25 + 1 + 4 + 1)))
    assert [row["relative_error"] for row in found["by_token"]] == pytest.approx([math.sqrt(1 / 29), math.sqrt(3 / 2)])
    assert found["worst_token"] == {**found["by_token"][1], "name": "patch (0, 0)", "index": 1}


def test_neighbours_by_hand() -> None:
    """On a circle: 0° and 10° are a pair, 90° and 80° another; quantized, the fourth image moves to 5°."""

    def at(*degrees: float) -> Tensor:
        angles = torch.deg2rad(torch.tensor(degrees))
        return torch.stack([angles.cos(), angles.sin()], 1)

    f, q = at(0, 10, 90, 80), at(0, 10, 90, 5)
    assert nearest_neighbours(f).tolist() == [1, 0, 3, 2] and nearest_neighbours(q).tolist() == [3, 3, 1, 1]
    found = record(f, q, ["image"], [0, 0, 1, 1])
    assert found["neighbours"] == 0 and found["knn_reference"] == 100 and found["knn"] == 0
    assert found["neighbour_images"] == 4 and found["worst_token"] is None
    assert record(f, f, ["image"])["neighbours"] == 100 and "knn" not in record(f, f, ["image"])
    assert record(f[:1], q[:1], ["image"])["neighbours"] is None


def test_the_class_token_or_the_mean_of_patches_is_an_images_vector() -> None:
    """Class tokens name one neighbour, patches another, and registers none."""
    one, two = torch.eye(3)[[0, 0, 1, 1]], torch.eye(3)[[0, 1, 0, 1]]
    noise = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    rows = torch.stack([one, noise, two], 1)
    same = {"neighbours": 100.0}
    names = ["class token", "register 1", "patch (0, 0)"]
    assert record(rows, torch.stack([one, -noise, two.flip(0)], 1), names).items() >= same.items()
    names[0] = "register 0"
    assert record(rows, torch.stack([-one, noise.flip(0), two], 1), names).items() >= same.items()


@given(st.integers(1, 7), st.integers(0, 1000))
def test_batches_of_any_size_give_the_same(split: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    f, q = torch.randn(2, 7, 3, 4, generator=generator)
    whole, parts = (record(f, q, ["a", "b", "c"], [0, 1, 0, 1, 0, 1, 1], size) for size in (7, split))
    flat = lambda told: [*told["by_token"][1].values(), told["cosine"], told["cosine_least"], told["neighbours"]]  # noqa: E731
    assert flat(whole)[2:] == pytest.approx(flat(parts)[2:]) and whole["knn"] == parts["knn"]


def test_zero_vectors_and_what_is_refused() -> None:
    zero, one = torch.zeros(1, 2), torch.ones(1, 2)
    assert cosines(zero, zero).tolist() == [1] and cosines(zero, one).tolist() == [0]
    scores = FeatureScores()
    with pytest.raises(QvitError, match="no images"):
        scores.record()
    with pytest.raises(QvitError, match="NaN or infinite"):
        scores.add(one, one * torch.nan, torch.zeros(1), ["image"])
    with pytest.raises(QvitError, match=r"shape \(3,\) cannot be compared with \(2,\)"):
        scores.add(one, torch.ones(1, 3), torch.zeros(1), ["image"])


@pytest.mark.parametrize("shape", [(3, 5), (3, 2, 5)])
def test_signed_vectors_have_the_hessian_of_the_distance(shape: tuple[int, ...]) -> None:
    """E[u·uᵀ] against autograd's Hessian at equal features, over all signs of one image."""
    features = torch.randn(shape, generator=torch.Generator().manual_seed(2))[:1]

    def distance(x: Tensor) -> Tensor:
        return 1 - torch.nn.functional.cosine_similarity(features.double(), x.view_as(features), dim=-1).mean()

    moved = features + 0.01 * features.roll(1, -1)
    assert float(cosine_distances(features, moved)) == pytest.approx(float(distance(moved.double())))
    hessian: Any = torch.autograd.functional.hessian(distance, features.flatten().double())
    generator, total = torch.Generator().manual_seed(0), torch.zeros_like(hessian)
    for _ in range(4000):
        u = signed_features(features, generator).flatten().double()
        total += torch.outer(u, u) / 4000
    assert (total - hessian).norm() < 0.1 * hessian.norm()


def test_distance_of_an_answer() -> None:
    classes, features = digits_model(), digits_model(num_classes=0)
    assert distance_of(classes) is DIVERGENCE and distance_of(features) is COSINE
    assert answers_with_features(digits_model(global_pool=""))
    logits = torch.randn(2, 3)
    kept = DIVERGENCE.prepared(logits)
    assert float(DIVERGENCE.total(kept, kept)) == 0
    uniform = DIVERGENCE.prepared(torch.zeros(2, 3))
    assert float(DIVERGENCE.total(uniform, kept)) == pytest.approx(float((-math.log(3) - kept).mean(1).sum()))


def test_names_of_rows() -> None:
    model = create_model("vit_small_patch16_224", img_size=32, embed_dim=32, depth=1, num_heads=2, reg_tokens=2,
                         num_classes=0, global_pool="")  # fmt: skip
    assert token_names(model, (4, 7, 32)) == [
        "class token", "register 1", "register 2", "patch (0, 0)", "patch (0, 1)", "patch (1, 0)", "patch (1, 1)",
    ]  # fmt: skip
    assert token_names(model, (4, 32)) == ["image"] and token_names(model, (4, 3, 32))[2] == "token 2"
    assert token_names(tiny("swin"), (1, 2, 3, 8))[3] == "patch (1, 0)"
    distilled = create_model("deit_tiny_distilled_patch16_224", img_size=32, embed_dim=32, depth=1, num_heads=2)
    assert token_names(distilled, (1, 6, 32))[:3] == ["class token", "distillation token", "patch (0, 0)"]


@torch.no_grad()
def test_features_of_a_rotated_model_come_back() -> None:
    torch.manual_seed(0)
    model, images = digits_model(depth=2), digit_batches(1)[0]
    rotated = digits_model(depth=2)
    assert rotate_residual(rotated)
    with feature_function(model) as reference, feature_function(rotated) as found:
        right, other = reference(images), found(images)
        assert (other - right).norm() > 0.5 * right.norm()
        torch.testing.assert_close(unrotated(model, rotated)(other), right, rtol=1e-4, atol=1e-4)
        same = unrotated(model, digits_model(depth=2))
        assert same(right) is right


def test_judging_a_loader() -> None:
    model, batches = digits_model(num_classes=0), digit_batches(2)
    loader = [(batch, torch.arange(len(batch)) % 2) for batch in batches]
    seen: list[int] = []
    names = lambda shape: token_names(model, shape)  # noqa: E731
    with torch.no_grad():
        told = judge_features(model, lambda x: 2 * model(x), loader, names, progress=seen.append)
    assert told["cosine"] == pytest.approx(1) and told["relative_error"] == pytest.approx(1)
    assert told["images"] == 16 and seen == [8, 16] and told["knn"] == told["knn_reference"]
    with torch.no_grad():
        assert "knn" not in judge_features(model, model, loader, names, labelled=False)


@pytest.mark.parametrize("family", ["swin", "eva02", "siglip", "beit", "cait"])
def test_features_in_front_of_the_classifier(family: str) -> None:
    """They are what timm's own `pre_logits` returns."""
    model = tiny(family)
    images = images_for(model)
    with torch.no_grad(), feature_function(model) as features:
        torch.testing.assert_close(
            features(images), model.forward_head(model.forward_features(images), pre_logits=True)
        )


def test_the_estimate_predicts_what_is_measured() -> None:
    """Where errors are small, second order is all there is: `features` against `cosine`, over many signs."""
    model, images = digits_model(num_classes=0, global_pool=""), digit_batches(12, 4)
    measured = measure_sensitivity(model, images[:1], metric="cosine", widths=(6, 8))
    estimated = measure_sensitivity(model, images[:1] * 12, metric="features", widths=(6, 8))
    found = agreement_of(estimated, measured)
    assert found["spearman"] > 0.9
    assert 0.7 < found["median_ratio_by_width"]["6"] < 1.4
    assert measure_sensitivity(model, images[:1], widths=(8,)).metric == "features"
