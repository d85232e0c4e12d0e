"""Plans and frontiers from sensitivities: against brute force on small models, by their promises on real ones."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qvit.allocate import allocate_plan, frontier, frontier_report
from qvit.allocate.choices import choices
from qvit.allocate.frontier import lower_hull
from qvit.allocate.relaxation import Relaxation, reduced
from qvit.allocate.units import Unit
from qvit.errors import QvitError, UsageError
from qvit.measure import Sensitivity
from qvit.models.create import create_model
from qvit.models.families import inspect_model
from qvit.plan.cost import CostModel, Matmul
from qvit.plan.quant_plan import QuantPlan
from qvit.plan.spec import Layout, PerHead, Site, TensorSpec

UNITS = ("bit_operations", "weight_bytes", "latency", "pairs")


def small_cost(generator: np.random.Generator) -> CostModel:
    """A patch embedding and two or three products in a block: 6 to 8 widths, as stars and pairs like a ViT's."""
    heads, per_head = Layout(heads=(2, 1, 1), view=(2, 4, 4)), TensorSpec(granularity=PerHead())
    sites = [
        Site("embed.input", "activation", Layout(), TensorSpec(), "first"),
        Site("embed.weight", "weight", Layout(), TensorSpec(), "first", 24),
        Site("blocks.0.x", "activation", Layout(), TensorSpec()),
        Site("blocks.0.w", "weight", heads, per_head, numel=32 * int(generator.integers(1, 9))),
        Site("blocks.0.u", "weight", Layout(), TensorSpec(), numel=int(generator.integers(1, 300))),
        Site("blocks.1.x", "activation", Layout(), TensorSpec()),
        Site("blocks.1.w", "weight", Layout(), TensorSpec(), numel=int(generator.integers(1, 300))),
    ]
    products = [("embed.input", "embed.weight"), ("blocks.0.x", "blocks.0.w"), ("blocks.0.x", "blocks.0.u")]
    products += [("blocks.1.x", "blocks.1.w")] if generator.random() < 0.8 else []
    matmuls = [Matmul(2 * int(generator.integers(1, 10_000)), *pair) for pair in products]
    return CostModel({site.name: site for site in sites}, matmuls)


def random_sensitivity(
    cost: CostModel, generator: np.random.Generator, widths: tuple[int, ...] = (2, 3, 5, 8)
) -> Sensitivity:
    """Losses that fall about fourfold per bit, with noise, over several orders of magnitude between sites."""
    raw = {}
    for name, site in cost.sites.items():
        rows = site.layout.num_heads
        size = 10 ** generator.uniform(-3, 2, (rows, 1))
        raw[name] = size * 4.0 ** -np.array(widths) * generator.uniform(0.5, 2.0, (rows, len(widths)))
    fields: dict[str, Any] = {"model": "small", "metric": "fisher", "images": 8, "seed": 0, "seconds": 1.0}
    return Sensitivity.from_raw(raw, widths=widths, **fields)


def measured_table(cost: CostModel, milliseconds: Callable[[int, int], float], **changes: Any) -> dict[str, Any]:
    """A file of `qvit bench --latency-table` with these times of every product in the blocks at 2, 5 and 8 bits."""
    products = [
        {
            "left": matmul.left,
            "right": matmul.right,
            "milliseconds": {f"w{m}a{n}": milliseconds(n, m) for n in (2, 5, 8) for m in (2, 5, 8)},
        }
        for matmul in cost.matmuls
        if matmul.left.startswith("blocks")
    ]
    plan = {"plan": "w8a8", "precision": "w8a8", "milliseconds": 1.0, "milliseconds_quartiles": [1.0, 1.0]}
    data = {
        "format": "qvit-latency", "version": 1, "model": "small", "macs": cost.macs, "engine": "qvit-native",
        "arithmetic": "", "threads": 1, "batch": 1, "divided_by": "macs", "largest_error": 0.0,
        "plans": [plan | {"predicted_milliseconds": 1.0}], "products": products, "hardware": "CPU",
        "date": "2020-01-02", "command": "c",
    }  # fmt: skip
    return data | changes


def random_case(seed: int, kind: str) -> tuple[CostModel, Sensitivity, Any]:
    generator = np.random.default_rng(seed)
    cost = small_cost(generator)
    sensitivity = random_sensitivity(cost, generator)
    if kind == "pairs":
        return (
            cost,
            sensitivity,
            measured_table(cost, lambda left, right: generator.uniform(0.1, 1) + left * right / 50),
        )
    if kind != "latency":
        return cost, sensitivity, kind
    table = {
        name: {width: float(generator.uniform(0.1, 1) + 0.1 * width) for width in sensitivity.widths}
        for name in cost.sites
        if name.startswith("blocks")
    }
    return cost, sensitivity, table


