"""Bit operations and bytes: the papers' numbers, cases worked out by hand, and the penalty's gradient."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest
import timm
import torch
from hypothesis import given
from hypothesis import strategies as st

from qvit.errors import QvitError, UsageError
from qvit.methods.search import DifferentiableCost
from qvit.models.create import create_model
from qvit.models.families import inspect_model
from qvit.plan.budget import format_bops, parse_budget
from qvit.plan.cost import FLOAT_BITS, CostModel, Matmul
from qvit.plan.quant_plan import QuantPlan, Rule
from qvit.plan.spec import Layout, Site, TensorSpec

# Bit operations in G of uniform models: the budgets and LSQ+ rows of Q-ViT's Table 1 (DeiT-T at 3 and 4 bits 12.9 and
# 21.5, DeiT-S 44.6 and 76.4) with more digits; the rest by the same sum, 12 blocks of 12 N·C² + 2 N²·C multiplications.
PAPER: dict[str, dict[int, str]] = {
    "deit_tiny_patch16_224": {2: "6.760", 3: "12.883", 4: "21.455", 6: "45.947", 8: "80.236"},
    "deit_small_patch16_224": {2: "21.887", 3: "44.590", 4: "76.375", 6: "167.19", 8: "294.33"},
    "deit_base_patch16_224": {2: "77.238", 3: "164.47", 4: "286.61"},
}
TOKENS, PATCHES = 197, 196


@pytest.fixture(scope="module")
def deit() -> dict[str, CostModel]:
    """Cost models of real timm models; on the meta device, since only shapes matter."""
    with torch.device("meta"):
        return {name: inspect_model(timm.create_model(name)) for name in PAPER}


@pytest.fixture(scope="module")
def digits() -> CostModel:
    return inspect_model(create_model("vit_digits"))


def site(name: str, heads: int = 1, numel: int = 0, position: Any = "block") -> Site:
    layout = Layout(heads=(heads, 1, 1)) if heads > 1 else Layout()
    return Site(name, "weight" if numel else "activation", layout, TensorSpec(), position, numel)


def attention_cost() -> CostModel:
    """Two heads: q·kᵀ of 100 MACs per head, then a linear layer of 60 MACs with one weight per head."""
    sites = [site("q", 2), site("k", 2), site("out", 2), site("proj", 2, numel=30), site("fc", numel=7)]
    matmuls = [Matmul(200, "q", "k"), Matmul(120, "out", "proj"), Matmul(50, "q", "fc")]
    return CostModel({own.name: own for own in sites}, matmuls)


HEAD_WIDTHS = {"q": (2, 8), "k": (3, 5), "out": (4, 4), "proj": (8, 2), "fc": (6,)}


def random_widths(cost: CostModel, seed: int) -> dict[str, tuple[int, ...]]:
    """One width, or one per head, wherever the site allows it."""
    generator = random.Random(seed)
    widths = {}
    for name, own in cost.sites.items():
        count = own.layout.num_heads if generator.random() < 0.8 else 1
        widths[name] = tuple(generator.randint(2, 8) for _ in range(count))
    return widths


# ---- The paper's numbers ----


@pytest.mark.parametrize(("model", "bits"), [(model, bits) for model, own in PAPER.items() for bits in own])
def test_bit_operations_of_the_paper(deit: dict[str, CostModel], model: str, bits: int) -> None:
    """To the digits that are printed: eight bits in the first and the last layer, `bits` in between."""
    cost, printed = deit[model], PAPER[model][bits]
    digits_after_the_point = len(printed.partition(".")[2])
    assert f"{cost.bit_operations(cost.uniform(bits)) / 1e9:.{digits_after_the_point}f}" == printed
    assert parse_budget(f"{bits}bit", cost) == cost.bit_operations(cost.uniform(bits))
    plan = QuantPlan.preset(f"w{bits}a{bits}").resolve(cost.sites)
    assert cost.bit_operations(plan.widths()) == cost.bit_operations(cost.uniform(bits))


def test_bit_operations_of_deit_tiny_term_by_term(deit: dict[str, CostModel]) -> None:
    """Twelve blocks of 12 N·C² + 2 N²·C at 4·4 bits; patch embedding and classifier at 8·8."""
    width, classes, kernel = 192, 1000, 3 * 16 * 16
    block = 12 * TOKENS * width**2 + 2 * TOKENS**2 * width
    boundary = PATCHES * kernel * width + width * classes
    cost = deit["deit_tiny_patch16_224"]
    assert cost.macs == 12 * block + boundary
    assert cost.bit_operations(cost.uniform(4)) == 12 * block * 16 + boundary * 64
    assert cost.bit_operations(cost.uniform(4, boundary_bits=4)) == cost.macs * 16
    assert cost.extreme() == (cost.macs * 4, cost.macs * 64)
    assert cost.bit_operations({name: (FLOAT_BITS,) for name in cost.sites}) == cost.macs * 32 * 32


def test_weight_bytes_of_deit_tiny(deit: dict[str, CostModel]) -> None:
    """All matrices, no biases, norms or embeddings: 4 bits in twelve blocks of 12·C², 8 bits at both ends."""
    cost = deit["deit_tiny_patch16_224"]
    assert cost.weight_bytes(cost.uniform(4)) == 12 * 12 * 192**2 // 2 + 3 * 256 * 192 + 192 * 1000
    assert cost.weight_bytes(cost.uniform(3)) == 12 * 12 * 192**2 * 3 // 8 + 3 * 256 * 192 + 192 * 1000


# ---- Products of widths per head ----


def test_heads_cost_the_mean_of_products_not_the_product_of_means() -> None:
    cost = attention_cost()
    scores = 100 * (2 * 3 + 8 * 5)
    assert scores != 200 * (2 + 8) / 2 * (3 + 5) / 2
    projection = 60 * (4 * 8 + 4 * 2)
    one_weight_for_two_heads = 25 * (2 * 6 + 8 * 6)
    assert cost.bit_operations(HEAD_WIDTHS) == scores + projection + one_weight_for_two_heads == 8500
    swapped = HEAD_WIDTHS | {"k": (5, 3)}
    assert cost.bit_operations(swapped) == 8500 - 100 * (6 + 40) + 100 * (10 + 24)


def test_one_width_for_all_heads_is_the_same_as_that_width_for_each() -> None:
    cost = attention_cost()
    single = {name: (5,) for name in cost.sites}
    each = {name: (5,) * own.layout.num_heads for name, own in cost.sites.items()}
    mixed = each | {"k": (5,), "proj": (5,)}
    assert cost.bit_operations(single) == cost.bit_operations(each) == cost.bit_operations(mixed) == cost.macs * 25
    assert cost.weight_bytes(single) == cost.weight_bytes(each)


def test_width_counts_that_do_not_match_are_refused() -> None:
    cost = attention_cost()
    with pytest.raises(UsageError, match="operands of q × k have 2 and 3 widths: give 1, or one per head"):
        cost.bit_operations(HEAD_WIDTHS | {"k": (3, 3, 3)})
    with pytest.raises(UsageError, match="operands of q × k have 3 and 3 widths"):  # 200 MACs in thirds
        cost.bit_operations(HEAD_WIDTHS | {"q": (3, 3, 3), "k": (3, 3, 3)})


def test_weight_bytes_by_hand() -> None:
    """15 weights of 8 bits and 15 of 2 are 150 bits: 19 bytes. 7 of 6 bits are 42: 6 bytes. Activations take none."""
    assert attention_cost().weight_bytes(HEAD_WIDTHS) == 19 + 6
    assert attention_cost().weight_bytes(HEAD_WIDTHS | {"proj": (32,), "fc": (32,)}) == 4 * 30 + 4 * 7


# ---- The report ----


@pytest.mark.parametrize("seed", range(5))
def test_rows_add_up_to_the_totals(digits: CostModel, seed: int) -> None:
    widths = random_widths(digits, seed)
    report = digits.report(widths, model="vit_digits", plan="random")
    assert (report["model"], report["plan"]) == ("vit_digits", "random")
    for key, total in (
        ("macs", digits.macs),
        ("bit_operations", digits.bit_operations(widths)),
        ("weight_bytes", digits.weight_bytes(widths)),
    ):
        assert report[key] == total == sum(row[key] for row in report["sites"])
        assert isinstance(report[key], int)
    assert [row["site"] for row in report["sites"]] == list(digits.sites)
    for row in report["sites"]:
        own = widths[row["site"]]
        assert row["bit_width"] == (own[0] if len(own) == 1 else list(own))
    assert json.loads(json.dumps(report)) == report


def test_each_product_is_counted_at_the_operand_in_the_place_of_the_weight() -> None:
    rows = {row["site"]: row for row in attention_cost().report(HEAD_WIDTHS, model="m", plan="p")["sites"]}
    assert [rows[name]["bit_operations"] for name in ("q", "k", "out", "proj", "fc")] == [0, 4600, 0, 2400, 1500]
    assert [rows[name]["macs"] for name in ("q", "k", "out", "proj", "fc")] == [0, 200, 0, 120, 50]
    assert [rows[name]["weight_bytes"] for name in ("q", "k", "out", "proj", "fc")] == [0, 0, 0, 19, 6]


def test_float_sites_count_32_bits(digits: CostModel) -> None:
    plan = QuantPlan.preset("w4a4").with_rules(Rule("blocks.0.mlp.fc1.weight", None)).resolve(digits.sites)
    difference = digits.bit_operations(plan.widths()) - digits.bit_operations(digits.uniform(4))
    product = next(matmul for matmul in digits.matmuls if matmul.right == "blocks.0.mlp.fc1.weight")
    assert difference == product.macs * 4 * (32 - 4)


# ---- The differentiable form ----


@pytest.mark.parametrize("seed", range(5))
def test_differentiable_cost_equals_the_integer_cost_exactly(digits: CostModel, seed: int) -> None:
    widths = random_widths(digits, seed)
    model = DifferentiableCost(digits, {name: len(own) for name, own in widths.items()})
    vector = torch.tensor([float(width) for own in widths.values() for width in own])
    value = model(vector)
    assert value.dtype == torch.float64 and value.shape == ()
    assert int(value) == digits.bit_operations(widths)


def test_differentiable_cost_of_a_large_model_is_exact(deit: dict[str, CostModel]) -> None:
    cost = deit["deit_base_patch16_224"]
    widths = random_widths(cost, 7)
    model = DifferentiableCost(cost, {name: len(own) for name, own in widths.items()})
    assert int(model(torch.tensor([float(width) for own in widths.values() for width in own]))) == cost.bit_operations(
        widths
    )


def test_gradient_of_the_cost_is_the_closed_form(digits: CostModel) -> None:
    """∂BOPs/∂b of one head is MACs/H times the other operand's width, summed over the products it takes part in."""
    counts = {name: own.layout.num_heads for name, own in digits.sites.items()}
    vector = torch.empty(sum(counts.values()), dtype=torch.float64).uniform_(2, 8).requires_grad_()
    DifferentiableCost(digits, counts)(vector).backward()
    place, position = {}, 0
    for name, count in counts.items():
        place[name], position = range(position, position + count), position + count
    expected = [0.0] * position
    for matmul in digits.matmuls:
        left, right = place[matmul.left], place[matmul.right]
        heads = max(len(left), len(right))
        for head in range(heads):
            i, j = left[head % len(left)], right[head % len(right)]
            expected[i] += matmul.macs / heads * vector[j].item()
            expected[j] += matmul.macs / heads * vector[i].item()
    assert vector.grad is not None
    torch.testing.assert_close(vector.grad, torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=0)


