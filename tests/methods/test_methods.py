"""Methods: the plans they start from, the penalty in numbers, and the freezing that always meets the budget."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import digits_model, events, small_config, starting_point, tiny_trainer
from torch import Tensor, nn

from qvit.errors import QvitError, UsageError
from qvit.methods import METHODS, Method, create_method, register_method
from qvit.methods.qvit import QViTMethod
from qvit.models.convert import Stage, plan_of, quantize, stage_of
from qvit.models.families import inspect_model
from qvit.plan.cost import CostModel
from qvit.plan.options import ScaleOptions
from qvit.plan.quant_plan import QuantPlan
from qvit.plan.spec import PerHead, TensorSpec
from qvit.quantizers import quantizers_of

HEADS = 2
GELU = "blocks.0.mlp.fc2.input"
HEAD_SITES = {
    *(f"blocks.0.attn.qkv.{part}_weight" for part in ("query", "key", "value")),
    *(f"blocks.0.attn.{part}" for part in ("query", "key", "value", "probs", "output")),
    "blocks.0.attn.proj.weight",
}
FIRST_AND_LAST = {"patch_embed.proj.input", "patch_embed.proj.weight", "head.input", "head.weight"}


@pytest.fixture
def cost() -> CostModel:
    return inspect_model(digits_model())


def plan_for(cost: CostModel, method: str, budget: str | None = "3bit", plan: str | None = None, **options: Any) -> Any:
    """The resolved starting plan: `{site: spec}`."""
    config = small_config(method=method, budget=budget, plan=plan, method_options=options)
    resolved = create_method(config).plan(cost)
    assert resolved is not None and list(resolved.sites) == list(cost.sites) and not resolved.rules
    return resolved.sites


# ------------------------------------------------------------------------------------------- plans of the baselines


@pytest.mark.parametrize("method", ["lsq", "lsq+"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_uniform_plans_site_by_site(cost: CostModel, method: str, bits: int) -> None:
    for name, spec in plan_for(cost, method, f"{bits}bit").items():
        assert spec.widths == ((8,) if name in FIRST_AND_LAST else (bits,)), name
        assert not spec.learn_bit_width and not ScaleOptions.of(spec).switchable_scale
        assert isinstance(spec.granularity, PerHead) == (name in HEAD_SITES), name
        if name == GELU:
            assert (spec.signed, spec.symmetric) == ((True, True) if method == "lsq" else (False, False))
        else:
            assert spec.symmetric and spec.signed == (name != "blocks.0.attn.probs"), name


def test_a_uniform_plan_costs_its_budget_exactly(cost: CostModel) -> None:
    for bits in range(2, 9):
        method = create_method(small_config(method="lsq+", budget=f"{bits}bit"))
        plan = method.plan(cost)
        assert plan is not None
        assert cost.bit_operations(plan.widths()) == method.budget(cost) == cost.bit_operations(cost.uniform(bits))


def test_scales_of_the_baselines_by_option(cost: CostModel) -> None:
    assert {plan_for(cost, "lsq+", scales="shared")[name].to_json()["granularity"] for name in HEAD_SITES} == {
        "per-tensor"
    }
    for name, spec in plan_for(cost, "lsq+", scales="per-channel").items():
        expected = "per-channel" if name.endswith("weight") else "per-head" if name in HEAD_SITES else "per-tensor"
        assert spec.to_json()["granularity"] == expected, name


@pytest.mark.parametrize("method", ["lsq+", "qvit"])
def test_offsets_for_further_activations(cost: CostModel, method: str) -> None:
    specs = plan_for(cost, method, asymmetric=["blocks.*.mlp.fc1.*", "head.input"])
    offset = {name for name, spec in specs.items() if not spec.symmetric}
    assert offset == {GELU, "blocks.0.mlp.fc1.input", "head.input"}
    assert not any(spec.signed for spec in specs.values() if not spec.symmetric)
    with pytest.raises(UsageError, match=r"fc3.*did you mean"):
        plan_for(cost, method, asymmetric=["blocks.0.mlp.fc3.input"])


def test_a_plan_instead_of_a_budget(cost: CostModel, tmp_path: Path) -> None:
    specs = plan_for(cost, "lsq+", None, "w2a5")
    assert specs["blocks.0.mlp.fc1.weight"].widths == (2,) and specs["blocks.0.attn.key"].widths == (5,)
    own = QuantPlan.preset("w4a4").resolve(cost.sites).with_widths({"blocks.0.attn.key": (2, 7)})
    own.save(tmp_path / "plan.json")
    specs = plan_for(cost, "lsq", None, str(tmp_path / "plan.json"))
    assert specs["blocks.0.attn.key"].widths == (2, 7) and specs["blocks.0.attn.query"].widths == (4,)


@pytest.mark.parametrize(
    ("method", "budget", "plan", "message"),
    [
        ("lsq", None, None, "either --budget"),
        ("lsq+", "3bit", "w3a3", "either --budget"),
        ("lsq+", "0.3", None, "needs method qvit"),
        ("lsq+", "9G", None, "needs method qvit"),
        ("qvit", None, None, "needs a --budget"),
        ("qvit", None, "w4a4", "needs a --budget"),
        ("float", "3bit", None, "takes no --budget"),
        ("float", None, "w4a4", "takes no --budget"),
    ],
)
def test_contradictions_between_method_and_budget(
    cost: CostModel, method: str, budget: str | None, plan: str | None, message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        create_method(small_config(method=method, budget=budget, plan=plan)).plan(cost)


def test_unknown_methods_and_options_show_the_nearest() -> None:
    names = {"float", "lsq", "lsq+", "irm", "ofq", "ptq", "pmq", "qvit", "vvtq", "qvit+vvtq", "dq", "edmips"}
    assert set(METHODS) == names
    with pytest.raises(UsageError, match="unknown method 'qvitt'; did you mean 'qvit'"):
        create_method(small_config(method="qvitt"))
    with pytest.raises(UsageError, match="unknown option 'head_wize'; did you mean 'head_wise'"):
        create_method(small_config(method="qvit", budget="3bit", method_options={"head_wize": True}))
    for options in ({"searching_ratio": 1.5}, {"scales": "per-channel"}, {"penalty_weight": -1}, {"initial_bits": 9}):
        with pytest.raises(UsageError, match=next(iter(options))):
            create_method(small_config(method="qvit", budget="3bit", method_options=options))


# ---------------------------------------------------------------------------------------------------- the plan of qvit


@pytest.mark.parametrize(("budget", "start"), [("2bit", 2), ("3bit", 3), ("4bit", 4), ("7bit", 7), ("8bit", 8)])
def test_qvit_starts_at_its_budget(cost: CostModel, budget: str, start: int) -> None:
    for name, spec in plan_for(cost, "qvit", budget).items():
        expected = 8 if name in FIRST_AND_LAST else start
        assert spec.widths == (expected,) * (HEADS if name in HEAD_SITES else 1), name
        assert spec.learn_bit_width and spec.bit_width_range == (2, 8), "also in the first and the last layer"
        assert spec.options == {"switchable_scale": True, "width_gradient": "interpolation"}
        assert isinstance(spec.granularity, PerHead) == (name in HEAD_SITES)
        assert spec.signed == (name not in ("blocks.0.attn.probs", GELU)) and spec.symmetric == (name != GELU)


def test_other_budgets_start_at_the_widest_uniform_width_within_them(cost: CostModel) -> None:
    between = (cost.bit_operations(cost.uniform(3)) + cost.bit_operations(cost.uniform(4))) / 2e6
    least, most = (cost.bit_operations(cost.uniform(bits)) / 1e6 for bits in (2, 8))
    for budget, start in ((between, 3), (0.95 * least, 2), (most, 8), (most - 0.001, 7)):
        assert plan_for(cost, "qvit", f"{budget}M")["blocks.0.mlp.fc1.weight"].widths == (start,)


def test_a_value_that_may_be_of_several_types_has_one_mistake() -> None:
    own = small_config(method="ptq", budget="w4a4", method_options={"class_token": 9})
    with pytest.raises(UsageError, match="class_token = 9: input should be less than or equal to 8 or 'auto' or 'off'"):
        create_method(own)


def test_ablations_of_the_paper_are_options(cost: CostModel) -> None:
    without_heads = plan_for(cost, "qvit", head_wise=False)
    assert {len(spec.widths) for spec in without_heads.values()} == {1}
    assert all(isinstance(without_heads[name].granularity, PerHead) for name in HEAD_SITES), "scales are another option"
    shared = plan_for(cost, "qvit", scales="shared")
    assert {shared[name].to_json()["granularity"] for name in HEAD_SITES} == {"per-tensor"}
    assert {len(shared[name].widths) for name in HEAD_SITES} == {HEADS}
    interpolated = plan_for(cost, "qvit", width_gradient="interpolation")
    assert {ScaleOptions.of(spec).width_gradient for spec in interpolated.values()} == {"interpolation"}
    assert all(plan_for(cost, "qvit", initial_bits=6)[name].widths == (6, 6) for name in HEAD_SITES)


@pytest.mark.parametrize(("switchable", "columns"), [(True, 7), (False, 1)])
def test_switchable_scale_is_a_column_per_width(cost: CostModel, switchable: bool, columns: int) -> None:
    config = small_config(method="qvit", budget="3bit", method_options={"switchable_scale": switchable})
    plan = create_method(config).plan(cost)
    assert plan is not None
    model = quantize(digits_model(), plan)
    for name, quantizer in quantizers_of(model):
        assert quantizer.scale.shape[-1] == columns, name
        assert quantizer.scale.numel() == columns * (HEADS if name in HEAD_SITES else 1)


def test_qvit_starts_from_a_given_plan(cost: CostModel, tmp_path: Path) -> None:
    start = QuantPlan.preset("w5a3").resolve(cost.sites).with_widths({"blocks.0.attn.key": (2, 7)})
    start.save(tmp_path / "start.json")
    specs = plan_for(cost, "qvit", "3bit", str(tmp_path / "start.json"))
    assert specs["blocks.0.attn.key"].widths == (2, 7)
    assert specs["blocks.0.attn.query"].widths == (3, 3) and specs["blocks.0.mlp.fc1.weight"].widths == (5,)
    assert all(spec.learn_bit_width for spec in specs.values())
    single = plan_for(cost, "qvit", "3bit", str(tmp_path / "start.json"), head_wise=False)
    assert single["blocks.0.attn.key"].widths in ((4,), (5,)), "the mean of 2 and 7"


def test_qvit_refuses_sites_left_in_float(cost: CostModel, tmp_path: Path) -> None:
    plan = QuantPlan.preset("w4a4").resolve(cost.sites)
    QuantPlan("part", (), {**plan.sites, "blocks.0.attn.key": None}).save(tmp_path / "part.json")
    config = small_config(method="qvit", budget="3bit", plan=str(tmp_path / "part.json"))
    model, method = starting_point(config, attach=False)
    with pytest.raises(UsageError, match="leaves tensors in float"):
        method.attach(model, cost, 1)


@pytest.mark.parametrize(
    ("ratio", "epochs", "search"),
    [(None, 10, 4), (None, 199, 79), (None, 200, 180), (0.29, 100, 29), (0, 5, 0), (1, 5, 5)],
)
def test_length_of_the_searching_stage(ratio: float | None, epochs: int, search: int) -> None:
    config = small_config(method="qvit", budget="3bit", epochs=epochs, method_options={"searching_ratio": ratio})
    method = create_method(config)
    assert isinstance(method, QViTMethod) and method.searching_epochs == search


def test_the_widths_learning_rate_lets_them_travel_ten_bits() -> None:
    method = create_method(small_config(method="qvit", budget="3bit", epochs=300, lr=2e-4))
    method.steps_per_epoch = 20
    assert method.width_lr == pytest.approx(10 / (270 * 20))
    method.steps_per_epoch = 100_000
    assert method.width_lr == 2e-4, "never below the rate of the weights"
    short = create_method(small_config(method="qvit", budget="3bit", epochs=2))
    assert short.width_lr == 0.1
    own = create_method(small_config(method="qvit", budget="3bit", method_options={"width_lr": 0.03}))
    assert own.width_lr == 0.03


# --------------------------------------------------------------------------------------------- the penalty in numbers


def set_widths(model: nn.Module, widths: dict[str, Sequence[float]] | float) -> None:
    with torch.no_grad():
        for name, quantizer in quantizers_of(model):
            own = [widths] * quantizer.bit_width.numel() if isinstance(widths, float) else widths[name]
            quantizer.bit_width.copy_(torch.tensor(own).view_as(quantizer.bit_width))


def width_gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {
        name: torch.zeros_like(quantizer.bit_width) if quantizer.bit_width.grad is None else quantizer.bit_width.grad
        for name, quantizer in quantizers_of(model)
    }


# vit_digits with one block of width 16: 16 patches of 2x2 pixels and a class token, 2 heads, hidden width 64.
TOKENS, WIDTH = 17, 16
MACS = {
    "patch_embed": 16 * WIDTH * 4,
    "projection": TOKENS * WIDTH * WIDTH,
    "scores": TOKENS * TOKENS * WIDTH,
    "mlp": TOKENS * WIDTH * 4 * WIDTH,
    "head": 10 * WIDTH,
}
ALL_MACS = MACS["patch_embed"] + 4 * MACS["projection"] + 2 * MACS["scores"] + 2 * MACS["mlp"] + MACS["head"]


@pytest.mark.parametrize("counted", ["real", "rounded"])
@pytest.mark.parametrize("bits", [5.0, 4.0, 4.3, 7.6])
def test_penalty_values_by_hand(bits: float, counted: str) -> None:
    for penalty, weight in (("relative", None), ("relative", 3.0), ("absolute", None), ("absolute", 2.0)):
        options = {"penalty": penalty, "penalty_weight": weight, "penalty_widths": counted}
        model, method = starting_point(small_config(method="qvit", budget="0.2", method_options=options))
        set_widths(model, bits)
        effective = bits if counted == "real" else round(bits)
        operations = ALL_MACS * effective**2
        limit = round(0.2 * ALL_MACS * 64)
        assert method.limit == limit
        if penalty == "relative":
            expected = (weight or 50.0) * max(0.0, operations / limit - 1) ** 2
        else:
            expected = (weight or 0.1) * max(0.0, (operations - limit) / 1e9) ** 2
        assert expected > 0
        assert method.penalty().item() == pytest.approx(expected, rel=1e-5)
        assert method.figures(every_width=False)["bit_operations"] == pytest.approx(operations, rel=1e-6)


@pytest.mark.parametrize("penalty", ["relative", "absolute"])
def test_penalty_gradient_by_hand(penalty: str) -> None:
    """∂BOPs/∂b of a width is the MACs that it takes part in, times the width of the other operand."""
    model, method = starting_point(small_config(method="qvit", budget="0.2", method_options={"penalty": penalty}))
    widths: dict[str, list[float]] = {
        name: [3.0 + (i + head) % 5 for head in range(q.bit_width.numel())]
        for i, (name, q) in enumerate(quantizers_of(model))
    }
    set_widths(model, widths)
    operations, limit = method.bit_operations().item(), method.limit
    assert operations > limit
    relative = 50 * 2 * (operations / limit - 1) / limit
    outer = relative if penalty == "relative" else 0.1 * 2 * (operations - limit) / 1e18
    gradients = width_gradients(model, method.penalty())
    attn, parts = "blocks.0.attn", ("query", "key", "value")
    projection, scores, mlp = MACS["projection"], MACS["scores"], MACS["mlp"]
    expected: dict[str, list[float]] = {
        f"{attn}.qkv.input": [sum(projection / 2 * w for p in parts for w in widths[f"{attn}.qkv.{p}_weight"])],
        f"{attn}.qkv.key_weight": [projection / 2 * widths[f"{attn}.qkv.input"][0]] * 2,
        f"{attn}.query": [scores / 2 * w for w in widths[f"{attn}.key"]],
        f"{attn}.key": [scores / 2 * w for w in widths[f"{attn}.query"]],
        f"{attn}.probs": [scores / 2 * w for w in widths[f"{attn}.value"]],
        f"{attn}.value": [scores / 2 * w for w in widths[f"{attn}.probs"]],
        f"{attn}.output": [projection / 2 * w for w in widths[f"{attn}.proj.weight"]],
        f"{attn}.proj.weight": [projection / 2 * w for w in widths[f"{attn}.output"]],
        GELU: [mlp * widths["blocks.0.mlp.fc2.weight"][0]],
        "blocks.0.mlp.fc1.weight": [mlp * widths["blocks.0.mlp.fc1.input"][0]],
        "patch_embed.proj.input": [MACS["patch_embed"] * widths["patch_embed.proj.weight"][0]],
        "head.weight": [MACS["head"] * widths["head.input"][0]],
    }
    for site, values in expected.items():
        actual = gradients[site].flatten().tolist()
        assert actual == pytest.approx([outer * value for value in values], rel=1e-5), site


@pytest.mark.parametrize("penalty", ["relative", "absolute"])
def test_within_the_budget_there_is_no_penalty_and_no_gradient(penalty: str) -> None:
    model, method = starting_point(small_config(method="qvit", budget="3bit", method_options={"penalty": penalty}))
    set_widths(model, 2.0)
    value = method.penalty()
    assert value.item() == 0.0
    assert not any(gradient.any() for gradient in width_gradients(model, value).values())
    at_the_limit = {name: [3.0] * q.bit_width.numel() for name, q in quantizers_of(model)}
    at_the_limit |= {name: [8.0] for name in FIRST_AND_LAST}
    set_widths(model, at_the_limit)
    assert method.bit_operations().item() == method.limit and method.penalty().item() == 0.0


def test_the_penalty_pulls_back_widths_that_overshot_and_leaves_the_lowest() -> None:
    model, method = starting_point(small_config(method="qvit", budget="2bit"))
    set_widths(model, 8.7)
    gradients = width_gradients(model, method.penalty())
    assert all((gradient > 0).all() for gradient in gradients.values()), "a width above 8 would never come back"
    name = "blocks.0.mlp.fc1.weight"
    low = {other: [1.9 if other == name else 8.0] * q.bit_width.numel() for other, q in quantizers_of(model)}
    set_widths(model, low)
    assert float(width_gradients(model, method.penalty())[name]) == 0.0, "2 bits is the least; there is nothing below"


def test_impossible_budgets_name_what_is_possible(cost: CostModel) -> None:
    with pytest.raises(QvitError, match=r"between 0\.2\d\d M \(2 bits everywhere\) and \d+\.\d+ M") as caught:
        create_method(small_config(method="qvit", budget="0.1M")).plan(cost)
    assert not isinstance(caught.value, UsageError)


# --------------------------------------------------------------------------------------- the end of the searching stage


@pytest.mark.parametrize(("ratio", "epochs", "frozen_at"), [(0.5, 4, 2), (0.4, 4, 1), (0.0, 2, 0), (0.99, 3, 2)])
def test_widths_stand_still_after_the_search(tmp_path: Path, ratio: float, epochs: int, frozen_at: int) -> None:
    options = {"searching_ratio": ratio, "width_lr": 0.2}
    trainer, method, model = tiny_trainer(tmp_path, epochs=epochs, method_options=options)
    trainer.fit(quiet=True)
    method.finish(trainer)
    frozen = events(tmp_path, "freeze")
    assert [(event["epoch"], event["step"]) for event in frozen] == [(frozen_at, 3 * frozen_at)]
    assert stage_of(model) is Stage.FROZEN
    widths = [event["bit_widths"] for event in events(tmp_path, "epoch")]
    final = {name: list(map(float, own)) for name, own in plan_of(model).widths().items()}
    for epoch, own in enumerate(widths):
        assert (own == final) == (epoch >= frozen_at), f"epoch {epoch}"
    for event in events(tmp_path, "step"):
        assert (event["penalty"] > 0) <= (event["epoch"] < frozen_at), "no penalty after freezing"


def test_a_search_to_the_last_epoch_is_frozen_at_the_end(tmp_path: Path) -> None:
    trainer, method, model = tiny_trainer(tmp_path, epochs=2, method_options={"searching_ratio": 1.0})
    trainer.fit(quiet=True)
    assert stage_of(model) is Stage.CALIBRATED and not events(tmp_path, "freeze")
    method.finish(trainer)
    assert stage_of(model) is Stage.FROZEN
    (event,) = events(tmp_path, "freeze")
    assert event["epoch"] == 2 and event["step"] == 6
    method.finish(trainer)
    assert len(events(tmp_path, "freeze")) == 1


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("budget", ["2bit", "3bit", "0.13", "0.5M"])
def test_the_final_plan_is_within_the_budget_always(tmp_path: Path, budget: str, seed: int) -> None:
    """From widths that have nothing to do with the budget, far above it or below."""
    trainer, method, model = tiny_trainer(tmp_path, seed=seed, budget=budget)
    generator = torch.Generator().manual_seed(100 + seed)
    low, high = [(2, 8), (1.5, 3), (6, 9), (2, 4), (4, 8), (2.4, 2.6)][seed]
    drawn = {
        name: (torch.rand(q.bit_width.numel(), generator=generator) * (high - low) + low).tolist()
        for name, q in quantizers_of(model)
    }
    set_widths(model, drawn)
    method.end_search(trainer)
    final = plan_of(model).widths()
    spent = method.cost.bit_operations(final)
    assert spent <= method.limit
    assert all(2 <= width <= 8 for own in final.values() for width in own)
    (event,) = events(tmp_path, "freeze")
    clamped = {name: [min(max(w, 2.0), 8.0) for w in own] for name, own in drawn.items()}
    rounded = {name: tuple(round(w) for w in own) for name, own in clamped.items()}
    assert event["bit_operations"] == spent and event["budget_bit_operations"] == method.limit
    assert event["bit_operations_rounded"] == method.cost.bit_operations(rounded)
    assert isinstance(event["bit_operations_learned"], float) and event["bit_operations_learned"] > 0
    changed = {
        (name, head if len(own) > 1 else None): (rounded[name][head], own[head])
        for name, own in final.items()
        for head in range(len(own))
        if own[head] != rounded[name][head]
    }
    assert {(c["site"], c["head"]): (c["rounded"], c["final"]) for c in event["changes"]} == changed
    for change in event["changes"]:
        assert change["learned"] == pytest.approx(clamped[change["site"]][change["head"] or 0], abs=1e-3)


@pytest.mark.parametrize("seed", range(3))
def test_trained_widths_end_within_the_budget(tmp_path: Path, seed: int) -> None:
    options = {"width_lr": 0.4, "searching_ratio": 0.5, "penalty_weight": 0.001}
    trainer, method, model = tiny_trainer(tmp_path, seed=seed, epochs=2, method_options=options)
    trainer.fit(quiet=True)
    assert method.cost.bit_operations(plan_of(model).widths()) <= method.limit
    assert len({width for own in plan_of(model).widths().values() for width in own}) > 1


def test_spare_budget_is_spent(tmp_path: Path) -> None:
    trainer, method, model = tiny_trainer(tmp_path, budget="4bit")
    set_widths(model, 2.2)
    method.end_search(trainer)
    rounded = method.cost.bit_operations(method.cost.uniform(2, boundary_bits=2))
    assert method.cost.bit_operations(plan_of(model).widths()) > 1.5 * rounded


def test_widths_leave_the_optimizer_when_they_are_frozen(tmp_path: Path) -> None:
    trainer, method, model = tiny_trainer(tmp_path, epochs=2, method_options={"searching_ratio": 0.5})
    groups = {group["name"]: group for group in trainer.optimizer.param_groups}
    widths = list(groups["widths"]["params"])
    assert {id(p) for p in widths} == {id(q.bit_width) for _, q in quantizers_of(model)}
    assert groups["widths"]["weight_decay"] == groups["scales"]["weight_decay"] == 0
    assert groups["widths"]["lr"] == pytest.approx(method.width_lr)
    others = {name: list(group["params"]) for name, group in groups.items() if name != "widths"}
    trainer.config = trainer.config.model_copy(update={"epochs": 1})
    trainer.fit(quiet=True)
    state = {id(p): trainer.optimizer.state[p]["exp_avg"].clone() for own in others.values() for p in own}
    assert all(p in trainer.optimizer.state for p in widths)
    method.end_search(trainer)
    assert groups["widths"]["params"] == [] and not any(p in trainer.optimizer.state for p in widths)
    for name, parameters in others.items():
        assert all(a is b for a, b in zip(groups[name]["params"], parameters, strict=True)), name
    for own in others.values():
        assert all(torch.equal(trainer.optimizer.state[p]["exp_avg"], state[id(p)]) for p in own)


@pytest.mark.parametrize("schedule", ["search", "run"])
def test_rate_of_widths(tmp_path: Path, schedule: str) -> None:
    """At rest at the end of the searching stage, or on its way with all others."""
    options = {"width_lr": 0.2, "searching_ratio": 0.5, "width_schedule": schedule}
    trainer, method, _ = tiny_trainer(tmp_path, epochs=4, method_options=options)
    rates, step = [], trainer.optimizer.step

    def spied() -> None:
        rates.append([group["lr"] for group in trainer.optimizer.param_groups if group["name"] == "widths"][0])
        step()

    trainer.optimizer.step = spied  # type: ignore[assignment]
    trainer.fit(quiet=True)
    searching = 2 * trainer.steps_per_epoch
    span = searching if schedule == "search" else 2 * searching
    wanted = [0.1 * (1 + math.cos(math.pi * done / span)) for done in range(searching)]
    assert rates[:searching] == pytest.approx(wanted, rel=1e-6)


def test_the_averaged_model_is_frozen_with_the_same_widths(tmp_path: Path) -> None:
    options = {"width_lr": 0.3, "searching_ratio": 0.5}
    trainer, _, model = tiny_trainer(tmp_path, epochs=2, ema_decay=0.5, method_options=options)
    trainer.fit(quiet=True)
    assert trainer.result_model is not model and stage_of(trainer.result_model) is Stage.FROZEN
    assert plan_of(trainer.result_model).sites == plan_of(model).sites


def test_scales_of_widths_that_were_left_stand_still(tmp_path: Path) -> None:
    """Adam's momentum would go on moving the scale of a width that is no longer used."""
    options = {"searching_ratio": 1.0, "width_lr": 1e-4, "width_gradient": "difference"}  # one column at a time
    trainer, _, model = tiny_trainer(tmp_path, epochs=2, method_options=options)
    whole = trainer.config
    trainer.config = whole.model_copy(update={"epochs": 1})
    trainer.fit(quiet=True)
    before = {name: q.scale.detach().clone() for name, q in quantizers_of(model)}
    set_widths(model, 6.0)
    trainer.config = whole
    trainer.fit(quiet=True)
    for name, quantizer in quantizers_of(model):
        moved = (quantizer.scale != before[name]).view(-1, 7).any(0).tolist()
        assert moved == [False] * 4 + [True] + [False] * 2, f"{name}: columns of 2 to 8 bits"


