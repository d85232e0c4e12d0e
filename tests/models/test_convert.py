"""The life of a model: stages and their order, calibration, freezing, and heads that do not touch each other."""

from __future__ import annotations

import json
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import calibrated_model, digit_batches, digits_model
from torch import Tensor, nn

from qvit.errors import QvitError, UsageError
from qvit.models.calibrate import calibrate
from qvit.models.convert import Stage, freeze, plan_of, quantize, quantizers_disabled, stage_of
from qvit.models.families import inspect_model
from qvit.models.layers import QuantConv2d, QuantLinear
from qvit.plan.quant_plan import QuantPlan, Rule
from qvit.quantizers import Quantizer, quantizers_of
from qvit.quantizers.lsq import LSQQuantizer
from qvit.quantizers.observers import BINS, HistogramObserver

LEARNED = {"learn_bit_width": True, "switchable_scale": True}


def learned_plan(model: nn.Module, bits: int = 4, **changes: Any) -> QuantPlan:
    """Every width learned, one per head, one scale per width: what `qvit` starts from."""
    rules = []
    for name, site in inspect_model(model).sites.items():
        widths = [bits] * site.layout.num_heads if site.layout.heads else bits
        rules.append(Rule(name, LEARNED | {"bit_width": widths} | changes))
    return QuantPlan("learned", tuple(rules))


def quantizer_at(model: nn.Module, site: str) -> LSQQuantizer:
    quantizer = model.get_submodule(site + "_quantizer")
    assert isinstance(quantizer, LSQQuantizer)
    return quantizer


def scales_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: value for name, value in model.state_dict().items() if name.endswith((".scale", ".offset"))}


# -------------------------------------------------------------------------------------------------------------- stages


def test_stages_in_their_order() -> None:
    model = digits_model()
    assert stage_of(model) is Stage.FLOAT
    quantized = quantize(model, learned_plan(model))
    assert stage_of(quantized) is Stage.QUANTIZED and stage_of(model) is Stage.FLOAT
    assert stage_of(calibrate(quantized, digit_batches())) is Stage.CALIBRATED
    assert stage_of(freeze(quantized)) is Stage.FROZEN
    assert Stage.FLOAT < Stage.QUANTIZED < Stage.CALIBRATED < Stage.FROZEN
    assert stage_of(calibrated_model("w4a4")) is Stage.FROZEN, "widths that are not learned are final"


def test_a_model_is_as_far_as_its_least_quantizer() -> None:
    model = calibrated_model()
    quantizer_at(model, "blocks.0.attn.query").calibrated = False
    assert stage_of(model) is Stage.QUANTIZED


def test_quantizing_twice_is_refused() -> None:
    with pytest.raises(UsageError, match="quantized already"):
        quantize(quantize(digits_model(), "w4a4"), "w4a4")


def test_an_uncalibrated_model_refuses_to_run() -> None:
    quantized = quantize(digits_model(), "w4a4")
    with pytest.raises(UsageError, match=r"never calibrated.*qvit\.calibrate"):
        quantized(digit_batches(1)[0])
    with quantizers_disabled(quantized):
        quantized(digit_batches(1)[0])
    with pytest.raises(UsageError, match="never calibrated"):
        quantized(digit_batches(1)[0])


def test_one_uncalibrated_quantizer_is_enough_to_refuse() -> None:
    model = calibrated_model()
    quantizer_at(model, "blocks.0.mlp.fc2.weight").calibrated = False
    with pytest.raises(UsageError, match="never calibrated"):
        model(digit_batches(1)[0])


def test_freezing_before_calibration_is_refused() -> None:
    model = digits_model()
    for early in (model, quantize(model, learned_plan(model))):
        with pytest.raises(UsageError, match=r"freeze comes after calibration.*qvit\.calibrate"):
            freeze(early)


def test_a_float_model_has_nothing_to_calibrate_and_no_plan() -> None:
    with pytest.raises(UsageError, match=r"qvit\.quantize"):
        calibrate(digits_model(), digit_batches())
    with pytest.raises(UsageError, match=r"no plan.*qvit\.quantize"):
        plan_of(digits_model())


