"""Families: what a quantized ViT has in common with the float one, over many variants of timm's VisionTransformer."""

from __future__ import annotations

import copy
import re
from typing import Any

import pytest
import timm
import torch
from timm.layers import SwiGLUPacked, get_norm_layer
from timm.models.vision_transformer import (
    Attention,
    DiffParallelScalingBlock,
    ParallelScalingBlock,
    ParallelThingsBlock,
    ResPostBlock,
    VisionTransformer,
)
from tiny_models import digit_batches, digits_model, shake
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from qvit.errors import UsageError
from qvit.models.calibrate import calibrate
from qvit.models.convert import plan_of, quantize, quantizers_disabled
from qvit.models.families import inspect_model
from qvit.models.families.vit import QuantAttention
from qvit.models.layers import adopt
from qvit.plan.quant_plan import QuantPlan
from qvit.quantizers import quantizers_of

# Depth 2 where it costs nothing; small images keep every token kind and leave a few patches.
TIMM_VARIANTS: dict[str, dict[str, Any]] = {
    "vit_tiny_patch16_224": {"depth": 2, "img_size": 32},
    "vit_small_patch32_224": {"depth": 1, "img_size": 64},
    "deit_tiny_patch16_224": {"depth": 2, "img_size": 48},
    "deit_tiny_distilled_patch16_224": {"depth": 1, "img_size": 32},
    "deit3_small_patch16_224": {"depth": 1, "img_size": 32},
    "vit_base_patch16_224": {"depth": 1, "img_size": 32},
    "vit_base_patch16_224_miil": {"depth": 1, "img_size": 32, "embed_dim": 96},
    "vit_medium_patch16_gap_256": {"depth": 1, "img_size": 32},
    "vit_medium_patch16_reg4_gap_256": {"depth": 1, "img_size": 32},
    "vit_mediumd_patch16_reg4_gap_256": {"depth": 1, "img_size": 32, "embed_dim": 64, "num_heads": 4},
    "vit_base_patch14_reg4_dinov2": {"depth": 1, "img_size": 28, "embed_dim": 96},
    "vit_giant_patch14_reg4_dinov2": {"depth": 1, "img_size": 28, "embed_dim": 48, "num_heads": 4},
    "vit_base_patch32_clip_224": {"depth": 1, "img_size": 64, "embed_dim": 96},
    "vit_base_patch32_clip_quickgelu_224": {"depth": 1, "img_size": 64, "embed_dim": 96},
    "vit_base_patch16_rpn_224": {"depth": 1, "img_size": 32, "embed_dim": 96},
    "vit_small_patch16_18x2_224": {"depth": 1, "img_size": 32, "embed_dim": 96},
    "vit_base_patch16_siglip_gap_224": {"depth": 1, "img_size": 32, "embed_dim": 96},
    "vit_so150m_patch16_reg4_gap_256": {"depth": 1, "img_size": 32, "embed_dim": 64, "num_heads": 4},
    "vit_little_patch16_reg1_gap_256": {"depth": 1, "img_size": 32, "embed_dim": 40},
    "beit3_base_patch16_224": {"depth": 1, "img_size": 32, "embed_dim": 96},
    "aimv2_1b_patch14_224": {"depth": 1, "img_size": 28, "embed_dim": 64, "num_heads": 4},
    "vit_intern300m_patch14_448": {"depth": 1, "img_size": 28, "embed_dim": 64, "num_heads": 4},
    "flexivit_small": {"depth": 1, "img_size": 32, "embed_dim": 96},
    "test_vit2": {"depth": 1, "img_size": 32},
}
SIZE: dict[str, Any] = {"img_size": 16, "patch_size": 8, "embed_dim": 24, "num_heads": 3, "num_classes": 7, "depth": 2}
BUILT_VARIANTS: dict[str, dict[str, Any]] = {
    "qk_norm": {"qk_norm": True},
    "res_post": {"block_fn": ResPostBlock, "init_values": 0.5},
    "parallel_things": {"block_fn": ParallelThingsBlock},
    "swiglu_packed": {"mlp_layer": SwiGLUPacked},
    "scale_norms": {"scale_attn_norm": True, "scale_mlp_norm": True},
    "no_class_token": {"class_token": False, "global_pool": "avg"},
    "no_biases": {"qkv_bias": False, "proj_bias": False},
    "one_channel": {"in_chans": 1},
    "no_classifier": {"num_classes": 0},
    "dynamic_size": {"dynamic_img_size": True},
    "no_positions": {"pos_embed": "none", "final_norm": False},
    "pre_norm_registers": {"pre_norm": True, "reg_tokens": 3, "no_embed_class": True},
    "one_head": {"num_heads": 1},
    "no_pooling": {"global_pool": ""},
    "rectangle": {"img_size": (16, 32), "patch_size": (8, 4)},
}
VARIANTS = [*TIMM_VARIANTS, *BUILT_VARIANTS]