def test_no_scale_moves_by_more_than_a_tenth_in_a_step(tmp_path: Path) -> None:
    trainer, _, model = tiny_trainer(tmp_path, steps=1, epochs=1, lr=10.0, method_options={"searching_ratio": 1.0})
    before = {name: q.scale.detach().clone() for name, q in quantizers_of(model)}
    trainer.fit(quiet=True)
    ratios = torch.cat([(q.scale.detach() / before[name]).flatten() for name, q in quantizers_of(model)])
    assert float(ratios.min()) >= 0.9 - 1e-6 and float(ratios.max()) <= 1.1 + 1e-6
    assert float((ratios - 1).abs().max()) > 0.09, "the learning rate was too small to test the limit"


def test_interpolated_widths_are_frozen_too(tmp_path: Path) -> None:
    options = {"width_gradient": "interpolation", "searching_ratio": 0.5, "width_lr": 0.2}
    trainer, method, model = tiny_trainer(tmp_path, epochs=2, method_options=options)
    trainer.fit(quiet=True)
    assert stage_of(model) is Stage.FROZEN
    assert method.cost.bit_operations(plan_of(model).widths()) <= method.limit


# ------------------------------------------------------------------------------------------------------ other methods


def test_a_new_method_is_one_class(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(METHODS, "_found", dict(METHODS))

    @register_method("half")
    class Half(Method):
        def plan(self, cost: CostModel) -> QuantPlan | None:
            return QuantPlan("half", (), dict.fromkeys(cost.sites, TensorSpec(4)))

    assert isinstance(create_method(small_config(method="half")), Half)


def test_float_quantizes_nothing(cost: CostModel) -> None:
    method = create_method(small_config(method="float"))
    assert method.plan(cost) is None and not method.quantizes
    assert method.penalty() is None and method.figures(every_width=True) == {} and method.budget(cost) is None