def everything(cost: CostModel, sensitivity: Sensitivity, boundary: int | None = 8) -> list[dict[str, tuple[int, ...]]]:
    """All plans there are."""
    own = []
    for name, site in cost.sites.items():
        fixed = boundary is not None and site.position != "block"
        options = (boundary,) if fixed and boundary is not None else sensitivity.widths
        own.append(list(itertools.product(options, repeat=len(sensitivity.table[name]))))
    return [dict(zip(cost.sites, combination, strict=True)) for combination in itertools.product(*own)]


@pytest.fixture(scope="module")
def deit() -> tuple[CostModel, Sensitivity]:
    """DeiT-T's costs with random sensitivities: 388 widths."""
    cost = inspect_model(create_model("deit_tiny_patch16_224"))
    return cost, random_sensitivity(cost, np.random.default_rng(0), (2, 3, 4, 5, 6, 7, 8))


# ---- Against brute force ----


@settings(max_examples=40)
@given(seed=st.integers(0, 10_000), kind=st.sampled_from(UNITS), share=st.floats(0.0, 1.0))
def test_no_plan_within_the_budget_is_better(seed: int, kind: str, share: float) -> None:
    cost, sensitivity, unit = random_case(seed, kind)
    of = Unit.of(unit, cost)
    plans = everything(cost, sensitivity)
    totals = [of.total(cost, widths) for widths in plans]
    budget = min(totals) + share * (max(totals) - min(totals))
    budget = budget if kind in ("latency", "pairs") else max(1, int(budget))
    plan = allocate_plan(cost, sensitivity, budget, unit=unit)
    assert of.total(cost, plan.widths()) <= budget * (1 + 1e-12)
    best = min(sensitivity.predicted(w) for w, total in zip(plans, totals, strict=True) if total <= budget)
    assert sensitivity.predicted(plan.widths()) == pytest.approx(best, rel=1e-6)


@settings(max_examples=30)
@given(seed=st.integers(0, 10_000), kind=st.sampled_from(UNITS))
def test_the_frontier_is_the_lower_hull_of_all_plans(seed: int, kind: str) -> None:
    cost, sensitivity, unit = random_case(seed, kind)
    of = Unit.of(unit, cost)
    points = frontier(cost, sensitivity, unit=unit, points=10_000)
    costs, losses = [p.cost for p in points], [p.predicted_loss for p in points]
    assert all(np.diff(costs) > 0) and all(np.diff(losses) < 0)
    slopes = np.diff(losses) / np.diff(costs)
    assert all(np.diff(slopes) > -1e-9 * np.abs(slopes[:-1]))
    for widths in everything(cost, sensitivity):
        total, loss = of.total(cost, widths), sensitivity.predicted(widths)
        line = losses[0] if total < costs[0] else float(np.interp(total, costs, losses))
        assert loss >= line * (1 - 1e-6) and total >= costs[0] * (1 - 1e-12)


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("kind", UNITS)
def test_the_relaxation_bounds_every_choice(seed: int, kind: str) -> None:
    cost, sensitivity, unit = random_case(seed, kind)
    problem = choices(cost, sensitivity, Unit.of(unit, cost)).problem
    relaxation = Relaxation(problem)
    assert relaxation.is_forest
    answers = [list(answer) for answer in itertools.product(*problem.options)]
    for price in (0.0, 1e-9, 1e-6, 1e-3, 1.0):
        values = [problem.damage(a) + price * problem.cost(a) for a in answers]
        chosen = relaxation.minimise(price)
        assert problem.damage(chosen) + price * problem.cost(chosen) == pytest.approx(min(values))
        least, bounds = relaxation.bounds(price)
        assert least == pytest.approx(min(values))
        for unit_index, options in enumerate(problem.options):
            for n, width in enumerate(options):
                own = min(value for a, value in zip(answers, values, strict=True) if a[unit_index] == width)
                assert bounds[unit_index, n] == pytest.approx(own)


def test_striking_out_options_keeps_the_best_answer() -> None:
    struck = 0
    for seed in range(20):
        cost, sensitivity, unit = random_case(seed, "bit_operations")
        whole = choices(cost, sensitivity, Unit.of(unit, cost))
        low, high = whole.extremes()
        problem = whole.within(int(low + 0.4 * (high - low)))
        smaller, _ = reduced(problem) or (problem, [])
        struck += sum(map(len, problem.options)) - sum(map(len, smaller.options))
        fitting = [a for a in itertools.product(*problem.options) if problem.cost(a) <= problem.budget]
        best = min(fitting, key=problem.damage)
        assert all(width in own for width, own in zip(best, smaller.options, strict=True))
    assert struck > 50