def build(variant: str) -> nn.Module:
    """The float model of a variant, shaken, in eval mode."""
    torch.manual_seed(3)
    if variant in TIMM_VARIANTS:
        model = timm.create_model(variant, num_classes=11, **TIMM_VARIANTS[variant])
    else:
        model = VisionTransformer(**(SIZE | BUILT_VARIANTS[variant]))
    return shake(model).eval()


def images_for(model: Any, count: int = 2) -> Tensor:
    return torch.randn(count, model.patch_embed.proj.in_channels, *model.patch_embed.img_size)


# -------------------------------------------------------------------------------------------------- the bypass contract


@pytest.mark.parametrize("variant", VARIANTS)
def test_all_quantizers_off_is_the_float_model(variant: str) -> None:
    model = build(variant)
    images = images_for(model)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    classes = {path: type(module) for path, module in model.named_modules()}

    quantized = quantize(model, "w4a4")
    with torch.no_grad(), quantizers_disabled(quantized):
        expected, actual = model(images), quantized(images)
    # One matmul differs in its order of operations: timm's fused attention against softmax(q·kᵀ)·v spelled out.
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))
    assert float(expected.std()) > 1e-3, "the model says nothing about its input: this comparison would prove nothing"

    own = quantized.state_dict()
    assert [key for key in own if "_quantizer." not in key] == list(before), "float keys, in their order"
    assert all(torch.equal(own[key], value) for key, value in before.items())
    added = own.keys() - before.keys()
    assert added and all(key.rpartition(".")[0].endswith("_quantizer") for key in added)
    assert list(model.state_dict()) == list(before), "quantize() changed the keys of the float model"
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert {path: type(module) for path, module in model.named_modules()} == classes
    shared = {p.data_ptr() for p in model.parameters()} & {p.data_ptr() for p in quantized.parameters()}
    assert not shared, "training the copy would train the float model"


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_site_is_a_quantizer_that_is_passed_once(variant: str) -> None:
    model = build(variant)
    sites = inspect_model(model).sites
    quantized = quantize(model, "w4a4")
    assert list(inspect_model(quantized).sites) == list(sites), "a quantized model has the sites of the float one"
    found = dict(quantizers_of(quantized))
    assert found.keys() == sites.keys()
    visits = dict.fromkeys(sites, 0)
    for site in sites:
        quantizer = quantized.get_submodule(site + "_quantizer")
        assert quantizer is found[site]

        def count(*_: Any, site: str = site) -> None:
            visits[site] += 1

        quantizer.register_forward_pre_hook(count)
    with torch.no_grad(), quantizers_disabled(quantized):
        quantized(images_for(model))
    assert visits == dict.fromkeys(sites, 1)


@pytest.mark.parametrize("variant", VARIANTS)
def test_macs_are_those_that_torch_counts(variant: str) -> None:
    model = build(variant)
    for module in model.modules():
        if isinstance(module, Attention):
            module.fused_attn = False  # torch counts no operations of the fused kernel on CPU
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(images_for(model, count=1))
    assert 2 * inspect_model(model).macs == counter.get_total_flops()


@pytest.mark.parametrize("variant", VARIANTS)
def test_plan_round_trip(variant: str) -> None:
    model = build(variant)
    sites = inspect_model(model).sites
    resolved = QuantPlan.preset("w3a5").resolve(sites)
    widths = {
        name: tuple(2 + (i + head) % 7 for head in range(site.layout.num_heads))
        for i, (name, site) in enumerate(sites.items())
    }
    plan = resolved.with_widths(widths)
    quantized = quantize(model, plan)
    assert plan_of(quantized).sites == plan.sites
    assert plan_of(quantized).widths() == widths
    again = quantize(model, QuantPlan.from_json(plan_of(quantized).to_json()))
    assert plan_of(again).sites == plan.sites
    shapes, expected = ({k: v.shape for k, v in m.state_dict().items()} for m in (again, quantized))
    assert shapes == expected


