"""The bin regularizer against the formula, written out with a loop over bins and left to autograd."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from qvit.functional import integer_range
from qvit.training.oscillation.bins import bin_regularizer

# Shapes of a weight, of its scales and of its widths.
AXES = {
    "per tensor": ((12, 10), (), ()),
    "odd": ((7, 3), (), ()),
    "per channel": ((6, 35), (6, 1), ()),
    "convolution": ((5, 3, 4, 4), (), ()),
    "convolution, per channel": ((4, 3, 4, 4), (4, 1, 1, 1), ()),
    "rows, per head": ((3, 8, 9), (3, 1, 1), (3, 1, 1)),
    "columns, per head": ((10, 3, 8), (3, 1), (3, 1)),
    "columns, one scale": ((10, 3, 8), (), ()),
}
TOLERANCE = {torch.float64: 1e-10, torch.float32: 2e-4, torch.bfloat16: 2e-2}


def by_the_formula(w: Tensor, scale: Tensor, bit_width: Tensor, signed: bool) -> Tensor:
    """L with autograd and loops; computes in the dtype of `scale`."""
    quant_min, quant_max = integer_range(bit_width, signed)
    w = w.to(scale.dtype)
    clamped = (torch.minimum(torch.maximum(w / scale, quant_min), quant_max) * scale).expand_as(w)
    codes = torch.round(torch.clamp(w / scale, quant_min, quant_max)).detach().expand_as(w)
    loss = (((codes * scale).detach() - clamped) ** 2).mean()
    owner = torch.arange(max(1, scale.numel())).view(scale.shape).expand_as(w)
    for group in owner.unique():
        for code in codes[owner == group].unique():
            inside = clamped[(owner == group) & (codes == code)]
            if len(inside) > 1:
                loss = loss + inside.var(unbiased=True)
    return loss


def random_weight(
    axes: str, bits: int, dtype: torch.dtype, seed: int, spread: float, signed: bool = True
) -> tuple[Tensor, Tensor, Tensor, bool]:
    shape, scales, widths = AXES[axes]
    generator = torch.Generator().manual_seed(seed)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    width = torch.full(widths, float(bits), dtype=wide)
    if width.numel() > 1:
        width = torch.randint(2, bits + 1, widths, generator=generator).to(wide)
    scale = (0.5 + torch.rand(scales, generator=generator, dtype=wide)) * 2.0 ** (1 - bits)
    w = (torch.randn(shape, generator=generator, dtype=wide) * spread).to(dtype)
    # Half precision lands on boundaries and limits, where a subgradient is a choice; a nudge keeps clear of them.
    if dtype == torch.bfloat16:
        scale = scale * (1 + 1e-3)
    return w, scale, width, signed


@given(
    axes=st.sampled_from(sorted(AXES)),
    bits=st.integers(2, 8),
    dtype=st.sampled_from(sorted(TOLERANCE, key=str)),
    seed=st.integers(0, 1000),
    spread=st.sampled_from([0.05, 0.5, 1.0, 4.0]),
    signed=st.booleans(),
)
def test_values_and_gradients_are_those_of_the_formula(
    axes: str, bits: int, dtype: torch.dtype, seed: int, spread: float, signed: bool
) -> None:
    w, scale, width, signed = random_weight(axes, bits, dtype, seed, spread, signed)
    found, expected = [], []
    for results, dtype_of_w in ((found, dtype), (expected, torch.float64)):
        own, step = w.detach().to(dtype_of_w, copy=True).requires_grad_(), scale.clone().requires_grad_()
        if results is found:
            loss = bin_regularizer(own, step, width, signed, 2**bits)
        else:
            loss = by_the_formula(own, step.double(), width.double(), signed)
        (3 * loss).backward()
        assert own.grad is not None and step.grad is not None
        assert own.grad.dtype == own.dtype and step.grad.dtype == step.dtype
        results += [loss.detach().double(), own.grad.double(), step.grad.double()]
    for ours, theirs in zip(found, expected, strict=True):
        bound = TOLERANCE[dtype] * (float(theirs.abs().max()) + float(scale.max()))
        assert float((ours - theirs).abs().max()) <= bound


def test_by_hand() -> None:
    """Scale 1, 2 bits: codes -2 … 1. Bins: {-2.3 → clipped}, {-0.2, 0.4}, {0.6, 1, 5 → clipped}."""
    w = torch.tensor([-2.3, -0.2, 0.4, 0.6, 1.0, 5.0], requires_grad=True)
    scale = torch.tensor(1.0, requires_grad=True)
    loss = bin_regularizer(w, scale, torch.tensor(2.0), True, 4)
    mean = (0.04 + 0.16 + 0.16) / 6
    variances = 0.18 + ((0.6 - 2.6 / 3) ** 2 + 2 * (1 - 2.6 / 3) ** 2) / 2
    assert loss.item() == pytest.approx(mean + variances, rel=1e-6)
    loss.backward()
    third = 2.6 / 3
    g = [0.0, -0.4 / 6 - 0.6, 0.8 / 6 + 0.6, -0.8 / 6 + 0.6 - third, 1 - third, 1 - third]
    assert w.grad is not None and w.grad.tolist() == pytest.approx([*g[:5], 0.0], abs=1e-6)
    assert scale.grad is not None and scale.grad.item() == pytest.approx(g[5], abs=1e-6)


def test_weights_on_the_grid_cost_nothing() -> None:
    scale = torch.tensor(0.25)
    w = (torch.randint(-8, 8, (16, 16)) * scale).requires_grad_()
    loss = bin_regularizer(w, scale, torch.tensor(4.0), True, 16)
    loss.backward()
    assert loss.item() == 0.0 and w.grad is not None and not w.grad.any()


def test_one_weight_per_bin_has_no_variance() -> None:
    w = torch.tensor([-1.8, -0.9, 0.2, 0.9])
    loss = bin_regularizer(w, torch.tensor(1.0), torch.tensor(2.0), True, 4)
    assert loss.item() == pytest.approx((0.04 + 0.01 + 0.04 + 0.01) / 4, rel=1e-5)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 3e38])
def test_a_weight_that_diverged_makes_the_loss_say_so_and_nothing_else_fail(value: float) -> None:
    w = torch.linspace(-1, 1, 64).view(4, 16)
    w[1, 3] = value
    loss = bin_regularizer(w.requires_grad_(), torch.full((4, 1), 0.1), torch.tensor(4.0), True, 16)
    loss.backward()
    assert bool(loss.isnan()) == math.isnan(value)


@pytest.mark.parametrize("bits", [2, 8])
def test_large_weights_lose_no_precision(bits: int) -> None:
    w = torch.randn(512, 512)
    scale = torch.tensor(2.0 ** (2 - bits))
    own, exact = w.clone().requires_grad_(), w.double().requires_grad_()
    loss = bin_regularizer(own, scale, torch.tensor(float(bits)), True, 2**bits)
    expected = by_the_formula(exact, scale.double(), torch.tensor(float(bits)).double(), True)
    loss.backward()
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert own.grad is not None and exact.grad is not None
    assert float((own.grad - exact.grad).abs().max()) < 1e-5 * float(exact.grad.abs().max()) * math.sqrt(bits)


@pytest.mark.gpu
def test_on_a_gpu() -> None:
    w, scale, width, signed = random_weight("rows, per head", 4, torch.float32, 0, 1.0)
    here = bin_regularizer(w, scale, width, signed, 16)
    there = bin_regularizer(w.cuda(), scale.cuda(), width.cuda(), signed, 16)
    assert there.item() == pytest.approx(here.item(), rel=1e-5)
