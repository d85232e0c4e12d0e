"""Other ways to learn widths, `dq` and `edmips`: gradients by hand, and runs to the end, stopped and not."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import (
    digit_batches,
    digits_model,
    events,
    small_config,
    starting_point,
    tiny_trainer,
)

from qvit.errors import UsageError
from qvit.functional import round_ste
from qvit.methods import create_method
from qvit.models.convert import Stage, freeze, plan_of, quantize, stage_of
from qvit.models.families import inspect_model
from qvit.plan.quant_plan import QuantPlan, Rule
from qvit.plan.spec import Layout, PerHead, TensorSpec
from qvit.quantizers import create_quantizer, quantizers_of
from qvit.quantizers.edmips import START
from qvit.quantizers.lsq import LSQQuantizer
from qvit.runs.finished import load_run
from qvit.runs.packed import pack_run
from qvit.runs.run import resume, train
from qvit.training import checkpoint as checkpoint_module

RIVALS = ["dq", "edmips"]
HEADS = Layout(heads=(2, 1, 1))


def quantizer_of(name: str, *, heads: bool = False, bits: int = 3, **changes: Any) -> Any:
    """A quantizer with a scale of 1 and the range of `bits`, that counts as calibrated."""
    width = (bits, bits) if heads else bits
    own: dict[str, Any] = {"granularity": PerHead()} if heads else {}
    options = {"switchable_scale": True} if name != "dq" else {}
    spec = TensorSpec(width, learn_bit_width=True, quantizer=name, options=options, **own, **changes)
    quantizer: Any = create_quantizer(spec, HEADS if heads else Layout())
    with torch.no_grad():
        quantizer.scale.fill_(1.0)
        if name == "dq":
            quantizer.log2_range.fill_(math.log2(2 ** (bits - spec.signed) - 1))
    quantizer.calibrated = True
    return quantizer


def plan_for(method: str, **options: Any) -> dict[str, Any]:
    plan = create_method(small_config(method=method, budget="3bit", method_options=options)).plan(
        inspect_model(digits_model())
    )
    assert plan is not None
    return dict(plan.sites)


# ------------------------------------------------------------------------------------------------------------------ dq


@pytest.mark.parametrize(
    ("signed", "steps", "width"), [(True, 1, 2.0), (True, 7, 4.0), (True, 4.2, math.log2(5.2) + 1), (False, 15, 4.0)]
)
def test_width_follows_from_scale_and_range(signed: bool, steps: float, width: float) -> None:
    quantizer = quantizer_of("dq", signed=signed)
    with torch.no_grad():
        quantizer.scale.fill_(0.25)
        quantizer.log2_range.fill_(math.log2(0.25 * steps))
    assert quantizer.clamped_bit_width().item() == pytest.approx(width, rel=1e-6)
    assert quantizer.integer_bit_width().item() == round(width)
    inside = 2 < width
    quantizer.clamped_bit_width().backward()
    slope = steps / ((steps + 1) * math.log(2))  # of log2(x_max/d + 1) along ln(x_max), and against ln(d)
    if inside:
        assert quantizer.scale.grad.item() == pytest.approx(-slope / 0.25, rel=1e-5)
        assert quantizer.log2_range.grad.item() == pytest.approx(slope * math.log(2), rel=1e-5)


@pytest.mark.parametrize("signed", [True, False])
def test_gradients_of_scale_and_range_by_hand(signed: bool) -> None:
    """d = 0.5 and x_max = 1.7: 3 steps above zero, 4 below on a signed grid."""
    quantizer = quantizer_of("dq", signed=signed)
    with torch.no_grad():
        quantizer.scale.fill_(0.5)
        quantizer.log2_range.fill_(math.log2(1.7))
    x = torch.tensor([-3.0, -1.4, -0.2, 0.1, 0.4, 1.3, 2.5], requires_grad=True)
    grad = torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0])
    below = -2.0 if signed else 0.0
    values = [below, -1.5 if signed else 0.0, 0.0, 0.0, 0.5, 1.5, 1.5]
    out = quantizer(x)
    assert out.tolist() == pytest.approx(values)
    out.backward(grad)
    rounding = 3 - 1.7 / 0.5  # of the range
    to_scale = [-rounding - 1, -3 + 2.8, 0.4] if signed else [0.0, 0.0, 0.0]
    to_scale += [-0.2, 1 - 0.8, 3 - 2.6, rounding]
    to_range = [-1.0 if signed else 0.0, 0, 0, 0, 0, 0, 1.0]
    assert quantizer.scale.grad.item() == pytest.approx(
        sum(a * b for a, b in zip(to_scale, grad.tolist(), strict=True))
    )
    expected = sum(a * b for a, b in zip(to_range, grad.tolist(), strict=True)) * 1.7 * math.log(2)
    assert quantizer.log2_range.grad.item() == pytest.approx(expected, rel=1e-5)
    assert x.grad is not None
    inside = [0, 1, 1, 1, 1, 1, 0] if signed else [0, 0, 0, 1, 1, 1, 0]
    assert x.grad.tolist() == [g * i for g, i in zip(grad.tolist(), inside, strict=True)]


@pytest.mark.parametrize("offset", [False, True])
def test_gradients_per_head_are_those_of_autograd(offset: bool) -> None:
    torch.manual_seed(0)
    changes: dict[str, Any] = {"signed": False, "symmetric": False} if offset else {}
    quantizer = quantizer_of("dq", heads=True, **changes)
    with torch.no_grad():
        quantizer.scale.copy_(torch.tensor([0.3, 0.7]).view(2, 1, 1, 1))
        quantizer.log2_range.copy_(torch.tensor([0.4, 2.1]).view(2, 1, 1))
        if offset:
            quantizer.offset.copy_(torch.tensor([-0.6, 0.2]).view(2, 1, 1, 1))
    x, grad = torch.randn(5, 2, 6, 4) * 2, torch.randn(5, 2, 6, 4)
    leaves = [quantizer.scale, quantizer.log2_range, *([quantizer.offset] if offset else [])]
    actual = torch.autograd.grad(quantizer(x), leaves, grad)

    scale, log2_range, *rest = (leaf.detach().clone().requires_grad_() for leaf in leaves)
    d, top = scale[..., 0], torch.exp2(log2_range)
    shift: Any = rest[0][..., 0] if offset else 0.0
    most = round_ste(top / d)
    least = torch.zeros_like(most) if offset else -most - 1
    u = (x - shift) / d
    expected = round_ste(torch.where(u > most, most, torch.where(u < least, least, u))) * d + shift
    for own, other in zip(actual, torch.autograd.grad(expected, [scale, log2_range, *rest], grad), strict=True):
        torch.testing.assert_close(own, other, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(quantizer(x), expected)


@pytest.mark.parametrize("signed", [True, False])
def test_whole_widths_are_the_grids_of_lsq(signed: bool) -> None:
    x = torch.randn(200) * 4
    for bits in range(2, 9):
        quantizer = quantizer_of("dq", bits=bits, signed=signed)
        plain: Any = create_quantizer(TensorSpec(bits, signed=signed), Layout())
        with torch.no_grad():
            quantizer.scale.fill_(0.1)
            quantizer.log2_range.add_(math.log2(0.1))
            plain.scale.fill_(0.1)
        plain.calibrated = True
        assert torch.equal(quantizer(x), plain(x))


def test_calibration_and_freezing_keep_the_range() -> None:
    model, _ = starting_point(small_config(method="dq", budget="3bit"))
    for _, quantizer in quantizers_of(model):
        own: Any = quantizer
        levels = own.quant_range()[1]
        torch.testing.assert_close(torch.exp2(own.log2_range), own.scale[..., 0] * levels)
        assert torch.equal(own.integer_bit_width(), own.bit_width)
    site, own = next((name, q) for name, q in quantizers_of(model) if q.bit_width.numel() == 2)
    ranges = torch.exp2(own.log2_range).detach()  # type: ignore[operator]
    freeze(model, {site: (2, 6)})
    assert type(own) is LSQQuantizer and own.spec.quantizer == "lsq" and own.spec.widths == (2, 6)
    torch.testing.assert_close(own.scale[..., 0] * own.quant_range()[1], ranges)


def test_ranges_stay_where_widths_may_be(tmp_path: Path) -> None:
    for sign, limit in ((1.0, 8.0), (-1.0, 2.0)):
        trainer, method, model = tiny_trainer(tmp_path / str(limit), method="dq", budget="3bit")
        with torch.no_grad():
            for _, quantizer in quantizers_of(model):
                quantizer.log2_range += sign * 20  # type: ignore[operator]
        method.after_step(trainer)
        for name, quantizer in quantizers_of(model):
            own: Any = quantizer
            unclamped = torch.log2(torch.exp2(own.log2_range) / own.scale[..., 0] + 1) + int(own.spec.signed)
            torch.testing.assert_close(unclamped, torch.full_like(unclamped, limit), msg=name)


# -------------------------------------------------------------------------------------------------------------- edmips


@pytest.mark.parametrize("heads", [False, True])
@pytest.mark.parametrize("offset", [False, True])
def test_a_certain_mixture_is_lsq_exactly(heads: bool, offset: bool) -> None:
    torch.manual_seed(0)
    changes: dict[str, Any] = {"signed": False, "symmetric": False} if offset else {}
    mixture = quantizer_of("edmips", heads=heads, **changes)
    with torch.no_grad():
        mixture.scale.copy_(torch.rand_like(mixture.scale) / 2 + 0.05)
        if offset:
            mixture.offset.copy_(torch.randn_like(mixture.offset))
        mixture.logits.fill_(-math.inf)
        mixture.logits[..., 2] = 0.0
    x = torch.randn(3, 2, 5, 4)
    own: dict[str, Any] = {"granularity": PerHead()} if heads else {}
    spec = TensorSpec((4, 4) if heads else 4, options={"switchable_scale": True}, **own, **changes)
    plain: Any = create_quantizer(spec, HEADS if heads else Layout())
    plain.load_state_dict(
        {**{k: v for k, v in mixture.state_dict().items() if k != "logits"}, "bit_width": plain.bit_width}
    )
    results = []
    for quantizer in (mixture, plain):
        leaf = x.clone().requires_grad_()
        out = quantizer(leaf)
        out.square().sum().backward()
        results.append([out.detach(), leaf.grad, quantizer.scale.grad, *([quantizer.offset.grad] if offset else [])])
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)
    assert mixture.integer_bit_width().unique().tolist() == [4]
    assert mixture.clamped_bit_width().unique().tolist() == [4]


def test_gradients_of_logits_by_hand() -> None:
    """∂/∂logit_k = π_k·Σ g·(q_k - x̂), for each head."""
    torch.manual_seed(0)
    quantizer = quantizer_of("edmips", heads=True)
    with torch.no_grad():
        quantizer.scale.copy_(torch.rand_like(quantizer.scale) / 2 + 0.05)
        quantizer.logits.copy_(torch.randn_like(quantizer.logits))
    x, grad = torch.randn(3, 2, 4, 5), torch.randn(3, 2, 4, 5)
    out = quantizer(x)
    out.backward(grad)
    shares = quantizer.logits.detach().softmax(-1)
    branches = []
    for index, bits in enumerate(range(2, 9)):
        scale = quantizer.scale.detach()[..., index]
        branches.append((x / scale).round().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) * scale)
    expected = sum(shares[..., k] * branch for k, branch in enumerate(branches))
    torch.testing.assert_close(out, expected)
    for k, branch in enumerate(branches):
        own = shares[..., k] * (grad * (branch - out)).sum((0, 2, 3)).view(2, 1, 1)
        torch.testing.assert_close(quantizer.logits.grad[..., k], own.detach(), rtol=1e-4, atol=1e-4)
    width = quantizer.clamped_bit_width().flatten()
    torch.testing.assert_close(width, shares.view(2, 7) @ torch.arange(2.0, 9.0))
    assert quantizer.integer_bit_width().flatten().tolist() == (shares.view(2, 7).argmax(-1) + 2).tolist()


def test_heads_that_share_a_scale_have_their_own_mixtures() -> None:
    """The bank's gradient is the sum over heads, each with its share, of what LSQ has for it."""
    torch.manual_seed(0)
    spec = TensorSpec((3, 3), learn_bit_width=True, quantizer="edmips", options={"switchable_scale": True})
    mixture: Any = create_quantizer(spec, HEADS)
    with torch.no_grad():
        mixture.scale.copy_(torch.rand(7) / 2 + 0.05)
        mixture.logits.copy_(torch.randn_like(mixture.logits))
    mixture.calibrated = True
    x, grad = torch.randn(3, 2, 4, 5), torch.randn(3, 2, 4, 5)
    mixture(x).backward(grad)
    shares = mixture.logits.detach().softmax(-1)
    for k in range(7):
        plain: Any = create_quantizer(TensorSpec((k + 2, k + 2)), HEADS)
        with torch.no_grad():
            plain.scale.copy_(mixture.scale[k : k + 1])
        plain.calibrated = True
        plain(x).backward(grad * shares[..., k])
        torch.testing.assert_close(mixture.scale.grad[k], plain.scale.grad[0], rtol=1e-4, atol=1e-5)


