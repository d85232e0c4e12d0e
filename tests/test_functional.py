"""Quantization maths against formulas written a second time in numpy, and against finite differences."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from qvit.functional import (
    SMALLEST_SCALE,
    clamp_inward,
    dequantize,
    fake_quantize,
    integer_range,
    pick_column,
    quantize,
    round_ste,
    scale_gradient,
    switchable_fake_quantize,
)
from qvit.kernels.fake_quantize import FakeQuantize

WIDTHS = range(2, 9)
CANDIDATES = torch.arange(2.0, 9.0)
LIMITS = (2, 8)


@dataclass(frozen=True)
class Axes:
    """A tensor with the shapes of its scales and widths."""

    x: tuple[int, ...]
    scale: tuple[int, ...] = ()
    width: tuple[int, ...] = ()

    @property
    def groups(self) -> tuple[int, ...]:
        return tuple(torch.broadcast_shapes(self.scale, self.width))

    @property
    def elements(self) -> int:
        """Elements that share a scale and a width."""
        return math.prod(self.x) // math.prod(self.groups)


AXES = {
    "activation, per tensor": Axes((2, 5, 8)),
    "activation, per channel": Axes((2, 5, 8), (8,)),
    "heads, per head": Axes((2, 3, 5, 4), (3, 1, 1), (3, 1, 1)),
    "heads, one scale, width per head": Axes((2, 3, 5, 4), (), (3, 1, 1)),
    "heads, one width, scale per head": Axes((2, 3, 5, 4), (3, 1, 1)),
    "heads, scale per channel, width per head": Axes((2, 3, 5, 4), (3, 1, 4), (3, 1, 1)),
    "one head": Axes((2, 1, 5, 4), (1, 1, 1), (1, 1, 1)),
    "weight, per channel": Axes((6, 7), (6, 1)),
    "convolution, per channel": Axes((6, 3, 2, 2), (6, 1, 1, 1)),
    "qkv rows, per head": Axes((3, 4, 5), (3, 1, 1), (3, 1, 1)),
    "qkv rows, per channel": Axes((3, 4, 5), (3, 4, 1), (3, 1, 1)),
    "proj columns, per head": Axes((6, 3, 4), (3, 1), (3, 1)),
    "proj columns, per channel": Axes((6, 3, 4), (6, 1, 1), (3, 1)),
}
GRIDS = {"signed": (True, False), "unsigned": (False, False), "offset": (False, True)}
axes_and_grids = pytest.mark.parametrize(
    ("axes", "signed", "with_offset"),
    [pytest.param(axes, *grid, id=f"{name}-{kind}") for name, axes in AXES.items() for kind, grid in GRIDS.items()],
)


@dataclass
class Case:
    """Operands of one random quantization; banks hold one column per candidate width."""

    x: Tensor
    scales: Tensor
    offsets: Tensor | None
    width: Tensor
    signed: bool
    elements: int
    upstream: Tensor

    def leaves(self) -> list[Tensor]:
        found = [self.x, self.scales, self.width]
        return found if self.offsets is None else [*found, self.offsets]


def random_case(
    axes: Axes,
    signed: bool,
    with_offset: bool,
    *,
    dtype: torch.dtype = torch.float64,
    columns: int = 7,
    seed: int = 0,
    integer_widths: bool = False,
) -> Case:
    """Values of which a good part is clipped, on both sides, for every width that was drawn."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(shape: tuple[int, ...], low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(shape, generator=generator, dtype=dtype)

    width = uniform(axes.width, 1.6, 8.4)
    width = width.clamp(2, 8).round() if integer_widths else width
    bank = (*axes.scale, columns)
    reach = torch.exp2(CANDIDATES.to(dtype) - 1) if columns == 7 else torch.tensor([8.0], dtype=dtype)
    scales = uniform(bank, 0.7, 1.3) / reach
    offsets = uniform(bank, -1.5, -0.5) if with_offset else None
    x = 1.5 * torch.randn(axes.x, generator=generator, dtype=dtype)
    upstream = torch.randn(axes.x, generator=generator, dtype=dtype)
    return Case(x, scales, offsets, width, signed, axes.elements, upstream)