def test_gradient_reaches_single_precision_widths() -> None:
    cost = attention_cost()
    vector = torch.tensor([2.0, 8.0, 3.0, 5.0, 4.0, 4.0, 8.0, 2.0, 6.0], requires_grad=True)
    DifferentiableCost(cost, {name: len(own) for name, own in HEAD_WIDTHS.items()})(vector).backward()
    assert vector.grad is not None and vector.grad.dtype == torch.float32
    assert vector.grad.tolist() == [300 + 150, 500 + 150, 200, 800, 480, 120, 240, 240, 25 * 10]


def test_buffers_move_with_the_module_and_stay_out_of_checkpoints() -> None:
    model = DifferentiableCost(attention_cost(), {name: len(own) for name, own in HEAD_WIDTHS.items()})
    assert model.state_dict() == {} and len(list(model.buffers())) == 3


@given(widths=st.lists(st.integers(2, 16), min_size=9, max_size=9))
def test_pairs_reproduce_the_cost(widths: list[int]) -> None:
    cost = attention_cost()
    counts = {name: len(own) for name, own in HEAD_WIDTHS.items()}
    coefficients, left, right = cost.pairs(counts)
    total = sum(c * widths[i] * widths[j] for c, i, j in zip(coefficients, left, right, strict=True))
    rest = list(widths)
    assert total == cost.bit_operations(
        {name: tuple(rest.pop(0) for _ in range(count)) for name, count in counts.items()}
    )