def test_a_plan_for_another_model_is_refused_and_the_model_stays_float() -> None:
    plan = QuantPlan.preset("w4a4").resolve(inspect_model(digits_model(depth=2)).sites, "vit_digits")
    model = digits_model(depth=1)
    with pytest.raises(UsageError, match=r"blocks\.1\.attn"):
        quantize(model, plan, in_place=True)
    assert stage_of(model) is Stage.FLOAT
    with pytest.raises(UsageError, match=r"qeury.*did you mean 'blocks\.0\.attn\.query'"):
        quantize(model, QuantPlan("typo", (Rule("blocks.0.attn.qeury", {"bit_width": 3}),)))


def test_quantizers_are_on_again_after_an_error_in_the_block() -> None:
    model = calibrated_model()
    quantizer_at(model, "head.input").enabled = False
    with pytest.raises(RuntimeError, match="inside"), quantizers_disabled(model):
        assert not any(quantizer.enabled for _, quantizer in quantizers_of(model))
        raise RuntimeError("inside")
    assert [name for name, quantizer in quantizers_of(model) if not quantizer.enabled] == ["head.input"]


def test_sites_left_in_float_have_no_quantizer() -> None:
    rules = (Rule("blocks.0.mlp.*", None), Rule("blocks.0.attn.query", None), Rule("patch_embed.*", None))
    model = calibrated_model(QuantPlan.preset("w4a4").with_rules(*rules))
    left = {site for site, spec in plan_of(model).sites.items() if spec is None}
    assert left == set(inspect_model(model).sites) - {site for site, _ in quantizers_of(model)}
    assert len(left) == 4 + 1 + 2
    assert torch.isfinite(model(digit_batches(1)[0])).all()


def test_quantized_layers_compute_quantized_products() -> None:
    """The layers against a product of quantized operands, written down by hand."""
    model: Any = calibrated_model("w3a3")
    fc1 = model.blocks[0].mlp.fc1
    assert isinstance(fc1, QuantLinear) and isinstance(model.patch_embed.proj, QuantConv2d)
    x = torch.randn(2, 5, 16)
    expected = fc1.input_quantizer(x) @ fc1.weight_quantizer(fc1.weight).T + fc1.bias
    torch.testing.assert_close(fc1(x), expected)
    assert len(fc1.weight_quantizer(fc1.weight).unique()) <= 8
    conv = model.patch_embed.proj
    image = digit_batches(1)[0]
    expected = nn.functional.conv2d(conv.input_quantizer(image), conv.weight_quantizer(conv.weight), conv.bias, 2)
    torch.testing.assert_close(conv(image), expected)
    qkv = model.blocks[0].attn.qkv
    names = ("query", "key", "value")
    thirds = [getattr(qkv, f"{n}_weight_quantizer")(w) for n, w in zip(names, qkv.weight.chunk(3), strict=True)]
    torch.testing.assert_close(qkv(x), qkv.input_quantizer(x) @ torch.cat(thirds).T + qkv.bias)


# --------------------------------------------------------------------------------------------------------- calibration


def test_calibration_keeps_histograms_and_no_activation() -> None:
    model = quantize(digits_model(), "w4a4")
    activations: list[weakref.ref[Tensor]] = []
    for name, quantizer in quantizers_of(model):
        if inspect_model(model).sites[name].role == "activation":
            quantizer.register_forward_pre_hook(lambda _, args: activations.append(weakref.ref(args[0])))
    checked: list[int] = []

    def check(images: int) -> None:
        for name, quantizer in quantizers_of(model):
            if quantizer.observer is None:
                continue
            kept = {key: v for key, v in vars(quantizer.observer).items() if not isinstance(v, (int, tuple))}
            assert kept.keys() == {"counts", "limit", "smallest", "largest"}, name
            groups = quantizer.observer.groups
            assert sum(value.numel() for value in kept.values()) == groups * (BINS + 3), name
        checked.append(images)

    def batches() -> Iterator[Tensor]:
        for batch in digit_batches(4, 6):
            yield batch.clone()

    calibrate(model, batches(), progress=check)
    assert checked == [6, 12, 18, 24]
    alive = [ref().shape for ref in activations if ref() is not None]
    assert len(activations) == 4 * 10 and not alive, "activations outlived their batch"
    assert all(quantizer.observer is None for _, quantizer in quantizers_of(model)), "histograms outlive calibration"