# ---- Pins, ties, the first and the last layer ----


def test_pins_and_ties_hold(deit: tuple[CostModel, Sensitivity]) -> None:
    cost, sensitivity = deit
    ties = ["blocks.*.attn.query=blocks.*.attn.key", "blocks.3.attn.qkv.*_weight"]
    pins = ["blocks.0.*=8", ("blocks.0.mlp.fc2.weight", 5)]
    widths = allocate_plan(cost, sensitivity, "4bit", pins=pins, ties=ties).widths()
    assert cost.bit_operations(widths) <= cost.bit_operations(cost.uniform(4))
    assert widths["blocks.0.mlp.fc2.weight"] == (5,) and widths["blocks.0.attn.probs"] == (8, 8, 8)
    for block in range(12):
        assert widths[f"blocks.{block}.attn.query"] == widths[f"blocks.{block}.attn.key"]
    shared = {width for part in ("query", "key", "value") for width in widths[f"blocks.3.attn.qkv.{part}_weight"]}
    assert len(shared) == 1
    assert widths["head.weight"] == widths["patch_embed.proj.input"] == (8,)
    free = allocate_plan(cost, sensitivity, "4bit", boundary=None).widths()
    assert (
        sensitivity.predicted(free) < sensitivity.predicted(allocate_plan(cost, sensitivity, "4bit").widths()) + 1e-12
    )
    assert free["head.input"] != (8,) or free["head.weight"] != (8,)


def test_ties_across_different_numbers_of_heads_share_one_width() -> None:
    cost, sensitivity, _ = random_case(0, "bit_operations")
    widths = allocate_plan(cost, sensitivity, "4bit", ties=["blocks.*.w=blocks.*.u"]).widths()
    assert len({*widths["blocks.0.w"], *widths["blocks.0.u"]}) == 1


def test_ties_that_close_a_circle_are_answered_and_said_to_be_inexact() -> None:
    cost, sensitivity, _ = random_case(1, "bit_operations")
    assert frontier_report(cost, sensitivity, ties=["blocks.?.w=blocks.?.u"])["exact"] is True
    matmuls = [Matmul(1000, "a", "b"), Matmul(700, "b", "c"), Matmul(900, "a", "c")]
    circle = CostModel({n: Site(n, "activation", Layout(), TensorSpec()) for n in "abc"}, matmuls)
    own = random_sensitivity(circle, np.random.default_rng(0))
    report = frontier_report(circle, own)
    assert report["exact"] is False
    costs, losses = ([p[key] for p in report["points"]] for key in ("cost", "predicted_loss"))
    assert all(np.diff(costs) > 0) and all(np.diff(losses) < 0)
    plan = allocate_plan(circle, own, "4bit")
    everywhere = [dict(zip("abc", [(w,) for w in ws], strict=True)) for ws in itertools.product(own.widths, repeat=3)]
    fitting = [w for w in everywhere if circle.bit_operations(w) <= circle.bit_operations(circle.uniform(4))]
    assert own.predicted(plan.widths()) == pytest.approx(min(map(own.predicted, fitting)))


def test_sites_in_float_stay_so() -> None:
    cost, sensitivity, _ = random_case(0, "bit_operations")
    plan = QuantPlan.from_json(
        {"format": "qvit-plan", "version": 1, "rules": [{"pattern": "blocks.1.w", "float": True}]}
    ).resolve(cost.sites, "small")
    raw = {name: values for name, values in sensitivity.raw.items() if name != "blocks.1.w"}
    fields = {key: getattr(sensitivity, key) for key in ("model", "metric", "images", "seed", "seconds", "widths")}
    own = Sensitivity.from_raw(raw, plan=plan, **fields)
    found = allocate_plan(cost, own, 10**9)
    assert found.sites["blocks.1.w"] is None and found.widths()["blocks.1.w"] == (32,)
    assert frontier_report(cost, own)["uniform"] == []


# ---- Budgets ----


@pytest.mark.parametrize("unit", ["bit_operations", "weight_bytes"])
@pytest.mark.parametrize("budget", ["3bit", "4bit", "50%"])
def test_real_models_keep_their_budgets(deit: tuple[CostModel, Sensitivity], unit: str, budget: str) -> None:
    cost, sensitivity = deit
    of = Unit.of(unit, cost)
    plan = allocate_plan(cost, sensitivity, budget, unit=unit)
    assert of.total(cost, plan.widths()) <= of.parse(budget, cost)
    assert plan.model == "small" and plan.name == f"fisher-{budget}"
    assert not any(spec is not None and spec.learn_bit_width for spec in plan.sites.values())
    if budget != "50%":
        uniform = sensitivity.predicted(cost.uniform(int(budget[0])))
        assert sensitivity.predicted(plan.widths()) < uniform


