"""The integer form: products are exact, equal those of the fake-quantized model, and the report says which are not.

Bounds, in units of 2^-24, the relative error of one float32 operation, times the sum of the products' magnitudes:

    integers       the sum is exact; rounding it, one product of scales, one multiplication, and for offsets a sum of
                   codes with two multiplications: at most 12, and one addition per block of columns more
    fake-quant     each of K products and K additions rounds: K + 12
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from integer_models import FAMILIES, UNIT, float_model, frozen, make_dyadic, products, without_warnings
from tiny_models import calibrated_model, digit_batches, digits_model, shake
from torch import Tensor, nn

from qvit.deploy.integer.arithmetic import Arithmetic
from qvit.deploy.integer.reference import IntegerAttention, IntegerLinear, arithmetic_in_words, integer_form, report_of
from qvit.deploy.integer.torch import TorchArithmetic
from qvit.errors import UsageError
from qvit.methods.pmq import Split, split_plan
from qvit.methods.ptq.stages import ptq
from qvit.models.calibrate import calibrate
from qvit.models.convert import freeze, quantize
from qvit.models.families import inspect_model
from qvit.models.layers import QuantConv2d, QuantLinear, adopt, linear_sites
from qvit.plan.quant_plan import QuantPlan, Rule
from qvit.plan.spec import Layout, PerChannel, PerHead, TensorSpec
from qvit.quantizers import create_quantizer, quantizers_of

ATTENTION = ("query", "key", "value", "probs", "output")
WEIGHTS = ("query_weight", "key_weight", "value_weight")
OFFSET = {"signed": False, "symmetric": False}


def check(
    fake: nn.Module, images: Tensor, *, edges: bool = False, equal: bool = False, count: int | None = None
) -> None:
    """Every product that runs on integers against float64 and against the fake-quantized one."""
    form = integer_form(fake, Arithmetic())
    found = products(fake, form, images, edges=edges)
    assert len(found) == (sum(reason is None for reason in report_of(form).values()) if count is None else count)
    for one in found:
        error = (one.found.double() - one.exact).abs()
        assert bool((error <= (12 + one.blocks) * UNIT * one.magnitude).all()), one.name
        if equal:
            assert torch.equal(one.found, one.fake), one.name
        apart = (one.found - one.fake).abs()
        assert bool((apart <= (one.length + 24 + one.blocks) * UNIT * one.magnitude).all()), one.name
        assert float(one.found.std()) > 0, one.name


@st.composite
def plans(draw: Any, *, statsq: bool = True) -> QuantPlan:
    """Plans of `vit_digits` with two heads: widths, granularities and offsets of all kinds."""
    width = st.integers(2, 8)
    pair = st.one_of(width, st.tuples(width, width).map(list))
    rules = [
        Rule("*", {"bit_width": draw(width)}, role="weight"),
        Rule("*", {"bit_width": draw(width)}, role="activation"),
        Rule("*", {"bit_width": draw(width)}, position="first"),
    ]
    for name in (*(f"blocks.*.attn.{part}" for part in ATTENTION), *(f"blocks.*.attn.qkv.{part}" for part in WEIGHTS),
                 "blocks.*.attn.proj.weight"):  # fmt: skip
        changes = {"bit_width": draw(pair), "granularity": draw(st.sampled_from(("per-tensor", "per-head")))}
        weight = name.endswith("weight")
        if weight and draw(st.booleans()):
            changes["granularity"] = "per-channel"
        if draw(st.booleans()) and not (name.endswith("output") and changes["granularity"] == "per-head"):
            changes |= OFFSET
        if weight and statsq and draw(st.booleans()):
            changes |= {"signed": True, "symmetric": True, "quantizer": "statsq"}
        rules.append(Rule(name, changes))
    for name in ("patch_embed.proj", "*.fc1", "*.fc2", "head"):
        changes = {"granularity": draw(st.sampled_from(("per-tensor", "per-channel")))}
        changes |= draw(st.sampled_from(({}, OFFSET, {"signed": False})))
        rules.append(Rule(f"{name}.weight", changes))
        rules.append(Rule(f"{name}.input", draw(st.sampled_from(({"signed": True, "symmetric": True}, OFFSET)))))
    return QuantPlan("drawn", tuple(rules))


# --------------------------------------------------------------------------------------------------- product by product


@settings(max_examples=12)
@given(plan=plans(statsq=False), edges=st.booleans())
def test_powers_of_two_make_both_forms_equal(plan: QuantPlan, edges: bool) -> None:
    """All sums of products are multiples of one power of two and below 2^24 of it: no operation rounds."""
    torch.manual_seed(0)
    check(make_dyadic(freeze(calibrated_model(plan))), digit_batches(1, 4)[0], edges=edges, equal=True, count=8)


@settings(max_examples=12)
@given(plan=plans(), edges=st.booleans())
def test_sums_are_exact_whatever_the_scales(plan: QuantPlan, edges: bool) -> None:
    torch.manual_seed(0)
    check(freeze(calibrated_model(plan)), digit_batches(1, 4)[0], edges=edges, count=8)


@pytest.mark.parametrize("plan", ["w8a8", "w4a4", "w2a2"])
@pytest.mark.parametrize("name", FAMILIES)
def test_products_of_all_families(name: str, plan: str) -> None:
    check(*frozen(name, plan))


@pytest.mark.parametrize("name", ["swin", "eva02", "sapiens2", "cait"])
def test_powers_of_two_in_other_families(name: str) -> None:
    model, images = frozen(name, "w4a4")
    check(make_dyadic(model), images, equal=True)


def mixed(name: str) -> QuantPlan:
    """A plan whose heads all differ, with offsets on keys and values."""
    sites = inspect_model(float_model(name)[0]).sites
    plan = QuantPlan.preset("w4a4").resolve(sites)
    widths = {site: tuple(2 + i % 7 for i in range(own.layout.num_heads)) for site, own in sites.items()}
    rules = [Rule(f"*.{part}", OFFSET | {"granularity": "per-tensor"}) for part in ("key", "value")]
    return plan.with_widths(widths).with_rules(*rules)


@pytest.mark.parametrize("name", FAMILIES)
def test_heads_with_widths_of_their_own(name: str) -> None:
    check(*frozen(name, mixed(name)))


# --------------------------------------------------------------------------------------------------------- whole models


def same_answers(fake: nn.Module, images: Tensor) -> None:
    """Rounding of a value on an edge may differ, and then all that follows in that image: in two of eight at most.

    A float error of 1e-7 moves one value in about a million over an edge, and these models have ten thousand in all.
    """
    with torch.no_grad():
        expected, found = fake(images), integer_form(fake)(images)
    apart = (found - expected).abs().amax(1) / expected.abs().max()
    assert int((apart > 1e-5).sum()) <= 2 and float(apart.max()) < 0.2, apart


@pytest.mark.parametrize("plan", ["w8a8", "w4a4", "w3a3"])
@pytest.mark.parametrize("name", FAMILIES)
def test_whole_models(name: str, plan: str) -> None:
    same_answers(*frozen(name, plan))


@pytest.mark.parametrize("name", ["vit", "swin"])
@pytest.mark.parametrize("quantizer", ["statsq", "irm"])
def test_other_quantizers(name: str, quantizer: str) -> None:
    rules = {"statsq": Rule("*weight", {"quantizer": "statsq"}), "irm": Rule("*.attn.query", {"quantizer": "irm"})}
    plan = QuantPlan.preset("w4a4").with_rules(rules[quantizer])
    model, images = frozen(name, plan)
    same_answers(model, images)
    if quantizer == "statsq":
        check(model, images)


def test_scales_of_statsq_are_those_of_the_present_weights() -> None:
    model, images = frozen("vit", QuantPlan.preset("w4a4").with_rules(Rule("*weight", {"quantizer": "statsq"})))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("fc1.weight"):
                parameter.mul_(3)
    form = integer_form(model)
    with torch.no_grad():
        torch.testing.assert_close(form(images), model(images))


@pytest.mark.parametrize("bits", [4, 8])
def test_models_of_post_training_quantization(bits: int) -> None:
    """Below 8 bits probabilities are on a logarithmic grid: those products are simulated, and said to be."""
    model, images = digits_model(depth=2), digit_batches(1, 8)[0]
    quantized = ptq(model, f"w{bits}a{bits}", [images])
    same_answers(quantized, images)
    report = report_of(integer_form(quantized))
    logarithmic = {f"blocks.{i}.attn.weigh" for i in range(2)} if bits == 4 else set()
    assert {name for name, reason in report.items() if reason == "a logarithmic grid"} == logarithmic
    assert all(report[name] is None for name in report if name not in logarithmic)


def patchwise(name: str, split: Split, *, heads: tuple[int, ...] | None = None) -> tuple[nn.Module, Tensor]:
    """A model with two groups of tokens in every tensor that may have them."""
    model, images = float_model(name)
    cost = inspect_model(model)
    blocks = {site.partition(".attn.")[0] for site in cost.sites if ".attn." in site}
    plan = split_plan(QuantPlan.preset("w4a4"), cost, dict.fromkeys(blocks, split), key=True)
    if heads is not None:
        tokens = {"share": split.share, "low": split.low}
        plan = plan.with_rules(Rule("*.attn.value", {"bit_width": list(heads), "token_bit_width": tokens}))
    return freeze(calibrate(quantize(model, plan), [images]).eval()), images


@pytest.mark.parametrize("name", ["vit", "swin"])
def test_groups_of_tokens(name: str) -> None:
    model, images = patchwise(name, Split(5, 3, 0.5))
    same_answers(model, images)
    assert set(report_of(integer_form(model)).values()) == {None}


@pytest.mark.parametrize("prefix", [{}, {"reg_tokens": 3}, {"class_token": False, "global_pool": "avg"}])
@pytest.mark.parametrize("int8", [False, True])
def test_a_width_for_prefix_tokens(prefix: dict[str, Any], int8: bool) -> None:
    """Nothing is ranked, and all products are those of integers, the values' in two parts."""
    model, images = digits_model(depth=2, **prefix), digit_batches(1, 8)[0]
    cost = inspect_model(model)
    plan = split_plan(QuantPlan.preset("w4a4"), cost, dict.fromkeys(["blocks.0", "blocks.1"], Split(8, 4, 0)), key=True)
    fake = freeze(calibrate(quantize(model, plan), [images]).eval())
    same_answers(fake, images)
    form = integer_form(fake)
    assert set(report_of(form).values()) == {None} and not any("Ranked" in type(m).__name__ for m in form.modules())
    assert torch.equal(integer_form(fake, TorchArithmetic(int8=int8))(images), form(images))