@pytest.mark.parametrize("plan", ["w4a4", "learned"])
def test_calibrating_twice_gives_the_same(plan: str) -> None:
    model = digits_model()
    quantized = quantize(model, learned_plan(model) if plan == "learned" else plan)
    first = {key: value.clone() for key, value in scales_of(calibrate(quantized, digit_batches())).items()}
    assert all((value > 0).all() for key, value in first.items() if key.endswith("scale"))
    second = scales_of(calibrate(quantized, digit_batches()))
    assert all(torch.equal(second[key], value) for key, value in first.items())
    other = scales_of(calibrate(quantized, [2 * batch for batch in digit_batches()]))
    changed = {key for key, value in first.items() if not torch.equal(other[key], value)}
    assert "patch_embed.proj.input_quantizer.scale" in changed
    assert not any("weight_quantizer" in key for key in changed), "weights are fitted from their values alone"


@pytest.mark.parametrize("sizes", [[2] * 8, [8, 8], [16], [1, 15], [7, 2, 7]])
def test_scales_do_not_depend_on_how_images_are_batched(sizes: list[int]) -> None:
    # In double precision, because matmuls of another batch size round differently in the last digit of single.
    images = torch.cat(digit_batches(2, 8)).double()
    one, split = (quantize(digits_model().double(), "w4a4") for _ in range(2))
    expected = scales_of(calibrate(one, [images]))
    actual = scales_of(calibrate(split, list(images.split(sizes))))
    for key, value in expected.items():
        torch.testing.assert_close(actual[key], value, rtol=1e-6, atol=0, msg=lambda text, key=key: f"{key}: {text}")


def test_calibration_sees_the_float_model() -> None:
    """Scales of the second block must not depend on the errors that quantization makes in the first."""
    model = digits_model(depth=2)
    fixed = QuantPlan.preset("w4a4").with_rules(Rule("blocks.0.*", {"bit_width": 2}))
    mixed = calibrate(quantize(model, fixed), digit_batches())
    plain = calibrate(quantize(model, "w4a4"), digit_batches())
    for key, value in scales_of(plain).items():
        assert torch.equal(scales_of(mixed)[key], value) == (not key.startswith("blocks.0.")), key


@pytest.mark.parametrize("training", [True, False])
def test_calibration_restores_the_mode_and_leaves_weights_alone(training: bool) -> None:
    model = quantize(digits_model(drop_rate=0.5, attn_drop_rate=0.5), "w4a4").train(training)
    before = {key: value.clone() for key, value in model.named_parameters() if "quantizer" not in key}
    state = torch.get_rng_state()
    calibrate(model, digit_batches())
    assert model.training is training
    assert all(torch.equal(dict(model.named_parameters())[key], value) for key, value in before.items())
    assert torch.equal(torch.get_rng_state(), state), "dropout was active while calibrating"
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())


def test_the_scale_is_the_one_of_least_squared_error() -> None:
    """Against a search over many scales, on the activations themselves."""
    model = digits_model()
    quantized = quantize(model, "w3a3")
    seen: list[Tensor] = []
    quantizer = quantizer_at(quantized, "blocks.0.mlp.fc1.input")
    quantizer.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    calibrate(quantized, digit_batches(4))
    x = torch.cat(seen).flatten()

    def error(scale: Tensor) -> float:
        return float((x - torch.clamp(torch.round(x / scale), -4, 3) * scale).square().mean())

    best = min(error(scale) for scale in torch.linspace(0.02, 1, 400) * x.abs().max() / 3)
    assert error(quantizer.scale.detach()) <= 1.01 * best