def run(function, case: Case, limits: tuple[int, int] | None = LIMITS) -> tuple[Tensor, list[Tensor | None]]:
    """The output of `FakeQuantize.apply` or its reference, and the gradients of x, scales, width and offsets."""
    leaves = [leaf.clone().requires_grad_() for leaf in case.leaves()]
    x, scales, width = leaves[:3]
    offsets = leaves[3] if case.offsets is not None else None
    candidates = CANDIDATES if scales.shape[-1] > 1 else torch.zeros(0)
    out = function(x, scales, offsets, width, candidates, limits, case.signed, case.elements)
    (out.double() * case.upstream.double()).sum().backward()
    return out.detach(), [leaf.grad for leaf in leaves]


def numpy_range(bits: np.ndarray, signed: bool) -> tuple[np.ndarray, np.ndarray]:
    if signed:
        return -(2.0 ** (bits - 1)), 2.0 ** (bits - 1) - 1
    return np.zeros_like(bits), 2.0**bits - 1


def numpy_column(bank: np.ndarray, bits: np.ndarray) -> np.ndarray:
    """The entries of a bank of seven columns that belong to integer widths, by indexing."""
    bits = np.broadcast_to(bits, np.broadcast_shapes(bank.shape[:-1], bits.shape))
    bank = np.broadcast_to(bank, (*bits.shape, bank.shape[-1]))
    return np.take_along_axis(bank, (bits.astype(int) - 2)[..., None], -1)[..., 0]