def test_mixtures_start_without_preference_at_five_bits() -> None:
    model, method = starting_point(small_config(method="edmips", budget="3bit"))
    for _, quantizer in quantizers_of(model):
        own: Any = quantizer
        assert (own.logits == START).all() and own.scale.shape[-1] == 7
    cost = inspect_model(model)
    everywhere = cost.bit_operations(cost.uniform(5, boundary_bits=5))
    assert method.bit_operations().item() == pytest.approx(everywhere, rel=1e-6)
    with pytest.raises(UsageError, match="takes no --plan"):
        create_method(small_config(method="edmips", budget="3bit", plan="w4a4")).plan(cost)


@pytest.mark.parametrize("wish", ["likeliest", "expected"])
def test_the_wish_at_the_end(tmp_path: Path, wish: str) -> None:
    options = {"wish": wish}
    trainer, method, model = tiny_trainer(tmp_path, method="edmips", budget="8bit", method_options=options)
    with torch.no_grad():
        for _, quantizer in quantizers_of(model):
            own: Any = quantizer
            own.logits.zero_()
            own.logits[..., -1] = 0.5  # 8 bits is the likeliest, 5.3 expected
    method.end_search(trainer)
    (event,) = events(tmp_path, "freeze")
    macs = event["bit_operations_learned"] / method.cost.macs
    assert macs == pytest.approx(64.0 if wish == "likeliest" else 5.254**2, rel=1e-3)