def test_no_images_and_broken_images_are_errors_that_leave_no_trace() -> None:
    model = quantize(digits_model(), "w4a4")
    with pytest.raises(QvitError, match="no images to calibrate"):
        calibrate(model, [])
    bad = digit_batches(3)
    bad[2][5, 0, 3, 3] = float("nan")
    with pytest.raises(QvitError, match="NaN or infinite pixels among calibration images 16 to 23"):
        calibrate(model, bad)
    assert stage_of(model) is Stage.QUANTIZED
    assert all(quantizer.observer is None and quantizer.enabled for _, quantizer in quantizers_of(model))
    calibrate(model, digit_batches())
    assert stage_of(model) is Stage.FROZEN


@pytest.mark.parametrize(
    ("parameter", "value", "site"),
    [
        ("blocks.0.norm2.bias", float("inf"), "blocks.0.mlp.fc1.input"),
        ("blocks.0.attn.qkv.bias", float("nan"), "blocks.0.attn.query"),
        ("blocks.0.mlp.fc2.weight", float("nan"), "head.input"),  # the first activation that it reaches
        ("head.weight", float("nan"), "head.weight"),
        ("head.weight", float("-inf"), "head.weight"),
    ],
)
def test_values_that_are_not_finite_are_named_by_their_site(parameter: str, value: float, site: str) -> None:
    model = quantize(digits_model(), "w4a4")
    with torch.no_grad():
        model.get_parameter(parameter).view(-1)[0] = value
    with pytest.raises(QvitError, match=f"'{site}'".replace(".", r"\.")):
        calibrate(model, digit_batches())
    assert not any(quantizer._forward_pre_hooks for _, quantizer in quantizers_of(model))


def test_a_tensor_of_zeros_is_calibrated_to_zeros() -> None:
    model: Any = quantize(digits_model(), "w4a4")
    with torch.no_grad():
        model.blocks[0].mlp.fc2.weight.zero_()
        model.blocks[0].attn.proj.weight[:, :8] = 0  # all of one head
    calibrate(model, digit_batches())
    output = model(digit_batches(1)[0])
    assert torch.isfinite(output).all()
    fc2 = model.blocks[0].mlp.fc2
    assert not fc2.weight_quantizer(fc2.weight).any()
    output.sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


# ---------------------------------------------------------------------------------------------------- freezing, saving


def test_freezing_rounds_to_nearest_and_keeps_the_function() -> None:
    model = digits_model()
    quantized = calibrate(quantize(model, learned_plan(model)), digit_batches())
    with torch.no_grad():
        for _, quantizer in quantizers_of(quantized):
            quantizer.bit_width.copy_(torch.rand_like(quantizer.bit_width) * 8 + 1)  # beyond the limits, too
    expected_widths = {
        name: tuple(int(w) for w in quantizer.bit_width.detach().clamp(2, 8).round().flatten())
        for name, quantizer in quantizers_of(quantized)
    }
    images = digit_batches(1)[0]
    before, keys = quantized(images).detach(), list(quantized.state_dict())
    assert plan_of(quantized).widths() == expected_widths
    freeze(quantized)
    assert torch.equal(quantized(images), before)
    assert sorted(quantized.state_dict()) == sorted(keys)
    assert plan_of(quantized).widths() == expected_widths
    assert not any(spec.learn_bit_width for spec in plan_of(quantized).sites.values() if spec)
    assert not any("bit_width" in name for name, _ in quantized.named_parameters())