def test_a_head_whose_two_groups_have_one_width() -> None:
    """3 bits in head 0 for all tokens, 5 and 3 bits in head 1."""
    same_answers(*patchwise("vit", Split(5, 3, 0.5), heads=(3, 5)))


# ----------------------------------------------------------------------------------------------------------- the report


def report(*rules: Rule, plan: str = "w4a4", depth: int = 1) -> tuple[nn.Module, dict[str, str | None]]:
    model, images = digits_model(depth=depth), digit_batches(1, 8)[0]
    quantized = freeze(calibrate(quantize(model, QuantPlan.preset(plan).with_rules(*rules)), [images]).eval())
    form = integer_form(quantized)
    with torch.no_grad():
        torch.testing.assert_close(form(images), quantized(images), rtol=1e-4, atol=1e-4)
    return form, report_of(form)


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        (Rule("*.fc1.input", {"granularity": "per-channel"}), {"mlp.fc1": "activations with a scale per channel"}),
        (Rule("*.attn.query", {"granularity": "per-channel"}), {"attn.scores": "activations with a scale per channel"}),
        (Rule("*.attn.value", {"granularity": "per-channel"}), {}),
        (Rule("*.attn.output", {"granularity": "per-channel"}), {"attn.proj": "activations with a scale per channel"}),
        (Rule("*.attn.output", OFFSET), {"attn.proj": "activations with an offset per head"}),
        (Rule("*.fc2.weight", None), {"mlp.fc2": "an operand in float"}),
        (Rule("*.attn.key", None), {"attn.scores": "an operand in float"}),
        (Rule("*.attn.qkv.key_weight", None), {"attn.qkv": "an operand in float"}),
        (Rule("*.attn.output", None), {"attn.proj": "an operand in float"}),
        (Rule("*.fc1.input", {"bit_width": 9}), {"mlp.fc1": "more than 8 bits"}),
        (Rule("*.attn.value", {"bit_width": [4, 16]}), {"attn.weigh": "more than 8 bits"}),
        (Rule("*.attn.probs", {"quantizer": "log2"}), {"attn.weigh": "a logarithmic grid"}),
        (Rule("*.attn.probs", {"quantizer": "log-sqrt2"}), {"attn.weigh": "a logarithmic grid"}),
    ],
)
def test_what_stays_simulated_and_why(rule: Rule, expected: dict[str, str]) -> None:
    form, found = report(rule)
    assert {name.removeprefix("blocks.0."): reason for name, reason in found.items() if reason} == expected
    names = {"patch_embed.proj", "head", *(f"blocks.0.{n}" for n in ("attn.qkv", "attn.scores", "attn.weigh"))}
    assert set(found) == names | {"blocks.0.attn.proj", "blocks.0.mlp.fc1", "blocks.0.mlp.fc2"}
    words = arithmetic_in_words(form)
    if expected:
        assert words == f"7 of 8 products in integers, 1 simulated (1: {next(iter(expected.values()))})"
    else:
        assert words == "all 8 products in integers"