# ---------------------------------------------------------------------------------------------------------------- both


def test_plans() -> None:
    cost = inspect_model(digits_model())
    for method in RIVALS:
        for name, spec in plan_for(method).items():
            assert spec.quantizer == method and spec.learn_bit_width and spec.bit_width_range == (2, 8)
            assert len(spec.widths) == (2 if cost.sites[name].layout.heads else 1)
        for spec in plan_for(method, head_wise=False).values():
            assert len(spec.widths) == 1
            assert method != "dq" or spec.to_json()["granularity"] == "per-tensor"
    assert plan_for("dq")["blocks.0.mlp.fc1.weight"].widths == (3,)
    assert plan_for("dq", initial_bits=6)["blocks.0.mlp.fc1.weight"].widths == (6,)
    assert plan_for("edmips", scales="shared")["blocks.0.attn.query"].to_json()["granularity"] == "per-tensor"


def test_wrong_options_name_the_nearest() -> None:
    for method, wrong, right in (("dq", "initial_bit", "initial_bits"), ("edmips", "scale", "scales")):
        with pytest.raises(UsageError, match=f"unknown option '{wrong}'; did you mean '{right}'"):
            create_method(small_config(method=method, budget="3bit", method_options={wrong: 4}))
    for method, options in (
        ("dq", {"switchable_scale": True}),
        ("edmips", {"initial_bits": 4}),
        ("edmips", {"wish": 1}),
    ):
        with pytest.raises(UsageError, match=next(iter(options))):
            create_method(small_config(method=method, budget="3bit", method_options=options))