def test_more_budget_is_never_worse_and_meets_the_frontier(deit: tuple[CostModel, Sensitivity]) -> None:
    cost, sensitivity = deit
    points = frontier(cost, sensitivity, points=12)
    assert len(points) == 12
    for point in points[2:5]:
        plan = allocate_plan(cost, sensitivity, point.cost)
        assert sensitivity.predicted(plan.widths()) == pytest.approx(point.predicted_loss, rel=1e-6)
        assert point.cost == point.bit_operations == cost.bit_operations(point.widths)
        assert point.weight_bytes == cost.weight_bytes(point.widths)


def test_impossible_budgets_say_what_is_possible(deit: tuple[CostModel, Sensitivity]) -> None:
    cost, sensitivity = deit
    with pytest.raises(QvitError, match=r"'0\.1MB' .* impossible: .* between 1\.667 MB of weights and 5\.648 MB"):
        allocate_plan(cost, sensitivity, "0.1MB", unit="weight_bytes")
    with pytest.raises(QvitError, match="impossible: with the widths that may be chosen .* between .* and "):
        allocate_plan(cost, sensitivity, "3bit", pins=["*=8"])
    with pytest.raises(QvitError, match="impossible"):
        allocate_plan(cost, sensitivity, "1M")
    whole = allocate_plan(cost, sensitivity, "8bit").widths()
    assert {width for own in whole.values() for width in own} == {8}


def test_latency_tables(tmp_path: Path) -> None:
    cost, sensitivity, table = random_case(3, "latency")
    file = tmp_path / "latency.json"
    file.write_text(json.dumps(table))
    from_file = allocate_plan(cost, sensitivity, "5ms", unit=file)
    assert from_file.sites == allocate_plan(cost, sensitivity, 5.0, unit=table).sites
    total = sum(sum(table[n][w] / len(own) for w in own) for n, own in from_file.widths().items() if n in table)
    assert total <= 5.0
    short = {"blocks.0.x": {"8": 1.0}}
    assert allocate_plan(cost, sensitivity, "100%", unit=short).widths()["blocks.0.x"] == (8,)
    with pytest.raises(UsageError, match="no entry for 4"):
        allocate_plan(cost, sensitivity, "4bit", unit=short)
    for wrong, message in (
        ({}, "at least one site"),
        ({"blocks.0.y": {"2": 1.0}}, "not in this model: 'blocks.0.y'; did you mean"),
        ({"blocks.0.x": 3}, "must be an object"),
        ({"blocks.0.x": {"two": 1.0}}, "width 'two'"),
        ({"blocks.0.x": {"2": -1.0}}, "-1.0 is no number of milliseconds"),
        ({"blocks.0.x": {"9": 1.0}}, "no entry for 'blocks.0.x'"),
    ):
        with pytest.raises(UsageError, match=message):
            allocate_plan(cost, sensitivity, "1ms", unit=wrong)
    file.write_text("{")
    with pytest.raises(QvitError, match="cannot read the latency table"):
        allocate_plan(cost, sensitivity, "1ms", unit=str(file))


