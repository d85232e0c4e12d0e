"""Sensitivity: every metric against closed forms or direct computation on small models, and its files."""

from __future__ import annotations

import copy
import functools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from tiny_models import calibrated_model, digit_batches, digits_model
from torch import Tensor, nn

from qvit.errors import QvitError, UsageError
from qvit.functional import fake_quantize
from qvit.measure import METRICS, Sensitivity, measure_sensitivity, site_type
from qvit.measure import fisher as fisher_module
from qvit.measure import kl as kl_module
from qvit.measure import partial as partial_module
from qvit.measure.fisher import signed_answer
from qvit.measure.table import monotone, normalised_by_type
from qvit.models.calibrate import calibrate
from qvit.models.convert import quantize, quantizers_disabled
from qvit.models.families import inspect_model
from qvit.plan.quant_plan import QuantPlan
from qvit.quantizers import quantizers_of

WIDTHS = (2, 4, 8)


def measure(metric: str = "fisher", **options: Any) -> Sensitivity:
    options = {"metric": metric, "widths": WIDTHS, "name": "vit_digits"} | options
    return measure_sensitivity(digits_model(), digit_batches(1, 6), **options)


@functools.cache
def measured(metric: str = "fisher") -> Sensitivity:
    """One measurement for tests that only look at it."""
    return measure(metric)


def test_random_signs_have_the_fisher_matrix_as_their_covariance() -> None:
    logits = torch.tensor([[1.0, -0.5, 0.2, 2.0]])
    generator = torch.Generator().manual_seed(0)
    draws = torch.cat([signed_answer(logits, generator) for _ in range(20_000)]).double()
    p = logits.softmax(-1).flatten().double()
    expected = torch.diag(p) - torch.outer(p, p)
    assert torch.allclose(draws.T @ draws / len(draws), expected, atol=0.01)


def test_fisher_is_the_squared_gradient_times_the_squared_error() -> None:
    """Worked out again by hand for a weight and an activation, head by head, image by image."""
    images, model = digit_batches(1, 4)[0], digits_model()
    found = measure_sensitivity(model, [images], widths=(3,), seed=5)
    quantized = calibrate(quantize(model, QuantPlan.preset("w3a3", boundary_bits=3)), [images]).eval()
    quantizers = dict(quantizers_of(quantized))
    generator = torch.Generator().manual_seed(5)
    weight, probs = quantizers["blocks.0.attn.proj.weight"], quantizers["blocks.0.attn.probs"]
    expected = {"blocks.0.attn.proj.weight": torch.zeros(2), "blocks.0.attn.probs": torch.zeros(2)}
    parameter = quantized.get_parameter("blocks.0.attn.proj.weight")
    seen: list[Tensor] = []
    hook = probs.register_forward_hook(lambda _m, _i, output: seen.append(output))
    with quantizers_disabled(quantized):
        for image in images.split(1):
            seen.clear()
            logits = quantized(image)
            g_weight, g_probs = torch.autograd.grad(logits, [parameter, seen[0]], signed_answer(logits, generator))
            weight_error, probs_error = (
                q.fake_quantize(q.view(t)).detach() - q.view(t).detach()
                for q, t in ((weight, parameter), (probs, seen[0]))
            )
            expected["blocks.0.attn.proj.weight"] += (weight.view(g_weight) * weight_error).square().sum((0, 2))
            expected["blocks.0.attn.probs"] += (g_probs * probs_error).square().sum((0, 2, 3))
    hook.remove()
    for site, total in expected.items():
        assert found.raw[site].shape == (2, 1)
        assert torch.allclose(torch.tensor(found.raw[site][:, 0]), 0.5 * total.double() / 4, rtol=1e-4)