@pytest.mark.parametrize("variant", ["vit_tiny_patch16_224", "deit_tiny_distilled_patch16_224", "qk_norm", "res_post"])
def test_quantizers_on_change_the_output_and_every_parameter_learns(variant: str) -> None:
    model = build(variant)
    images = images_for(model, 4)
    quantized = calibrate(quantize(model, "w3a3"), [images])
    output = quantized(images)
    assert output.shape == model(images).shape and torch.isfinite(output).all()
    assert float((output - model(images)).detach().abs().max()) > 1e-3, "3 bits cannot be the float model"
    output.square().sum().backward()
    without = [name for name, parameter in quantized.named_parameters() if parameter.grad is None]
    assert not without
    dead = [name for name, p in quantized.named_parameters() if name.endswith(".scale") and not p.grad.abs().any()]
    assert not dead, f"scales without a gradient: {dead}"


@pytest.mark.parametrize("variant", ["vit_tiny_patch16_224", "swiglu_packed", "scale_norms"])
def test_more_bits_come_closer_to_the_float_model(variant: str) -> None:
    model = build(variant)
    images = images_for(model, 16)
    expected = model(images)
    errors = []
    for bits in (2, 4, 8):
        plan = QuantPlan.preset(f"w{bits}a{bits}", boundary_bits=bits)
        errors.append(float((calibrate(quantize(model, plan), [images])(images) - expected).detach().norm()))
    assert errors[0] > 2 * errors[1] > 8 * errors[2], errors


def test_in_place_keeps_the_parameters_themselves() -> None:
    model = digits_model()
    parameters = dict(model.named_parameters())
    assert quantize(model, "w4a4", in_place=True) is model
    assert all(dict(model.named_parameters())[name] is parameter for name, parameter in parameters.items())


def test_hooks_and_attributes_survive_conversion() -> None:
    model: Any = digits_model()
    seen: list[str] = []
    model.blocks[0].attn.proj.register_forward_hook(lambda *_: seen.append("proj"))
    model.blocks[0].attn.remark = "kept"
    quantized: Any = quantize(model, "w4a4")
    with torch.no_grad(), quantizers_disabled(quantized):
        quantized(digit_batches(1)[0])
    assert seen == ["proj"] and quantized.blocks[0].attn.remark == "kept"
    assert isinstance(quantized.blocks[0].attn, Attention), "code that looks for timm's class must find it"


def test_a_quantized_model_can_be_copied() -> None:
    quantized = calibrate(quantize(digits_model(), "w4a4"), digit_batches())
    images = digit_batches(1)[0]
    assert torch.equal(copy.deepcopy(quantized)(images), quantized(images))


# ------------------------------------------------------------------------------------------------------- what sites are


def test_site_names_of_a_vit() -> None:
    attention = ["query_weight", "key_weight", "value_weight"]
    block = ["attn.qkv.input", *(f"attn.qkv.{part}" for part in attention)]
    block += [f"attn.{part}" for part in ("query", "key", "value", "probs", "output")]
    block += ["attn.proj.weight", "mlp.fc1.input", "mlp.fc1.weight", "mlp.fc2.input", "mlp.fc2.weight"]
    expected = ["patch_embed.proj.input", "patch_embed.proj.weight"]
    expected += [f"blocks.{i}.{name}" for i in range(2) for name in block] + ["head.input", "head.weight"]
    assert list(inspect_model(digits_model(depth=2)).sites) == expected


def test_distilled_deit_has_two_classifiers_and_both_count() -> None:
    cost = inspect_model(build("deit_tiny_distilled_patch16_224"))
    for site in ("head.input", "head.weight", "head_dist.input", "head_dist.weight"):
        assert cost.sites[site].position == "last"
    assert sum(matmul.macs for matmul in cost.matmuls if matmul.right.startswith("head")) == 2 * 192 * 11


def test_heads_roles_and_grids_of_sites() -> None:
    sites = inspect_model(digits_model(num_heads=4)).sites
    per_head = {name.removeprefix("blocks.0.") for name, site in sites.items() if site.layout.num_heads == 4}
    assert per_head == {
        *(f"attn.qkv.{part}_weight" for part in ("query", "key", "value")),
        *(f"attn.{part}" for part in ("query", "key", "value", "probs", "output")),
        "attn.proj.weight",
    }
    assert {name for name, site in sites.items() if site.role == "weight"} == {n for n in sites if n.endswith("weight")}
    unsigned = {name for name, site in sites.items() if not site.default.signed}
    assert unsigned == {"blocks.0.attn.probs", "blocks.0.mlp.fc2.input"}
    offset = {name for name, site in sites.items() if not site.default.symmetric}
    assert offset == {"blocks.0.mlp.fc2.input"}, "LSQ+'s offset is for the GELU's output alone"
    first = {name for name, site in sites.items() if site.position == "first"}
    assert first == {"patch_embed.proj.input", "patch_embed.proj.weight"}
    assert sum(site.numel for site in sites.values()) == sum(
        parameter.numel() for name, parameter in digits_model().named_parameters() if parameter.dim() in (2, 4)
    )


