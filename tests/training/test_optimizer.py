"""Parameter groups, and the rules that keep scales and widths where they make sense."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from timm.optim import list_optimizers
from tiny_models import calibrated_model, digit_batches, digits_model
from torch import Tensor, nn

from qvit.errors import UsageError
from qvit.models.convert import freeze, quantize
from qvit.models.create import create_model
from qvit.plan.quant_plan import QuantPlan, Rule
from qvit.quantizers import quantizers_of
from qvit.quantizers.lsq import LSQQuantizer
from qvit.training.checkpoint import load_checkpoint, save_checkpoint
from qvit.training.optimizer import LARGEST_RELATIVE_STEP, WIDTH_BETA2, create_optimizer, drop_widths

LEARNED = QuantPlan.preset("w4a4").with_rules(
    Rule("*", {"learn_bit_width": True, "switchable_scale": True}), Rule("*attn.query", {"bit_width": [4, 4]})
)
GELU = "blocks.0.mlp.fc2.input"  # the site with an offset
CASES = [("adamw", 1e-3), ("sgd", 1e-2), ("lion", 1e-3)]


def make_optimizer(model: nn.Module, **changes: Any) -> torch.optim.Optimizer:
    return create_optimizer(model, **({"opt": "adamw", "lr": 1e-3, "weight_decay": 0.05, "width_lr": 0.0} | changes))


def lsq_of(model: nn.Module) -> dict[str, LSQQuantizer]:
    return {name: q for name, q in quantizers_of(model) if isinstance(q, LSQQuantizer)}


def set_widths(model: nn.Module, bits: float) -> None:
    with torch.no_grad():
        for _, quantizer in quantizers_of(model):
            quantizer.bit_width.fill_(bits)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 1, seed: int = 1) -> None:
    for step in range(steps):
        optimizer.zero_grad()
        model(digit_batches(1, seed=seed + step)[0]).square().mean().backward()
        optimizer.step()


def group(optimizer: torch.optim.Optimizer, name: str) -> dict[str, Any]:
    return next(found for found in optimizer.param_groups if found["name"] == name)


def columns(model: nn.Module, bits: int) -> dict[str, Tensor]:
    """A copy of the scale (and offset) that every site keeps for a width."""
    found = {}
    for site, quantizer in lsq_of(model).items():
        found[f"{site}.scale"] = quantizer.scale.detach()[..., bits - 2].clone()
        if quantizer.offset is not None:
            found[f"{site}.offset"] = quantizer.offset.detach()[..., bits - 2].clone()
    return found


def moved(before: dict[str, Tensor], after: dict[str, Tensor]) -> set[str]:
    return {name for name in before if not torch.equal(before[name], after[name])}


# ---- Groups ----


def test_groups_of_a_quantized_model() -> None:
    model = calibrated_model(LEARNED)
    optimizer = make_optimizer(model, lr=2e-3, weight_decay=0.07, width_lr=0.03)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    members = {own["name"]: [names[id(p)] for p in own["params"]] for own in optimizer.param_groups}
    assert [own["name"] for own in optimizer.param_groups] == ["weights", "others", "scales", "widths"]
    assert sorted(name for own in members.values() for name in own) == sorted(names.values())  # each in one group
    settings = {own["name"]: (own["weight_decay"], own["lr"]) for own in optimizer.param_groups}
    assert settings == {"weights": (0.07, 2e-3), "others": (0.0, 2e-3), "scales": (0.0, 2e-3), "widths": (0.0, 0.03)}
    assert all(name.endswith(".weight") and "norm" not in name for name in members["weights"])
    assert all(name.endswith(("_quantizer.scale", "_quantizer.offset")) for name in members["scales"])
    assert all(name.endswith("_quantizer.bit_width") for name in members["widths"])
    assert {"cls_token", "pos_embed", "norm.weight", "head.bias", "patch_embed.proj.bias"} <= set(members["others"])
    assert {"patch_embed.proj.weight", "head.weight", "blocks.0.attn.qkv.weight"} <= set(members["weights"])
    assert f"{GELU}_quantizer.offset" in members["scales"]
    assert len(members["widths"]) == len(lsq_of(model))


def test_groups_of_a_float_model_and_of_a_frozen_one() -> None:
    optimizer = make_optimizer(digits_model())
    assert [len(own["params"]) > 0 for own in optimizer.param_groups] == [True, True, False, False]
    frozen = freeze(calibrated_model(LEARNED))
    optimizer = make_optimizer(frozen)
    assert [len(own["params"]) > 0 for own in optimizer.param_groups] == [True, True, True, False]
    train(frozen, optimizer)


def test_parameters_that_stand_still_are_left_out() -> None:
    model = digits_model()
    model.get_parameter("pos_embed").requires_grad = False
    listed = {id(p) for own in make_optimizer(model).param_groups for p in own["params"]}
    assert id(model.get_parameter("pos_embed")) not in listed
    assert id(model.get_parameter("cls_token")) in listed


def test_tokens_of_other_models_get_no_weight_decay() -> None:
    with torch.device("meta"):
        model = create_model("deit_tiny_distilled_patch16_224", depth=1)
        registers = create_model("vit_medium_patch16_reg4_gap_256", depth=1)
    for owner, token in ((model, "dist_token"), (registers, "reg_token"), (model, "pos_embed")):
        others = group(make_optimizer(owner), "others")["params"]
        assert any(parameter is owner.get_parameter(token) for parameter in others)


@pytest.mark.parametrize(
    ("model", "kwargs", "exempt", "decayed"),
    [
        (
            "swin_tiny_patch4_window7_224",
            {"depths": (1, 1)},
            "layers.1.blocks.0.attn.relative_position_bias_table",
            "layers.1.downsample.reduction.weight",
        ),
        (
            "swinv2_tiny_window8_256",
            {"depths": (1, 1)},
            "layers.0.blocks.0.attn.cpb_mlp.0.weight",
            "layers.0.blocks.0.attn.proj.weight",
        ),
        ("vit_small_patch16_rope_mixed_224", {"depth": 1}, "rope.freqs", "blocks.0.mlp.fc1.weight"),
        (
            "beit_base_patch16_224",
            {"depth": 1},
            "blocks.0.attn.relative_position_bias_table",
            "blocks.0.attn.qkv.weight",
        ),
    ],
)
def test_what_timm_exempts_by_name_gets_no_weight_decay(
    model: str, kwargs: dict[str, Any], exempt: str, decayed: str
) -> None:
    with torch.device("meta"):
        owner = quantize(create_model(model, **kwargs), "w4a4", in_place=True)
    optimizer = make_optimizer(owner)
    for name, parameter in (("others", exempt), ("weights", decayed)):
        assert any(own is owner.get_parameter(parameter) for own in group(optimizer, name)["params"]), parameter
    assert owner.get_parameter(exempt).dim() > 1


def test_widths_forget_faster_than_weights() -> None:
    optimizer = make_optimizer(calibrated_model(LEARNED))
    assert {own["name"]: own["betas"][1] for own in optimizer.param_groups} == {
        "weights": 0.999,
        "others": 0.999,
        "scales": 0.999,
        "widths": WIDTH_BETA2,
    }
    assert "betas" not in group(make_optimizer(calibrated_model(LEARNED), opt="sgd"), "widths")


@pytest.mark.parametrize(
    "opt", ["adam", "sgd", "lamb", "nadamw", "adafactor", "rmsprop", "lookahead_adamw", "muon", "adan"]
)
def test_optimizers_of_timm_can_be_chosen(opt: str) -> None:
    """The rules hold for all of them, however many betas they have."""
    model = calibrated_model(LEARNED)
    optimizer = make_optimizer(model, opt=opt, width_lr=0.01)
    before, eight = {name: q.scale.detach().clone() for name, q in lsq_of(model).items()}, columns(model, 8)
    train(model, optimizer, 2)
    assert any(not torch.equal(q.scale, before[name]) for name, q in lsq_of(model).items())
    inner = {name for name, quantizer in lsq_of(model).items() if (quantizer.bit_width < 7).all()}
    assert {name.rpartition(".")[0] for name in moved(eight, columns(model, 8))}.isdisjoint(inner)


@pytest.fixture(scope="module")
def start() -> tuple[nn.Module, list[Tensor | None]]:
    """A model with learned widths, and the gradients of a batch."""
    model = calibrated_model(LEARNED)
    model(digit_batches(1)[0]).square().mean().backward()
    gradients = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    return model, gradients


#: What a machine may lack: a CUDA device, and packages.
ELSEWHERE = ("bnb", "fused")
#: Compile their sums on first use.
COMPILED = ("kron", "kronc", "kronw")
QUICK = ("adamw", "sgd", "muon", "cadopt", "adahessian", "bnbadam")


def every_optimizer() -> list[Any]:
    """Names with and without Lookahead; those that add little but time are for the slow tests."""
    names = [*list_optimizers(), *(f"lookahead_{name}" for name in list_optimizers())]
    slow = [n for n in names if n.endswith(COMPILED) or n.startswith("look") and n.partition("_")[2] not in QUICK]
    return [pytest.param(name, marks=pytest.mark.slow) if name in slow else name for name in names]


@pytest.mark.filterwarnings("ignore:It is highly recommended to have 'opt_einsum'")
@pytest.mark.parametrize("opt", every_optimizer())
def test_every_optimizer_of_timm_is_taken_or_refused(
    start: tuple[nn.Module, list[Tensor | None]], opt: str, tmp_path: Path
) -> None:
    """A step, its rules, a checkpoint, and the same second step after it; then widths are dropped."""
    model, gradients = copy.deepcopy(start[0]), start[1]
    settings, name = {"opt": opt, "lr": 0.5, "width_lr": 0.5}, opt.rpartition("_")[2]
    if name == "adahessian" or (name.startswith(ELSEWHERE) and not torch.cuda.is_available()):
        reason = "needs second derivatives" if name == "adahessian" else "cannot be used here: CUDA required"
        with pytest.raises(UsageError, match=f"optimizer '{opt}' {reason}"):
            make_optimizer(model, **settings)
        return

    def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        for parameter, gradient in zip(model.parameters(), gradients, strict=True):
            parameter.grad = None if gradient is None else gradient.clone()
        optimizer.step()

    optimizer = make_optimizer(model, **settings)
    before = {site: q.scale.detach().clone() for site, q in lsq_of(model).items()}
    weights = start[0].get_parameter("blocks.0.mlp.fc1.weight")
    step(model, optimizer)
    for site, quantizer in lsq_of(model).items():
        assert ((quantizer.scale / before[site] - 1).abs() <= LARGEST_RELATIVE_STEP + 1e-6).all(), site
        assert ((quantizer.bit_width >= 2) & (quantizer.bit_width <= 8)).all()
    state = {"step": 1, "plan": "{}", "model": model.state_dict(), "optimizer": optimizer.state_dict()}
    save_checkpoint(tmp_path, {**state, "ema": None, "sums": None, "hooks": {}, "diagnostics": {}})
    saved = load_checkpoint(tmp_path)
    again = copy.deepcopy(start[0])
    resumed = make_optimizer(again, **settings)
    again.load_state_dict(saved["model"])
    resumed.load_state_dict(saved["optimizer"])
    for own, its in ((model, optimizer), (again, resumed)):
        step(own, its)
    assert not torch.equal(model.get_parameter("blocks.0.mlp.fc1.weight"), weights)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    drop_widths(resumed)
    assert freeze(again) is not None
    assert resumed.state_dict()["state"]  # names parameters by their place: none may be left over


@pytest.mark.parametrize("name", ["adamv", "lookahead_adamv", "any_adamw", "lookahead_lookahead_adamw"])
def test_names_of_no_optimizer(name: str) -> None:
    with pytest.raises(UsageError, match=rf"unknown optimizer '{name}'"):
        make_optimizer(digits_model(), opt=name)


def test_weight_decay_moves_matrices_alone() -> None:
    """Without gradients a step only decays."""
    model = calibrated_model(LEARNED)
    optimizer = make_optimizer(model, lr=0.1, weight_decay=0.5, width_lr=0.1)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    matrices = {id(parameter) for parameter in group(optimizer, "weights")["params"]}
    for name, parameter in model.named_parameters():
        expected = before[name] * 0.95 if id(parameter) in matrices else before[name]
        torch.testing.assert_close(parameter.detach(), expected, msg=name)


def test_an_unknown_optimizer_is_refused() -> None:
    with pytest.raises(UsageError, match="unknown optimizer 'adamm'; did you mean"):
        make_optimizer(digits_model(), opt="adamm")


# ---- Columns that are not in use ----


@pytest.mark.parametrize(("opt", "lr"), CASES)
def test_columns_that_are_not_in_use_stand_still(opt: str, lr: float) -> None:
    """Ten steps at 4 bits fill the momentum of that column; then the widths are 6, and 4 must not move any more."""
    model = calibrated_model(LEARNED)
    optimizer = make_optimizer(model, opt=opt, lr=lr)
    set_widths(model, 4)
    train(model, optimizer, 10)
    set_widths(model, 6)
    four, six, eight = (columns(model, bits) for bits in (4, 6, 8))
    train(model, optimizer, 10, seed=50)
    assert moved(four, columns(model, 4)) == set()
    assert moved(eight, columns(model, 8)) == set()
    assert len(moved(six, columns(model, 6))) >= 0.8 * len(six)


def test_without_the_rule_momentum_would_move_them() -> None:
    """The same steps with a plain AdamW: what the rule is there for."""
    model = calibrated_model(LEARNED)
    scales = [q.scale for q in lsq_of(model).values()]
    plain = torch.optim.AdamW(scales, lr=1e-3, weight_decay=0.0)
    set_widths(model, 4)
    train(model, plain, 10)
    set_widths(model, 6)
    before = columns(model, 4)
    train(model, plain, 10, seed=50)
    changed = {name for name in moved(before, columns(model, 4)) if name.endswith("scale")}
    assert len(changed) >= 0.8 * len(scales)


def test_a_column_moves_again_when_its_width_returns() -> None:
    model = calibrated_model(LEARNED)
    optimizer = make_optimizer(model)
    for bits in (4, 6, 4):
        set_widths(model, bits)
        before = columns(model, bits)
        train(model, optimizer, 3)
        assert len(moved(before, columns(model, bits))) >= 0.8 * len(before)


def test_heads_of_different_widths_move_their_own_columns() -> None:
    model = calibrated_model(LEARNED)
    query = lsq_of(model)["blocks.0.attn.query"]
    assert query.scale.shape == (2, 1, 1, 7)
    with torch.no_grad():
        query.bit_width.copy_(torch.tensor([3.0, 7.0]).view(2, 1, 1))
    before = query.scale.detach().clone()
    train(model, make_optimizer(model), 3)
    changed = (query.scale.detach() != before).view(2, 7)
    assert [torch.nonzero(row).flatten().tolist() for row in changed] == [[1], [5]]


# ---- Steps of scales ----


@pytest.mark.parametrize(("opt", "lr"), [("adamw", 1.0), ("sgd", 1e4), ("adamw", 1e-3)])
def test_a_scale_changes_by_at_most_a_tenth_in_a_step(opt: str, lr: float) -> None:
    model = calibrated_model(LEARNED)
    optimizer = make_optimizer(model, opt=opt)
    for own in optimizer.param_groups:  # only scales and offsets are in a hurry
        own["lr"] = lr if own["name"] == "scales" else 0.0
    largest = 0.0
    for step in range(8):
        before = {name: q.scale.detach().clone() for name, q in lsq_of(model).items()}
        train(model, optimizer, seed=step)
        for name, quantizer in lsq_of(model).items():
            change = quantizer.scale.detach() / before[name] - 1
            assert (change.abs() <= LARGEST_RELATIVE_STEP + 1e-6).all(), name
            assert (quantizer.scale > 0).all()
            largest = max(largest, float(change.abs().max()))
    assert largest == pytest.approx(0.1, abs=1e-5) if lr > 0.1 else 0 < largest <= 0.1 + 1e-6


def test_without_the_rule_a_scale_would_cross_zero() -> None:
    model = calibrated_model(LEARNED)
    scales = [q.scale for q in lsq_of(model).values()]
    train(model, torch.optim.AdamW(scales, lr=1.0), 3)
    assert any((scale <= 0).any() for scale in scales)


def test_small_steps_of_scales_are_those_of_the_optimizer() -> None:
    """Far below the limit the rules change nothing."""
    model = calibrated_model(LEARNED)
    twin = copy.deepcopy(model)
    train(model, make_optimizer(model, lr=1e-6, weight_decay=0.0), 3)
    train(twin, torch.optim.AdamW(twin.parameters(), lr=1e-6, weight_decay=0.0), 3)
    for (name, quantizer), other in zip(lsq_of(model).items(), lsq_of(twin).values(), strict=True):
        torch.testing.assert_close(quantizer.scale, other.scale, rtol=1e-6, atol=1e-9, msg=name)


def test_offsets_are_not_bounded_by_their_size() -> None:
    """An offset may be zero or change its sign; a relative limit would hold it there for ever."""
    model = calibrated_model(LEARNED)
    offset = lsq_of(model)[GELU].offset
    assert offset is not None
    with torch.no_grad():
        offset.zero_()
    optimizer = make_optimizer(model, lr=0.05)
    train(model, optimizer, 2)
    assert offset[2].abs() > 0.01  # column of 4 bits
    assert (offset[[0, 1, 3, 4, 5, 6]] == 0).all()


# ---- Widths ----


@pytest.mark.parametrize("limits", [(2, 8), (3, 5)])
@pytest.mark.parametrize("direction", [-1.0, 1.0])
def test_widths_stay_in_their_range(limits: tuple[int, int], direction: float) -> None:
    """Momentum towards a limit carries no width across it, and one gradient the other way brings it back inside."""
    rule = Rule("*", {"bit_width_range": list(limits), "bit_width": 4})
    narrow = Rule("*fc1.weight", {"bit_width_range": [4, 6]})
    model = calibrated_model(LEARNED.with_rules(rule, narrow))
    optimizer = make_optimizer(model, lr=0.0, width_lr=0.4)
    quantizers = lsq_of(model)

    def push(sign: float) -> None:
        optimizer.zero_grad()
        for quantizer in quantizers.values():
            quantizer.bit_width.grad = torch.full_like(quantizer.bit_width, -sign)
        optimizer.step()

    for _ in range(20):
        push(direction)
        for quantizer in quantizers.values():
            low, high = quantizer.spec.bit_width_range
            assert (quantizer.bit_width >= low).all() and (quantizer.bit_width <= high).all()
    end = 1 if direction > 0 else 0
    for name, quantizer in quantizers.items():
        expected = (4, 6)[end] if name.endswith("fc1.weight") else limits[end]
        assert (quantizer.bit_width == expected).all()
    for _ in range(12):
        push(-direction)
    assert all((q.bit_width != q.spec.bit_width_range[end]).all() for q in quantizers.values())


@pytest.mark.parametrize("end", [2.0, 8.0])
def test_gradients_that_lead_beyond_a_limit_do_not_count(end: float) -> None:
    """They leave no momentum behind that a gradient inwards would have to overcome; those of other widths do count."""
    model = calibrated_model(LEARNED)
    optimizer = make_optimizer(model, lr=0.0, width_lr=0.1)
    inner = [quantizer.bit_width for quantizer in lsq_of(model).values() if (quantizer.bit_width == 4).all()]
    first, *others = inner
    outward = 1.0 if end == 2 else -1.0
    with torch.no_grad():
        first.fill_(end)
    for sign in (*[1.0] * 5, -1.0):
        for width in (first, *others):
            width.grad = torch.full_like(width, sign * outward)
        optimizer.step()
        if sign > 0:
            assert (first == end).all() and not optimizer.state[first]["exp_avg"].any()
            assert all((width.grad == outward).all() for width in others)
    assert ((first - end).abs() > 0.01).all()


def test_widths_move_with_their_own_learning_rate() -> None:
    model = calibrated_model(LEARNED)
    optimizer = make_optimizer(model, lr=1e-9, width_lr=0.2)
    before = {name: q.bit_width.detach().clone() for name, q in lsq_of(model).items()}
    train(model, optimizer)
    steps = torch.cat([(q.bit_width.detach() - before[name]).flatten().abs() for name, q in lsq_of(model).items()])
    assert steps.max() == pytest.approx(0.2, rel=1e-3)


# ---- Freezing ----


def test_dropping_the_widths_keeps_everything_else() -> None:
    model = calibrated_model(LEARNED)
    optimizer = make_optimizer(model, width_lr=0.05)
    train(model, optimizer, 3)
    widths = list(group(optimizer, "widths")["params"])
    others = {p: optimizer.state[p] for own in optimizer.param_groups if own["name"] != "widths" for p in own["params"]}
    copies = {p: copy.deepcopy(dict(state)) for p, state in others.items()}
    assert widths and all(width in optimizer.state for width in widths)
    freeze(model)
    drop_widths(optimizer)
    assert group(optimizer, "widths")["params"] == []
    assert len(optimizer.param_groups) == 4
    assert all(width not in optimizer.state for width in widths)
    for parameter, state in others.items():
        assert optimizer.state[parameter] is state
        for key, value in copies[parameter].items():
            assert torch.equal(state[key], value)
    final = {name: q.bit_width.clone() for name, q in lsq_of(model).items()}
    used = columns(model, 4)
    train(model, optimizer, 2)
    assert all(torch.equal(q.bit_width, final[name]) for name, q in lsq_of(model).items())
    assert moved(used, columns(model, 4))


def test_state_of_a_frozen_run_loads_into_the_optimizer_of_a_frozen_model() -> None:
    """A run that was killed after the freeze starts again from a model without learned widths."""
    model = calibrated_model(LEARNED)
    optimizer = make_optimizer(model, width_lr=0.05)
    train(model, optimizer, 2)
    freeze(model)
    drop_widths(optimizer)
    train(model, optimizer, 2)
    state = copy.deepcopy(optimizer.state_dict())
    again = copy.deepcopy(model)
    resumed = make_optimizer(again, width_lr=0.05)
    resumed.load_state_dict(state)
    train(model, optimizer, 2, seed=9)
    train(again, resumed, 2, seed=9)
    for (name, parameter), other in zip(model.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(parameter, other), name


def test_dropping_without_widths_does_nothing() -> None:
    optimizer = make_optimizer(digits_model())
    drop_widths(optimizer)
    assert [own["name"] for own in optimizer.param_groups] == ["weights", "others", "scales", "widths"]
    plain = torch.optim.SGD([nn.Parameter(torch.zeros(2))], lr=0.1)
    drop_widths(plain)
    assert len(plain.param_groups[0]["params"]) == 1