# ---- Budgets ----


@pytest.mark.parametrize(
    ("text", "bit_operations"),
    [
        ("4bit", 21_455_413_248),
        ("4 bits", 21_455_413_248),
        (" 4BIT ", 21_455_413_248),
        ("21.455G", 21_455_000_000),
        ("21.455 g", 21_455_000_000),
        ("100G", 100_000_000_000),
        ("21455M", 21_455_000_000),
        ("6000.5m", 6_000_500_000),
    ],
)
def test_budgets_of_deit_tiny(deit: dict[str, CostModel], text: str, bit_operations: int) -> None:
    assert parse_budget(text, deit["deit_tiny_patch16_224"]) == bit_operations


def test_budgets_as_a_share_of_eight_bits(deit: dict[str, CostModel]) -> None:
    cost = deit["deit_tiny_patch16_224"]
    full = cost.macs * 64
    for text, share in (
        ("0.25", 0.25),
        ("25%", 0.25),
        ("25 %", 0.25),
        ("1", 1.0),
        ("100%", 1.0),
        ("0.5", 0.5),
        ("12.5%", 0.125),
    ):
        assert parse_budget(text, cost) == round(share * full)


def test_small_models_have_budgets_in_millions(digits: CostModel) -> None:
    assert parse_budget("12.3M", digits) == 12_300_000
    assert digits.extreme()[0] < 12_300_000 < digits.extreme()[1]


