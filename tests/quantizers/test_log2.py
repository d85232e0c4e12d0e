"""Logarithmic grids: levels, codes, errors, gradients, and what a spec may ask of them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import calibrated_model, digit_batches, digits_model
from torch import Tensor

from qvit.errors import UsageError
from qvit.models.calibrate import calibrate
from qvit.models.convert import Stage, freeze, plan_of, quantize, stage_of
from qvit.models.families import inspect_model
from qvit.plan.quant_plan import QuantPlan, Rule
from qvit.plan.spec import Layout, PerHead, TensorSpec
from qvit.quantizers import Quantizer, create_quantizer
from qvit.quantizers.log2 import Log2Quantizer

NAMES = ("log2", "log-sqrt2")
PROBS = Layout(heads=(2, 1, 1))


def made(name: str = "log2", bits: int | tuple[int, ...] = 4, scale: float = 1.0, **changes: object) -> Quantizer:
    """A quantizer whose largest level is `scale`."""
    spec = TensorSpec(bit_width=bits, signed=False, quantizer=name).changed(changes)
    quantizer = create_quantizer(spec, PROBS)
    with torch.no_grad():
        quantizer.get_parameter("scale").fill_(scale)
    quantizer.calibrated = True
    return quantizer


def probabilities(seed: int = 0, sharpness: float = 3.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (sharpness * torch.randn(2, 2, 12, 12, generator=generator)).softmax(-1)


def test_levels_written_by_hand() -> None:
    q = made("log2", 2, 0.8)
    assert torch.equal(q.from_int(torch.tensor([0, 1, 2, 3])), torch.tensor([0.8, 0.4, 0.2, 0.0]))
    x = torch.tensor([2.0, 0.8, 0.5, 0.2, 0.1, 0.0])
    assert q.to_int(x).tolist() == [0, 0, 1, 2, 3, 3]
    finer = made("log-sqrt2", 3, 1.0).from_int(torch.arange(8))
    assert torch.allclose(finer, torch.tensor([2 ** (-k / 2) for k in range(7)] + [0.0]))


@given(
    name=st.sampled_from(NAMES),
    bits=st.integers(2, 8),
    scale=st.floats(1e-3, 4.0),
    values=st.lists(st.floats(0, 8, width=32), min_size=1, max_size=30),
)
def test_grid(name: str, bits: int, scale: float, values: list[float]) -> None:
    q, x = made(name, bits, scale), torch.tensor(values)
    codes, out = q.to_int(x), q(x).detach()
    assert torch.equal(q.from_int(codes), out), "codes and forward agree, bit for bit"
    assert torch.equal(q(out), out), "levels are fixed points"
    assert int(codes.min()) >= 0 and int(codes.max()) <= 2**bits - 1
    inside = (x <= q.get_parameter("scale")) & (codes < 2**bits - 1)
    ratio = 2 ** (0.5 / q.STEPS) if isinstance(q, Log2Quantizer) else 0.0
    relative = (out / x)[inside]
    assert bool(((relative <= ratio * 1.001) & (relative >= 1 / ratio / 1.001)).all()), "half a step away at most"
    order = x.argsort()
    assert bool((out[order].diff() >= 0).all()), "monotone"


@pytest.mark.parametrize("name", NAMES)
def test_gradient(name: str) -> None:
    q = made(name, 3, 0.5)
    x = torch.tensor([0.7, 0.5, 0.3, 1e-9], requires_grad=True)
    weight = torch.tensor([1.0, 2.0, 4.0, 8.0])
    (q(x) * weight).sum().backward()
    assert x.grad is not None and x.grad.tolist() == [0.0, 2.0, 4.0, 0.0]
    assert q.get_parameter("scale").grad.item() == 1.0  # type: ignore[union-attr]


@pytest.mark.parametrize("name", NAMES)
def test_calibration_finds_a_scale_no_candidate_beats(name: str) -> None:
    spec = TensorSpec(bit_width=(3, 5), signed=False, granularity=PerHead(), quantizer=name)
    q, x = create_quantizer(spec, PROBS), probabilities()
    observer = q.create_observer()
    observer.observe(x)
    q.initialize(observer)
    own = (q(x) - x).square().mean((0, 2, 3))
    for factor in (0.25, 0.5, 0.8, 1.25, 2.0):
        other = made(name, (3, 5), granularity="per-head")
        with torch.no_grad():
            other.get_parameter("scale").copy_(q.get_parameter("scale") * factor)
        assert bool((own <= (other(x) - x).square().mean((0, 2, 3)) * 1.05).all())
    shared = create_quantizer(TensorSpec(bit_width=(3, 5), signed=False, quantizer=name), PROBS)
    observer = shared.create_observer()
    observer.observe(x)
    shared.initialize(observer)
    assert shared.get_parameter("scale").shape == (1,)


def test_a_scale_for_every_width() -> None:
    x = probabilities()
    spec = TensorSpec(
        bit_width=3, signed=False, granularity=PerHead(), quantizer="log2", options={"switchable_scale": True}
    )
    bank = create_quantizer(spec, PROBS)
    for bits in (3, 6):
        single = create_quantizer(
            TensorSpec(bit_width=bits, signed=False, granularity=PerHead(), quantizer="log2"), PROBS
        )
        for q in (bank, single):
            observer = q.create_observer()
            observer.observe(x)
            q.initialize(observer)
        bank.freeze(bits)
        assert torch.equal(bank(x), single(x)) and torch.equal(bank.to_int(x), single.to_int(x))


def test_small_probabilities_keep_their_relative_size() -> None:
    x = probabilities(sharpness=4.0)
    errors = {}
    for name in ("lsq", *NAMES):
        q = create_quantizer(TensorSpec(bit_width=4, signed=False, quantizer=name), PROBS)
        observer = q.create_observer()
        observer.observe(x)
        q.initialize(observer)
        small = x < 0.02
        errors[name] = float(((q(x).detach() - x)[small] / x[small].mean()).square().mean())
    assert errors["log2"] < 0.5 * errors["lsq"] and errors["log-sqrt2"] < 0.5 * errors["lsq"]


@pytest.mark.parametrize("changes", [{"signed": True}, {"symmetric": False}, {"learn_bit_width": True}])
def test_what_it_refuses(changes: dict[str, object]) -> None:
    with pytest.raises(UsageError, match="log2"):
        create_quantizer(TensorSpec(signed=False, quantizer="log2").changed(changes), PROBS)


@pytest.mark.parametrize("name", NAMES)
def test_in_a_model(name: str) -> None:
    plan = QuantPlan.preset("w4a4").with_rules(Rule("*.probs", {"quantizer": name}))
    model = calibrate(quantize(digits_model(), plan), digit_batches())
    assert stage_of(freeze(model)) is Stage.FROZEN
    resolved, uniform = plan_of(model), plan_of(calibrated_model())
    cost = inspect_model(model)
    assert cost.bit_operations(resolved.widths()) == cost.bit_operations(uniform.widths())
    again = quantize(digits_model(), QuantPlan.from_json(resolved.to_json()))
    again.load_state_dict(model.state_dict())
    images = digit_batches()[0]
    assert torch.equal(again(images), model(images))
    assert not torch.equal(model(images), calibrated_model()(images))