@pytest.mark.parametrize("variant", ["scale_norms", "swiglu_packed"])
def test_fc2_gets_an_offset_only_right_after_a_gelu(variant: str) -> None:
    sites = inspect_model(build(variant)).sites
    spec = sites["blocks.0.mlp.fc2.input"].default
    assert spec.signed and spec.symmetric, "a LayerNorm's output and a gated product have both signs"


# ----------------------------------------------------------------------------------------------------------- attention


def quantized_attention(**kwargs: Any) -> tuple[Attention, QuantAttention]:
    attention = Attention(dim=24, num_heads=3, qkv_bias=True, **kwargs)
    shake(attention).eval()
    return attention, adopt(QuantAttention, attention)


@pytest.mark.parametrize("mask", ["none", "causal", "bool", "float"])
def test_attention_masks_mean_what_they_mean_to_timm(mask: str) -> None:
    attention, quantized = quantized_attention()
    x = torch.randn(2, 5, 24)
    keep = torch.rand(2, 1, 5, 5) > 0.4
    keep |= torch.eye(5, dtype=torch.bool)
    arguments = {
        "none": {},
        "causal": {"is_causal": True},
        "bool": {"attn_mask": keep},
        "float": {"attn_mask": torch.randn(2, 1, 5, 5)},
    }[mask]
    with torch.no_grad():
        torch.testing.assert_close(quantized(x, **arguments), attention(x, **arguments), rtol=1e-5, atol=1e-6)
        if arguments:
            assert not torch.allclose(quantized(x, **arguments), quantized(x)), "the mask has no effect"


def test_probabilities_are_quantized_after_dropout() -> None:
    model: Any = digits_model(attn_drop_rate=0.5)
    quantized: Any = calibrate(quantize(model, "w8a8"), digit_batches())
    seen: list[Tensor] = []
    quantized.blocks[0].attn.probs_quantizer.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    quantized.train()(digit_batches(1)[0])
    dropped = float((seen[0] == 0).float().mean())
    assert 0.4 < dropped < 0.6
    quantized.eval()(digit_batches(1)[0])
    assert float((seen[1] == 0).float().mean()) == 0


# --------------------------------------------------------------------------------------------- what is refused, by name


class HalvedAttention(Attention):
    """Attention that computes something else."""

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        return 0.5 * super().forward(x, attn_mask, is_causal)


class GatedAttention(Attention):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, gated=True, **kwargs)