def numpy_sum_to(full: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Sums over the axes along which `shape` was broadcast."""
    full = full.sum(axis=tuple(range(full.ndim - len(shape))))
    axes = tuple(axis for axis, size in enumerate(shape) if size == 1)
    return full.sum(axis=axes, keepdims=True) if axes else full


# ---- Rounding, ranges, integers ----


def test_rounds_half_to_even_and_passes_the_gradient() -> None:
    x = torch.tensor([-2.5, -1.5, -0.5, 0.49, 0.5, 1.5, 2.5, 3.5], requires_grad=True)
    rounded = round_ste(x)
    rounded.backward(torch.arange(8.0))
    assert rounded.tolist() == [-2, -2, 0, 0, 0, 2, 2, 4]
    assert x.grad is not None and torch.equal(x.grad, torch.arange(8.0))


def test_scale_gradient_is_the_identity_with_another_gradient() -> None:
    x = torch.randn(5, requires_grad=True)
    out = scale_gradient(x, 0.125)
    out.sum().backward()
    assert torch.equal(out, x)
    assert x.grad is not None and torch.equal(x.grad, torch.full((5,), 0.125))


@pytest.mark.parametrize(
    ("bits", "signed", "expected"),
    [
        (1, False, (0, 1)),
        (2, True, (-2, 1)),
        (2, False, (0, 3)),
        (4, True, (-8, 7)),
        (8, True, (-128, 127)),
        (8, False, (0, 255)),
    ],
)
def test_integer_range(bits: int, signed: bool, expected: tuple[int, int]) -> None:
    assert integer_range(bits, signed) == expected
    low, high = integer_range(torch.tensor([float(bits)]), signed)
    assert (low.tolist(), high.tolist()) == ([expected[0]], [expected[1]])


def test_integers_worked_out_by_hand() -> None:
    x = torch.tensor([-10.0, -0.9, -0.25, 0.0, 0.24, 0.26, 0.75, 1.3, 9.0])
    scale = torch.tensor(0.5)
    q = quantize(x, scale, 3, signed=True)
    assert q.dtype == torch.int32
    assert q.tolist() == [-4, -2, 0, 0, 0, 1, 2, 3, 3]  # -0.5 → 0 and 1.5 → 2: half to even
    assert dequantize(q, scale).tolist() == [-2.0, -1.0, 0.0, 0.0, 0.0, 0.5, 1.0, 1.5, 1.5]
    assert quantize(x, scale, 3, signed=False).tolist() == [0, 0, 0, 0, 0, 1, 2, 3, 7]
    offset = torch.tensor(-1.0)
    q = quantize(x, scale, torch.tensor(3.0), signed=False, offset=offset)
    assert q.tolist() == [0, 0, 2, 2, 2, 3, 4, 5, 7]
    assert dequantize(q, scale, offset).tolist() == [-1.0, -1.0, 0.0, 0.0, 0.0, 0.5, 1.0, 1.5, 2.5]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_dtype_of_the_input_is_kept_and_half_precision_computes_in_float32(dtype: torch.dtype) -> None:
    x = torch.linspace(-1.2, 1.2, 257).to(dtype)
    scale, width = torch.tensor([0.0079]), torch.tensor(8.0)
    reference = fake_quantize(x, scale[0], width, True)
    fast = FakeQuantize.apply(x, scale, None, width, torch.zeros(0), None, True, 1)
    assert reference.dtype == fast.dtype == dtype
    assert torch.equal(reference, fast)
    wide = x.double() if dtype == torch.float64 else x.float()
    exact = dequantize(quantize(wide, scale[0], 8, True), scale[0].to(wide.dtype))
    assert torch.equal(fast, exact.to(dtype))


def test_half_precision_gradients_have_the_dtype_of_their_leaf() -> None:
    x = torch.randn(4, 6, dtype=torch.bfloat16, requires_grad=True)
    scales = torch.tensor([0.1], requires_grad=True)
    width = torch.tensor(3.0, requires_grad=True)
    out = FakeQuantize.apply(x, scales, None, width, torch.zeros(0), LIMITS, True, 24)
    out.sum().backward()
    assert [leaf.grad.dtype for leaf in (x, scales, width)] == [torch.bfloat16, torch.float32, torch.float32]


# ---- Properties of the grid ----

finite_scales = st.floats(1e-4, 1e2)
offsets = st.floats(-4, 4)


@given(
    bits=st.sampled_from(WIDTHS),
    signed=st.booleans(),
    scale=finite_scales,
    shift=st.one_of(st.none(), offsets),
    values=st.lists(st.floats(-300, 300), min_size=1, max_size=40),
)
def test_grid_properties(bits: int, signed: bool, scale: float, shift: float | None, values: list[float]) -> None:
    """Grid points are fixed points, quantizing twice changes nothing, and the error inside the range is half a step."""
    step = torch.tensor(scale, dtype=torch.float64)
    offset = None if shift is None else torch.tensor(shift, dtype=torch.float64) * step
    width = torch.tensor(float(bits), dtype=torch.float64)
    low, high = integer_range(bits, signed)

    def fq(x: Tensor) -> Tensor:
        return fake_quantize(x, step, width, signed, offset)

    integers = torch.arange(low, high + 1, dtype=torch.int32)
    points = dequantize(integers, step, offset)
    assert torch.equal(fq(points), points)
    assert torch.equal(quantize(points, step, bits, signed, offset), integers)

    x = torch.tensor(values, dtype=torch.float64) * step
    once = fq(x)
    assert torch.equal(fq(once), once)
    assert torch.equal(once, dequantize(quantize(x, step, bits, signed, offset), step, offset))
    inside = (x >= points[0]) & (x <= points[-1])
    bound = step / 2 + 1e-12 * (x.abs() + step)
    assert ((x - once).abs() <= bound)[inside].all()
    assert torch.equal(once[x > points[-1]], points[-1].expand(int((x > points[-1]).sum())))
    assert torch.equal(once[x < points[0]], points[0].expand(int((x < points[0]).sum())))


@given(bits=st.sampled_from(WIDTHS), signed=st.booleans(), values=st.lists(st.floats(-50, 50), min_size=2, max_size=30))
def test_quantization_is_monotone(bits: int, signed: bool, values: list[float]) -> None:
    x = torch.tensor(sorted(values))
    out = fake_quantize(x, torch.tensor(0.37), torch.tensor(float(bits)), signed)
    assert (out.diff() >= 0).all()


@axes_and_grids
def test_values_of_all_granularities(axes: Axes, signed: bool, with_offset: bool) -> None:
    case = random_case(axes, signed, with_offset, dtype=torch.float32, integer_widths=True)
    out, _ = run(FakeQuantize.apply, case, None)
    bits = case.width.numpy()
    scale = numpy_column(case.scales.numpy(), bits)
    offset = 0 if case.offsets is None else numpy_column(case.offsets.numpy(), bits)
    low, high = numpy_range(bits, signed)
    expected = np.rint(np.clip((case.x.numpy() - offset) / scale, low, high)) * scale + offset
    np.testing.assert_array_equal(out.numpy(), expected.astype(np.float32))


# ---- Gradients against formulas ----


def closed_form(case: Case) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray | None]:
    """Gradients of x, scales, width and offsets of a signed or unsigned grid, element by element, in numpy."""
    x, g = case.x.double().numpy(), case.upstream.double().numpy()
    real = case.width.double().numpy()
    bits = np.rint(np.clip(real, 2, 8))
    s = numpy_column(case.scales.double().numpy(), bits)
    beta = 0.0 if case.offsets is None else numpy_column(case.offsets.double().numpy(), bits)
    low, high = numpy_range(bits, case.signed)
    u = (x - beta) / s
    above, below = u > high, u < low
    inside = ~above & ~below
    factor = 1 / np.sqrt(case.elements * np.broadcast_to(high, np.broadcast_shapes(s.shape, high.shape)))
    to_scale = g * factor * np.where(above, high, np.where(below, low, np.rint(u) - u))
    levels = 2.0 ** (bits - 1) if case.signed else 2.0**bits
    to_width = g * s * math.log(2) * levels * (above.astype(float) - (below if case.signed else 0.0))
    column = np.arange(2, 9) == np.broadcast_to(bits, x.shape)[..., None]
    grad_scales = numpy_sum_to(to_scale[..., None] * column, tuple(case.scales.shape))
    grad_width = numpy_sum_to(to_width, tuple(case.width.shape))
    grad_offsets = None
    if case.offsets is not None:
        grad_offsets = numpy_sum_to((g * ~inside)[..., None] * column, tuple(case.offsets.shape))
    return g * inside, grad_scales, grad_width, grad_offsets


@pytest.mark.parametrize("function", [switchable_fake_quantize, FakeQuantize.apply], ids=["autograd", "by hand"])
@axes_and_grids
def test_gradients_are_the_closed_forms(function, axes: Axes, signed: bool, with_offset: bool) -> None:
    case = random_case(axes, signed, with_offset, seed=3)
    _, gradients = run(function, case)
    for found, expected in zip(gradients, closed_form(case), strict=False):
        assert found is not None and expected is not None
        assert found.shape == expected.shape
        np.testing.assert_allclose(found.numpy(), expected, rtol=1e-9, atol=1e-12)
    assert len(gradients) == (4 if with_offset else 3)


def surrogate(case: Case, x: np.ndarray, scale: np.ndarray, offset: np.ndarray, bits: np.ndarray) -> np.ndarray:
    """What straight-through means: the rounding residual and which elements are clipped stay as they are at the case's
    own values, everything else may move. Its ordinary derivative is the gradient that training uses.
    """
    own = case.width.numpy()
    s, b = case.scales.numpy()[..., 0], 0.0 if case.offsets is None else case.offsets.numpy()[..., 0]
    low, high = numpy_range(own, case.signed)
    u = (case.x.numpy() - b) / s
    clamped = np.clip(u, low, high)
    residual = np.rint(clamped) - clamped
    low, high = numpy_range(bits, case.signed)
    now = np.where(u > clamped, high, np.where(u < clamped, low, (x - offset) / scale))
    return scale * (now + residual) + offset


@axes_and_grids
def test_gradients_match_finite_differences(axes: Axes, signed: bool, with_offset: bool) -> None:
    case = random_case(axes, signed, with_offset, columns=1, seed=5, integer_widths=True)
    case.width.clamp_(3, 7)
    out, gradients = run(FakeQuantize.apply, case)
    high = numpy_range(case.width.numpy(), signed)[1]
    start = {
        "x": case.x.numpy(),
        "scale": case.scales.numpy()[..., 0],
        "offset": np.zeros(()) if case.offsets is None else case.offsets.numpy()[..., 0],
        "bits": case.width.numpy(),
    }
    np.testing.assert_allclose(surrogate(case, *start.values()), out.numpy(), rtol=1e-12, atol=1e-12)

    def slope(name: str, index: tuple[int, ...]) -> np.ndarray:
        """∂ out / ∂ start[name][index], by element of the output, times the upstream gradient."""
        moved = []
        for step in (1e-5, -1e-5):
            values = {key: value.copy() for key, value in start.items()}
            values[name][index] += step
            moved.append(surrogate(case, *values.values()))
        return (moved[0] - moved[1]) / 2e-5 * case.upstream.numpy()

    names = ["x", "scale", "bits", "offset"] if with_offset else ["x", "scale", "bits"]
    for name, found in zip(names, gradients, strict=True):
        assert found is not None
        flat = found.numpy().reshape(start[name].shape)
        indices = list(np.ndindex(start[name].shape))
        for index in indices[:: max(1, len(indices) // 12)]:
            each = slope(name, index)
            if name == "scale":
                each = each / np.sqrt(case.elements * np.broadcast_to(high, case.x.shape))
            assert flat[index] == pytest.approx(each.sum(), rel=1e-6, abs=1e-7), (name, index)


def test_lsq_factor_by_hand() -> None:
    """Two of four elements above a signed 3-bit grid: ∂s = 1/sqrt(4·3) · (3 + 3 + (round(u) - u))."""
    x = torch.tensor([1.0, 9.0, 9.0, 0.6], dtype=torch.float64)
    scale = torch.tensor([0.5], dtype=torch.float64, requires_grad=True)
    width = torch.tensor(3.0, dtype=torch.float64, requires_grad=True)
    FakeQuantize.apply(x, scale, None, width, torch.zeros(0), LIMITS, True, 4).sum().backward()
    assert scale.grad is not None and width.grad is not None
    assert scale.grad.item() == pytest.approx((3 + 3 + 0.0 + (1 - 1.2)) / math.sqrt(12), rel=1e-12)
    assert width.grad.item() == pytest.approx(2 * 0.5 * math.log(2) * 4, rel=1e-12)


@pytest.mark.parametrize("signed", [True, False])
def test_width_feels_nothing_where_nothing_clips(signed: bool) -> None:
    x = torch.rand(40) if not signed else torch.rand(40) - 0.5
    for function in (FakeQuantize.apply, switchable_fake_quantize):
        width = torch.tensor(4.0, requires_grad=True)
        scales = torch.tensor([0.5], requires_grad=True)
        out = function(x, scales, None, width, torch.zeros(0), LIMITS, signed, 40)
        (out * torch.randn(40)).sum().backward()
        assert width.grad is not None and width.grad.item() == 0.0
        assert scales.grad is not None and scales.grad.item() != 0.0


# ---- The hand-written derivative against autograd ----


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("columns", [7, 1], ids=["switchable", "one scale"])
@axes_and_grids
def test_by_hand_equals_autograd(axes: Axes, signed: bool, with_offset: bool, columns: int, dtype: torch.dtype) -> None:
    tolerance = {"rtol": 1e-10, "atol": 1e-12} if dtype == torch.float64 else {"rtol": 2e-4, "atol": 2e-5}
    for seed in range(4):
        case = random_case(axes, signed, with_offset, dtype=dtype, columns=columns, seed=seed)
        fast, fast_gradients = run(FakeQuantize.apply, case)
        reference, gradients = run(switchable_fake_quantize, case)
        assert torch.equal(fast, reference)
        for found, expected in zip(fast_gradients, gradients, strict=True):
            torch.testing.assert_close(found, expected, **tolerance)
        assert all(leaf is not None and leaf.dtype == dtype for leaf in fast_gradients)


@given(
    rows=st.integers(1, 4),
    heads=st.integers(1, 4),
    columns=st.integers(1, 5),
    seed=st.integers(0, 10_000),
    shared=st.booleans(),
    kind=st.sampled_from(list(GRIDS)),
)
def test_by_hand_equals_autograd_for_any_shape(
    rows: int, heads: int, columns: int, seed: int, shared: bool, kind: str
) -> None:
    axes = Axes((rows, heads, columns, 2), () if shared else (heads, 1, 1), (heads, 1, 1))
    case = random_case(axes, *GRIDS[kind], seed=seed)
    fast, fast_gradients = run(FakeQuantize.apply, case)
    reference, gradients = run(switchable_fake_quantize, case)
    assert torch.equal(fast, reference)
    for found, expected in zip(fast_gradients, gradients, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)


def test_elements_on_a_limit_and_beyond_it_agree_with_autograd() -> None:
    """On the limit itself the gradient passes; one step beyond it does not."""
    edge = 3 * 0.5
    x = torch.tensor([edge, math.nextafter(edge, 9.0), -2.0, math.nextafter(-2.0, -9.0)], dtype=torch.float64)
    for function in (FakeQuantize.apply, switchable_fake_quantize):
        leaf = x.clone().requires_grad_()
        scales, width = torch.tensor([0.5], dtype=torch.float64), torch.tensor(3.0, dtype=torch.float64)
        function(leaf, scales, None, width, torch.zeros(0), None, True, 4).sum().backward()
        assert leaf.grad is not None and leaf.grad.tolist() == [1.0, 0.0, 1.0, 0.0]


def test_a_fixed_width_gets_no_gradient() -> None:
    case = random_case(AXES["heads, per head"], True, False, integer_widths=True)
    _, gradients = run(FakeQuantize.apply, case, None)
    assert gradients[2] is None
    assert gradients[1] is not None and gradients[1].abs().sum() > 0


def test_the_factor_of_lsq_can_be_left_out() -> None:
    case = random_case(AXES["weight, per channel"], True, False, columns=1, integer_widths=True)
    with_factor = run(FakeQuantize.apply, case, None)[1][1]
    case.elements = None  # type: ignore[assignment]
    without = run(FakeQuantize.apply, case, None)[1][1]
    reference = run(switchable_fake_quantize, case, None)[1][1]
    assert with_factor is not None and without is not None
    torch.testing.assert_close(without, reference)
    quant_max = 2 ** (float(case.width) - 1) - 1
    torch.testing.assert_close(with_factor, without / math.sqrt(7 * quant_max))


def test_a_collapsed_scale_is_used_at_the_smallest_allowed_value() -> None:
    x = torch.tensor([-1.0, 0.0, 1.0])
    for scale in (0.0, 1e-12, -1.0):
        out = FakeQuantize.apply(x, torch.tensor([scale]), None, torch.tensor(8.0), torch.zeros(0), None, True, 3)
        torch.testing.assert_close(out, torch.tensor([-128.0, 0.0, 127.0]) * SMALLEST_SCALE, rtol=1e-6, atol=0)


# ---- Switchable scales ----


def test_each_width_uses_its_own_column() -> None:
    bank = torch.tensor([2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0]) / 100
    for bits in WIDTHS:
        assert pick_column(bank, torch.tensor(float(bits)), CANDIDATES).item() == pytest.approx(bits / 100)
    per_head = pick_column(bank.expand(3, 1, 1, 7), torch.tensor([8.0, 2.0, 5.0]).view(3, 1, 1), CANDIDATES)
    torch.testing.assert_close(per_head, torch.tensor([0.08, 0.02, 0.05]).view(3, 1, 1))
    shared = pick_column(bank, torch.tensor([4.0, 4.0, 3.0]).view(3, 1), CANDIDATES)
    torch.testing.assert_close(shared, torch.tensor([0.04, 0.04, 0.03]).view(3, 1))


@axes_and_grids
def test_only_the_column_in_use_gets_a_gradient(axes: Axes, signed: bool, with_offset: bool) -> None:
    case = random_case(axes, signed, with_offset, dtype=torch.float32, seed=9)
    case.offsets = torch.full_like(case.scales, 0.1) if with_offset else None
    _, gradients = run(FakeQuantize.apply, case)
    own = np.rint(np.clip(case.width.numpy(), 2, 8))
    in_use = np.broadcast_to(own, axes.x)[..., None] == np.arange(2, 9)
    used = torch.from_numpy(numpy_sum_to(in_use, tuple(case.scales.shape)) > 0)
    assert used.any() and not used.all()
    for gradient in [gradients[1], *gradients[3:]]:
        assert gradient is not None
        assert (gradient[~used] == 0).all()
        assert (gradient[used] != 0).any()


@pytest.mark.parametrize("function", [switchable_fake_quantize, FakeQuantize.apply], ids=["autograd", "by hand"])
def test_other_columns_do_not_matter_even_if_they_are_huge(function) -> None:
    x, width = torch.randn(50), torch.tensor(4.0)
    bank = torch.full((7,), 0.2)
    wild = torch.full((7,), 1e30)
    wild[2] = 0.2
    assert torch.equal(
        function(x, bank, None, width, CANDIDATES, LIMITS, True, 50),
        function(x, wild, None, width, CANDIDATES, LIMITS, True, 50),
    )


# ---- Limits of a learned width ----


@pytest.mark.parametrize(
    ("width", "gradient", "passes"),
    [
        (5.0, 1.0, True),
        (5.0, -1.0, True),
        (8.0, -1.0, False),  # descent would raise it beyond 8
        (8.0, 1.0, True),
        (8.7, -1.0, False),
        (8.7, 1.0, True),  # overshot, and on its way back
        (2.0, 1.0, False),
        (2.0, -1.0, True),
        (1.2, 1.0, False),
        (1.2, -1.0, True),
    ],
)
def test_gradient_at_the_limits_leads_inward_only(width: float, gradient: float, passes: bool) -> None:
    leaf = torch.tensor([width], requires_grad=True)
    out = clamp_inward(leaf, 2, 8)
    out.backward(torch.tensor([gradient]))
    assert out.item() == min(max(width, 2.0), 8.0)
    assert leaf.grad is not None and leaf.grad.item() == pytest.approx(gradient if passes else 0.0)
    assert leaf.item() == pytest.approx(width)  # forward projects nothing


@pytest.mark.parametrize("function", [switchable_fake_quantize, FakeQuantize.apply], ids=["autograd", "by hand"])
@pytest.mark.parametrize("width", [1.3, 2.0, 8.0, 8.9])
@pytest.mark.parametrize("towards_more", [True, False])
def test_width_of_a_quantizer_at_its_limits(function, width: float, towards_more: bool) -> None:
    """Everything is clipped from above, so ∂x̂/∂b > 0: a negative upstream gradient asks for more bits.

    It counts at a limit as anywhere else: another part of the batch may ask for the opposite.
    """
    leaf = torch.tensor(width, requires_grad=True)
    out = function(torch.full((6,), 1e3), torch.ones(7), None, leaf, CANDIDATES, LIMITS, True, 6)
    (out.sum() * (-1.0 if towards_more else 1.0)).backward()
    assert out[0].item() == (127.0 if width >= 8 else 1.0)
    assert leaf.grad is not None
    levels = 2.0 ** (min(max(round(width), 2), 8) - 1)
    assert leaf.grad.item() == pytest.approx(6 * math.log(2) * levels * (-1.0 if towards_more else 1.0))


@pytest.mark.parametrize(
    ("width", "used"), [(2.4, 2), (2.5, 2), (2.51, 3), (3.5, 4), (7.49, 7), (7.5, 8), (9.0, 8), (0.0, 2)]
)
def test_widths_round_to_nearest_and_half_to_even(width: float, used: int) -> None:
    x = torch.linspace(-9, 9, 200)
    bank = 1 / torch.exp2(CANDIDATES)
    expected = fake_quantize(x, bank[used - 2], torch.tensor(float(used)), True)
    for function in (FakeQuantize.apply, switchable_fake_quantize):
        assert torch.equal(function(x, bank, None, torch.tensor(width), CANDIDATES, LIMITS, True, 200), expected)
