"""The arithmetic of the engine `torch` against the reference: equal bit for bit, whichever unit multiplies."""

from __future__ import annotations

import shutil
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from integer_models import FAMILIES, float_model, frozen
from test_integer import mixed, patchwise, plans
from tiny_models import calibrated_model, digit_batches, shake
from torch import Tensor, nn

from qvit.deploy.integer import torch as torch_integer
from qvit.deploy.integer.arithmetic import Arithmetic, Grid, Operand, exact_product
from qvit.deploy.integer.reference import IntegerLinear, integer_form
from qvit.deploy.integer.torch import EXACT_BELOW, TorchArithmetic
from qvit.deploy.packages import cxx
from qvit.methods.pmq import Split
from qvit.methods.ptq.stages import ptq
from qvit.models.calibrate import calibrate
from qvit.models.convert import freeze, quantize
from qvit.plan.quant_plan import QuantPlan, Rule
from qvit.plan.spec import Layout, TensorSpec
from qvit.quantizers import create_quantizer


def equal(model: nn.Module, images: Tensor) -> None:
    """Both units answer like the reference, bit for bit."""
    with torch.no_grad():
        expected = integer_form(model)(images)
        for int8 in (False, True):
            assert torch.equal(integer_form(model, TorchArithmetic(int8=int8))(images), expected), int8


@pytest.mark.parametrize("plan", ["w8a8", "w3a3", "mixed"])
@pytest.mark.parametrize("name", FAMILIES)
def test_all_families(name: str, plan: str) -> None:
    equal(*frozen(name, mixed(name) if plan == "mixed" else plan))


@settings(max_examples=15)
@given(plan=plans())
def test_plans_of_all_kinds(plan: QuantPlan) -> None:
    torch.manual_seed(0)
    equal(freeze(calibrated_model(plan)), digit_batches(1, 4)[0])


@pytest.mark.parametrize("name", ["vit", "swin"])
def test_groups_of_tokens(name: str) -> None:
    equal(*patchwise(name, Split(5, 3, 0.5)))


def test_groups_of_tokens_in_some_heads() -> None:
    equal(*patchwise("vit", Split(5, 3, 0.5), heads=(3, 5)))


def test_simulated_products_and_rectified_queries() -> None:
    model, images = frozen("vit")
    equal(ptq(float_model("vit")[0], "w4a4", [images]), images)
    equal(*frozen("vit", QuantPlan.preset("w4a4").with_rules(Rule("*.attn.query", {"quantizer": "irm"}))))


def grid_of(bits: int = 8, *, signed: bool = True, scale: float = 0.5) -> Grid:
    quantizer: Any = create_quantizer(TensorSpec(bit_width=bits, signed=signed), Layout(channels=(1,)))
    quantizer.scale.data.fill_(scale)
    quantizer.calibrated = True
    return Grid(quantizer)


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("int8", [True, False])
@pytest.mark.parametrize("length", [8, 256, 3000])
def test_codes_at_their_limits(length: int, int8: bool, signed: bool) -> None:
    """All products at their largest: beyond 2^24 float32 is left for float64, and both round the sum once."""
    grid, x = grid_of(signed=signed), torch.full((3, length), 1e6)
    x[1] = -1e6
    x[2, ::2] = 0.3
    quantizer: Any = grid.quantizer
    results = []
    for weight in (torch.full((5, length), 127), torch.full((5, length), -128)):
        weight[4, 0] = 1
        for arithmetic in (Arithmetic(), TorchArithmetic(int8=int8)):
            layer = IntegerLinear(weight, torch.full((1, 5), 0.7), None, torch.randn(5) * 0, quantizer, arithmetic)
            results.append(layer(x))
        if isinstance(arithmetic, TorchArithmetic):
            limit = (128 if signed else 255) * int(weight.abs().sum(1).max())
            assert layer.grid.unit == ("int8" if int8 else "float32" if limit < EXACT_BELOW else "float64")
        assert torch.equal(*results[-2:])
        expected = (quantizer.to_int(x).double() @ weight.double().t()).float() * (grid.scale * 0.7)
        assert torch.equal(results[-1], expected)