def test_times_of_pairs_of_widths(tmp_path: Path) -> None:
    """Products are fast where two widths are small together, as with sums in 16 bits."""
    cost, sensitivity, _ = random_case(3, "weight_bytes")
    table = measured_table(cost, lambda left, right: 1.0 if left + right <= 7 else 2.0)
    file = tmp_path / "latency.json"
    file.write_text(json.dumps(table))
    unit = Unit.of(file, cost, "small")
    blocks = [matmul for matmul in cost.matmuls if matmul.left.startswith("blocks")]
    assert unit.total(cost, cost.uniform(2)) == len(blocks) and unit.total(cost, cost.uniform(8)) == 2 * len(blocks)
    assert unit.total(cost, cost.uniform(8) | {"blocks.0.w": (2, 8)}) == 2 * len(blocks)  # 8 and 2 bits are slow, too
    assert unit.rate(blocks[0], 3, 2) == 1.0  # by that of 5 and 2 bits, which is the next wider one that was measured
    assert unit.rate(blocks[0], 3, 3) == 2.0  # by 5 and 5
    plan = allocate_plan(cost, sensitivity, float(len(blocks)), unit=file)
    widths = plan.widths()
    assert all(max(widths[matmul.left]) + max(widths[matmul.right]) <= 7 for matmul in blocks)
    assert unit.total(cost, widths) == len(blocks)
    assert allocate_plan(cost, sensitivity, "8bit", unit=table).widths().keys() == widths.keys()
    report = frontier_report(cost, sensitivity, unit=table)
    assert report["unit"] == "milliseconds" and report["exact"] and report["points"][0]["cost"] == len(blocks)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "other"}, "the latency table is of 'other', the sensitivity of 'small'"),
        ({"macs": 1}, "of a small of 1 MACs, this one has .* measure it at the same image size"),
        ({"version": 2}, "key 'version' must be 1, not 2"),
        ({"divided_by": "guess"}, "key 'divided_by' must be 'profile' or 'macs'"),
        ({"products": []}, "key 'products' must be of at least 1 entries"),
        ({"threads": -1}, "key 'threads' must be at least 0"),
        ({"products": [{"left": "a", "right": "b", "milliseconds": {"w8a8": 1.0}}]}, "not in this model: 'a' × 'b'"),
        ({"pair": {"w8a8": -1.0}}, "must be at least 0.0, not -1.0"),
        ({"pair": {"w8a8": "1"}}, "must be a number, not '1'"),
        ({"pair": {"8": 1.0}}, "'8' in the latency table is no pair of widths such as w4a8"),
        ({"pair": {"w0a8": 1.0}}, "'w0a8' in the latency table is no pair of widths"),
        ({"pair": {"w8a4": 1.0, "w4a8": 1.0}}, "lacks the widest pair w8a8 of 'blocks.0.w'"),
        ({"pair": {"w2a2": 1.0}}, "no entry for 'blocks.0.x' at any width"),
    ],
)
def test_measured_tables_are_refused_by_name(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    cost, sensitivity, table = random_case(3, "pairs")
    if "pair" in changes:
        own = {"left": "blocks.0.x", "right": "blocks.0.w", "milliseconds": changes.pop("pair")}
        changes = {"products": [own]}
    (tmp_path / "latency.json").write_text(json.dumps(table | changes))
    pins = ["blocks.0.x=8"] if "no entry" in message else []
    with pytest.raises(UsageError, match=message):
        allocate_plan(cost, sensitivity, "90%" if not pins else 1.0, unit=tmp_path / "latency.json", pins=pins)


def test_a_product_does_not_stand_in_a_table_twice() -> None:
    cost, sensitivity, table = random_case(3, "pairs")
    with pytest.raises(UsageError, match="a product twice: 'blocks.0.x' × 'blocks.0.w'"):
        allocate_plan(cost, sensitivity, 1.0, unit=table | {"products": table["products"][:1] * 2})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"budget": "many"}, "not understood"),
        ({"budget": "4.5bit", "unit": "weight_bytes"}, "must be an integer"),
        ({"budget": "many", "unit": "weight_bytes"}, "not understood: give '4bit', '2.5MB'"),
        ({"budget": "4ms", "unit": "weight_bytes"}, "does not fit the unit weight_bytes"),
        ({"budget": "150%", "unit": "weight_bytes"}, "more than the 8-bit model"),
        ({"budget": -1.0}, "positive number"),
        ({"unit": "bytes"}, "neither bit_operations nor weight_bytes nor a file"),
        ({"pins": ["blocks.0.attn.qeury=8"]}, "matches no site"),
        ({"pins": ["blocks.0.x"]}, "not PATTERN=BITS"),
        ({"pins": ["blocks.0.x=99"]}, "2 to 16 bits"),
        ({"ties": ["blocks.0.x=blocks.9.x"]}, "'blocks.9.x' matches no site"),
        ({"ties": ["blocks.0.w=blocks.?.x"]}, "no two sites agree"),
        ({"ties": ["blocks.0.x=blocks.0.u"], "pins": ["*.x=8", "*.u=4"]}, "is tied to"),
        ({"boundary": 1}, "boundary 1"),
    ],
)
def test_requests_that_cannot_be_meant(options: dict[str, Any], message: str) -> None:
    cost, sensitivity, _ = random_case(0, "bit_operations")
    with pytest.raises(UsageError, match=message):
        allocate_plan(cost, sensitivity, **({"budget": "4bit"} | options))


def test_hulls_of_one_plan() -> None:
    cost, sensitivity, _ = random_case(0, "bit_operations")
    only = choices(cost, sensitivity, Unit("bit_operations"), pins=["*=4"])
    assert len(lower_hull(only, 10)) == 1
