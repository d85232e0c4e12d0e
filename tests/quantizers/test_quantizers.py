"""Quantizers as modules: axes and heads, calibration state, learned widths, interpolation, freezing."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from qvit.errors import QvitError, UsageError
from qvit.functional import integer_range
from qvit.models.layers import attention_sites, linear_sites
from qvit.plan.spec import GRANULARITIES, Layout, TensorSpec
from qvit.quantizers import Quantizer, create_quantizer, quantizers_of
from qvit.quantizers.base import QUANTIZERS, register_quantizer
from qvit.quantizers.lsq import LSQQuantizer
from qvit.quantizers.observers import HistogramObserver

HEADS, DIM, INPUTS, OUTPUTS = 3, 4, 5, 6


def attention_layouts() -> dict[str, Layout]:
    """Layouts of the sites of an attention module with three heads of four, five inputs and six outputs."""
    sites = attention_sites("attn", nn.Linear(INPUTS, 3 * HEADS * DIM), nn.Linear(HEADS * DIM, OUTPUTS), HEADS)
    return {site.name.removeprefix("attn."): site.layout for site in sites}


LAYOUTS: dict[str, tuple[Layout, tuple[int, ...]]] = {
    "input": (linear_sites("fc", nn.Linear(INPUTS, 2), TensorSpec())[0].layout, (2, 7, INPUTS)),
    "weight": (linear_sites("fc", nn.Linear(INPUTS, OUTPUTS), TensorSpec())[1].layout, (OUTPUTS, INPUTS)),
    "tokens": (Layout(channels=(INPUTS,), positions=(7, 1)), (2, 7, INPUTS)),
    "image": (linear_sites("conv", nn.Conv2d(3, OUTPUTS, 2), TensorSpec())[0].layout, (2, 3, 8, 8)),
    "kernel": (linear_sites("conv", nn.Conv2d(3, OUTPUTS, 2), TensorSpec())[1].layout, (OUTPUTS, 3, 2, 2)),
    "query": (attention_layouts()["query"], (2, HEADS, 7, DIM)),
    "probs": (attention_layouts()["probs"], (2, HEADS, 7, 7)),
    "query_weight": (attention_layouts()["qkv.query_weight"], (HEADS * DIM, INPUTS)),
    "proj_weight": (attention_layouts()["proj.weight"], (OUTPUTS, HEADS * DIM)),
}
WITH_HEADS = ["query", "probs", "query_weight", "proj_weight"]
GRIDS = {"signed": {}, "unsigned": {"signed": False}, "offset": {"signed": False, "symmetric": False}}


def shape_of(layout: Layout, granularity: str) -> tuple[int, ...] | None:
    """The shape of the scales; None where tensors of the layout cannot have them."""
    shapes = {"per-head": layout.heads, "per-channel": layout.channels, "per-position": layout.positions}
    return shapes.get(granularity, ())


places_and_granularities = pytest.mark.parametrize(
    ("place", "granularity"),
    [(place, name) for place in LAYOUTS for name in GRANULARITIES if shape_of(LAYOUTS[place][0], name) is not None],
)


def make(place: str, x: Tensor | None = None, **changes: Any) -> LSQQuantizer:
    """A quantizer of a place of `LAYOUTS`; calibrated on `x` if given."""
    quantizer = create_quantizer(TensorSpec().changed(changes), LAYOUTS[place][0])
    assert isinstance(quantizer, LSQQuantizer)
    return quantizer if x is None else calibrated(quantizer, x)


def calibrated(quantizer: LSQQuantizer, x: Tensor) -> LSQQuantizer:
    observer = quantizer.create_observer()
    observer.observe(quantizer.view(x))
    quantizer.initialize(observer)
    return quantizer


def values(place: str, signed: bool = True) -> Tensor:
    x = torch.randn(LAYOUTS[place][1])
    return x if signed else x.abs()


def per_head(place: str, x: Tensor) -> list[Tensor]:
    """The elements of every head, found by explicit indexing: not by the code under test."""
    if x.shape[:1] == (HEADS * DIM,) and place == "query_weight":
        return [x[head * DIM : (head + 1) * DIM] for head in range(HEADS)]
    if place == "proj_weight":
        return [x[:, head * DIM : (head + 1) * DIM] for head in range(HEADS)]
    return [x[:, head] for head in range(HEADS)]


# ---- Integers and grid points ----


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("switchable", [False, True], ids=["one scale", "switchable"])
@places_and_granularities
def test_integers_and_back_are_forward_bit_for_bit(place: str, granularity: str, switchable: bool, grid: str) -> None:
    for bits in range(2, 9):
        x = values(place)
        q = make(place, x, bit_width=bits, granularity=granularity, switchable_scale=switchable, **GRIDS[grid])
        y = 1.7 * x + 0.1
        integers, out = q.to_int(y), q(y)
        low, high = integer_range(bits, q.spec.signed)
        assert integers.dtype == torch.int32 and integers.shape == out.shape == y.shape
        assert low <= integers.min() and integers.max() <= high
        assert torch.equal(q.from_int(integers), out)
        assert torch.equal(q(out), out)


@pytest.mark.parametrize("place", WITH_HEADS)
def test_integers_and_back_with_a_width_per_head(place: str) -> None:
    x = values(place)
    for granularity in ("per-head", "per-tensor"):
        q = make(place, x, bit_width=[2, 5, 8], granularity=granularity, switchable_scale=True)
        assert torch.equal(q.from_int(q.to_int(x)), q(x))
        for bits, own in zip((2, 5, 8), per_head(place, q.to_int(x)), strict=True):
            low, high = integer_range(bits, True)
            assert low <= own.min() and own.max() <= high
            assert own.unique().numel() > 2 ** (bits - 1) or bits > 4  # the whole range is used where there are values


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@places_and_granularities
def test_half_precision_inputs_keep_their_type(place: str, granularity: str, dtype: torch.dtype) -> None:
    x = values(place)
    q = make(place, x, bit_width=4, granularity=granularity)
    out = q(x.to(dtype))
    assert out.dtype == dtype and out.shape == x.shape
    assert torch.equal(out, q(x.to(dtype).float()).to(dtype))


@pytest.mark.parametrize("grid", GRIDS)
@places_and_granularities
def test_scales_shared_as_the_granularity_says(place: str, granularity: str, grid: str) -> None:
    """Every group of elements is quantized with its own scale: compared with a loop in numpy over all elements."""
    layout, shape = LAYOUTS[place]
    x = values(place)
    q = make(place, x, bit_width=3, granularity=granularity, **GRIDS[grid])
    expected_shape = shape_of(layout, granularity)
    assert expected_shape is not None
    assert tuple(q.scale.shape) == (*expected_shape, 1)
    with torch.no_grad():
        q.scale.copy_(0.1 + torch.rand_like(q.scale))
        if q.offset is not None:
            q.offset.copy_(-torch.rand_like(q.offset))
    viewed = layout.view or shape
    scale = np.broadcast_to(q.scale.detach().numpy()[..., 0], viewed).reshape(shape)
    shift = np.zeros(shape, np.float32)
    if q.offset is not None:
        shift = np.broadcast_to(q.offset.detach().numpy()[..., 0], viewed).reshape(shape)
    low, high = integer_range(3, q.spec.signed)
    out, x_ = q(x).detach().numpy(), x.numpy()
    for index in np.ndindex(shape):
        level = min(max((x_[index] - shift[index]) / scale[index], low), high)
        assert out[index] == pytest.approx(np.rint(level) * scale[index] + shift[index], rel=1e-6, abs=1e-6)


def test_views_put_heads_on_the_axis_where_they_belong() -> None:
    """Heads are blocks of rows of W_q and of columns of W_o; channels are output rows of both, and an activation's last
    axis.
    """
    x = torch.arange(HEADS * DIM * INPUTS).view(HEADS * DIM, INPUTS)
    assert torch.equal(make("query_weight").view(x)[1, 2], x[DIM + 2])
    x = torch.arange(OUTPUTS * HEADS * DIM).view(OUTPUTS, HEADS * DIM)
    assert torch.equal(make("proj_weight").view(x)[5, 2], x[5, 2 * DIM : 3 * DIM])
    assert make("query_weight", granularity="per-channel").scale.shape == (HEADS, DIM, 1, 1)
    assert make("proj_weight", granularity="per-channel").scale.shape == (OUTPUTS, 1, 1, 1)
    assert make("query", granularity="per-channel").scale.shape == (HEADS, 1, DIM, 1)
    assert make("image", granularity="per-channel").scale.shape == (3, 1, 1, 1)
    assert make("kernel", granularity="per-channel").scale.shape == (OUTPUTS, 1, 1, 1, 1)


# ---- Heads ----


@pytest.mark.parametrize("change", ["width", "scale", "offset"])
@pytest.mark.parametrize("place", WITH_HEADS)
@pytest.mark.parametrize("head", range(HEADS))
def test_heads_are_independent(place: str, head: int, change: str) -> None:
    """Another width, scale or offset of one head changes the output of that head and no other."""
    x = values(place)
    grid = GRIDS["offset"] if change == "offset" else {}
    q = make(place, x, bit_width=[4] * HEADS, granularity="per-head", switchable_scale=True, **grid)
    before = q(x)
    with torch.no_grad():
        if change == "width":
            q.bit_width.view(-1)[head] = 2.0
        elif change == "scale":
            q.scale.view(HEADS, 7)[head] *= 1.37
        else:
            assert q.offset is not None
            q.offset.view(HEADS, 7)[head] += 0.11
    changed = [not torch.equal(*pair) for pair in zip(per_head(place, before), per_head(place, q(x)), strict=True)]
    assert changed == [other == head for other in range(HEADS)]


@pytest.mark.parametrize("place", WITH_HEADS)
@pytest.mark.parametrize("head", range(HEADS))
def test_gradients_of_heads_are_independent(place: str, head: int) -> None:
    """Upstream gradient in one head reaches the width and the scale of that head alone."""
    x = values(place)
    q = make(place, x, bit_width=[3] * HEADS, granularity="per-head", learn_bit_width=True, switchable_scale=True)
    per_head(place, q(3 * x))[head].square().sum().backward()
    assert q.bit_width.grad is not None and q.scale.grad is not None
    assert (q.bit_width.grad.flatten() != 0).tolist() == [other == head for other in range(HEADS)]
    assert (q.scale.grad.view(HEADS, 7) != 0).any(1).tolist() == [other == head for other in range(HEADS)]


def test_rows_of_a_small_query_weight_by_hand() -> None:
    """Two heads of two rows; head 0 in steps of 1 with 2 bits (-2 … 1), head 1 in steps of 10 with 3 bits."""
    sites = attention_sites("attn", nn.Linear(2, 12), nn.Linear(4, 2), 2)
    layout = {site.name: site.layout for site in sites}["attn.qkv.query_weight"]
    q = LSQQuantizer(TensorSpec(bit_width=(2, 3), granularity=GRANULARITIES["per-head"]), layout)
    with torch.no_grad():
        q.scale.copy_(torch.tensor([1.0, 10.0]).view(2, 1, 1, 1))
    q.calibrated = True
    weight = torch.tensor([[0.6, -7.0], [3.0, -1.2], [0.6, -7.0], [44.0, -14.0]])
    assert q(weight).tolist() == [[1.0, -2.0], [1.0, -1.0], [0.0, -10.0], [30.0, -10.0]]


def test_columns_of_a_small_output_weight_by_hand() -> None:
    """Two heads of two columns each, with the steps and widths of the test above."""
    sites = attention_sites("attn", nn.Linear(2, 12), nn.Linear(4, 2), 2)
    layout = {site.name: site.layout for site in sites}["attn.proj.weight"]
    q = LSQQuantizer(TensorSpec(bit_width=(2, 3), granularity=GRANULARITIES["per-head"]), layout)
    with torch.no_grad():
        q.scale.copy_(torch.tensor([1.0, 10.0]).view(2, 1, 1))
    q.calibrated = True
    weight = torch.tensor([[0.6, -7.0, 0.6, -7.0], [3.0, -1.2, 44.0, -14.0]])
    assert q(weight).tolist() == [[1.0, -2.0, 0.0, -10.0], [1.0, -1.0, 30.0, -10.0]]


# ---- Calibration state ----


def test_uncalibrated_refuses_and_off_passes() -> None:
    q, x = make("input", bit_width=4), values("input")
    with pytest.raises(UsageError, match=r"never calibrated: call qvit\.calibrate"):
        q(x)
    q.enabled = False
    assert q(x) is x
    q.observer = q.create_observer()
    q.enabled = True
    assert q(x) is x
    with pytest.raises(QvitError, match="nothing was observed"):
        q.initialize(HistogramObserver(()))


@places_and_granularities
def test_a_loaded_state_knows_whether_it_was_calibrated(place: str, granularity: str) -> None:
    x = values(place)
    changes = {"granularity": granularity, "bit_width": 3, "switchable_scale": True, **GRIDS["offset"]}
    source, fresh = make(place, x, **changes), make(place, **changes)
    fresh.load_state_dict(source.state_dict())
    assert fresh.calibrated
    assert torch.equal(fresh(x), source(x))
    again = make(place, x, **changes)
    again.load_state_dict(make(place, **changes).state_dict())
    assert not again.calibrated
    with pytest.raises(UsageError, match="never calibrated"):
        again(x)


@pytest.mark.parametrize("broken", [0.0, -1.0, float("inf"), float("nan")])
def test_a_state_with_an_impossible_scale_is_not_calibrated(broken: float) -> None:
    source = make("weight", values("weight"), granularity="per-channel")
    state = copy.deepcopy(source.state_dict())
    state["scale"][2] = broken
    fresh = make("weight", granularity="per-channel")
    fresh.load_state_dict(state)
    assert not fresh.calibrated


@pytest.mark.parametrize("grid", GRIDS)
@places_and_granularities
def test_each_width_is_calibrated_for_itself(place: str, granularity: str, grid: str) -> None:
    """A bank of switchable scales holds, for every width, the scale that a quantizer of that width alone gets."""
    x = values(place, signed=grid != "unsigned")
    bank = make(place, x, granularity=granularity, switchable_scale=True, **GRIDS[grid])
    assert bank.scale.shape[-1] == 7 and bool((bank.scale > 0).all())
    for column, bits in enumerate(range(2, 9)):
        single = make(place, x, granularity=granularity, bit_width=bits, **GRIDS[grid])
        torch.testing.assert_close(single.scale[..., 0], bank.scale[..., column])
        if bank.offset is not None and single.offset is not None:
            torch.testing.assert_close(single.offset[..., 0], bank.offset[..., column])


def test_without_switchable_scales_each_head_is_calibrated_at_its_own_width() -> None:
    x = values("query")
    bank = make("query", x, granularity="per-head", switchable_scale=True)
    mixed = make("query", x, granularity="per-head", bit_width=[2, 4, 7])
    expected = torch.stack([bank.scale[head, 0, 0, bits - 2] for head, bits in enumerate((2, 4, 7))])
    torch.testing.assert_close(mixed.scale.flatten(), expected)
    per_channel = make("query", x, granularity="per-channel", bit_width=[2, 4, 7])
    channels = make("query", x, granularity="per-channel", switchable_scale=True)
    for head, bits in enumerate((2, 4, 7)):
        torch.testing.assert_close(per_channel.scale[head, ..., 0], channels.scale[head, ..., bits - 2])
    shared = make("query", x, bit_width=[2, 4, 7])
    middle = make("query", x, bit_width=4)
    torch.testing.assert_close(shared.scale, middle.scale)


# ---- Learned widths ----


def test_forward_uses_the_rounded_width_and_its_column() -> None:
    x = values("query")
    q = make("query", x, bit_width=[4] * HEADS, granularity="per-head", learn_bit_width=True, switchable_scale=True)
    with torch.no_grad():
        q.bit_width.copy_(torch.tensor([2.4, 5.6, 9.3]).view(HEADS, 1, 1))
    fixed = make("query", x, bit_width=[2, 6, 8], granularity="per-head", switchable_scale=True)
    assert torch.equal(q(x), fixed(x))
    assert q.integer_bit_width().flatten().tolist() == [2.0, 6.0, 8.0]
    assert [bound.flatten().tolist() for bound in q.quant_range()] == [[-2.0, -32.0, -128.0], [1.0, 31.0, 127.0]]
    scale, offset = q.grid()
    assert offset is None
    torch.testing.assert_close(
        scale.flatten(), torch.stack([q.scale[0, 0, 0, 0], q.scale[1, 0, 0, 4], q.scale[2, 0, 0, 6]])
    )
    assert torch.equal(q.from_int(q.to_int(x)), q(x))


def test_forward_leaves_the_width_parameter_alone() -> None:
    q = make("query", values("query"), learn_bit_width=True, bit_width=8)
    with torch.no_grad():
        q.bit_width.fill_(9.5)
    q(values("query")).sum().backward()
    assert q.bit_width.item() == 9.5


def test_lsq_factor_counts_the_elements_that_share_a_scale() -> None:
    """n is the number of elements per scale, or per head where heads of different widths share one."""
    x = values("query")
    expected = {"per-tensor": x.numel(), "per-head": x.numel() // HEADS, "per-channel": x.numel() // (HEADS * DIM)}
    for granularity, elements in expected.items():
        q = make("query", x, bit_width=3, granularity=granularity)
        upstream = torch.randn_like(x)
        (q(x) * upstream).sum().backward()
        scale = q.scale.detach()[..., 0]
        u = x / scale
        each = upstream * torch.where(u > 3, 3.0, torch.where(u < -4, -4.0, torch.round(u) - u)) / (elements * 3) ** 0.5
        assert q.scale.grad is not None
        torch.testing.assert_close(q.scale.grad[..., 0], each.sum_to_size(scale.shape) if scale.dim() else each.sum())
    shared = make("query", x, bit_width=[3, 3, 3])
    shared(x).sum().backward()
    single = make("query", x, bit_width=3)
    single(x).sum().backward()
    assert shared.scale.grad is not None and single.scale.grad is not None
    torch.testing.assert_close(shared.scale.grad, single.scale.grad * HEADS**0.5)


# ---- Interpolation ----


def interpolating(place: str, x: Tensor, width: float, **changes: Any) -> LSQQuantizer:
    learned = {"learn_bit_width": True, "width_gradient": "interpolation", "switchable_scale": True}
    q = make(place, x, **(learned | changes))
    with torch.no_grad():
        q.bit_width.fill_(width)
    return q


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("grid", GRIDS)
def test_interpolation_at_an_integer_is_that_width(bits: int, grid: str) -> None:
    x = values("query")
    q = interpolating("query", x, bits, **GRIDS[grid])
    assert torch.equal(q(x), make("query", x, bit_width=bits, switchable_scale=True, **GRIDS[grid])(x))


@pytest.mark.parametrize("width", [2.0, 2.25, 3.5, 5.0, 7.9, 8.0])
def test_interpolation_mixes_the_neighbours_and_its_gradient_is_their_difference(width: float) -> None:
    x, upstream = values("query"), torch.randn(LAYOUTS["query"][1])
    q = interpolating("query", x, width)
    lower = min(int(width), 7)
    below, above = (make("query", x, bit_width=bits, switchable_scale=True)(x).detach() for bits in (lower, lower + 1))
    out = q(x)
    torch.testing.assert_close(out, below + (width - lower) * (above - below))
    (out * upstream).sum().backward()
    expected = float(((above - below) * upstream).sum())
    assert q.bit_width.grad is not None
    assert q.bit_width.grad.item() == pytest.approx(expected, rel=1e-4)


def test_interpolation_feels_elements_that_are_not_clipped() -> None:
    """Where nothing clips, the clipping gradient of the width is exactly zero, and that of interpolation is not."""
    x = 0.9 * values("query") / 10
    gradients = {}
    for kind in ("clipping", "interpolation"):
        q = interpolating("query", x, 4.3, width_gradient=kind)
        with torch.no_grad():
            q.scale.copy_(torch.tensor([1.0, 0.5, 0.2, 0.1, 0.05, 0.02, 0.01]))
        (q(x) - x).square().sum().backward()
        assert q.bit_width.grad is not None
        gradients[kind] = q.bit_width.grad.item()
    assert gradients["clipping"] == 0.0
    assert gradients["interpolation"] < 0.0  # more bits, less error


@pytest.mark.parametrize("width", [2.3, 6.8])
def test_interpolation_gives_gradient_to_the_two_columns_it_uses(width: float) -> None:
    x = values("query")
    q = interpolating("query", x, width)
    q(x).square().sum().backward()
    assert q.scale.grad is not None
    assert torch.nonzero(q.scale.grad).flatten().tolist() == [int(width) - 2, int(width) - 1]


def test_interpolation_per_head() -> None:
    x = values("proj_weight")
    q = interpolating("proj_weight", x, 3.0, bit_width=[3] * HEADS, granularity="per-head")
    with torch.no_grad():
        q.bit_width.copy_(torch.tensor([2.5, 3.0, 7.75]).view(HEADS, 1))
    bits = [(2, 3), (3, 4), (7, 8)]
    fixed = [
        make("proj_weight", x, bit_width=[pair[side] for pair in bits], granularity="per-head", switchable_scale=True)(
            x
        )
        for side in (0, 1)
    ]
    for out, below, above, fraction in zip(
        *(per_head("proj_weight", y) for y in (q(x), *fixed)), (0.5, 0.0, 0.75), strict=True
    ):
        torch.testing.assert_close(out, below + fraction * (above - below))


def test_interpolation_in_a_range_of_one_width() -> None:
    x = values("input")
    q = make("input", x, bit_width=4, bit_width_range=[4, 4], learn_bit_width=True, width_gradient="interpolation")
    assert torch.equal(q(x), make("input", x, bit_width=4)(x))


# ---- Freezing ----


@pytest.mark.parametrize("width_gradient", ["clipping", "interpolation"])
@pytest.mark.parametrize("place", WITH_HEADS)
def test_freezing_makes_widths_plain_integers(place: str, width_gradient: str) -> None:
    x = values(place)
    q = make(
        place,
        x,
        bit_width=[4] * HEADS,
        granularity="per-head",
        learn_bit_width=True,
        switchable_scale=True,
        width_gradient=width_gradient,
    )
    with torch.no_grad():
        q.bit_width.copy_(torch.tensor([4.4, 2.7, 8.9]).view(q.bit_width.shape))
    keys, scale = set(q.state_dict()), q.scale
    assert q.learns_width and "bit_width" in dict(q.named_parameters())
    before = q(x).detach()
    q.freeze()
    assert not q.learns_width
    assert set(q.state_dict()) == keys
    assert "bit_width" not in dict(q.named_parameters()) and "bit_width" in dict(q.named_buffers())
    assert q.bit_width.flatten().tolist() == [4.0, 3.0, 8.0]
    assert q.spec.bit_width == (4, 3, 8) and not q.spec.learn_bit_width
    assert q.scale is scale and q.scale.requires_grad
    if width_gradient == "clipping":
        assert torch.equal(q(x), before)
    after = q(x)
    fixed = make(place, x, bit_width=[4, 3, 8], granularity="per-head", switchable_scale=True)
    assert torch.equal(after, fixed(x))
    fixed.load_state_dict(q.state_dict())
    assert torch.equal(fixed(x), after)


def test_freezing_at_given_widths() -> None:
    x = values("query")
    q = make("query", x, bit_width=[4] * HEADS, granularity="per-head", learn_bit_width=True, switchable_scale=True)
    q.freeze((2, 7, 5))
    assert q.spec.bit_width == (2, 7, 5)
    assert torch.equal(q(x), make("query", x, bit_width=[2, 7, 5], granularity="per-head", switchable_scale=True)(x))
    q.freeze((3, 3, 3))  # a frozen quantizer may still be given other widths
    assert q.bit_width.flatten().tolist() == [3.0, 3.0, 3.0]
    single = make("input", values("input"), bit_width=4, learn_bit_width=True)
    single.freeze(6)
    assert single.spec.bit_width == 6 and single.bit_width.shape == ()


def test_freezing_refuses_what_does_not_fit() -> None:
    q = make("query", values("query"), bit_width=[4] * HEADS, learn_bit_width=True, switchable_scale=True)
    with pytest.raises(UsageError, match="2 bit-widths given for a quantizer with 3"):
        q.freeze((4, 4))
    with pytest.raises(UsageError, match="bit_width 9 has no scale"):
        q.freeze((4, 9, 4))
    assert q.learns_width and q.spec.learn_bit_width  # nothing happened


def test_frozen_and_learned_states_have_the_same_keys_and_load_into_each_other() -> None:
    x = values("query")
    learned = make("query", x, bit_width=5, learn_bit_width=True, switchable_scale=True, **GRIDS["offset"])
    frozen = copy.deepcopy(learned)
    frozen.freeze()
    assert set(learned.state_dict()) == {"bit_width", "scale", "offset"}
    learned.load_state_dict(frozen.state_dict())
    assert learned.learns_width
    assert torch.equal(learned(x), frozen(x))


# ---- Construction, names ----


def test_repr_says_what_the_quantizer_does() -> None:
    x = values("query")
    q = make("query", x, bit_width=[4, 3, 2], granularity="per-head", learn_bit_width=True)
    assert q.extra_repr() == "bit_width=(4, 3, 2), per-head, learned"
    assert "bit_width=(4, 3, 2), per-head, learned" in repr(nn.ModuleDict({"query_quantizer": q}))
    with torch.no_grad():
        q.bit_width[0] = 3.417
    assert q.extra_repr() == "bit_width=(3.42, 3, 2), per-head, learned"
    q.freeze()
    assert q.extra_repr() == "bit_width=(3, 3, 2), per-head, fixed"
    q.enabled = False
    assert q.extra_repr() == "bit_width=(3, 3, 2), per-head, fixed, off"
    offset = make("input", bit_width=4, switchable_scale=True, **GRIDS["offset"])
    assert offset.extra_repr() == "bit_width=4, per-tensor, fixed, switchable scale, unsigned, offset, not calibrated"
    assert make("weight", granularity="per-channel").extra_repr() == "bit_width=8, per-channel, fixed, not calibrated"


def test_impossible_quantizers_are_refused() -> None:
    with pytest.raises(UsageError, match="'per-head' needs a tensor with heads"):
        make("input", granularity="per-head")
    with pytest.raises(UsageError, match="'per-channel' needs a tensor with channels"):
        make("probs", granularity="per-channel")
    with pytest.raises(UsageError, match=r"2 bit-widths given for a tensor with 3 head\(s\)"):
        make("query", bit_width=[4, 4])
    with pytest.raises(UsageError, match=r"2 bit-widths given for a tensor with 1 head\(s\)"):
        make("input", bit_width=[4, 4])
    with pytest.raises(UsageError, match=r"unknown quantizer 'lsqq'; did you mean 'lsq'\?"):
        make("input", quantizer="lsqq")
    with pytest.raises(UsageError, match="unknown quantizer 'lsq") as refused:
        make("input", quantizer="lsq" * 100_000)  # a name of a stranger's file is not repeated whole
    assert len(str(refused.value)) < 500


def test_a_new_quantizer_is_one_registered_class(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(QUANTIZERS, "_found", dict(QUANTIZERS))

    @register_quantizer("sign")
    class Sign(Quantizer):
        def fake_quantize(self, x: Tensor) -> Tensor:
            return x.sign()

    q = create_quantizer(TensorSpec(quantizer="sign"), Layout())
    q.calibrated = True
    assert isinstance(q, Sign) and q(torch.tensor([-3.0, 2.0])).tolist() == [-1.0, 1.0]


def test_quantizers_of_a_model_are_named_by_their_site() -> None:
    model = nn.Module()
    model.attn = nn.Module()
    model.attn.query_quantizer = make("query")
    model.attn.qkv = nn.Linear(2, 2)
    model.attn.qkv.input_quantizer = make("input")
    assert [name for name, _ in quantizers_of(model)] == ["attn.query", "attn.qkv.input"]


@given(
    place=st.sampled_from(list(LAYOUTS)),
    bits=st.integers(2, 8),
    grid=st.sampled_from(list(GRIDS)),
    power=st.integers(-12, 12),
    seed=st.integers(0, 999),
)
def test_calibrated_output_is_closer_than_zero(place: str, bits: int, grid: str, power: int, seed: int) -> None:
    """A calibrated quantizer is finite and never worse than answering nothing, at any magnitude of its tensor."""
    x = torch.randn(LAYOUTS[place][1], generator=torch.Generator().manual_seed(seed)) * 2.0**power
    out = make(place, x, bit_width=bits, **GRIDS[grid])(x)
    assert torch.isfinite(out).all()
    assert (out - x).square().sum() <= x.square().sum()


def test_a_model_of_quantizers_can_be_copied_and_moved_between_types() -> None:
    x = values("query")
    q = make("query", x, bit_width=[4, 3, 2], granularity="per-head", learn_bit_width=True, switchable_scale=True)
    twin = copy.deepcopy(q)
    with torch.no_grad():
        twin.scale.mul_(2)
    assert not torch.equal(twin(x), q(x))
    wide = copy.deepcopy(q).double()
    torch.testing.assert_close(wide(x.double()).float(), q(x))