class DoubledLinear(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


def with_own_classifier() -> nn.Module:
    model = VisionTransformer(**SIZE)
    model.head = DoubledLinear(24, 7)
    return model


REFUSED: dict[str, tuple[Any, str]] = {
    "hybrid": (lambda: timm.create_model("vit_tiny_r_s16_p8_224", depth=1), "patch_embed.backbone"),
    "pooling with averages": (lambda: VisionTransformer(**SIZE, global_pool="prr"), "attn_pool"),
    "parallel scaling": (lambda: VisionTransformer(**SIZE, block_fn=ParallelScalingBlock), "blocks.0.in_proj"),
    "differential": (lambda: VisionTransformer(**SIZE, attn_layer="diff"), "blocks.0.attn.qkv"),
    "differential, parallel": (lambda: VisionTransformer(**SIZE, block_fn=DiffParallelScalingBlock), "blocks.0."),
    "own attention": (lambda: VisionTransformer(**SIZE, attn_layer=HalvedAttention), "blocks.0.attn"),
    "gated attention": (lambda: VisionTransformer(**SIZE, attn_layer=GatedAttention), "blocks.0.attn"),
    "own linear layer": (with_own_classifier, "head"),
    "swin v2 cr": (lambda: timm.create_model("swinv2_cr_tiny_224", embed_dim=12, depths=(1, 1)), "SwinTransformerV2Cr"),
    "resnet": (lambda: timm.create_model("resnet18"), "ResNet"),
    "relative positions": (
        lambda: timm.create_model("vit_relpos_small_patch16_224", depth=1),
        "VisionTransformerRelPos",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_supported_is_refused_by_name(name: str) -> None:
    make, named = REFUSED[name]
    model = make()
    keys = list(model.state_dict())
    with pytest.raises(UsageError, match=named.replace(".", r"\.")) as caught:
        quantize(model, "w4a4", in_place=True)
    assert "\n" not in str(caught.value)
    with pytest.raises(UsageError):
        inspect_model(model)
    assert list(model.state_dict()) == keys, "a refused model stays as it was"


NORMS = {
    "batchnorm2d": "BatchNorm2d",
    "groupnorm1": "GroupNorm1",
    "layernorm2d": "LayerNorm2d",
    "rmsnorm2d": "RmsNorm2d",
    "simplenorm2d": "SimpleNorm2d",
}


@pytest.mark.parametrize("norm", NORMS)
def test_norms_of_channels_that_come_first_are_refused_by_name(norm: str) -> None:
    """Built they are, and no float model with them answers."""
    size = {"img_size": 32, "num_classes": 3}
    vit = {"depth": 1, "embed_dim": 24, "num_heads": 3, "norm_layer": get_norm_layer(norm)}
    swin = {"depths": (1, 1), "embed_dim": 16, "num_heads": (2, 4), "window_size": 4, "norm_layer": vit["norm_layer"]}
    models = {
        "patch_embed.norm": VisionTransformer(**SIZE, embed_norm_layer=get_norm_layer(norm)),
        "norm": VisionTransformer(**SIZE, norm_layer=norm),
        "blocks.0.norm1": timm.create_model("cait_xxs24_224", **size, **vit),
        "blocks.0.norm2": timm.create_model("eva02_tiny_patch14_224", **(size | {"img_size": 28}), **vit),
        "patch_embed.norm ": timm.create_model("swin_tiny_patch4_window7_224", **size, **swin),
    }
    for path, model in models.items():
        assert path.strip() in dict(model.named_modules())
        with pytest.raises(UsageError, match=rf"norm of another axis.*'[\w.]*norm\w*' \({NORMS[norm]}\)"):
            quantize(model, "w4a4")


@pytest.mark.parametrize("norm", ["layernorm", "layernormfp32", "rmsnorm", "rmsnormfp32", "simplenorm"])
def test_norms_of_the_last_axis_are_known(norm: str) -> None:
    model, images = VisionTransformer(**SIZE, norm_layer=norm).eval(), torch.randn(2, 3, 16, 16)
    quantized = calibrate(quantize(model, "w4a4"), [images]).eval()
    with torch.no_grad(), quantizers_disabled(quantized):
        torch.testing.assert_close(quantized(images), model(images), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "kwargs"),
    [
        ("vit_base_patch16_siglip_224", {"num_classes": 0}),
        ("vit_small_patch14_reg4_dinov2", {"num_classes": 0, "global_pool": "", "patch_size": 16}),
        ("vit_small_patch16_dinov3", {}),
    ],
)
def test_intermediate_features_are_those_of_the_same_blocks(name: str, kwargs: dict[str, Any]) -> None:
    """What `forward_intermediates` gives behind the last block is what the head sees, and it is quantized."""
    torch.manual_seed(0)
    small = {"img_size": 32, "embed_dim": 32, "depth": 2, "num_heads": 2}
    model, images = shake(timm.create_model(name, **(small | kwargs))).eval(), torch.randn(3, 3, 32, 32)
    quantized: Any = calibrate(quantize(model, "w4a4"), [images]).eval()
    with torch.no_grad():
        last, features = quantized.forward_intermediates(images, norm=True, output_fmt="NLC")
        floats: Any = model.forward_intermediates(images, norm=True, output_fmt="NLC")[1]  # type: ignore[operator]
        assert torch.equal(quantized.forward_head(last), quantized(images))
    assert len(features) == 2 and torch.equal(features[-1], last[:, quantized.num_prefix_tokens :])
    for own, other in zip(features, floats, strict=True):
        assert own.shape == other.shape and not torch.allclose(own, other, atol=1e-3)
        assert torch.cosine_similarity(own, other, dim=-1).mean() > 0.7


def test_hybrid_stems_are_refused_by_name() -> None:
    """Every one of timm, without storage, as `train --dry-run` builds them."""
    names = [n for n in timm.list_models("vit_*") if re.search(r"_(r|r26|r50|resnet\d+d?)(_s\d+.*)?_\d+$", n)]
    assert len(names) > 10
    for name in names:
        with torch.device("meta"):
            model = timm.create_model(name, depth=1)
        with pytest.raises(UsageError, match=r"'patch_embed\.backbone\."):
            quantize(model, "w4a4")


def test_a_subclass_of_the_model_is_refused() -> None:
    class Other(VisionTransformer):
        pass

    with pytest.raises(UsageError, match="Other"):
        quantize(Other(**SIZE), "w4a4")
