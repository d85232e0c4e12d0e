"""Every architecture that timm registers for a supported family, at tiny depth: the bypass contract, costs, plans."""

from __future__ import annotations

import re
from typing import Any, NamedTuple

import pytest
import timm
import torch
from tiny_models import shake
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from qvit.errors import UsageError
from qvit.models.convert import plan_of, quantize, quantizers_disabled
from qvit.models.create import create_shapes
from qvit.models.families import inspect_model
from qvit.plan.quant_plan import QuantPlan
from qvit.quantizers import quantizers_of

# What makes a model tiny and leaves its architecture: windows (which do not divide the sizes of all stages, so that
# they are padded in some and shrink in others), rotary positions, head size, kinds of projections and MLPs.
SWIN: dict[str, Any] = {"depths": (2, 1, 2, 1), "embed_dim": 16, "num_heads": (1, 2, 4, 8), "img_size": 64}
TINY: dict[str, dict[str, Any]] = {
    "swin_transformer": SWIN,
    "swin_transformer_v2": SWIN,
    "vision_transformer": {"depth": 1, "embed_dim": 48, "num_heads": 3},
    "deit": {"depth": 1, "embed_dim": 48, "num_heads": 3},
    "eva": {"depth": 2, "embed_dim": 128, "num_heads": 2},
    "beit": {"depth": 2, "embed_dim": 48, "num_heads": 3, "img_size": 48},
    "cait": {"depth": 2, "embed_dim": 48, "num_heads": 4, "img_size": 48},
}
# What has layers that no part covers: a pattern of names, and the path that the refusal names.
REFUSED = {
    r".*_xp_224|vit_d?pwee_.*": "blocks.0.in_proj",
    r"vit_d(little|wee)_.*": "blocks.0.attn",
}


def kwargs_of(name: str, module: str) -> dict[str, Any]:
    """Arguments that make one model tiny: 2×2 patches, or 4×4 where their positions are rotated."""
    kwargs = TINY[module] | {"num_classes": 11}
    if "img_size" not in kwargs:
        patch = re.search(r"patch(\d+)", name)
        kwargs["img_size"] = (4 if module == "eva" else 2) * (int(patch[1]) if patch else 16)
    if "sapiens2" in name:
        kwargs["num_kv_heads"] = (2, 1)  # one block of each kind
    if name.startswith("vit_pe_core_"):
        kwargs["attn_pool_num_heads"] = 2
    return kwargs


def refusal(name: str) -> str | None:
    return next((path for pattern, path in REFUSED.items() if re.fullmatch(pattern, name)), None)


MODULES = {name: module for module in TINY for name in timm.list_models(module=module)}
VARIANTS = [name for name in MODULES if refusal(name) is None]


def build(name: str) -> nn.Module:
    """The float model of a variant, shaken, in eval mode, without fused kernels (torch counts no operations there)."""
    torch.manual_seed(3)
    model = shake(timm.create_model(name, **kwargs_of(name, MODULES[name]))).eval()
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = False  # type: ignore[assignment]
    return model


class Pair(NamedTuple):
    """A float model, its quantized form with widths that differ between sites and heads, and an image."""

    model: nn.Module
    quantized: nn.Module
    plan: QuantPlan
    images: Tensor


@pytest.fixture(scope="module", params=VARIANTS)
def pair(request: pytest.FixtureRequest) -> Pair:
    model: Any = build(request.param)
    sites = inspect_model(model).sites
    widths = {
        name: tuple(2 + (i + head) % 7 for head in range(site.layout.num_heads))
        for i, (name, site) in enumerate(sites.items())
    }
    plan = QuantPlan.preset("w3a5").resolve(sites).with_widths(widths)
    return Pair(model, quantize(model, plan), plan, torch.randn(1, 3, *model.patch_embed.img_size))


def test_all_quantizers_off_is_the_float_model(pair: Pair) -> None:
    visits = dict.fromkeys(inspect_model(pair.model).sites, 0)
    assert dict(quantizers_of(pair.quantized)).keys() == visits.keys()
    hooks = []
    for site in visits:

        def count(*_: Any, site: str = site) -> None:
            visits[site] += 1

        hooks.append(pair.quantized.get_submodule(site + "_quantizer").register_forward_pre_hook(count))
    with torch.no_grad(), quantizers_disabled(pair.quantized):
        expected, actual = pair.model(pair.images), pair.quantized(pair.images)
    for hook in hooks:
        hook.remove()
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=2e-5 * float(expected.abs().max()))
    assert float(expected.std()) > 1e-3, "the model says nothing about its input: this comparison would prove nothing"
    assert visits == dict.fromkeys(visits, 1), "every site is passed once"


def test_float_keys_survive(pair: Pair) -> None:
    before, own = pair.model.state_dict(), pair.quantized.state_dict()
    assert [key for key in own if "_quantizer." not in key] == list(before), "float keys, in their order"
    assert all(torch.equal(own[key], value) for key, value in before.items())
    added = own.keys() - before.keys()
    assert added and all(key.rpartition(".")[0].endswith("_quantizer") for key in added)


def test_macs_are_those_that_torch_counts(pair: Pair) -> None:
    # With gradients: torch's counter cannot tell modules apart where a parameter is passed on without any.
    with FlopCounterMode(display=False) as counter:
        pair.model(pair.images)
    counts = counter.get_flop_counts()
    of_parameters_alone = sum(
        sum(own.values()) for path, own in counts.items() if path.endswith((".cpb_mlp", "attn_pool.q"))
    )
    assert 2 * inspect_model(pair.model).macs == counter.get_total_flops() - of_parameters_alone


def test_plan_round_trip(pair: Pair) -> None:
    assert list(inspect_model(pair.quantized).sites) == list(inspect_model(pair.model).sites)
    assert plan_of(pair.quantized).sites == pair.plan.sites
    again = quantize(pair.model, QuantPlan.from_json(plan_of(pair.quantized).to_json()))
    shapes, expected = ({k: v.shape for k, v in m.state_dict().items()} for m in (again, pair.quantized))
    assert shapes == expected


def test_weight_bytes_cover_every_matrix(pair: Pair) -> None:
    """All matrices and kernels but those that never meet an activation: of positions, their MLP, tokens, a latent."""
    layers = [
        (path, module) for path, module in pair.model.named_modules() if isinstance(module, (nn.Linear, nn.Conv2d))
    ]
    expected = sum(
        module.weight.numel() for path, module in layers if ".cpb_mlp." not in path and path != "attn_pool.q"
    )
    assert sum(site.numel for site in inspect_model(pair.model).sites.values()) == expected


@pytest.mark.parametrize("name", VARIANTS)
def test_a_model_without_storage_has_the_same_costs(name: str) -> None:
    kwargs = kwargs_of(name, MODULES[name])
    without = create_shapes(name, **kwargs)
    assert all(parameter.is_meta for parameter in without.parameters())
    expected, found = inspect_model(timm.create_model(name, **kwargs)), inspect_model(without)
    assert list(found.sites.items()) == list(expected.sites.items()) and found.matmuls == expected.matmuls


@pytest.mark.parametrize("name", [name for name in MODULES if refusal(name)])
def test_other_layers_are_refused_by_name(name: str) -> None:
    with pytest.raises(UsageError, match=f"'{refusal(name)}"):
        quantize(timm.create_model(name, **kwargs_of(name, MODULES[name])), "w4a4")
