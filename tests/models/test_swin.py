"""Swin and what it has in common with the other new families: budgets, heads per stage, windows, training, methods."""

from __future__ import annotations

import random
from typing import Any

import pytest
import timm
import torch
from family_models import TINY, images_for, tiny
from timm.models.swin_transformer import WindowAttention
from tiny_models import small_config
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from qvit.allocate import round_to_budget
from qvit.errors import UsageError
from qvit.methods import create_method
from qvit.models.calibrate import calibrate
from qvit.models.convert import freeze, plan_of, quantize, quantizers_disabled
from qvit.models.families import inspect_model
from qvit.models.families.swin import QuantWindowAttention, windows_bias
from qvit.models.layers import adopt
from qvit.plan.budget import parse_budget
from qvit.plan.quant_plan import QuantPlan
from qvit.quantizers import quantizers_of

# ---------------------------------------------------------------------------------------------------------------- costs


@pytest.mark.parametrize(("bits", "printed"), [(3, "41.25"), (4, "72.58")])
def test_bit_operations_of_swin_tiny_are_those_of_the_paper(bits: int, printed: str) -> None:
    """Q-ViT's budgets for Swin-T: 8 bits in patch embedding and classifier, patch merging at the blocks' width."""
    with torch.device("meta"):
        cost = inspect_model(timm.create_model("swin_tiny_patch4_window7_224"))
    assert f"{cost.bit_operations(cost.uniform(bits)) / 1e9:.2f}" == printed
    assert parse_budget(f"{bits}bit", cost) == cost.bit_operations(cost.uniform(bits))


