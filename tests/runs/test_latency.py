"""Tables of measured milliseconds by pairs of widths: how a model's time is divided, and the way to a plan."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from fake_engines import fake_engines  # noqa: F401
from tiny_models import SMALL, digits_model

from qvit.allocate.latency import LatencyTable
from qvit.allocate.units import Unit
from qvit.documents.base import checked
from qvit.errors import QvitError, UsageError
from qvit.models.families import inspect_model
from qvit.plan.cost import CostModel
from qvit.runs.bench import BenchRequest
from qvit.runs.latency import Measured, divided, kernel_of, latency_table

PLANS = ("w8a8", "w8a4", "w4a8", "w4a4")


@pytest.fixture
def cost() -> CostModel:
    return inspect_model(digits_model())


def measured(cost: CostModel, weight: int, activation: int, ms: float, kernels: dict[str, float] | None) -> Measured:
    widths = {
        name: (8 if site.position != "block" else weight if site.role == "weight" else activation,)
        for name, site in cost.sites.items()
    }
    return Measured(widths, ms, kernels)


def profile(weight: int, activation: int, scale: float = 1.0) -> dict[str, float]:
    """Kernels of an engine whose products take as long as their widths are wide together; LayerNorm takes 1."""
    wide = weight + activation
    found = {"layernorm": 1.0, "qkv": 1.0 * wide, "attention": 0.5 * activation, "proj": 0.25 * wide}
    return {kind: scale * ms for kind, ms in (found | {"fc1+gelu": 2.0 * wide, "fc2": 1.0 * wide}).items()}


def test_products_have_the_names_of_kernels(cost: CostModel) -> None:
    names = {matmul.right: kernel_of(matmul, cost) for matmul in cost.matmuls}
    assert names["patch_embed.proj.weight"] == "patch embedding" and names["head.weight"] == "head"
    assert names["blocks.0.attn.qkv.key_weight"] == "qkv" and names["blocks.0.attn.proj.weight"] == "proj"
    assert names["blocks.0.attn.key"] == names["blocks.0.attn.value"] == "attention"
    assert names["blocks.0.mlp.fc1.weight"] == "fc1" and names["blocks.0.mlp.fc2.weight"] == "fc2"


def test_time_is_divided_by_the_engines_own_account(cost: CostModel) -> None:
    """A profile of half the measured time, all of it scaled; the products of each plan add up to its time again."""
    pairs = [(weight, activation) for weight in (4, 8) for activation in (4, 8)]
    found = [measured(cost, *pair, sum(profile(*pair).values()), profile(*pair, scale=0.5)) for pair in pairs]
    how, products = divided(cost, found)
    assert how == "profile"
    unit = Unit("milliseconds", products=products)
    for one in found:
        assert unit.total(cost, one.widths) == pytest.approx(one.milliseconds)
    by_site = {matmul.right: (matmul, rates) for matmul, rates in products.items()}
    spread = {site: matmul.macs / cost.macs for site, (matmul, _) in by_site.items()}  # of the 1 ms of LayerNorm
    fc1, key = by_site["blocks.0.mlp.fc1.weight"][1], by_site["blocks.0.attn.key"][1]
    for (activation, weight), ms in fc1.items():
        assert ms - spread["blocks.0.mlp.fc1.weight"] == pytest.approx(2.0 * (weight + activation))
    assert key.keys() == {(4, 4), (8, 8)}  # queries and keys have one width in each plan
    assert key[4, 4] - spread["blocks.0.attn.key"] == pytest.approx(1.0)  # half of attention's 0.5 · 4
    assert by_site["head.weight"][1] == {(8, 8): pytest.approx(spread["head.weight"])}


@pytest.mark.parametrize("kernels", [None, {"products": 3.0, "glue": 1.0}])
def test_time_is_divided_by_macs_where_no_account_names_the_products(
    cost: CostModel, kernels: dict[str, float] | None
) -> None:
    how, products = divided(cost, [measured(cost, 8, 8, 4.0, kernels), measured(cost, 4, 4, 2.0, kernels)])
    assert how == "macs"
    for matmul, rates in products.items():
        own = {(8, 8): 4.0, (4, 4): 2.0} if cost.sites[matmul.right].position == "block" else {(8, 8): 3.0}
        assert rates == {pair: pytest.approx(ms * matmul.macs / cost.macs) for pair, ms in own.items()}


def quick(**changes: Any) -> BenchRequest:
    values = {"model": "vit_digits", "model_kwargs": SMALL, "rounds": 1, "seconds": 1e-3, "images": 2, "threads": 1}
    return BenchRequest(**(values | {"plans": PLANS, "engines": ["qvit-told"]} | changes))


@pytest.mark.usefixtures("fake_engines")
def test_a_table_from_an_engine_to_a_plan(tmp_path: Path, cost: CostModel) -> None:
    table = latency_table(quick(batches=(3,)))
    checked(LatencyTable, table, "the table")
    assert (table["engine"], table["batch"], table["threads"], table["divided_by"]) == ("qvit-told", 3, 1, "profile")
    assert [row["plan"] for row in table["plans"]] == list(PLANS)
    assert all(row["kernels"]["qkv"] == pytest.approx(3 / 8) for row in table["plans"])
    (tmp_path / "latency.json").write_text(json.dumps(table))
    unit = Unit.of(tmp_path / "latency.json", cost, "vit_digits")
    for row, weight, activation in zip(table["plans"], (8, 8, 4, 4), (8, 4, 8, 4), strict=True):
        widths = measured(cost, weight, activation, 0.0, None).widths
        assert unit.total(cost, widths) == pytest.approx(row["predicted_milliseconds"], rel=1e-3)
        error = abs(row["predicted_milliseconds"] / row["milliseconds"] - 1)
        assert error <= table["largest_error"] + 1e-4
    with pytest.raises(
        UsageError, match=r"latency\.json: the latency table is of 'vit_digits', the sensitivity of 'x'"
    ):
        Unit.of(tmp_path / "latency.json", cost, "x")


@pytest.mark.usefixtures("fake_engines")
def test_engines_without_an_account_serve_too() -> None:
    table = latency_table(quick(engines=["qvit-torch"], plans=("w4a4",)))
    assert table["divided_by"] == "macs" and table["plans"][0]["kernels"] is None


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"batches": (1, 8)}, "for one batch size"),
        ({"engines": ["openvino-fp32"]}, "of one engine of ours, such as qvit-native, not openvino-fp32"),
        ({"engines": ["qvit-torch", "qvit-told"]}, "of one engine of ours"),
        ({"data": "digits"}, "leave --data and --profile out"),
        ({"profile": True}, "leave --data and --profile out"),
        ({"plans": ("w4a8", "w8a4")}, "needs the widest pair: add --plan w8a8"),
        ({"model": "no.safetensors"}, "no file"),
    ],
)
@pytest.mark.usefixtures("fake_engines")
def test_what_no_table_is_made_of(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(QvitError, match=message):
        latency_table(quick(**wrong))


@pytest.mark.usefixtures("fake_engines")
def test_mixed_plans_are_refused_before_they_are_measured(tmp_path: Path) -> None:
    from qvit.plan.quant_plan import QuantPlan, Rule

    QuantPlan.preset("w4a4").with_rules(Rule("blocks.0.mlp.*", {"bit_width": 3})).save(tmp_path / "mixed.json")
    with pytest.raises(UsageError, match="plan mixed is mixed: a latency table takes one width for weights"):
        latency_table(quick(plans=(str(tmp_path / "mixed.json"),)))
