"""Histograms that grow, and the scales found in them against a dense search on the data themselves."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

from qvit.errors import QvitError
from qvit.quantizers.observers import BINS, HistogramObserver

WIDTHS = tuple(range(2, 9))
COUNT = 6000
# Name of a distribution → whether its grid is signed where it has no offset.
SIGNED = {
    "gaussian": True,
    "laplace": True,
    "uniform": True,
    "outliers": True,
    "softmax": False,
    "gelu": True,
    "image": True,
}


def sample(name: str, count: int = COUNT, seed: int = 0) -> Tensor:
    """What tensors of a ViT look like: weights, activations with outliers, probabilities, GELU outputs, pixels."""
    generator = torch.Generator().manual_seed(seed)
    normal = torch.randn(count, generator=generator)
    if name == "laplace":
        uniform = torch.rand(count, generator=generator) - 0.5
        return -uniform.sign() * torch.log1p(-2 * uniform.abs().clamp_max(0.4999999))
    if name == "uniform":
        return 2 * torch.rand(count, generator=generator) - 1
    if name == "outliers":
        return torch.where(torch.rand(count, generator=generator) < 0.01, 8 * normal, normal)
    if name in ("softmax", "peaky softmax"):
        return (normal.view(-1, 100) * (2 if name == "softmax" else 6)).softmax(-1).flatten()
    if name == "gelu":
        return torch.nn.functional.gelu(normal)
    if name == "image":
        return (torch.rand(count, generator=generator) - 0.45) / 0.23
    return normal


def observed(*batches: Tensor, scale_shape: tuple[int, ...] = ()) -> HistogramObserver:
    observer = HistogramObserver(scale_shape)
    for batch in batches:
        observer.observe(batch)
    return observer


def squared_error(x: np.ndarray, scale: np.ndarray, offset: np.ndarray, low: int, high: int) -> np.ndarray:
    """Mean squared error of each `(scale, offset)`."""
    scale, offset = scale[:, None], offset[:, None]
    q = np.rint(np.clip((x - offset) / scale, low, high))
    return np.square(q * scale + offset - x).mean(axis=1)


def grid_limits(bits: int, signed: bool) -> tuple[int, int]:
    return (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)


def dense_search(x: np.ndarray, bits: int, signed: bool) -> float:
    """The least error of any scale: 400 of them, then 100 around each of the best five."""
    low, high = grid_limits(bits, signed)
    first = np.abs(x).max() / high * np.linspace(0.01, 1.05, 400)
    errors = squared_error(x, first, np.zeros(400), low, high)
    best = first[np.argsort(errors)[:5]]
    second = (best[:, None] + (first[1] - first[0]) * np.linspace(-1, 1, 100)).ravel()
    return min(errors.min(), squared_error(x, second, np.zeros(500), low, high).min())


def dense_search_with_offset(x: np.ndarray, bits: int) -> float:
    """The least error of any interval [β, β + s·quant_max]: pairs of quantiles and of points beyond them, and a local
    search around each of the best four.
    """
    high, span = 2**bits - 1, x.max() - x.min()
    shares = np.array([0, 0.001, 0.005, 0.01, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4])
    outside = span * np.array([-0.02, 0.02, 0.05, 0.1, 0.2, 0.3, 0.4])

    def errors_of(bottoms: np.ndarray, tops: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        b, t = (part.ravel() for part in np.meshgrid(bottoms, tops))
        keep = t - b > 1e-4 * span
        return b[keep], t[keep], squared_error(x, (t - b)[keep] / high, b[keep], 0, high)

    b, t, errors = errors_of(
        np.concatenate([x.min() + outside, np.quantile(x, shares)]),
        np.concatenate([x.max() - outside, np.quantile(x, 1 - shares)]),
    )
    best = errors.min()
    for start in np.argsort(errors)[:4]:
        bottom, top, error, reach = b[start], t[start], errors[start], span / 16
        for _ in range(5):
            near = np.linspace(-1, 1, 9) * reach
            bottoms, tops, around = errors_of(bottom + near, top + near)
            if around.min() < error:
                bottom, top, error = bottoms[around.argmin()], tops[around.argmin()], around.min()
            reach /= 2.2
        best = min(best, error)
    return best


# ---- Streaming ----


@pytest.mark.parametrize("name", SIGNED)
def test_streaming_equals_one_batch(name: str) -> None:
    """Batches of growing magnitude: the histogram widens several times and stays what one batch would have given."""
    x = sample(name, 9000) * torch.linspace(0.01, 3, 9000)
    streamed, whole = observed(*x.split(1000)), observed(x)
    assert streamed.counts is not None and whole.counts is not None
    assert torch.equal(streamed.limit, whole.limit)
    assert torch.equal(streamed.counts, whole.counts)
    assert torch.equal(streamed.smallest, whole.smallest)
    assert streamed.counts.sum() == 9000
    for with_offset in (False, True):
        pair = [observer.fit(WIDTHS, signed=not with_offset, with_offset=with_offset) for observer in (streamed, whole)]
        assert all(torch.equal(a, b) for a, b in zip(*pair, strict=True))


@example(values=[1.0, 0.5, 1.5, -2.0, 4.0, -4.0, 0.0, 9.0], cuts=[1, 3, 4, 6])  # limits themselves
@example(values=[-1e-7, 3.0, -2.5e-8, 1e-7], cuts=[1])  # next to the edge of two bins
@given(
    values=st.lists(st.floats(-100, 100, width=32), min_size=1, max_size=60),
    cuts=st.lists(st.integers(1, 59), max_size=4),
)
def test_streaming_equals_one_batch_wherever_it_is_cut(values: list[float], cuts: list[int]) -> None:
    x = torch.tensor(values)
    pieces = [piece for piece in torch.tensor_split(x, sorted(cuts)) if piece.numel()]
    streamed, whole = observed(*pieces), observed(x)
    assert streamed.counts is not None and whole.counts is not None
    assert torch.equal(streamed.limit, whole.limit)
    assert torch.equal(streamed.counts, whole.counts)


def test_the_order_of_batches_does_not_matter() -> None:
    pieces = sample("laplace").split(700)
    forwards, backwards = observed(*pieces), observed(*reversed(pieces))
    assert forwards.counts is not None and backwards.counts is not None
    assert torch.equal(forwards.counts, backwards.counts)


def test_range_is_the_power_of_two_above_the_largest_value() -> None:
    observer = observed(torch.tensor([0.3, -0.7]))
    assert observer.limit.item() == 1.0
    observer.observe(torch.tensor([-5.1]))
    assert observer.limit.item() == 8.0
    observer.observe(torch.tensor([0.001]))
    assert observer.limit.item() == 8.0
    assert observer.counts is not None
    width = 16.0 / BINS
    occupied = torch.nonzero(observer.counts[0]).flatten()
    centres = (occupied + 0.5) * width - 8.0
    torch.testing.assert_close(centres, torch.tensor([-5.1, -0.7, 0.001, 0.3]), rtol=0, atol=width / 2 + 1e-6)


def test_memory_does_not_grow() -> None:
    observer = HistogramObserver((3, 1, 1))
    for _ in range(5):
        observer.observe(torch.randn(2, 3, 10, 4))
        assert observer.counts is not None and observer.counts.shape == (3, BINS)


# ---- One histogram per scale ----


def test_heads_have_histograms_of_their_own() -> None:
    x = torch.randn(4, 3, 50, 8) * torch.tensor([0.1, 1.0, 30.0]).view(3, 1, 1)
    together = observed(x, scale_shape=(3, 1, 1))
    scales, _ = together.fit(WIDTHS, signed=True, with_offset=False)
    assert scales.shape == (3, 1, 1, 7)
    for head in range(3):
        alone = observed(x[:, head])
        assert together.counts is not None and alone.counts is not None
        assert torch.equal(together.counts[head], alone.counts[0])
        torch.testing.assert_close(scales[head, 0, 0], alone.fit(WIDTHS, signed=True, with_offset=False)[0])


@pytest.mark.parametrize(
    ("shape", "scale_shape", "axes"),
    [
        ((2, 5, 8), (8,), (2,)),
        ((6, 7), (6, 1), (0,)),
        ((6, 3, 2, 2), (6, 1, 1, 1), (0,)),
        ((2, 3, 4, 4), (3, 1, 1), (1,)),
        ((6, 3, 4), (3, 1), (1,)),
        ((3, 4, 5), (3, 4, 1), (0, 1)),
        ((2, 3, 5, 4), (3, 1, 4), (1, 3)),
        ((2, 1, 5, 4), (1, 1, 1), ()),
    ],
)
def test_groups_are_those_that_the_scales_broadcast_over(
    shape: tuple[int, ...], scale_shape: tuple[int, ...], axes: tuple[int, ...]
) -> None:
    x = torch.randn(shape) * torch.linspace(0.1, 5, math.prod(shape)).view(shape)
    observer = observed(x, scale_shape=scale_shape)
    moved = x.movedim(axes, tuple(range(len(axes)))).reshape(math.prod(scale_shape), -1)
    for group, own in enumerate(moved):
        alone = observed(own)
        assert observer.counts is not None and alone.counts is not None
        assert torch.equal(observer.counts[group], alone.counts[0])
        assert observer.limit[group] == alone.limit[0]


def test_many_groups_are_fitted_like_few() -> None:
    """More channels than are fitted at once."""
    x = torch.randn(150, 300) * torch.linspace(0.1, 4, 150).view(-1, 1)
    scales, offsets = observed(x, scale_shape=(150, 1)).fit(WIDTHS, signed=True, with_offset=False)
    assert scales.shape == offsets.shape == (150, 1, 7)
    for row in (0, 72, 73, 145, 146, 149):
        alone, _ = observed(x[row]).fit(WIDTHS, signed=True, with_offset=False)
        torch.testing.assert_close(scales[row, 0], alone)


# ---- How good the scales are ----


@pytest.mark.parametrize("name", SIGNED)
def test_scale_is_near_the_best_of_a_dense_search(name: str) -> None:
    x = sample(name)
    scales, offsets = observed(x).fit(WIDTHS, signed=SIGNED[name], with_offset=False)
    assert torch.equal(offsets, torch.zeros(7))
    for scale, bits in zip(scales.double().numpy(), WIDTHS, strict=True):
        low, high = grid_limits(bits, SIGNED[name])
        error = squared_error(x.double().numpy(), scale[None], np.zeros(1), low, high)[0]
        assert error <= 1.03 * dense_search(x.double().numpy(), bits, SIGNED[name]), f"{bits} bits"


@pytest.mark.parametrize("name", SIGNED)
def test_scale_and_offset_are_near_the_best_of_a_dense_search(name: str) -> None:
    x = sample(name)
    scales, offsets = observed(x).fit(WIDTHS, signed=False, with_offset=True)
    for scale, offset, bits in zip(scales.double().numpy(), offsets.double().numpy(), WIDTHS, strict=True):
        error = squared_error(x.double().numpy(), scale[None], offset[None], 0, 2**bits - 1)[0]
        assert error <= 1.03 * dense_search_with_offset(x.double().numpy(), bits), f"{bits} bits"


@pytest.mark.parametrize("with_offset", [False, True])
@pytest.mark.parametrize("name", SIGNED)
def test_better_than_the_largest_value(name: str, with_offset: bool) -> None:
    """Never worse than the scale that reaches the extremes, but for the width of a bin; clearly better at few bits.

    Pixels and uniform tensors have no rare large values to clip.
    """
    x = sample(name)
    signed = SIGNED[name] and not with_offset
    scales, offsets = observed(x).fit(WIDTHS, signed=signed, with_offset=with_offset)
    data = x.double().numpy()
    for scale, offset, bits in zip(scales.double().numpy(), offsets.double().numpy(), WIDTHS, strict=True):
        low, high = grid_limits(bits, signed)
        shift = np.array([data.min() if with_offset else 0.0])
        plain = squared_error(data, (np.abs(data - shift).max() / high)[None], shift, low, high)[0]
        found = squared_error(data, scale[None], offset[None], low, high)[0]
        assert found <= 1.01 * plain
        if bits <= 4 and name in ("gaussian", "laplace", "outliers"):
            assert found < 0.8 * plain


def test_more_bits_never_hurt() -> None:
    for name, signed in SIGNED.items():
        x = sample(name).double().numpy()
        scales, _ = observed(sample(name)).fit(WIDTHS, signed=signed, with_offset=False)
        errors = [
            squared_error(x, scale[None], np.zeros(1), *grid_limits(bits, signed))[0]
            for scale, bits in zip(scales.double().numpy(), WIDTHS, strict=True)
        ]
        assert all(after < 0.7 * before for before, after in zip(errors, errors[1:], strict=False)), name


@pytest.mark.parametrize("name", [name for name, signed in SIGNED.items() if signed])
def test_an_offset_is_no_worse_than_none(name: str) -> None:
    """The grids with offset contain the ones without: 0 … 2^b - 1 shifted by half of it is the signed grid."""
    x = sample(name)
    data = x.double().numpy()
    plain, _ = observed(x).fit(WIDTHS, signed=True, with_offset=False)
    scales, offsets = observed(x).fit(WIDTHS, signed=False, with_offset=True)
    for index, bits in enumerate(WIDTHS):
        own, shift, without = (part[index : index + 1].double().numpy() for part in (scales, offsets, plain))
        best = squared_error(data, without, np.zeros(1), *grid_limits(bits, True))[0]
        assert squared_error(data, own, shift, 0, 2**bits - 1)[0] <= 1.03 * best, f"{bits} bits"


def test_negative_and_positive_tensors_use_the_longer_side_of_a_signed_grid() -> None:
    """-2 … 1 at two bits: all-negative data fit into two steps, which all-positive data do not have."""
    x = torch.linspace(0.0, 1.0, 2001)
    negative, _ = observed(-x).fit((2,), signed=True, with_offset=False)
    data = -x.double().numpy()
    error = squared_error(data, negative.double().numpy(), np.zeros(1), -2, 1)[0]
    assert error <= 1.03 * dense_search(data, 2, True)


# ---- Extremes ----


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_nan_and_infinity_are_refused(bad: float) -> None:
    x = torch.randn(2, 3, 4, 4)
    x[1, 2, 0, 3] = bad
    for scale_shape in ((), (3, 1, 1)):
        observer = observed(torch.randn(2, 3, 4, 4), scale_shape=scale_shape)
        before = observer.counts.clone() if observer.counts is not None else None
        with pytest.raises(QvitError, match="NaN or infinite values while calibrating"):
            observer.observe(x)
        assert observer.counts is not None and before is not None and torch.equal(observer.counts, before)


def test_nothing_observed_is_refused() -> None:
    with pytest.raises(QvitError, match="nothing was observed"):
        HistogramObserver(()).fit(WIDTHS, signed=True, with_offset=False)


@pytest.mark.parametrize("with_offset", [False, True])
@pytest.mark.parametrize("value", [0.0, 1.0, -1.0, 3.7, -0.002, 1e-6, 65504.0])
def test_constant_tensors(value: float, with_offset: bool) -> None:
    scales, offsets = observed(torch.full((40,), value)).fit(WIDTHS, signed=not with_offset, with_offset=with_offset)
    assert torch.isfinite(scales).all() and torch.isfinite(offsets).all() and (scales > 0).all()
    low = torch.tensor([grid_limits(bits, not with_offset) for bits in WIDTHS])
    q = torch.round(torch.clamp((value - offsets) / scales, low[:, 0], low[:, 1]))
    out = q * scales + offsets
    assert (out - value).abs().max() <= 2e-3 * abs(value)


@pytest.mark.parametrize("with_offset", [False, True])
@pytest.mark.parametrize("magnitude", [1e-38, 1e-20, 1e-9, 1e-7, 1e-5, 1e4, 1e10, 1e18, 1e25, 1e38])
def test_tiny_and_huge_magnitudes_give_finite_positive_scales(magnitude: float, with_offset: bool) -> None:
    x = sample("uniform", 500) * magnitude
    scales, offsets = observed(x).fit(WIDTHS, signed=not with_offset, with_offset=with_offset)
    assert torch.isfinite(scales).all() and torch.isfinite(offsets).all() and (scales > 0).all()


@pytest.mark.parametrize("magnitude", [1e-5, 1e-3, 1.0, 1e4, 1e8])
def test_scales_are_proportional_to_the_tensor(magnitude: float) -> None:
    """Exactly so for powers of two, whose histogram is the same."""
    x, power = sample("gaussian"), 2.0 ** round(math.log2(magnitude))
    plain, _ = observed(x).fit((3, 5, 8), signed=True, with_offset=False)
    scaled, _ = observed(x * power).fit((3, 5, 8), signed=True, with_offset=False)
    torch.testing.assert_close(scaled / power, plain, rtol=1e-5, atol=0)


def test_zeros_before_and_after_real_values_only_add_zeros() -> None:
    x = sample("gaussian", 1000)
    zeros = torch.zeros(300)
    counts = [observed(*batches).counts for batches in ((zeros, x), (x, zeros), (torch.cat([x, zeros]),))]
    assert all(other is not None and counts[0] is not None and torch.equal(counts[0], other) for other in counts)


def test_a_head_that_is_silent_does_not_disturb_the_others() -> None:
    x = torch.randn(2, 3, 20, 4)
    x[:, 1] = 0
    scales, _ = observed(x, scale_shape=(3, 1, 1)).fit(WIDTHS, signed=True, with_offset=False)
    alone, _ = observed(x[:, 0]).fit(WIDTHS, signed=True, with_offset=False)
    assert torch.isfinite(scales).all() and (scales > 0).all()
    torch.testing.assert_close(scales[0, 0, 0], alone)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_types_are_observed_in_float32(dtype: torch.dtype) -> None:
    x = sample("gaussian", 1000).to(dtype)
    observer, reference = observed(x), observed(x.float())
    assert observer.counts is not None and reference.counts is not None
    assert torch.equal(observer.counts, reference.counts)