def test_keys_of_groups_with_scales_of_their_own_stay_simulated() -> None:
    model, images = frozen("sapiens2", QuantPlan.preset("w4a4").with_rules(
        Rule("*.attn.value", {"granularity": "per-channel"})))  # fmt: skip
    found = report_of(integer_form(model))
    assert found["blocks.0.attn.weigh"] == "groups of heads with scales of their own"
    same_answers(model, images)


@pytest.mark.parametrize("site", ["blocks.0.mlp.fc1.input", "blocks.0.attn.query", "blocks.0.mlp.fc1.weight"])
def test_a_quantizer_that_is_off_leaves_its_operand_in_float(site: str) -> None:
    model, images = frozen("vit")
    dict(quantizers_of(model))[site].enabled = False
    form = integer_form(model)
    assert list(filter(None, report_of(form).values())) == ["an operand in float"]
    with torch.no_grad():
        torch.testing.assert_close(form(images), model(images), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({}, None),
        ({"padding": "valid"}, None),
        ({"padding": 1}, "a convolution of overlapping or padded patches"),
        ({"stride": 2}, "a convolution of overlapping or padded patches"),
        ({"groups": 2}, "a convolution of overlapping or padded patches"),
    ],
)
def test_convolutions(arguments: dict[str, Any], reason: str | None) -> None:
    """Patches are rows of a matrix; what is left of the image behind the last patch is cut off."""
    conv = shake(nn.Conv2d(2, 6, (4, 3), **({"stride": (4, 3)} | arguments)))
    layer: Any = adopt(QuantConv2d, conv)
    images = torch.randn(3, 2, 17, 13)
    for site in linear_sites("conv", conv, TensorSpec(granularity=PerChannel())):
        leaf = site.name.rpartition(".")[2]
        spec = TensorSpec(bit_width=5) if leaf == "input" else TensorSpec(bit_width=3, granularity=PerChannel())
        quantizer = create_quantizer(spec, site.layout)
        observer = quantizer.create_observer()
        observer.observe(images if leaf == "input" else conv.weight)
        quantizer.initialize(observer)
        layer.add_module(f"{leaf}_quantizer", quantizer)
    model = nn.Sequential(layer).eval()
    form = integer_form(model)
    assert report_of(form) == {"0": reason}
    with torch.no_grad():
        torch.testing.assert_close(form(images), model(images))