def test_freezing_to_given_widths() -> None:
    model = digits_model()
    quantized = calibrate(quantize(model, learned_plan(model)), digit_batches())
    freeze(quantized, {"blocks.0.attn.query": (2, 7), "head.input": (5,)})
    widths = plan_of(quantized).widths()
    assert widths["blocks.0.attn.query"] == (2, 7) and widths["head.input"] == (5,)
    assert widths["blocks.0.attn.key"] == (4, 4)
    output = quantizer_at(quantized, "blocks.0.attn.query")(torch.linspace(-5, 5, 5000).expand(1, 2, 1, -1))
    assert [len(output[:, head].unique()) for head in range(2)] == [4, 128]
    with pytest.raises(UsageError, match=r"blocks\.9"):
        freeze(quantized, {"blocks.9.attn.query": (4, 4)})
    with pytest.raises(UsageError, match="1 bit-widths given for a quantizer with 2"):
        freeze(quantized, {"blocks.0.attn.query": (4,)})


@pytest.mark.parametrize("frozen", [False, True])
def test_state_dict_and_plan_restore_the_model_bit_for_bit(tmp_path: Path, frozen: bool) -> None:
    model = digits_model()
    quantized = calibrate(quantize(model, learned_plan(model)), digit_batches())
    if frozen:
        freeze(quantized, {"blocks.0.attn.value": (3, 8)})
    save_file(quantized.state_dict(), tmp_path / "model.safetensors")
    plan_of(quantized).save(tmp_path / "plan.json")
    again = quantize(digits_model(seed=5), QuantPlan.load(tmp_path / "plan.json"))
    assert stage_of(again) is Stage.QUANTIZED
    again.load_state_dict(load_file(tmp_path / "model.safetensors"))
    assert stage_of(again) is (Stage.FROZEN if frozen else Stage.CALIBRATED)
    images = digit_batches(1)[0]
    assert torch.equal(again(images), quantized(images))
    assert plan_of(again).sites == plan_of(quantized).sites


def test_loading_an_uncalibrated_state_does_not_count_as_calibration() -> None:
    model = digits_model()
    blank = quantize(model, "w4a4").state_dict()
    other = calibrated_model("w4a4")
    other.load_state_dict(blank)
    with pytest.raises(UsageError, match="never calibrated"):
        other(digit_batches(1)[0])


def test_print_of_a_model_is_a_report() -> None:
    model = digits_model()
    text = repr(calibrate(quantize(model, learned_plan(model, 3)), digit_batches()))
    assert "query_quantizer" in text and "bit_width=(3, 3), per-head, learned, switchable scale" in text
    json.dumps(plan_of(calibrated_model()).to_json())


# ----------------------------------------------------------------------------------------------- heads are independent

HEADS = 4
HEAD_SITES = [
    *(f"qkv.{part}_weight" for part in ("query", "key", "value")),
    *(f"{part}" for part in ("query", "key", "value", "probs", "output")),
    "proj.weight",
]


def contributions(model: Any, images: Tensor) -> tuple[Tensor, Tensor]:
    """What each head adds to the attention's output, `[head, image, token, channel]`, and the output without bias."""
    attn = model.blocks[0].attn
    found: dict[str, Tensor] = {}
    handles = [
        attn.output_quantizer.register_forward_hook(lambda _, __, out: found.update(output=out)),
        attn.proj.weight_quantizer.register_forward_hook(lambda _, __, out: found.update(weight=out)),
        attn.register_forward_hook(lambda _, __, out: found.update(result=out)),
    ]
    with torch.no_grad():
        model(images)
    for handle in handles:
        handle.remove()
    outputs, weight = found["output"], found["weight"]
    heads, size = outputs.shape[1], outputs.shape[3]
    blocks = weight.view(weight.shape[0], heads, size)
    each = torch.stack([outputs[:, head] @ blocks[:, head].T for head in range(heads)])
    return each, found["result"] - attn.proj.bias