@pytest.mark.parametrize("name", RIVALS)
def test_quantizers_refuse_specs_that_they_cannot_follow(name: str) -> None:
    with pytest.raises(UsageError, match=f"'{name}' learns its width.*'lsq'"):
        create_quantizer(TensorSpec(4, quantizer=name), Layout())
    switchable = name == "dq"
    with pytest.raises(UsageError, match="switchable_scale"):
        create_quantizer(
            TensorSpec(4, quantizer=name, learn_bit_width=True, options={"switchable_scale": switchable}), Layout()
        )
    if name == "dq":
        rule = Rule("*fc1.weight", {"quantizer": "dq", "learn_bit_width": True, "granularity": "per-channel"})
        with pytest.raises(UsageError, match="one scale and one range for each width"):
            quantize(digits_model(), QuantPlan("p", (rule,)))


@pytest.mark.parametrize("method", RIVALS)
def test_frozen_they_are_lsq(method: str) -> None:
    model, _ = starting_point(small_config(method=method, budget="3bit"))
    assert stage_of(model) is Stage.CALIBRATED and f"bit_width={'3' if method == 'dq' else '5'}" in repr(model)
    before = {name: q.integer_bit_width().flatten().tolist() for name, q in quantizers_of(model)}
    freeze(model)
    assert stage_of(model) is Stage.FROZEN
    assert all(type(q) is LSQQuantizer and q.spec.quantizer == "lsq" for _, q in quantizers_of(model))
    assert {name: q.bit_width.flatten().tolist() for name, q in quantizers_of(model)} == before
    plain = quantize(digits_model(), plan_of(model))
    plain.load_state_dict(model.state_dict())
    x = digit_batches(1)[0]
    assert torch.equal(model(x), plain(x))
    with pytest.raises(UsageError, match="bit-widths given"):
        next(quantizers_of(starting_point(small_config(method=method, budget="3bit"))[0]))[1].freeze((3, 3, 3))