def test_only_frozen_models_are_taken() -> None:
    learned = QuantPlan.preset("w4a4").with_rules(Rule("*", {"learn_bit_width": True}))
    for model in (digits_model(), quantize(digits_model(), "w4a4"), calibrated_model(learned)):
        with pytest.raises(UsageError, match="freeze"):
            integer_form(model)


def test_the_source_and_other_forms_stay_as_they_are() -> None:
    model, images = frozen("vit")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    classes = {path: type(module) for path, module in model.named_modules()}
    arithmetic = Arithmetic()
    forms = [integer_form(model, arithmetic), integer_form(frozen("swin")[0], arithmetic), integer_form(model)]
    with torch.no_grad():
        expected = forms[0](images)
        for value in forms[2].state_dict().values():
            value.zero_()
        assert torch.equal(forms[0](images), expected) and torch.equal(copy.deepcopy(forms[0])(images), expected)
    after = model.state_dict()
    assert list(after) == list(before) and all(torch.equal(after[key], value) for key, value in before.items())
    assert {path: type(module) for path, module in model.named_modules()} == classes
    assert not any(parameter.requires_grad for parameter in forms[0].parameters())


def test_a_form_keeps_no_weight_in_float() -> None:
    form = integer_form(frozen("vit")[0])
    wide = [name for name, value in form.named_parameters() if value.dim() > 1 and "quantizer" not in name]
    assert wide == ["cls_token", "pos_embed"] or set(wide) <= {"cls_token", "pos_embed"}
    kinds = {type(module) for module in form.modules()}
    assert IntegerLinear in kinds and any(issubclass(kind, IntegerAttention) for kind in kinds)