def test_multiplications_of_swin_tiny_stage_by_stage() -> None:
    """Blocks of 12 N·C² + 2 N·49·C, merging of 4C × 2C, and both ends."""
    with torch.device("meta"):
        cost = inspect_model(timm.create_model("swin_tiny_patch4_window7_224"))
    expected = 56**2 * 48 * 96 + 768 * 1000
    for stage, depth in enumerate((2, 2, 6, 2)):
        tokens, width = (56 // 2**stage) ** 2, 96 * 2**stage
        expected += depth * (12 * tokens * width**2 + 2 * tokens * 49 * width)
        expected += tokens * 2 * width**2 if stage else 0
    assert cost.macs == expected


def test_padded_windows_are_counted_as_computed() -> None:
    """A grid of 9×9 tokens and windows of 4: attention computes 12×12 tokens, the MLP 81."""
    model = tiny(img_size=36, depths=(1,), num_heads=(2,))
    macs = {matmul.right: matmul.macs for matmul in inspect_model(model).matmuls}
    block = "layers.0.blocks.0"
    assert macs[f"{block}.attn.qkv.query_weight"] == macs[f"{block}.attn.proj.weight"] == 144 * 16 * 16
    assert macs[f"{block}.attn.key"] == macs[f"{block}.attn.value"] == 144 * 16 * 16
    assert macs[f"{block}.mlp.fc1.weight"] == 81 * 16 * 64


@pytest.mark.parametrize("name", ["eva02", "beit", "cait"])
def test_a_classifier_without_pooling_sees_every_token(name: str) -> None:
    counts = [
        next(matmul.macs for matmul in inspect_model(tiny(name, global_pool=pool)).matmuls if "head." in matmul.right)
        for pool in ("", "avg")
    ]
    assert counts == [5 * 5 * 32, 5 * 32]


# ---------------------------------------------------------------------------------------------------------------- sites


def test_sites_of_swin_are_named_after_its_modules() -> None:
    sites = inspect_model(tiny()).sites
    block = ["attn.qkv.input", *(f"attn.qkv.{part}_weight" for part in ("query", "key", "value"))]
    block += [f"attn.{part}" for part in ("query", "key", "value", "probs", "output")]
    block += ["attn.proj.weight", "mlp.fc1.input", "mlp.fc1.weight", "mlp.fc2.input", "mlp.fc2.weight"]
    expected = ["patch_embed.proj.input", "patch_embed.proj.weight"]
    expected += [f"layers.0.blocks.{i}.{name}" for i in range(2) for name in block]
    expected += ["layers.1.downsample.reduction.input", "layers.1.downsample.reduction.weight"]
    expected += [f"layers.1.blocks.0.{name}" for name in block] + ["head.fc.input", "head.fc.weight"]
    assert list(sites) == expected
    assert [sites[f"layers.{i}.blocks.0.attn.query"].layout.num_heads for i in range(2)] == [2, 4]
    positions = {name: site.position for name, site in sites.items() if site.position != "block"}
    assert positions == dict.fromkeys(expected[:2], "first") | dict.fromkeys(expected[-2:], "last")


@pytest.mark.parametrize("name", ["swin", "swin_v2", "beit", "cait"])
def test_outputs_of_gelus_get_an_offset_and_probabilities_an_unsigned_grid(name: str) -> None:
    sites = inspect_model(tiny(name)).sites
    offset = {site for site, own in sites.items() if not own.default.symmetric}
    assert offset == {site for site in sites if site.endswith("mlp.fc2.input")} and offset
    unsigned = {site for site, own in sites.items() if not own.default.signed} - offset
    mixed = {"blocks.0.attn.probs"} if name == "cait" else set()
    softmax = {site for site in sites if site.endswith((".probs", ".proj_w.input"))}
    assert unsigned == softmax - mixed, "mixed probabilities of talking heads can be negative"


@pytest.mark.parametrize("name", ["eva02", "dinov3", "sapiens2"])
def test_gated_products_have_both_signs(name: str) -> None:
    spec = inspect_model(tiny(name)).sites["blocks.0.mlp.fc2.input"].default
    assert spec.signed and spec.symmetric


def test_separate_projections_have_their_own_sites() -> None:
    sites = inspect_model(tiny("eva02")).sites
    names = [name.removeprefix("blocks.0.attn.") for name in sites if ".attn." in name]
    assert names == [
        *(f"{part}_proj.{leaf}" for part in "qkv" for leaf in ("input", "weight")),
        *("query", "key", "value", "probs", "output", "proj.weight"),
    ]
    assert sites["blocks.0.attn.k_proj.weight"].layout.num_heads == 2


def test_shared_keys_and_values_have_one_width() -> None:
    cost = inspect_model(tiny("sapiens2"))
    heads = {name.rpartition("attn.")[2]: site.layout.num_heads for name, site in cost.sites.items() if "attn" in name}
    assert heads["query"] == heads["probs"] == heads["output"] == heads["q_proj.weight"] == 4
    assert heads["key"] == heads["value"] == heads["k_proj.weight"] == heads["v_proj.weight"] == 1
    widths = {name: (2, 4, 6, 8)[: site.layout.num_heads] for name, site in cost.sites.items()}
    (scores,) = (matmul for matmul in cost.matmuls if matmul.right.endswith("attn.key"))
    rest = cost.bit_operations(widths | {"blocks.0.attn.key": (3,)}) - cost.bit_operations(widths)
    assert rest == scores.macs // 4 * (2 + 4 + 6 + 8), "one bit more for the keys, against the queries of four heads"


# ------------------------------------------------------------------------------------------------------- windows, heads


def test_biases_of_windows_are_those_that_timm_adds() -> None:
    bias, mask = torch.randn(1, 3, 4, 4), torch.randn(5, 4, 4)
    scores = torch.randn(10, 3, 4, 4)
    expected = ((scores + bias).view(2, 5, 3, 4, 4) + mask.unsqueeze(1).unsqueeze(0)).view(10, 3, 4, 4)
    torch.testing.assert_close(scores + windows_bias(bias, mask, 10), expected)
    assert windows_bias(bias, None, 10) is bias


def test_the_mask_of_shifted_windows_matters() -> None:
    quantized: Any = adopt(QuantWindowAttention, tiny().layers[0].blocks[1].attn)
    x = torch.randn(8, 16, 16)
    mask = torch.zeros(4, 16, 16).masked_fill(torch.rand(4, 16, 16) > 0.5, -100.0)
    with torch.no_grad():
        assert not torch.allclose(quantized(x, mask=mask), quantized(x))


@pytest.mark.parametrize("name", ["swin", "swin_v2", "eva02", "beit", "cait"])
def test_changing_a_heads_widths_changes_that_head_alone(name: str) -> None:
    """In every quantizer with heads: other heads' slices of the tensor stay what they were, bit for bit."""
    model = tiny(name)
    images = images_for(model)
    quantized = calibrate(quantize(model, QuantPlan.preset("w4a4").resolve(inspect_model(model).sites)), [images])
    sites = inspect_model(model).sites
    per_head = {name: site for name, site in sites.items() if site.layout.num_heads > 1}
    assert {name.rpartition(".")[2] for name in per_head} >= {"query", "key", "value", "probs", "output", "weight"}
    found = dict(quantizers_of(quantized))
    for name, site in per_head.items():
        quantizer, heads = found[name], site.layout.num_heads
        assert site.layout.heads is not None
        axis = len(site.layout.heads) - site.layout.heads.index(heads)
        shape = site.layout.view or (2, heads, 5, site.layout.channels[-1] if site.layout.channels else 5)
        x = torch.rand(shape)
        low, high = quantizer.spec.changed({"bit_width": [4] * heads}), [4] * heads
        high[1] = 2
        before, after = (_with_widths(quantizer, x, spec) for spec in (low, low.changed({"bit_width": high})))
        for head, (old, new) in enumerate(zip(before.unbind(-axis), after.unbind(-axis), strict=True)):
            assert torch.equal(old, new) == (head != 1), f"{name}, head {head}"


def _with_widths(quantizer: Any, x: Tensor, spec: Any) -> Tensor:
    """`x` through a quantizer like `quantizer` whose heads have the widths of `spec`."""
    other = type(quantizer)(spec, quantizer.layout)
    observer = other.create_observer()
    observer.observe(other.view(x))
    other.initialize(observer)
    with torch.no_grad():
        return other(x).view(x.shape)


@pytest.mark.parametrize(
    ("name", "attention"),
    [
        ("swin", "layers.0.blocks.1.attn"),
        ("swin_v2", "layers.0.blocks.1.attn"),
        ("eva02", "blocks.0.attn"),
        ("beit", "blocks.0.attn"),
        ("cait", "blocks_token_only.0.attn"),
    ],
)
def test_heads_stay_apart_up_to_their_outputs(name: str, attention: str) -> None:
    """One head gets other widths in every tensor of a module: the other head's output stays the same, in all bits."""
    model = tiny(name)
    images = images_for(model)
    plan = QuantPlan.preset("w4a4").resolve(inspect_model(model).sites)
    uniform = {site: (4,) * own.layout.num_heads for site, own in inspect_model(model).sites.items()}
    last = {f"{attention}.output", f"{attention}.proj.weight"}
    changed = {
        site: (4, 2) if site.startswith(attention) and len(own) == 2 and site not in last else own
        for site, own in uniform.items()
    }
    assert sum(changed[site] != uniform[site] for site in uniform) == 7
    seen: list[Tensor] = []
    for widths in (uniform, changed):
        quantized = calibrate(quantize(model, plan.with_widths(widths)), [images])
        output = quantized.get_submodule(f"{attention}.output_quantizer")
        output.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        with torch.no_grad():
            quantized(images)
    first, second = (torch.equal(seen[0][:, head], seen[1][:, head]) for head in range(2))
    assert first and not second


def test_widths_of_a_head_reach_the_cost_of_its_stage_alone() -> None:
    cost = inspect_model(tiny())
    uniform: dict[str, tuple[int, ...]] = {name: (4,) * own.layout.num_heads for name, own in cost.sites.items()}
    assert cost.bit_operations(uniform) == cost.bit_operations(cost.uniform(4, boundary_bits=4))
    changed = uniform | {"layers.1.blocks.0.attn.key": (4, 4, 2, 4)}
    (scores,) = (matmul for matmul in cost.matmuls if matmul.right == "layers.1.blocks.0.attn.key")
    assert cost.bit_operations(uniform) - cost.bit_operations(changed) == scores.macs // 4 * (4 * 4 - 4 * 2)


# ------------------------------------------------------------------------------------------------------------- training


@pytest.mark.parametrize("name", TINY)
def test_every_scale_and_width_learns(name: str) -> None:
    model = tiny(name)
    images = images_for(model, 8)
    cost = inspect_model(model)
    method = create_method(small_config(method="qvit", budget="3bit"))
    plan = method.plan(cost)
    assert plan is not None
    quantized = calibrate(quantize(model, plan), [images])
    output = quantized.train()(images)
    assert output.shape == (8, 5) and torch.isfinite(output).all()
    assert float((output - model(images)).detach().abs().max()) > 1e-3, "3 bits cannot be the float model"
    torch.nn.functional.cross_entropy(output, torch.arange(8) % 5).backward()
    for parameter_name, parameter in quantized.named_parameters():
        assert parameter.grad is not None, f"no gradient: {parameter_name}"
        assert torch.isfinite(parameter.grad).all(), parameter_name
        if parameter_name.endswith(".scale"):
            assert parameter.grad.abs().any(), f"no gradient: {parameter_name}"


@pytest.mark.parametrize("name", ["swin", "sapiens2", "cait"])
def test_learned_widths_are_rounded_to_the_budget(name: str) -> None:
    """The numbers of heads differ between stages, between queries and keys, or between kinds of blocks."""
    model = tiny(name)
    cost = inspect_model(model)
    method: Any = create_method(small_config(method="qvit", budget="3bit"))
    quantized = calibrate(quantize(model, method.plan(cost)), [images_for(model)])
    method.attach(quantized, cost, 1)
    penalty = method.penalty()
    assert penalty is not None and torch.isfinite(penalty)
    generator = random.Random(0)
    learned = {
        site: [generator.uniform(2, 6) for _ in range(quantizer.bit_width.numel())]
        for site, quantizer in quantizers_of(quantized)
    }
    widths = round_to_budget(cost, learned, method.limit)
    freeze(quantized, widths)
    final = plan_of(quantized).widths()
    assert final == widths and 0.95 * method.limit < cost.bit_operations(final) <= method.limit
    assert {site: len(own) for site, own in final.items()} == {n: s.layout.num_heads for n, s in cost.sites.items()}


@pytest.mark.parametrize(
    "name", ["swin", *(pytest.param(name, marks=pytest.mark.slow) for name in ("swin_v2", "eva02", "sapiens2", "cait"))]
)
def test_a_quantized_model_compiles_to_one_graph(name: str) -> None:
    model = tiny(name)
    images = images_for(model)
    quantized = calibrate(quantize(model, "w4a4"), [images])
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled: Any = torch.compile(quantized, backend=counter, fullgraph=True)
    torch.testing.assert_close(compiled(images), quantized(images))
    assert counter.frame_count == 1
    torch._dynamo.reset()


# -------------------------------------------------------------------------------------------------------------- refused


class HalvedAttention(WindowAttention):
    """Window attention that computes something else."""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return 0.5 * super().forward(x, mask)


def with_own_attention() -> nn.Module:
    model = tiny()
    model.layers[0].blocks[1].attn = adopt(HalvedAttention, model.layers[0].blocks[1].attn)
    return model


def with_gate() -> nn.Module:
    model = tiny("dinov3")
    model.blocks[0].attn.gate = nn.Linear(32, 32)
    return model


def with_other_patches() -> nn.Module:
    model = tiny()
    model.patch_embed = nn.Sequential(nn.Conv2d(3, 16, 4, 4))
    return model


def with_convolution() -> nn.Module:
    model = tiny("cait")
    model.blocks[0].mlp.dwconv = nn.Conv1d(128, 128, 3, groups=128)
    return model


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (with_own_attention, "layers.0.blocks.1.attn.qkv"),
        (with_gate, "blocks.0.attn."),
        (with_other_patches, "patch_embed.0"),
        (with_convolution, "blocks.0.mlp.dwconv"),
        (lambda: timm.create_model("swinv2_cr_tiny_224", depths=(1, 1), embed_dim=12), "SwinTransformerV2Cr"),
    ],
)
def test_what_is_not_known_is_refused_by_name(make: Any, named: str) -> None:
    model = make()
    keys = list(model.state_dict())
    with pytest.raises(UsageError, match=named.replace(".", r"\.")):
        quantize(model, "w4a4", in_place=True)
    assert list(model.state_dict()) == keys, "a refused model stays as it was"


def test_a_quantized_swin_takes_another_image_size() -> None:
    """timm changes masks and resolutions in place; sites have no axis of windows or tokens."""
    model = tiny()
    quantized: Any = calibrate(quantize(model, "w8a8"), [images_for(model)])
    for own in (model, quantized):
        own.set_input_size(img_size=48, window_size=4)
    images = images_for(model)
    with torch.no_grad(), quantizers_disabled(quantized):
        torch.testing.assert_close(quantized(images), model(images), rtol=1e-4, atol=1e-4)
    assert inspect_model(quantized).macs == inspect_model(model).macs