@pytest.mark.parametrize("method", RIVALS)
def test_what_decides_widths_has_their_learning_rate_and_leaves_with_them(method: str, tmp_path: Path) -> None:
    trainer, own, model = tiny_trainer(tmp_path, method=method, epochs=2, method_options={"searching_ratio": 0.5})
    groups = {group["name"]: group for group in trainer.optimizer.param_groups}
    name = "log2_range" if method == "dq" else "logits"
    assert {id(p) for p in groups["widths"]["params"]} == {id(getattr(q, name)) for _, q in quantizers_of(model)}
    assert groups["widths"]["weight_decay"] == 0 and groups["widths"]["lr"] == pytest.approx(own.width_lr)
    scales = list(groups["scales"]["params"])
    trainer.fit(quiet=True)
    assert groups["widths"]["params"] == []
    assert all(a is b for a, b in zip(groups["scales"]["params"], scales, strict=True))
    assert not any(name in key for key in model.state_dict())


@pytest.mark.parametrize("method", RIVALS)
def test_the_penalty_reaches_what_decides_widths(method: str) -> None:
    above = {"initial_bits": 3} if method == "dq" else {}
    model, own = starting_point(small_config(method=method, budget="2bit", method_options=above))
    widths = torch.cat([q.clamped_bit_width().flatten() for _, q in quantizers_of(model)])
    torch.testing.assert_close(own.widths(), widths)
    own.penalty().backward()
    for name, quantizer in quantizers_of(model):
        q: Any = quantizer
        if method == "dq":
            assert (q.log2_range.grad > 0).all() and (q.scale.grad < 0).all(), name
        else:
            assert (q.logits.grad[..., 0] < 0).all() and (q.logits.grad[..., -1] > 0).all(), name
    operations = own.bit_operations().item()
    assert own.penalty().item() == pytest.approx(50 * (operations / own.limit - 1) ** 2, rel=1e-6)


@pytest.mark.parametrize("method", RIVALS)
def test_a_run_ends_within_its_budget_however_often_it_is_stopped(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped at the end of every epoch, within the search and after it."""
    options = {"searching_ratio": 0.5} | ({"initial_bits": 4} if method == "dq" else {})
    config = small_config(method=method, budget="3bit", epochs=4, method_options=options, ema_decay=0.9)
    whole = train(config, tmp_path / "whole", quiet=True)
    original = checkpoint_module.save_checkpoint

    def stops(*arguments: Any, **options: Any) -> Path:
        original(*arguments, **options)
        raise KeyboardInterrupt

    monkeypatch.setattr("qvit.training.loop.save_checkpoint", stops)
    frozen = []
    for start in (lambda run: train(config, run, quiet=True), *[lambda run: resume(run, quiet=True)] * 3):
        with pytest.raises(KeyboardInterrupt):
            start(tmp_path / "broken")
        frozen.append(bool(events(tmp_path / "broken", "freeze")))
    assert frozen == [False, False, True, True]
    again = resume(tmp_path / "broken", quiet=True)
    assert again["accuracy"] == whole["accuracy"] and again["bit_operations"] == whole["bit_operations"]
    first, second = load_run(tmp_path / "whole"), load_run(tmp_path / "broken")
    pairs = zip(first.state_dict().values(), second.state_dict().values(), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)

    (event,) = events(tmp_path / "whole", "freeze")
    assert whole["bit_operations"] == event["bit_operations"] <= event["budget_bit_operations"]
    spent = [own["bit_operations"] for own in events(tmp_path / "whole", "epoch")]
    assert spent[1] < spent[0], "the penalty brings the widths down"
    plan = QuantPlan.load(tmp_path / "whole" / "plan.json")
    assert {spec.quantizer for spec in plan.sites.values() if spec} == {"lsq"}

    x = digit_batches(1)[0]
    assert torch.equal(pack_run(tmp_path / "whole").model()(x), first(x))


@pytest.mark.parametrize("method", RIVALS)
def test_micro_batches_see_one_quantization(method: str, tmp_path: Path) -> None:
    """Weights are quantized once for all micro-batches of a step; the result is that of one batch, nearly."""
    states = []
    for accumulate in (1, 2):
        config = small_config(method=method, budget="3bit", epochs=1, accumulate=accumulate)
        train(config, tmp_path / str(accumulate), quiet=True)
        states.append([event["loss"] for event in events(tmp_path / str(accumulate), "step")])
    assert states[0] == pytest.approx(states[1], rel=2e-2)