@pytest.mark.parametrize("signed", [(True, True), (False, True), (False, False)])
@pytest.mark.parametrize("tokens", [257, 258, 300, 514, 515, 1100])
def test_products_of_many_tokens(tokens: int, signed: tuple[bool, bool]) -> None:
    """Weighted sums of so many values pass 2^24: at 515 tokens, and at 259 if both grids are unsigned."""
    arithmetic, x = TorchArithmetic(), torch.full((1, 2, 2, tokens), 1e6)
    grids = tuple(grid_of(signed=own) for own in signed)
    arithmetic.prepare(grids)
    y = torch.full((1, 2, tokens, 3), 1e6)
    y[..., 0] = -1e6
    y[..., ::2, 1] = 0.4
    left, right = (arithmetic.encode(grid, t) for grid, t in zip(grids, (x, y), strict=True))
    own = Arithmetic()
    expected = own.matmul(*(own.encode(grid, t) for grid, t in zip(grids, (x, y), strict=True)), 1.0)
    assert torch.equal(arithmetic.matmul(left, right, 1.0), expected)
    assert torch.equal(exact_product(left.codes, right.codes) * (left.scale * right.scale), expected)


@given(
    st.integers(2, 8), st.booleans(), st.floats(1e-6, 1e3),
    st.lists(st.floats(-1e5, 1e5, width=32), min_size=1, max_size=40),
)  # fmt: skip
def test_rounding_is_that_of_the_reference(bits: int, signed: bool, scale: float, values: list[float]) -> None:
    """Also on the edges between two integers, and next to them."""
    grid = grid_of(bits, signed=signed, scale=scale)
    halves = torch.arange(-300, 300) * grid.scale / 2
    x = torch.cat([torch.tensor(values), halves, torch.nextafter(halves, torch.tensor(1e9))])
    for unit in ("float32", "float64", "int8"):
        grid.unit = unit
        codes = TorchArithmetic().encode(grid, x).codes
        assert codes.dtype == {"float32": torch.float32, "float64": torch.float64}.get(
            unit, torch.int8 if signed else torch.uint8
        )
        assert torch.equal(codes.to(torch.int32), Arithmetic().encode(grid, x).codes)


def test_int8_is_taken_where_the_processor_has_dot_products(monkeypatch: pytest.MonkeyPatch) -> None:
    for capabilities, expected in (({"avx2": True}, False), ({"avx512_vnni": True}, True), ({"amx_int8": True}, True)):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda found=capabilities: found, raising=False)
        torch_integer.has_int8_dot_products.cache_clear()
        assert TorchArithmetic().int8 is expected and TorchArithmetic(int8=not expected).int8 is not expected
    torch_integer.has_int8_dot_products.cache_clear()


@pytest.mark.parametrize(("signed", "largest"), [(True, 4), (False, 7)])
def test_an_operand_knows_its_largest_code(signed: bool, largest: int) -> None:
    grid, arithmetic = grid_of(3, signed=signed), TorchArithmetic()
    arithmetic.prepare((grid,))
    found = arithmetic.encode(grid, torch.randn(4))
    assert isinstance(found, Operand) and found.largest == largest


@pytest.mark.slow
@pytest.mark.skipif(shutil.which(cxx()[0]) is None, reason="no C++ compiler")
@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("name", ["vit", "swin"])
def test_compiled(name: str, int8: bool) -> None:
    """Compiled glue has other last digits; the sums are the same."""
    model, images = frozen(name, "w8a8")
    form = integer_form(model, TorchArithmetic(int8=int8))
    torch._dynamo.reset()
    with torch.no_grad():
        expected, found = form(images), torch.compile(form, fullgraph=True)(images)
    apart = (found - expected).abs().amax(1) / expected.abs().max()
    assert int((apart > 1e-5).sum()) <= 2 and float(apart.max()) < 0.1, apart
    torch._dynamo.reset()


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["vit", "swin", "sapiens2"])
def test_on_a_gpu(name: str) -> None:
    """The reference multiplies in float64 there. Both arithmetics are equal; the glue's digits are the GPU's."""
    model, images = frozen(name)
    forms = [integer_form(model, arithmetic).cuda() for arithmetic in (None, TorchArithmetic())]
    with torch.no_grad():
        found = [form(images.cuda()).cpu() for form in forms]
        expected = integer_form(model)(images)
    assert torch.equal(*found)
    apart = (found[0] - expected).abs().amax(1) / expected.abs().max()
    assert int((apart > 1e-4).sum()) <= 2, apart


def test_a_shaken_model_is_no_special_case() -> None:
    """Weights of one sign: the largest sums that a layer of this length can have."""
    model, images = float_model("vit")[0], digit_batches(1, 8)[0]
    with torch.no_grad():
        for parameter in shake(model).parameters():
            parameter.abs_()
    equal(freeze(calibrate(quantize(model, "w8a8"), [images]).eval()), images)
