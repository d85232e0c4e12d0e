"""Twin grids: levels, nearest ones, the search for m, exact integers, what runs them and what refuses them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from integer_models import make_dyadic
from tiny_models import SMALL, digit_batches, digits_model
from torch import Tensor, nn

from qvit.deploy.engines import create_engine
from qvit.deploy.export.onnx import OpenVinoArithmetic, onnx_model
from qvit.deploy.file.artifact import Artifact
from qvit.deploy.integer.arithmetic import Arithmetic, exact_product
from qvit.deploy.integer.reference import integer_form, report_of
from qvit.deploy.integer.simulated import require_codes
from qvit.deploy.integer.torch import TorchArithmetic
from qvit.errors import UsageError
from qvit.methods.ptq.class_token import with_class_token
from qvit.methods.ptq.stages import ptq, ptq_plan
from qvit.models.calibrate import calibrate
from qvit.models.convert import freeze, quantize
from qvit.models.families import inspect_model
from qvit.plan.quant_plan import QuantPlan, Rule
from qvit.plan.spec import Layout, TensorSpec
from qvit.quantizers import create_quantizer, quantizers_of
from qvit.quantizers.twin import LARGEST_RATIO, TwinQuantizer

GELU = {"quantizer": "twin", "signed": True, "symmetric": True}
TWIN = QuantPlan.preset("w4a4").with_rules(Rule("*.probs", {"quantizer": "twin"}), Rule("*.fc2.input", GELU))


def made(bits: int, ratio: int, scale: float = 1.0, *, signed: bool = False) -> TwinQuantizer:
    spec = TensorSpec(bit_width=bits, signed=signed, quantizer="twin")
    quantizer = create_quantizer(spec, Layout())
    assert isinstance(quantizer, TwinQuantizer)
    with torch.no_grad():
        quantizer.scale.fill_(scale)
        quantizer.ratio.fill_(ratio)
    quantizer.calibrated = True
    return quantizer


def levels(bits: int, ratio: int, *, signed: bool) -> list[int]:
    """The integers n of all codes, from the smallest code on."""
    half = 2 ** (bits - 1)
    coarse = [2**ratio * q for q in range(half)]
    return [*range(-half, 0), *coarse] if signed else [*range(half), *coarse]


def fitted(x: Tensor, bits: int, *, signed: bool) -> TwinQuantizer:
    quantizer = made(bits, 0, signed=signed)
    observer = quantizer.create_observer()
    observer.observe(x)
    quantizer.initialize(observer)
    return quantizer


@given(
    bits=st.integers(2, 8),
    ratio=st.integers(0, LARGEST_RATIO),
    scale=st.floats(1e-4, 2.0),
    signed=st.booleans(),
    seed=st.integers(0, 99),
)
def test_values_go_to_the_nearest_level(bits: int, ratio: int, scale: float, signed: bool, seed: int) -> None:
    quantizer, table = made(bits, ratio, scale, signed=signed), torch.tensor(levels(bits, ratio, signed=signed))
    first = -(2 ** (bits - 1)) if signed else 0
    codes = torch.arange(first, first + 2**bits)
    assert torch.equal(quantizer.expanded(codes), table) and quantizer.largest_multiple() == table.abs().max()
    x = torch.randn(200, generator=torch.Generator().manual_seed(seed)) * scale * 2.0 ** torch.linspace(-2, 20, 200)
    x = x if signed else x.abs()
    q, out = quantizer.to_int(x), quantizer(x).detach()
    assert torch.equal(quantizer.from_int(q), out), "codes and forward agree, bit for bit"
    assert int(q.min()) >= first and int(q.max()) < first + 2**bits
    assert torch.equal(quantizer(out), out), "levels are fixed points"
    assert torch.equal(quantizer.multiples(x), quantizer.expanded(q))
    points = table.double() * quantizer.scale.detach().double()
    nearest = (x.double().unsqueeze(-1) - points).abs().amin(-1)
    assert bool(((x.double() - out.double()).abs() <= nearest + 1e-6 * (x.double().abs() + scale)).all())


@pytest.mark.parametrize("bits", [3, 4, 6])
def test_m_and_scale_are_those_of_least_error(bits: int) -> None:
    generator = torch.Generator().manual_seed(bits)
    probs = (3 * torch.randn(40, 60, generator=generator)).softmax(-1)
    gelu = nn.functional.gelu(1.5 * torch.randn(4000, generator=generator))
    half = 2 ** (bits - 1)
    for x, signed in ((probs, False), (gelu, True)):
        found = fitted(x, bits, signed=signed)
        error = (found(x) - x).square().mean()
        tried = [2.0 ** (-step / 8) * float(x.max()) / (half - 1) for step in range(33)] if signed else [1 / half]
        errors = {}
        for ratio in range(LARGEST_RATIO + 1):
            for coarse in tried:
                table = torch.tensor(levels(bits, ratio, signed=signed)) * coarse / 2**ratio
                errors[ratio, coarse] = (x.flatten().unsqueeze(1) - table).abs().amin(1).square().mean()
        best = min(errors.values())
        assert error <= 1.01 * best
        uniform = create_quantizer(TensorSpec(bit_width=bits, signed=signed, symmetric=True), Layout())
        observer = uniform.create_observer()
        observer.observe(x)
        uniform.initialize(observer)
        if signed or bits > 3:  # with 3 bits a fitted range does more for the few large probabilities
            assert error < (uniform(x) - x).square().mean()
        assert 0 < float(found.ratio) <= LARGEST_RATIO
        if not signed:
            assert float(found.scale.detach()) * 2 ** float(found.ratio) == 1 / half


def test_gradients_are_straight_through() -> None:
    quantizer = made(3, 2, 0.5, signed=True)  # -2 ... -0.5, 0, 2, 4, 6
    x = torch.tensor([-9.0, -1.1, 0.3, 2.6, 9.0], requires_grad=True)
    out = quantizer(x)
    assert out.tolist() == [-2.0, -1.0, 0.0, 2.0, 6.0]
    out.sum().backward()
    assert x.grad is not None and x.grad.tolist() == [0, 1, 1, 1, 0]
    assert quantizer.scale.grad is not None  # n where x is clipped, n - x/s elsewhere
    assert quantizer.scale.grad.item() == pytest.approx(-4 + 12 + (-2 + 2.2) + (0 - 0.6) + (4 - 5.2), rel=1e-5)


@pytest.mark.parametrize(
    "changes", [{"symmetric": False}, {"learn_bit_width": True, "bit_width_range": (2, 8)}, {"bit_width": 1}]
)
def test_what_a_spec_may_not_ask(changes: dict[str, Any]) -> None:
    spec = TensorSpec(bit_width=4, signed=False, quantizer="twin")
    with pytest.raises(UsageError, match="'twin' has"):
        create_quantizer(spec.changed(changes), Layout())


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return freeze(calibrate(quantize(digits_model(), TWIN), digit_batches()).eval())


@torch.no_grad()
def test_integers_equal_the_model_and_pack(model: nn.Module) -> None:
    images = digit_batches(1, 4)[0]
    exact = freeze(make_dyadic(calibrate(quantize(digits_model(), TWIN), digit_batches())).eval())
    for _, quantizer in quantizers_of(exact):
        if isinstance(quantizer, TwinQuantizer):
            quantizer.scale.mul_(2.0 ** (quantizer.ratio - 7))
            quantizer.ratio.fill_(7)
            assert quantizer.largest_multiple() == 7 * 2**7, "far more than 8 bits"
    form = integer_form(exact, Arithmetic())
    assert set(report_of(form).values()) == {None}, "all products run on integers"
    torch.testing.assert_close(form(images), exact(images), rtol=0, atol=1e-5)
    for int8 in (True, False):
        assert torch.equal(integer_form(exact, TorchArithmetic(int8=int8))(images), form(images))
    loaded = Artifact.from_model(model, model_name="vit_digits", model_kwargs=SMALL)
    assert torch.equal(loaded.model()(images), model(images))
    answers = create_engine(loaded, "reference")(images)
    torch.testing.assert_close(answers, model(images), rtol=1e-4, atol=1e-4)


def test_products_of_twin_grids_are_exact(model: nn.Module) -> None:
    """The layer behind the GELU, against float64 from levels, with sums that int32 would not hold."""
    layer: Any = integer_form(model, Arithmetic()).get_submodule("blocks.0.mlp.fc2")
    quantizer = layer.grid.quantizer
    quantizer.ratio.fill_(LARGEST_RATIO)
    x = torch.randn(3, 5, layer.weight_0.shape[1]) * 100
    n = quantizer.multiples(x).double()
    sums = n @ layer.weight_0.double().t()
    expected = sums.float() * (layer.grid.scale * layer.weight_scale[0]) + layer.bias
    assert torch.equal(layer(x), expected)
    big = torch.full((1, 2**14), 2**17, dtype=torch.int64)
    assert float(exact_product(big, torch.full((2**14, 1), 127, dtype=torch.int32))) == 127 * 2.0**31


def test_engines_that_refuse_say_where(model: nn.Module) -> None:
    artifact = Artifact.from_model(model, model_name="vit_digits", model_kwargs=SMALL)
    with pytest.raises(UsageError, match="'blocks.0.attn.probs' has a twin grid"):
        require_codes(model)
    with pytest.raises(UsageError, match="twin grid"):
        onnx_model(model, OpenVinoArithmetic(), (1, 8, 8))
    pytest.importorskip("qvit.deploy.native.library")
    with pytest.raises(UsageError, match="'twin'"):
        create_engine(artifact, "native")


def test_ptq_asks_for_them_by_name() -> None:
    float_model, images = digits_model(), digit_batches()
    plan = ptq_plan(float_model, "w4a4", probs="twin", gelu="twin")
    twins = {site for site, spec in plan.sites.items() if spec is not None and spec.quantizer == "twin"}
    assert twins == {"blocks.0.attn.probs", "blocks.0.mlp.fc2.input"}
    found = ptq(float_model, "w4a4", images, probs="twin", gelu="twin", rotate="none")
    assert torch.isfinite(found(images[0])).all()
    assert all("ratio=2^" in repr(q) for site, q in quantizers_of(found) if site in twins)


def test_a_class_token_s_width_leaves_twin_grids_alone() -> None:
    cost = inspect_model(digits_model())
    plan = with_class_token(QuantPlan.preset("w4a4").resolve(cost.sites), cost, 8)
    assert plan is not None
    site = "blocks.0.mlp.fc2.input"
    before, after = plan.sites[site], ptq_plan(digits_model(), plan, gelu="twin").sites[site]
    assert before is not None and before.widths == (8,) and before.token_bit_width is not None
    assert after is not None and after.quantizer == "twin" and after.widths == (4,) and after.token_bit_width is None