def test_weights_square_the_gradient_of_each_image_and_not_of_the_batch() -> None:
    images = digit_batches(1, 4)[0]
    one_by_one = measure_sensitivity(digits_model(), images.split(1), widths=(2,), seed=1)
    together = measure_sensitivity(digits_model(), [images], widths=(2,), seed=1)
    for site, values in together.raw.items():
        assert np.allclose(values, one_by_one.raw[site], rtol=1e-5), site


@pytest.mark.parametrize("metric", ["fisher", "hessian", "kl"])
def test_every_site_and_head_has_a_row(metric: str) -> None:
    sites, found = inspect_model(digits_model()).sites, measured(metric)
    assert list(found.table) == list(sites)
    for name, site in sites.items():
        assert found.table[name].shape == (site.layout.num_heads, len(WIDTHS))
        assert np.isfinite(found.raw[name]).all()
        assert (np.diff(found.table[name], axis=1) <= 0).all()
    assert found.metric == metric and found.images == 6 and found.widths == WIDTHS and found.model == "vit_digits"


@pytest.mark.parametrize("metric", ["fisher", "hessian", "kl"])
def test_the_seed_decides(metric: str) -> None:
    first, again, other = (measure(metric, seed=seed) for seed in (3, 3, 4))
    assert all((first.raw[site] == again.raw[site]).all() for site in first.raw)
    differs = any((first.raw[site] != other.raw[site]).any() for site in first.raw)
    assert differs == (metric != "kl")