def test_given_codes_are_used() -> None:
    model, images = frozen("vit")
    site = "blocks.0.mlp.fc1.weight"
    layer: Any = model.get_submodule("blocks.0.mlp.fc1")
    codes = layer.weight_quantizer.to_int(layer.weight)
    form: Any = integer_form(model, integers={site: codes.flip(0)})
    assert torch.equal(form.blocks[0].mlp.fc1.weight_0, codes.flip(0))
    assert not torch.equal(form(images), integer_form(model)(images))


def test_weights_on_unsigned_grids_are_shifted() -> None:
    """255 is no int8: codes less 128, and an offset instead."""
    layout = Layout(channels=(1,))
    weight = create_quantizer(TensorSpec(bit_width=8, signed=False), layout)
    weight.get_parameter("scale").data.fill_(2.0**-6)
    weight.calibrated = True
    linear: Any = nn.Linear(64, 3)
    with torch.no_grad():
        linear.weight.copy_(torch.linspace(0, 4, 192).view(3, 64))
    layer: Any = adopt(QuantLinear, linear)
    layer.weight_quantizer = weight
    layer.input_quantizer = create_quantizer(TensorSpec(bit_width=8), layout)
    layer.input_quantizer.scale.data.fill_(2.0**-5)
    layer.input_quantizer.calibrated = True
    model = nn.Sequential(layer).eval()
    form: Any = integer_form(model)
    assert int(form[0].weight_0.max()) == 127 and int(form[0].weight_0.min()) == -128
    x = torch.randn(5, 64)
    with torch.no_grad():
        torch.testing.assert_close(form(x), model(x), rtol=0, atol=80 * UNIT * 64 * 4 * 4)


def test_a_model_with_other_classes_of_modules() -> None:
    """Distilled DeiT has two classifiers; a ViT of 448 pixels more than 514 tokens."""
    model = shake(without_warnings("deit_tiny_distilled_patch16_224", depth=1, embed_dim=24, num_heads=3, img_size=32,
                                   num_classes=7)).eval()  # fmt: skip
    images = torch.randn(8, 3, 32, 32)
    quantized = freeze(calibrate(quantize(model, "w4a4"), [images]).eval())
    assert "head_dist" in report_of(integer_form(quantized))
    same_answers(quantized, images)


def test_granularities_of_one_head() -> None:
    """With one head, per-head scales are one number in several dimensions."""
    model = digits_model(num_heads=1)
    plan = QuantPlan.preset("w4a4").with_rules(Rule("*.attn.output", OFFSET))
    assert any(spec is not None and spec.granularity == PerHead() for spec in
               plan.resolve(inspect_model(model).sites).sites.values())  # fmt: skip
    images = digit_batches(1, 8)[0]
    check(freeze(calibrate(quantize(model, plan), [images]).eval()), images, count=8)