@pytest.mark.parametrize("text", ["1G", "5M", "0", "0.01", "1%", "0.0G", "1bit"])
def test_an_impossible_budget_shows_what_is_possible(deit: dict[str, CostModel], text: str) -> None:
    cost = deit["deit_tiny_patch16_224"]
    low, high = cost.extreme()
    with pytest.raises(QvitError, match=r"is impossible: this model takes between") as caught:
        parse_budget(text, cost)
    assert not isinstance(caught.value, UsageError)  # not a slip of the pen: exit code 1
    assert f"{low / 1e9:.3f} G (2 bits everywhere)" in str(caught.value)
    assert f"{high / 1e9:.3f} G (8 bits everywhere)" in str(caught.value)
    assert f"budget '{text}'" in str(caught.value)


def test_the_smallest_possible_budget_is_possible(deit: dict[str, CostModel]) -> None:
    cost = deit["deit_tiny_patch16_224"]
    low, _ = cost.extreme()
    assert parse_budget(f"{low / 1e9:.9f}G", cost) == low
    with pytest.raises(QvitError, match="impossible"):
        parse_budget(f"{(low - 1) / 1e9:.9f}G", cost)


@pytest.mark.parametrize(
    "text", ["", "lots", "4bitt", "G", "-4G", "4,5G", "1e9", "0x10", "4 bit 5", "nan", "inf", "4T", "%", "4b"]
)
def test_nonsense_is_refused_with_examples(digits: CostModel, text: str) -> None:
    with pytest.raises(UsageError, match=r"is not understood: give '4bit', '21\.455G' .*'0\.25' or '25%'"):
        parse_budget(text, digits)


@pytest.mark.parametrize("text", ["3.5bit", "0bit", "17bit", "2.0001bits"])
def test_fractions_of_bits_are_refused(digits: CostModel, text: str) -> None:
    with pytest.raises(UsageError, match="the bit-width must be an integer.* such as '4bit'"):
        parse_budget(text, digits)


@pytest.mark.parametrize("text", ["1.5", "4", "21.455", "150%", "1.0001"])
def test_shares_above_one_are_refused(digits: CostModel, text: str) -> None:
    with pytest.raises(UsageError, match=f"budget '{text}'"):
        parse_budget(text, digits)
    with pytest.raises(UsageError, match="did you mean '4bit' or '4G'"):
        parse_budget("4", digits)
    with pytest.raises(UsageError) as caught:
        parse_budget("150%", digits)
    assert "%bit" not in str(caught.value)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (21_455_413_248, "21.455 G"),
        (100_000_000, "0.100 G"),
        (99_999_999, "100.000 M"),
        (12_345_678, "12.346 M"),
        (0, "0.000 M"),
    ],
)
def test_bit_operations_for_people(value: int, text: str) -> None:
    assert format_bops(value) == text