def test_kl_is_what_a_model_with_one_quantized_head_answers() -> None:
    """Head 1 of q at 2 bits, done by hand in the attention's place."""
    images, model = digit_batches(1, 4)[0], digits_model()
    found = measure_sensitivity(model, [images], metric="kl", widths=(2, 8))
    changes = {"bit_width": 2, "bit_width_range": [2, 8], "switchable_scale": True}
    specs = {name: site.default.changed(changes) for name, site in inspect_model(model).sites.items()}
    quantized = calibrate(quantize(model, QuantPlan("hand", (), specs)), [images]).eval()
    quantizers = dict(quantizers_of(quantized))
    query = quantizers["blocks.0.attn.query"]
    scale, _ = query.grid()

    def replace_head(_module: nn.Module, _inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        quantized_all = fake_quantize(output, scale, torch.tensor(2.0), True)
        return torch.cat([output[:, :1], quantized_all[:, 1:]], dim=1)

    with torch.no_grad(), quantizers_disabled(quantized):
        before = quantized(images).log_softmax(-1)
        query.register_forward_hook(replace_head)
        after = quantized(images).log_softmax(-1)
    expected = nn.functional.kl_div(after, before, log_target=True, reduction="batchmean")
    assert found.raw["blocks.0.attn.query"][1, 0] == pytest.approx(float(expected), rel=1e-4, abs=1e-9)


def test_small_errors_cost_what_second_order_predicts() -> None:
    """At 8 bits the errors are small: over many draws the estimates add up to the measured divergence."""
    batches = digit_batches(1, 24)
    exact = measure_sensitivity(digits_model(), batches, metric="kl", widths=(6,))
    for metric in ("fisher", "hessian"):
        estimates = [
            measure_sensitivity(digits_model(), batches, metric=metric, widths=(6,), seed=seed) for seed in range(3)
        ]
        total = np.mean([sum(values.sum() for values in found.raw.values()) for found in estimates])
        assert total == pytest.approx(sum(values.sum() for values in exact.raw.values()), rel=0.6)


def test_hessian_trace_is_that_of_the_exact_second_derivative() -> None:
    """For the classifier's weight the Gauss-Newton matrix is known: (diag(p) - ppᵀ) ⊗ xxᵀ, with trace (1-Σp²)·|x|²."""
    images, model = digit_batches(1, 64)[0], digits_model()
    found = [
        measure_sensitivity(model, [images], metric="hessian", widths=(4,), seed=seed).raw["head.weight"][0, 0]
        for seed in range(8)
    ]
    with torch.no_grad():
        features = model.forward_head(model.forward_features(images), pre_logits=True)  # type: ignore[operator]
        p = model(images).softmax(-1)
        trace = ((1 - p.square().sum(-1)) * features.square().sum(-1)).mean()
        weight = model.get_parameter("head.weight")
        quantized = calibrate(quantize(model, QuantPlan.preset("w4a4", boundary_bits=4)), [images])
        error = dict(quantizers_of(quantized))["head.weight"].fake_quantize(weight) - weight
    expected = 0.5 * float(trace) / weight.numel() * float(error.square().sum())
    assert np.mean(found) == pytest.approx(expected, rel=0.15)


def kept_in(partial: Path) -> set[str]:
    with safe_open(str(partial), "pt") as file:
        return set(file.keys())


def test_an_interrupted_measurement_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    partial = tmp_path / "s.json.partial"
    monkeypatch.setattr(partial_module, "_SAVE_EVERY", 0.0)
    calls: list[str] = []
    whole, original = measured("kl"), kl_module.divergence

    def stops(probe: Any, site: str, *rest: Any) -> float:
        calls.append(site)
        if len(calls) > 40:
            raise KeyboardInterrupt
        return original(probe, site, *rest)

    monkeypatch.setattr(kl_module, "divergence", stops)
    with pytest.raises(KeyboardInterrupt):
        measure("kl", partial=partial)
    done = kept_in(partial)
    assert 0 < len(done) < len(whole.table)
    calls.clear()
    monkeypatch.setattr(
        kl_module, "divergence", lambda p, site, *rest: (calls.append(site), original(p, site, *rest))[1]
    )
    again = measure("kl", partial=partial)
    assert not done & set(calls)
    assert all((again.raw[site] == whole.raw[site]).all() for site in whole.raw)
    calls.clear()
    measure_sensitivity(digits_model(1), digit_batches(1, 6), metric="kl", widths=WIDTHS, partial=partial)
    assert set(calls) == set(whole.table)  # another model: nothing is taken up
    partial.write_text("{")
    assert (measure("kl", partial=partial).raw["head.weight"] == whole.raw["head.weight"]).all()


@pytest.mark.parametrize("metric", ["fisher", "hessian"])
@pytest.mark.parametrize("stop", [1, 3, 5])
def test_an_interrupted_estimate_ends_with_the_same_bits(
    metric: str, stop: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    partial, whole = tmp_path / "s.json.partial", measured(metric)
    monkeypatch.setattr(partial_module, "_SAVE_EVERY", 0.0)
    original, passes = fisher_module.signed_answer, []

    def stops(*arguments: Any) -> Any:
        passes.append(1)
        if len(passes) > stop:
            raise KeyboardInterrupt
        return original(*arguments)

    monkeypatch.setattr(fisher_module, "signed_answer", stops)
    with pytest.raises(KeyboardInterrupt):
        measure(metric, partial=partial)
    monkeypatch.setattr(fisher_module, "signed_answer", lambda *rest: (passes.append(1), original(*rest))[1])
    passes.clear()
    again = measure(metric, partial=partial)
    assert len(passes) == whole.images - stop, "images were passed anew that had been"
    assert all((again.raw[site] == whole.raw[site]).all() for site in whole.raw)
    passes.clear()
    other = measure("hessian" if metric == "fisher" else "fisher", partial=partial)
    assert len(passes) == whole.images and other.metric != metric  # the file of another metric is not taken up


def test_learned_scales_are_read_head_by_head() -> None:
    rules = {"learn_bit_width": True, "switchable_scale": True, "bit_width": 4}
    specs = {n: s.default.changed(rules) for n, s in inspect_model(digits_model()).sites.items()}
    model = calibrate(quantize(digits_model(), QuantPlan("learned", (), specs)), digit_batches())
    quantizer = dict(quantizers_of(model))["blocks.0.attn.proj.weight"]
    with torch.no_grad():
        quantizer.get_parameter("scale")[1, 0, 0] = 123.0
    found = measure_sensitivity(model, metric="learned")
    assert found.images == 0 and found.widths == (2, 3, 4, 5, 6, 7, 8)
    assert found.raw["blocks.0.attn.proj.weight"][1, 0] == 123.0
    assert found.raw["blocks.0.attn.proj.weight"][0, 0] < 1.0
    assert found.plan is not None and set(found.plan.sites) == set(found.table)
    with pytest.raises(UsageError, match="learned scale for 2 bits"):
        measure_sensitivity(calibrated_model(), metric="learned")
    with pytest.raises(UsageError, match="trained model"):
        measure_sensitivity(digits_model(), metric="learned")


def test_the_model_is_left_as_it_was() -> None:
    model = digits_model().train()
    before = copy.deepcopy(model.state_dict())
    measure_sensitivity(model, digit_batches(1, 4), widths=WIDTHS)
    assert model.training and all(p.requires_grad for p in model.parameters())
    assert list(before) == list(model.state_dict())
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_a_plan_gives_grids_and_float_sites() -> None:
    rules = [{"pattern": "*.weight", "granularity": "per-channel"}, {"pattern": "head.*", "float": True}]
    data = {"format": "qvit-plan", "version": 1, "rules": rules}
    found = measure(plan=QuantPlan.from_json(data))
    assert "head.weight" not in found.table
    assert (found.raw["blocks.0.mlp.fc1.weight"] < measured().raw["blocks.0.mlp.fc1.weight"]).all()
    assert found.plan is not None and found.plan.sites["head.weight"] is None
    again = Sensitivity.from_json(json.loads(json.dumps(found.to_json())))
    assert again.plan is not None and again.plan.sites == found.plan.sites
    again.check(inspect_model(digits_model()).sites)


def test_more_bits_never_look_worse() -> None:
    raw = np.array([[3.0, 1.0, 2.0, -1e-9]])
    assert monotone(raw).tolist() == [[3.0, 2.0, 2.0, 0.0]]


def test_types_are_normalised_to_one_mean() -> None:
    assert site_type("blocks.3.attn.qkv.key_weight") == site_type("blocks.0.attn.qkv.query_weight")
    assert site_type("layers.0.blocks.1.attn.query") == "layers.blocks.attn.query"
    found = measure(type_normalised=True)
    means: dict[str, list[float]] = {}
    for site, values in found.table.items():
        means.setdefault(site_type(site), []).extend(values.flatten().tolist())
    averages = [np.mean(own) for own in means.values()]
    assert np.allclose(averages, averages[0])
    plain = measured()
    assert all((plain.raw[site] == found.raw[site]).all() for site in plain.raw)
    assert normalised_by_type({"a": np.zeros((1, 2)), "b": np.ones((1, 2))})["a"].tolist() == [[0.0, 0.0]]


def test_files_say_what_was_measured(tmp_path: Path) -> None:
    found = measured()
    found.save(tmp_path / "s.json")
    again = Sensitivity.load(tmp_path / "s.json")
    assert again.to_json() == found.to_json()
    assert again.predicted({"head.weight": (4,)}) == pytest.approx(found.table["head.weight"][0, 1])
    assert again.damage("head.weight", 0, 16) == again.damage("head.weight", 0, 8)
    with pytest.raises(QvitError, match="no sensitivity at"):
        Sensitivity.load(tmp_path / "missing.json")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "qvit-plan"}, "not a sensitivity"),
        ({"version": 2}, "version 2"),
        ({"widhts": []}, "unknown key 'widhts' in a sensitivity; did you mean 'widths'"),
        ({"widths": [2, 2, 8]}, "'widths' must be different"),
        ({"widths": "2"}, "'widths' of a sensitivity must be a list"),
        ({"images": 1.5}, "'images' of a sensitivity must be int"),
        ({"images": -1}, "must not be negative"),
        ({"seconds": float("nan")}, "'seconds'"),
        ({"sites": {}}, "'sites'"),
        ({"sites": {"a": {"table": [[1, 1, 0]]}}}, "site 'a'.*exactly the keys"),
        ({"sites": {"a": {"table": [[1, 0]], "raw": [[1, 0, 0]]}}}, "'table' of site 'a' has a row of 2"),
        ({"sites": {"a": {"table": [[1, float("nan"), 0]], "raw": [[1, 0, 0]]}}}, "'table' of site 'a' holds nan"),
        ({"sites": {"a": {"table": [[0, 1, 0]], "raw": [[1, 0, 0]]}}}, "must not increase"),
        ({"sites": {"a": {"table": [[1, 1, 0]], "raw": [[1, 0, 0]] * 2}}}, "different numbers of heads"),
        ({"plan": {"format": "other"}}, "not a plan"),
    ],
)
def test_wrong_files_are_refused_by_key(change: dict[str, Any], message: str) -> None:
    data = measured().to_json() | change
    with pytest.raises(UsageError, match=message):
        Sensitivity.from_json(data)


