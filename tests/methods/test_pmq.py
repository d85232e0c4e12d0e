"""Patch-wise widths: ranking, quantization by rank, costs of token groups, splits and their allocation."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import calibrated_model, digit_batches, digits_model, shake
from torch import nn

from qvit.deploy.file.artifact import Artifact
from qvit.deploy.integer.reference import integer_form
from qvit.deploy.integer.torch import TorchArithmetic
from qvit.errors import QvitError, UsageError
from qvit.measure import partial as partial_module
from qvit.methods import pmq
from qvit.methods.pmq import (
    Split,
    allocate_splits,
    block_widths,
    candidate_splits,
    divergence,
    keeping_average,
    measure_splits,
    patchwise_plan,
    split_plan,
    switchable,
    token_blocks,
)
from qvit.methods.ptq.class_token import with_class_token
from qvit.models.calibrate import calibrate
from qvit.models.convert import freeze, plan_of, quantize, quantizers_disabled
from qvit.models.create import create_model
from qvit.models.families import inspect_model
from qvit.models.families.tokens import rank_tokens
from qvit.plan.cost import CostModel, TokenWidths
from qvit.plan.quant_plan import QuantPlan, Rule
from qvit.plan.spec import Layout, TensorSpec, TokenSplit
from qvit.quantizers import create_quantizer, quantizers_of
from qvit.report.patches import render_patches, write_patches_page
from qvit.runs.patchwise import important_patches, patchwise
from qvit.runs.subject import Request


def split_model(splits: dict[str, Split], model: nn.Module | None = None, plan: str = "w4a4") -> nn.Module:
    """A calibrated model of `digits_model` with these splits."""
    model = digits_model(depth=2) if model is None else model
    cost = inspect_model(model)
    images = digit_batches() if hasattr(model, "blocks") else [torch.randn(2, 3, 32, 32)]
    resolved = split_plan(QuantPlan.preset(plan), cost, splits)
    return calibrate(quantize(model, resolved), images).eval()


@pytest.fixture(scope="module")
def cost() -> CostModel:
    return inspect_model(digits_model(depth=2))


@pytest.fixture(scope="module")
def plain(cost: CostModel) -> QuantPlan:
    return QuantPlan.preset("w4a4").resolve(cost.sites)


def mixed_groups(plain: QuantPlan, cost: CostModel) -> QuantPlan:
    """Two blocks in which splits, a width of the class token, and widths of heads and tensors of their own meet."""
    three = {"share": 0.5, "high": 5, "low": 3}
    changes: dict[str, dict[str, Any]] = {
        "blocks.0.attn.key": {"bit_width": [3, 5]},
        "blocks.0.attn.query": {"bit_width": [8, 7], "token_bit_width": three},
        "blocks.0.attn.value": {"bit_width": 8, "token_bit_width": three},
        "blocks.0.mlp.fc1.input": {"bit_width": 8, "token_bit_width": three},
        "blocks.0.mlp.fc2.weight": {"bit_width": 3},
        "blocks.1.attn.qkv.input": {"bit_width": 8, "token_bit_width": {"share": 0, "low": 3}},
        "blocks.1.attn.value": {"bit_width": [6, 4], "token_bit_width": {"share": 0.25, "low": 2}},
    }
    rules = [Rule(site, own) for site, own in changes.items()]
    return switchable(plain, cost).with_rules(*rules).resolve(cost.sites)


def token_widths(plan: QuantPlan, cost: CostModel, site: str) -> list[list[int]]:
    """The width of every token of every head of a site; one token where all are alike."""
    spec = plan.sites[site]
    assert spec is not None
    split, tokens, prefix = spec.token_bit_width, cost.sites[site].tokens, cost.sites[site].layout.prefix_tokens
    if split is None:
        return [[width] for width in spec.widths]
    found = []
    for width in spec.widths:
        middle = width if split.high is None else split.high
        high = max(prefix, math.floor(split.share * tokens))
        found.append([width if n < prefix else middle if n < high else split.low for n in range(tokens)])
    return found


def swin() -> nn.Module:
    model = create_model(
        "swin_tiny_patch4_window7_224", img_size=32, window_size=4, depths=(1, 1), num_heads=(2, 4), embed_dim=16
    )
    return shake(model).eval()


class TestRanking:
    def test_by_hand(self) -> None:
        scores = torch.tensor([[0.0, 0.3, 0.9, 0.3, 0.1], [9.0, 0.0, 1.0, 2.0, 3.0]])
        assert rank_tokens(scores, 1).tolist() == [[-1, 2, 1, 3, 4], [-1, 4, 3, 2, 1]]
        assert rank_tokens(scores).tolist() == [[4, 1, 0, 2, 3], [0, 4, 3, 2, 1]]

    def test_scores_are_the_attention_of_the_class_token(self) -> None:
        model = split_model({"blocks.1": Split(5, 3, 0.5)})
        seen: dict[str, Any] = {}
        blocks: Any = model.get_submodule("blocks")
        blocks[0].attn.attn_drop.register_forward_hook(lambda _, __, probs: seen.update(probs=probs))
        blocks[1].mlp.fc1.register_forward_pre_hook(lambda _, inputs: seen.update(rank=inputs[1]))
        model(digit_batches(1)[0])
        received = seen["probs"][:, :, 0].mean(1)
        assert torch.equal(seen["rank"], rank_tokens(received, 1))
        best = received[:, 1:].argmax(1) + 1
        assert (seen["rank"].gather(1, best.unsqueeze(1)) == 1).all() and (seen["rank"][:, 0] == -1).all()

    def test_the_first_block_ranks_by_magnitude(self) -> None:
        model = split_model({"blocks.0": Split(5, 3, 0.5)})
        seen: dict[str, Any] = {}
        model.get_submodule("blocks.0.attn.qkv").register_forward_pre_hook(lambda _, inputs: seen.update(inputs=inputs))
        model(digit_batches(1)[0])
        x, rank = seen["inputs"]
        assert torch.equal(rank, rank_tokens(x.abs().mean(-1), 1))

    def test_a_model_without_class_token_ranks_by_magnitude_throughout(self) -> None:
        model = split_model({"blocks.1": Split(5, 3, 0.5)}, digits_model(depth=2, class_token=False, global_pool="avg"))
        seen: dict[str, Any] = {}
        model.get_submodule("blocks.1.attn.qkv").register_forward_pre_hook(lambda _, inputs: seen.update(inputs=inputs))
        model(digit_batches(1)[0])
        assert torch.equal(seen["inputs"][1], rank_tokens(seen["inputs"][0].abs().mean(-1)))

    def test_blocks_do_not_run_alone(self) -> None:
        model = split_model({"blocks.0": Split(5, 3, 0.5)})
        with pytest.raises(UsageError, match="run them through the model's forward"):
            model.get_submodule("blocks.0")(torch.randn(1, 17, 16))
        with pytest.raises(UsageError, match="run them through the model's forward"):
            model.forward_features(digit_batches(1)[0], attn_mask=torch.ones(17, 17))  # type: ignore[operator]


class TestQuantizer:
    SPEC = TensorSpec(bit_width=5, options={"switchable_scale": True}, token_bit_width=TokenSplit(0.5, 3))

    def quantizer(self, spec: TensorSpec = SPEC, layout: Layout | None = None) -> Any:
        quantizer = create_quantizer(spec, layout or Layout())
        observer = quantizer.create_observer()
        observer.observe(torch.randn(64, 2, 8, 4))
        quantizer.initialize(observer)
        return quantizer

    @pytest.mark.parametrize("shape", [(2, 8, 4), (2, 2, 8, 4)])
    def test_each_group_is_quantized_as_a_plain_tensor(self, shape: tuple[int, ...]) -> None:
        x, quantizer = torch.randn(shape), self.quantizer()
        rank = torch.stack([torch.randperm(8), torch.randperm(8)])
        found = quantizer(x, rank)
        important = (rank < 4).unsqueeze(-1) if len(shape) == 3 else (rank < 4)[:, None, :, None]
        for bits, chosen in ((5, important), (3, ~important)):
            alone = self.quantizer(TensorSpec(bit_width=bits, options={"switchable_scale": True}))
            alone.load_state_dict(quantizer.state_dict() | {"bit_width": torch.tensor(float(bits))})
            assert torch.equal(found[chosen.expand_as(x)], alone(x)[chosen.expand_as(x)])

    def test_heads_keep_their_widths(self) -> None:
        spec = self.SPEC.changed({"bit_width": [5, 6], "granularity": "per-head"})
        quantizer = self.quantizer(spec, Layout(heads=(2, 1, 1)))
        widths = quantizer.token_bit_width(torch.randn(1, 2, 4, 4), torch.tensor([[3, 0, 1, 2]]))
        assert widths[0, :, :, 0].tolist() == [[3, 5, 5, 3], [3, 6, 6, 3]]

    def test_without_a_ranking_it_refuses(self) -> None:
        with pytest.raises(UsageError, match="given no ranking"):
            self.quantizer()(torch.randn(1, 8, 4))

    @given(share=st.floats(0, 1), tokens=st.integers(1, 200), prefix=st.integers(0, 2))
    def test_the_share_is_exact(self, share: float, tokens: int, prefix: int) -> None:
        tokens += prefix
        split = TokenSplit(share, 2)
        count = split.important(tokens, prefix)
        rank = rank_tokens(torch.rand(2, tokens), prefix)
        assert (rank < split.important(tokens)).sum(1).tolist() == [count, count]
        assert count >= prefix and (count == prefix or count <= share * tokens + 1e-6)

    def test_gradients_reach_the_scales_of_both_widths_alone(self) -> None:
        quantizer = self.quantizer()
        quantizer(torch.randn(2, 8, 4), torch.stack([torch.arange(8)] * 2)).square().sum().backward()
        used = [int(bits) for bits, grad in zip(range(2, 9), quantizer.scale.grad.flatten(), strict=True) if grad != 0]
        assert used == [3, 5]

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"token_bit_width": {"share": 0.5, "low": 6}}, "unlike 6"),
            ({"token_bit_width": {"share": 0.5, "low": 1}}, "unlike 1"),
            ({"token_bit_width": {"share": 1.5, "low": 3}}, "between 0 and 1, unlike 1.5"),
            ({"token_bit_width": {"share": 0.5}}, "must be .* or null"),
            ({"token_bit_width": 3}, "must be .* or null, not 3"),
            (
                {"token_bit_width": {"share": 0.5, "low": 3, "high": 6}},
                "others, 3, to the tensor's, 5, unlike 6",
            ),
            ({"token_bit_width": {"share": 0, "low": 3, "high": 4}}, "needs a share above 0"),
            ({"token_bit_width": {"share": 0.5, "low": 3}, "switchable_scale": False}, "need a scale for each"),
            ({"token_bit_width": {"share": 0.5, "low": 3}, "learn_bit_width": True}, "fixed widths"),
        ],
    )
    def test_impossible_specs(self, changes: dict[str, Any], message: str) -> None:
        with pytest.raises(UsageError, match=message):
            TensorSpec(bit_width=5, options={"switchable_scale": True}).changed(changes)


class TestModel:
    def test_all_high_is_the_plain_model_bit_for_bit(self, cost: CostModel, plain: QuantPlan) -> None:
        model, images = digits_model(depth=2), digit_batches(1)[0]
        rules = [
            Rule(site, {"token_bit_width": {"share": 1.0, "low": 2}})
            for own in token_blocks(cost).values()
            for site in own
        ]
        high = switchable(plain, cost).with_rules(*rules).resolve(cost.sites)
        expected = calibrate(quantize(model, plain), digit_batches()).eval()(images)
        assert torch.equal(calibrate(quantize(model, high), digit_batches()).eval()(images), expected)
        assert cost.bit_operations(high.widths()) == cost.bit_operations(plain.widths())

    def test_all_low_is_the_plain_model_but_for_the_class_token(self, cost: CostModel, plain: QuantPlan) -> None:
        model = split_model({block: Split(8, 4, 0.0) for block in token_blocks(cost)})
        found = important_patches(model, digit_batches(1)[0])
        assert all(not important.any() for important, *_ in found.values())
        assert not torch.equal(
            model(digit_batches(1)[0]), calibrated_model("w4a4", depth=2).eval()(digit_batches(1)[0])
        )

    @pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "swin_tiny_patch4_window7_224"])
    def test_patches_lie_where_the_model_has_them(self, name: str) -> None:
        tiny: dict[str, Any] = {"embed_dim": 16, "num_heads": 2, "depth": 2}
        expected = {"blocks.0": (4, 2), "blocks.1": (4, 2)}
        if name.startswith("swin"):
            tiny = {"embed_dim": 16, "num_heads": (2, 4), "depths": (1, 1), "window_size": 2}
            expected = {"layers.0.blocks.0": (16, 8), "layers.1.blocks.0": (8, 4)}
        model = create_model(name, img_size=(64, 32), num_classes=3, **tiny).eval()
        cost, images = inspect_model(model), torch.randn(2, 3, 64, 32)
        splits = dict.fromkeys(token_blocks(cost), Split(8, 4, 0.5))
        quantized = quantize(model, split_plan(QuantPlan.preset("w6a6"), cost, splits))
        found = important_patches(calibrate(quantized, [images]).eval(), images)
        assert {block: tuple(important.shape[1:]) for block, (important, *_) in found.items()} == expected

    def test_float_keys_and_numbers_survive(self) -> None:
        model = digits_model(depth=2)
        quantized = split_model({"blocks.0": Split(5, 3, 0.5)}, model)
        assert [key for key in quantized.state_dict() if "_quantizer" not in key] == list(model.state_dict())
        with quantizers_disabled(quantized):
            assert torch.allclose(quantized(digit_batches(1)[0]), model(digit_batches(1)[0]), atol=1e-5)

    def test_an_image_does_not_depend_on_its_batch_mates(self) -> None:
        model = split_model({"blocks.0": Split(6, 2, 0.5), "blocks.1": Split(6, 2, 0.5)})
        images = digit_batches(1)[0]
        whole = model(images)
        alone = torch.cat([model(image) for image in images.split(1)])
        assert torch.allclose(whole, alone, atol=1e-5)
        assert torch.allclose(model(images.flip(0)).flip(0), whole, atol=1e-5)
        assert torch.equal(model(images), whole)

    def test_the_class_token_is_always_high(self) -> None:
        model = split_model({"blocks.0": Split(8, 2, 0.25), "blocks.1": Split(8, 2, 0.25)})
        widths: list[torch.Tensor] = []
        for _, quantizer in quantizers_of(model):
            if quantizer.spec.token_bit_width is not None:
                quantizer.register_forward_pre_hook(lambda q, inputs: widths.append(q.token_bit_width(*inputs)))
        model(digit_batches(1)[0])
        assert len(widths) == 2 * 5
        for width in widths:
            flat = width.squeeze(-1) if width.dim() == 3 else width[:, 0, :, 0]
            assert (flat[:, 0] == 8).all() and ((flat == 8).sum(1) == math.floor(0.25 * 17)).all()

    def test_freezing_and_saving_keep_the_groups(self, cost: CostModel) -> None:
        model = freeze(split_model({"blocks.1": Split(5, 3, 0.5)}))
        plan = plan_of(model)
        assert plan.sites["blocks.1.attn.value"].token_bit_width == TokenSplit(0.5, 3)  # type: ignore[union-attr]
        other = quantize(digits_model(depth=2), plan).eval()
        other.load_state_dict(model.state_dict())
        assert torch.equal(other(digit_batches(1)[0]), model.eval()(digit_batches(1)[0]))

    def test_three_groups_have_the_widths_of_their_tokens(self, cost: CostModel, plain: QuantPlan) -> None:
        model = calibrate(quantize(digits_model(depth=2), mixed_groups(plain, cost)), digit_batches()).eval()
        seen: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}

        def note(site: str) -> Any:
            def hook(quantizer: Any, inputs: tuple[torch.Tensor, torch.Tensor]) -> None:
                seen[site] = (quantizer.token_bit_width(*inputs), inputs[1])

            return hook

        for site, quantizer in quantizers_of(model):
            if quantizer.spec.ranks_tokens:
                quantizer.register_forward_pre_hook(note(site))
        model(digit_batches(1)[0])
        assert len(seen) == 4
        for site, (widths, rank) in seen.items():
            widths = widths.squeeze(-1) if widths.dim() == 4 else widths.transpose(1, 2)
            order = rank.argsort(1)
            for head, own in enumerate(token_widths(mixed_groups(plain, cost), cost, site)):
                assert (widths[:, head].gather(1, order) == torch.tensor(own)).all()

    @pytest.mark.parametrize("arithmetic", [None, TorchArithmetic()])
    def test_mixed_plans_are_packed_and_run_on_integers(
        self, cost: CostModel, plain: QuantPlan, tmp_path: Path, arithmetic: Any
    ) -> None:
        plan, images = mixed_groups(plain, cost), digit_batches(1)[0]
        model = freeze(calibrate(quantize(digits_model(depth=2), plan), digit_batches()).eval())
        with torch.no_grad():
            expected = model(images)
            assert torch.allclose(integer_form(model, arithmetic)(images), expected, atol=1e-5)
            kwargs = {"depth": 2, "embed_dim": 16, "num_heads": 2}
            Artifact.from_model(model, model_name="vit_digits", model_kwargs=kwargs).save(tmp_path / "packed")
            artifact = Artifact.load(tmp_path / "packed")
            assert artifact.plan.sites == plan_of(model).sites
            assert torch.equal(artifact.model()(images), expected)

    @pytest.mark.slow
    def test_it_compiles_into_one_graph(self) -> None:
        model = split_model({"blocks.0": Split(5, 3, 0.5), "blocks.1": Split(6, 2, 0.5)})
        images = digit_batches(1)[0]
        assert torch.allclose(torch.compile(model, fullgraph=True)(images), model(images), atol=1e-5)

    def test_swin_ranks_within_windows(self) -> None:
        model = swin()
        cost = inspect_model(model)
        path = "layers.0.blocks.0"
        assert [cost.sites[f"{path}.{leaf}"].tokens for leaf in ("attn.query", "mlp.fc1.input")] == [16, 64]
        split = split_model({path: Split(5, 3, 0.5)}, model)
        seen: dict[str, Any] = {}
        split.get_submodule(f"{path}.attn.qkv").register_forward_pre_hook(lambda _, inputs: seen.update(inputs=inputs))
        images = torch.randn(2, 3, 32, 32)
        with torch.no_grad():
            result = split(images)
            assert seen["inputs"][1].shape == (8, 16)
            assert torch.allclose(split(images[1:]), result[1:], atol=1e-5)
            with quantizers_disabled(split):
                assert torch.allclose(split(images), model(images), atol=1e-5)

    @pytest.mark.parametrize("name", ["cait_xxs24_224", "eva02_tiny_patch14_224"])
    def test_other_families_refuse(self, name: str) -> None:
        cost = inspect_model(create_model(name, depth=1))
        with pytest.raises(UsageError, match="cannot differ in width"):
            token_blocks(cost)
        site = next(site for site in cost.sites if site.endswith("attn.query"))
        rule = Rule(site, {"switchable_scale": True, "token_bit_width": {"share": 0.5, "low": 3}})
        with pytest.raises(UsageError, match=f"tokens of site '{site}' cannot differ"):
            QuantPlan.preset("w4a4").with_rules(rule).resolve(cost.sites)


class TestCost:
    @pytest.mark.parametrize("key", [False, True])
    @pytest.mark.parametrize("name", ["vit", "swin"])
    def test_by_brute_force(self, name: str, key: bool) -> None:
        """The MACs of every product, walked through token by token."""
        model = digits_model(depth=2) if name == "vit" else swin()
        cost = inspect_model(model)
        splits = {block: Split(6, 3, 0.3 + 0.2 * n) for n, block in enumerate(token_blocks(cost))}
        widths = split_plan(QuantPlan.preset("w4a4"), cost, splits, key=key).widths()
        total = 0
        for matmul in cost.matmuls:
            sides = []
            for site in (matmul.left, matmul.right):
                own = widths[site]
                count = cost.sites[site].tokens if isinstance(own, TokenWidths) else 1
                high = (
                    own.split.important(count, cost.sites[site].layout.prefix_tokens)
                    if isinstance(own, TokenWidths)
                    else 1
                )
                low = own.split.low if isinstance(own, TokenWidths) else 0
                sides.append([own[0] if token < high else low for token in range(count)])
            each, rest = divmod(matmul.macs, len(sides[0]) * len(sides[1]))
            assert rest == 0
            total += sum(each * left * right for left, right in itertools.product(*sides))
        assert cost.bit_operations(widths) == total
        report = cost.report(widths, model="", plan="")
        assert report["bit_operations"] == sum(row["bit_operations"] for row in report["sites"]) == total
        assert sum("token_bit_width" in row for row in report["sites"]) == len(splits) * (6 if key else 5)

    def test_mixed_widths_by_brute_force(self, cost: CostModel, plain: QuantPlan) -> None:
        """Every token of every head, where groups, widths of heads and a width of the class token meet."""
        plan = mixed_groups(plain, cost)
        total = 0
        for matmul in cost.matmuls:
            sides = [token_widths(plan, cost, site) for site in (matmul.left, matmul.right)]
            heads = max(map(len, sides))
            each, rest = divmod(matmul.macs, heads * len(sides[0][0]) * len(sides[1][0]))
            assert rest == 0
            for head in range(heads):
                left, right = (side[head % len(side)] for side in sides)
                total += each * sum(left) * sum(right)
        assert cost.bit_operations(plan.widths()) == total

    def test_deit_by_hand(self) -> None:
        """197 tokens, 98 of them at 5 bits and 99 at 3: the input of fc1 has 3.9949 bits in the mean."""
        cost = inspect_model(create_model("deit_tiny_patch16_224"))
        plain = QuantPlan.preset("w4a4").resolve(cost.sites)
        split = split_plan(plain, cost, {"blocks.3": Split(5, 3, 0.5)}).widths()
        rows = {row["site"]: row for row in cost.report(split, model="", plan="")["sites"]}

        def counted(site: str) -> int:
            return rows[site]["bit_operations"]

        assert counted("blocks.3.mlp.fc1.weight") == (98 * 5 + 99 * 3) * 192 * 768 * 4
        assert counted("blocks.3.attn.key") == (98 * 5 + 99 * 3) * 197 * 192 * 4
        assert counted("blocks.2.attn.key") == 197 * 197 * 192 * 16


class TestPlan:
    def test_json_round_trip(self, cost: CostModel, plain: QuantPlan, tmp_path: Path) -> None:
        plan = patchwise_plan(plain, cost, 0.5)
        plan.save(tmp_path / "plan.json")
        assert QuantPlan.load(tmp_path / "plan.json") == plan
        data = json.loads((tmp_path / "plan.json").read_text())
        assert data["sites"]["blocks.0.attn.query"]["token_bit_width"] == {"share": 0.5, "low": 3}
        rules = QuantPlan(
            "r", (Rule("*.fc1.input", {"switchable_scale": True, "token_bit_width": {"share": 0.5, "low": 3}}),)
        )
        assert QuantPlan.from_json(rules.to_json()).resolve(cost.sites) == rules.resolve(cost.sites)

    def test_plans_without_groups_read_as_before(self, plain: QuantPlan) -> None:
        assert all("token_bit_width" not in spec for spec in plain.to_json()["sites"].values())
        assert QuantPlan.from_json(plain.to_json()) == plain

    def test_difference(self, cost: CostModel, plain: QuantPlan) -> None:
        rows = switchable(plain, cost).resolve(cost.sites).diff(split_plan(plain, cost, {"blocks.0": Split(5, 3, 0.5)}))
        assert {(row["key"], str(row["here"])) for row in rows} == {("bit_width", "4"), ("token_bit_width", "None")}

    def test_widths_of_heads_stay_beside_groups(self, cost: CostModel, plain: QuantPlan) -> None:
        plan = split_plan(plain, cost, {"blocks.0": Split(5, 3, 0.5)})
        changed = plan.with_widths({"blocks.0.attn.query": (5, 6)})
        spec = changed.sites["blocks.0.attn.query"]
        assert spec is not None and spec.widths == (5, 6) and spec.token_bit_width == TokenSplit(0.5, 3)


class TestSplits:
    @pytest.mark.parametrize(
        ("width", "share", "expected"),
        [
            (4, 0.5, [(5, 3), (6, 2)]),
            (4, 0.25, [(7, 3)]),
            (6, 0.5, [(7, 5), (8, 4)]),
            (8, 0.5, []),
            (6, 2 / 3, [(7, 4), (8, 2)]),
        ],
    )
    def test_keeping_the_average(self, width: int, share: float, expected: list[tuple[int, int]]) -> None:
        assert [(split.high, split.low) for split in keeping_average(width, share)] == expected

    def test_equal_bit_operations_but_for_whole_tokens(self, cost: CostModel, plain: QuantPlan) -> None:
        before, after = (cost.bit_operations(p.widths()) for p in (plain, patchwise_plan(plain, cost, 0.5)))
        assert 0.97 * before < after <= before

    def test_no_such_widths(self, cost: CostModel) -> None:
        with pytest.raises(
            UsageError, match=r"average to 2 bits at a share of 0\.5: give a smaller budget|average to 2"
        ):
            patchwise_plan(QuantPlan.preset("w2a2"), cost, 0.5)
        with pytest.raises(UsageError, match=r"at a share of 0\.45; shares that do: 0\.2, 0\.25"):
            patchwise_plan(QuantPlan.preset("w4a4"), cost, 0.45)

    def test_unknown_blocks(self, cost: CostModel, plain: QuantPlan) -> None:
        with pytest.raises(UsageError, match="'blocks.7' is no block with tokens"):
            split_plan(plain, cost, {"blocks.7": Split(5, 3, 0.5)})

    def test_splits_of_mixed_plans_keep_the_distance_of_widths(self, cost: CostModel, plain: QuantPlan) -> None:
        widths = {"blocks.0.attn.value": 5, "blocks.0.attn.query": [4, 6], "blocks.0.mlp.fc1.input": 8}
        mixed = plain.with_rules(*(Rule(site, {"bit_width": bits}) for site, bits in widths.items()))
        assert block_widths(mixed, cost) == {"blocks.0": 4, "blocks.1": 4}
        found = split_plan(mixed, cost, {"blocks.0": Split(6, 3, 0.5)}).widths()
        groups = {site: (own[0], own.split.low) for site, own in found.items() if isinstance(own, TokenWidths)}
        assert groups == {f"blocks.0.{leaf}": (6, 3) for leaf in ("attn.qkv.input", "mlp.fc2.input")} | {
            "blocks.0.attn.value": (7, 4),
            "blocks.0.mlp.fc1.input": (8, 7),
        }
        assert found["blocks.0.attn.query"] == (4, 6)
        class_token = with_class_token(mixed, cost, 8)
        assert class_token is not None and block_widths(class_token, cost) == {"blocks.0": 4, "blocks.1": 4}
        found = split_plan(class_token, cost, {"blocks.0": Split(6, 3, 0.5), "blocks.1": Split(5, 5, 1.0)}).widths()
        three, two = (found[f"blocks.{n}.attn.qkv.input"] for n in (0, 1))
        assert isinstance(three, TokenWidths) and (three[0], three.split) == (8, TokenSplit(0.5, 3, 6))
        assert isinstance(two, TokenWidths) and (two[0], two.split) == (8, TokenSplit(0, 5))
        floats = plain.with_rules(*(Rule(site, None) for site in token_blocks(cost)["blocks.1"]))
        with pytest.raises(UsageError, match=r"has all activations of blocks\.1 in float"):
            block_widths(floats, cost)

    def test_mixed_plans_keep_the_average_of_each_tensor(self, cost: CostModel, plain: QuantPlan) -> None:
        widths = {"blocks.0.attn.value": 5, "blocks.0.attn.query": [4, 6], "blocks.1.mlp.fc1.input": 8}
        rules = [Rule(site, {"bit_width": bits}) for site, bits in widths.items()]
        plan = patchwise_plan(plain.with_rules(*rules), cost, 0.5)
        found = {site: spec for site, spec in plan.sites.items() if spec is not None}
        assert found["blocks.0.attn.value"].bit_width == 6
        assert found["blocks.0.attn.value"].token_bit_width == TokenSplit(0.5, 4)
        assert found["blocks.0.attn.query"].widths == (4, 6)
        assert found["blocks.0.attn.query"].token_bit_width is None
        assert found["blocks.1.mlp.fc1.input"].token_bit_width is None
        assert found["blocks.1.mlp.fc2.input"].token_bit_width == TokenSplit(0.5, 3)

    def test_damages_are_of_one_block_at_a_time(self, cost: CostModel, plain: QuantPlan) -> None:
        candidates = {block: candidate_splits(4, (0.5,), free=False) for block in token_blocks(cost)}
        done: list[tuple[int, int]] = []
        damages = measure_splits(
            digits_model(depth=2), plain, cost, candidates, digit_batches(), digit_batches(1, seed=4),
            progress=lambda *at: done.append(at),
        )  # fmt: skip
        assert done[-1] == (6, 6) and damages["blocks.0"][0] == damages["blocks.1"][0] > 0
        assert all(math.isfinite(value) for own in damages.values() for value in own)

    def test_an_interrupted_measurement_goes_on(
        self, cost: CostModel, plain: QuantPlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """What was measured before the end of a call is not measured again, unless the plain plan is another."""
        monkeypatch.setattr(partial_module, "_SAVE_EVERY", 0.0)
        candidates = {block: candidate_splits(4, (0.5,), free=False) for block in token_blocks(cost)}
        measured: list[float] = []

        def measure(plan: QuantPlan, most: int = 100) -> dict[str, list[float]]:
            def counted(*given: Any) -> float:
                if len(measured) >= most:
                    raise KeyboardInterrupt
                measured.append(divergence(*given))
                return measured[-1]

            measured.clear()
            monkeypatch.setattr(pmq, "divergence", counted)
            batches = digit_batches(1, seed=4)
            return measure_splits(
                digits_model(depth=2), plan, cost, candidates, digit_batches(), batches, partial=tmp_path / "partial"
            )

        whole = measure(plain)
        (tmp_path / "partial").unlink()
        with pytest.raises(KeyboardInterrupt):
            measure(plain, most=3)
        assert measure(plain) == whole
        assert len(measured) == 2
        measure(QuantPlan.preset("w4a6").resolve(cost.sites))
        assert len(measured) == 6

    @pytest.mark.parametrize("seed", range(5))
    def test_the_allocation_is_the_best_of_all(self, cost: CostModel, plain: QuantPlan, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        candidates = {block: candidate_splits(4, (0.5,), free=True) for block in token_blocks(cost)}
        damages = {b: torch.rand(len(own), generator=generator).tolist() for b, own in candidates.items()}
        budget = int(cost.bit_operations(plain.widths()) * (0.9 + 0.05 * seed))
        chosen = allocate_splits(plain, cost, candidates, damages, budget)
        best = min(
            sum(damages[block][index] for block, index in zip(candidates, picks, strict=True))
            for picks in itertools.product(*(range(len(own)) for own in candidates.values()))
            if cost.bit_operations(
                split_plan(plain, cost, {b: candidates[b][i] for b, i in zip(candidates, picks, strict=True)}).widths()
            )
            <= budget
        )
        assert sum(damages[b][candidates[b].index(split)] for b, split in chosen.items()) == pytest.approx(best)
        assert cost.bit_operations(split_plan(plain, cost, chosen).widths()) <= budget

    def test_an_impossible_budget(self, cost: CostModel, plain: QuantPlan) -> None:
        candidates = {block: candidate_splits(4, (0.5,), free=True) for block in token_blocks(cost)}
        damages = {block: [0.0] * len(own) for block, own in candidates.items()}
        with pytest.raises(QvitError, match=r"no splits fit into 1\.000 M: .* between [\d.]+ M and [\d.]+ M"):
            allocate_splits(plain, cost, candidates, damages, 1_000_000)


class TestEndToEnd:
    REQUEST = Request(
        model="vit_digits", data="digits", images=40, calibration_images=32, device="cpu",
        model_kwargs={"depth": 2, "embed_dim": 16, "num_heads": 2},
    )  # fmt: skip

    @pytest.mark.parametrize("allocation", ["same", "average", "free"])
    def test_result_and_files(self, tmp_path: Path, allocation: str) -> None:
        result = patchwise(self.REQUEST, tmp_path, budget="4bit", allocation=allocation, score_images=8, picture=2)
        assert result["bit_operations"] <= result["budget"] == result["uniform_bit_operations"]
        assert json.loads((tmp_path / "patchwise.json").read_text()) == result
        assert set(result["seconds"]) == {"allocation", "calibration", "float", "uniform", "patchwise", "total"}
        cost = json.loads((tmp_path / "cost.json").read_text())
        assert cost["bit_operations"] == result["bit_operations"]
        assert QuantPlan.load(tmp_path / "plan.json").model == "vit_digits"
        with pytest.raises(UsageError, match="holds a result"):
            patchwise(self.REQUEST, tmp_path, budget="4bit")
        again = patchwise(self.REQUEST, tmp_path / "2", budget="4bit", plan=tmp_path / "plan.json")
        assert {k: again[k] for k in ("top1", "agreement", "splits", "bit_operations", "uniform_top1")} == {
            k: result[k] for k in ("top1", "agreement", "splits", "bit_operations", "uniform_top1")
        }

    def test_splits_of_a_mixed_plan(self, tmp_path: Path) -> None:
        rules = (Rule("blocks.*.mlp.*", {"bit_width": 3}), Rule("blocks.0.attn.key", {"bit_width": [3, 5]}))
        mixed = QuantPlan.preset("w4a4").with_rules(*rules)
        mixed.save(tmp_path / "mixed.json")
        result = patchwise(
            self.REQUEST, tmp_path / "run", budget="4bit", allocation="average", plan=tmp_path / "mixed.json",
            score_images=8,
        )  # fmt: skip
        assert result["bit_operations"] <= result["uniform_bit_operations"] < result["budget"]
        assert set(result["splits"]) == {"blocks.0", "blocks.1"}

    def test_a_width_for_the_class_token_is_kept_beside_splits(self, cost: CostModel, tmp_path: Path) -> None:
        plan = with_class_token(QuantPlan.preset("w4a4"), cost, 8)
        assert plan is not None
        plan.save(tmp_path / "class.json")
        options: dict[str, Any] = {"budget": "60%", "plan": tmp_path / "class.json", "score_images": 8}
        result = patchwise(self.REQUEST, tmp_path / "run", allocation="average", share=0.5, **options)
        found = QuantPlan.load(tmp_path / "run" / "plan.json").sites["blocks.0.mlp.fc1.input"]
        assert found is not None and found.widths == (8,) and found.token_bit_width is not None
        assert result["splits"]["blocks.0"]["high"] == (found.token_bit_width.high or 4)
        as_it_is = patchwise(self.REQUEST, tmp_path / "same", **options)
        assert as_it_is["bit_operations"] == cost.bit_operations(plan.widths())

    def test_the_page_shows_every_low_patch(self, tmp_path: Path) -> None:
        patchwise(self.REQUEST, tmp_path, budget="4bit", picture=2)
        record = json.loads((tmp_path / "patches.json").read_text())
        page = write_patches_page(tmp_path / "patches.json", tmp_path / "p.html").read_text()
        low = sum(layer["important"].count("0") for image in record["images"] for layer in image["layers"])
        assert sum(page.split("<script")[0].count(f"{tail}z") for tail in ("h-35.00",)) == low == 2 * 2 * 9
        record["images"][0]["layers"][0]["important"] = "01"
        (tmp_path / "patches.json").write_text(json.dumps(record))
        with pytest.raises(QvitError, match="has 2 patches, which do not fill"):
            write_patches_page(tmp_path / "patches.json", tmp_path / "p.html")

    def test_eight_rows_of_four_patches_are_drawn_so(self, tmp_path: Path) -> None:
        kwargs = {"depth": 2, "embed_dim": 16, "num_heads": 2, "patch_size": (1, 2)}
        patchwise(self.REQUEST.model_copy(update={"model_kwargs": kwargs}), tmp_path, budget="4bit", picture=2)
        record = json.loads((tmp_path / "patches.json").read_text())
        (image, *_) = record["images"]
        assert (image["height"], image["width"]) == (8, 8)
        assert {(layer["rows"], layer["columns"]) for layer in image["layers"]} == {(8, 4)}
        image["layers"][0]["important"] = "1" * 29 + "011"  # one low patch: row 7, column 1
        path = render_patches(record).split('fill="#6a1fb0"')[0].rpartition("<path")[2]
        assert path == ' d="M35.00 122.50h35.00v17.50h-35.00z" '

    def test_an_image_is_drawn_with_its_own_sides(self, tmp_path: Path) -> None:
        layer = {"layer": "blocks.0", "high": 5, "low": 3, "rows": 2, "columns": 4, "important": "11111110"}
        image = {"png": "", "height": 100, "width": 200, "layers": [layer]}
        page = render_patches({"model": "vit", "plan": "p", "images": [image]})
        assert page.count('viewBox="0 0 140 70" width="140" height="70"') == 2
        assert '<image id="picture-0" width="140" height="70" preserveAspectRatio="none"' in page
        assert "M105.00 35.00h35.00v35.00h-35.00z" in page
        old = {key: value for key, value in image.items() if key not in ("height", "width")}
        assert 'viewBox="0 0 140 140"' in render_patches({"model": "vit", "plan": "p", "images": [old]})
        flat = {"model": "vit", "plan": "p", "images": [image | {"height": 0}]}
        (tmp_path / "patches.json").write_text(json.dumps(flat))
        with pytest.raises(QvitError, match="'images.0.height' must be at least 1, not 0"):
            write_patches_page(tmp_path / "patches.json", tmp_path / "p.html")

    def test_mistakes(self, tmp_path: Path) -> None:
        with pytest.raises(UsageError, match="unknown allocation 'averge'; did you mean 'average'"):
            patchwise(self.REQUEST, tmp_path, budget="4bit", allocation="averge")
        with pytest.raises(QvitError, match="is impossible: this model takes between"):
            patchwise(self.REQUEST, tmp_path, budget="0.1M")
        with pytest.raises(QvitError, match="takes .* bit operations, the budget is"):
            patchwise(self.REQUEST, tmp_path, budget="3bit", plan="w4a4")