@pytest.mark.parametrize("head", range(HEADS))
@pytest.mark.parametrize("site", HEAD_SITES)
def test_the_width_of_a_head_changes_that_head_alone(site: str, head: int) -> None:
    float_model = digits_model(num_heads=HEADS, embed_dim=32)
    model = calibrate(quantize(float_model, learned_plan(float_model, 6)), digit_batches())
    images = digit_batches(1)[0]
    before, total = contributions(model, images)
    torch.testing.assert_close(before.sum(0), total)
    quantizer = quantizer_at(model, f"blocks.0.attn.{site}")
    with torch.no_grad():
        quantizer.bit_width.view(-1)[head] = 2.0
    after, total = contributions(model, images)
    torch.testing.assert_close(after.sum(0), total)
    changed = [other for other in range(HEADS) if not torch.equal(before[other], after[other])]
    assert changed == [head]
    assert float((after[head] - before[head]).norm() / before[head].norm()) > 0.01


@pytest.mark.parametrize("site", HEAD_SITES)
def test_the_scale_of_a_head_is_its_own(site: str) -> None:
    model = calibrated_model("w4a4", num_heads=HEADS, embed_dim=32)
    images = digit_batches(1)[0]
    before, _ = contributions(model, images)
    quantizer = quantizer_at(model, f"blocks.0.attn.{site}")
    assert quantizer.scale.numel() == HEADS
    with torch.no_grad():
        quantizer.scale.view(HEADS)[1] *= 3
    after, _ = contributions(model, images)
    assert [head for head in range(HEADS) if not torch.equal(before[head], after[head])] == [1]


@pytest.mark.parametrize("site", HEAD_SITES)
def test_the_gradient_of_a_width_comes_from_its_head_alone(site: str) -> None:
    """Only the contribution of head 2 is in the loss: the widths of the other heads must not feel it."""
    float_model = digits_model(num_heads=HEADS, embed_dim=32)
    model: Any = calibrate(quantize(float_model, learned_plan(float_model, 3)), digit_batches())
    attn = model.blocks[0].attn
    found: dict[str, Tensor] = {}
    attn.output_quantizer.register_forward_hook(lambda _, __, out: found.update(output=out))
    attn.proj.weight_quantizer.register_forward_hook(lambda _, __, out: found.update(weight=out))
    model(digit_batches(1)[0])
    part = found["output"][:, 2] @ found["weight"].view(32, HEADS, 8)[:, 2].T
    part.square().sum().backward()
    gradient = quantizer_at(model, f"blocks.0.attn.{site}").bit_width.grad
    assert gradient is not None
    assert [head for head in range(HEADS) if gradient.view(-1)[head] != 0] == [2]


def test_layouts_against_blocks_cut_by_hand() -> None:
    """Heads are blocks of output rows of W_q, W_k, W_v and blocks of input columns of W_o."""
    model: Any = calibrated_model("w4a4", num_heads=HEADS, embed_dim=32)
    attn = model.blocks[0].attn
    for index, part in enumerate(("query", "key", "value")):
        quantizer: Quantizer = getattr(attn.qkv, f"{part}_weight_quantizer")
        third = attn.qkv.weight[32 * index : 32 * (index + 1)].detach()
        whole = quantizer(third)
        for head in range(HEADS):
            rows = slice(8 * head, 8 * head + 8)
            scale = quantizer.scale.detach().view(HEADS)[head]
            expected = torch.clamp(torch.round(third[rows] / scale), -8, 7) * scale
            torch.testing.assert_close(whole[rows], expected)
    quantizer = attn.proj.weight_quantizer
    whole = quantizer(attn.proj.weight.detach())
    for head in range(HEADS):
        columns = slice(8 * head, 8 * head + 8)
        scale = quantizer.scale.detach().view(HEADS)[head]
        expected = torch.clamp(torch.round(attn.proj.weight.detach()[:, columns] / scale), -8, 7) * scale
        torch.testing.assert_close(whole[:, columns], expected)


def test_an_observer_of_one_head_sees_that_head() -> None:
    observer = HistogramObserver((HEADS, 1, 1))
    x = torch.zeros(2, HEADS, 3, 5)
    x[:, 2] = 7.0
    observer.observe(x)
    assert observer.limit.tolist() == [0.0, 0.0, 8.0, 0.0] and observer.counts is not None
    assert observer.counts.sum(1).tolist() == [30.0] * HEADS