def test_a_missing_key_is_named() -> None:
    data = measured().to_json()
    del data["seed"]
    with pytest.raises(UsageError, match="lacks the key 'seed'"):
        Sensitivity.from_json(data)


def test_foreign_models_are_refused() -> None:
    found = measured()
    with pytest.raises(UsageError, match="lacks .* site.*vit_digits"):
        found.check(inspect_model(digits_model(depth=2)).sites)
    with pytest.raises(UsageError, match="has 4 head"):
        found.check(inspect_model(digits_model(num_heads=4)).sites)
    with pytest.raises(UsageError, match="does not have, first 'blocks.1"):
        measure_sensitivity(digits_model(depth=2), digit_batches(1, 4)).check(inspect_model(digits_model()).sites)


def test_requests_that_cannot_be_meant() -> None:
    model, batches = digits_model(), digit_batches(1, 4)
    with pytest.raises(UsageError, match="unknown metric 'fischer'; did you mean 'fisher'"):
        measure_sensitivity(model, batches, metric="fischer")
    with pytest.raises(UsageError, match="quantized already"):
        measure_sensitivity(calibrated_model(), batches)
    with pytest.raises(UsageError, match="between 2 and 16"):
        measure_sensitivity(model, batches, widths=(1, 2))
    with pytest.raises(UsageError, match="without labels"):
        measure_sensitivity(model, [(batches[0], 0)])  # type: ignore[list-item]
    with pytest.raises(QvitError, match="too few images to measure sensitivity with: 2"):
        measure_sensitivity(model, [batches[0][:2]])
    with pytest.raises(QvitError, match="NaN or infinite pixels in batch 1"):
        measure_sensitivity(model, [*batches, batches[0] * float("nan")])
    with pytest.raises(UsageError, match="every site in float"):
        rule = {"format": "qvit-plan", "version": 1, "rules": [{"pattern": "*", "float": True}]}
        measure_sensitivity(model, batches, plan=QuantPlan.from_json(rule))
    with pytest.raises(UsageError, match="needs classes"):
        measure_sensitivity(digits_model(num_classes=0), batches, metric="fisher")
    with pytest.raises(UsageError, match="for models that answer with features"):
        measure_sensitivity(model, batches, metric="cosine")
    with torch.no_grad():
        model.get_parameter("head.weight").fill_(float("nan"))
    with pytest.raises(QvitError, match="NaN or infinite"):
        measure_sensitivity(model, batches)
    known = {
        "fisher",
        "hessian",
        "kl",
        "learned",
        "features",
        "cosine",
        "relevance",
        "mix-qvit",
        "nuclear-norm",
        "lampq",
        "ompq",
        "topological-entropy",
    }
    assert set(METRICS) == known
