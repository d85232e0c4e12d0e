"""The fused forms beside what they stand for: values, every gradient, both dtypes, all granularities, odd shapes."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import calibrated_model, digits_model, small_config
from torch import Tensor, nn

from qvit.errors import UsageError
from qvit.functional import switchable_fake_quantize
from qvit.kernels import cpu
from qvit.kernels.attention import split_heads
from qvit.kernels.fake_quantize import (
    FakeQuantize,
    Grid,
    Mixed,
    _backward,
    _forward,
    backward_on,
    codes_on,
    difference_on,
    quantize_on,
)
from qvit.layers import AttentionSites, QuantConv2d, QuantLinear, QuantQKV, add_quantizers, adopt, linear_sites
from qvit.quantizers import create_quantizer, quantizers_of
from qvit.run import train
from qvit.spec import Layout, PerChannel, PerHead, TensorSpec
from qvit.training.config import TrainConfig
from qvit.training.held_weights import HeldWeights
from qvit.training.loop import run_on_integers

needs_kernels = pytest.mark.skipif(not cpu.available(), reason="no C++ compiler on this machine")
needs_int8 = pytest.mark.skipif(not cpu.has_int8_dot_products(), reason="no 8-bit dot products on this processor")


@pytest.fixture
def plain(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A function that runs another one without compiled kernels."""

    def run(function: Any, *arguments: Any, **options: Any) -> Any:
        with monkeypatch.context() as patch:
            patch.setattr(cpu, "ENABLED", False)
            return function(*arguments, **options)

    return run


# --------------------------------------------------------------------------------------------------- the two operators

SHAPES: list[tuple[tuple[int, ...], tuple[int, ...]]] = [
    ((5, 7), ()),
    ((1,), ()),
    ((3, 1, 17), ()),
    ((0, 4), ()),
    ((2, 3, 5, 7), (3, 1, 1)),
    ((2, 3, 5, 7), (3, 1, 7)),
    ((2, 3, 5, 7), (3, 5, 7)),
    ((2, 5, 33), (33,)),
    ((4, 6, 50), (4, 6, 1)),
    ((6, 4, 5), (4, 1)),
    ((2, 4, 6, 6), (4, 1, 1)),
    ((3, 40000), ()),
    ((2, 3, 200, 100), (3, 1, 1)),
    ((300, 129), (129,)),
]
TYPES = (torch.float32, torch.bfloat16)


def difference(grad: Tensor, x: Tensor, above: Grid, below: Grid) -> Tensor:
    """`difference_on` by its formula."""
    moved = grad.float() * (_forward(x.float(), *above) - _forward(x.float(), *below))
    groups = torch.broadcast_shapes(above.scale.shape, above.quant_max.shape)
    return moved.sum_to_size((1,) * (x.dim() - len(groups)) + groups)


def make_grid(shape: tuple[int, ...], *, signed: bool, offset: bool) -> Grid:
    """Scales of all sizes, so that a good part of the elements is clipped; widths per group."""
    widths = torch.randint(1, 9, shape).float()
    scale = torch.rand(shape) * 2 / torch.exp2(widths) + 0.01
    low = -torch.exp2(widths - 1) if signed else torch.zeros(shape)
    high = torch.exp2(widths - 1) - 1 if signed else torch.exp2(widths) - 1
    return Grid(scale, torch.randn(shape) * 0.3 if offset else None, low, high)


@needs_kernels
@pytest.mark.parametrize(("shape", "groups"), SHAPES, ids=str)
@pytest.mark.parametrize("x_type", TYPES, ids=str)
@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("offset", [True, False])
@pytest.mark.parametrize("threads", [1, 2])
def test_operators_are_their_formulas(
    shape: tuple[int, ...], groups: tuple[int, ...], x_type: torch.dtype, signed: bool, offset: bool, threads: int
) -> None:
    grid = make_grid(groups, signed=signed, offset=offset)
    x = torch.randn(shape).to(x_type)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for out_type in TYPES:
            assert torch.equal(quantize_on(x, grid, out_type), _forward(x, *grid, dtype=out_type))
        for grad_type in TYPES:
            grad = torch.randn(shape).to(grad_type)
            grad_x, sums = backward_on(grad, x, grid)
            expected_x, expected_sums = _backward(grad, x, *grid)
            assert torch.equal(grad_x, expected_x) and grad_x.dtype == x_type
            tolerance = 2e-6 * max(1, x.numel() // max(1, sums[0].numel())) ** 0.5 * 256
            torch.testing.assert_close(sums, expected_sums, rtol=1e-4, atol=tolerance)
            again = backward_on(grad, x, grid)[1]
            assert torch.equal(again, sums), "the same numbers on every run"
            other = make_grid(groups, signed=not signed, offset=offset)
            torch.testing.assert_close(
                difference_on(grad, x, grid, other), difference(grad, x, grid, other), rtol=1e-4, atol=tolerance
            )
    finally:
        torch.set_num_threads(before)


@needs_kernels
@pytest.mark.parametrize(("shape", "groups"), SHAPES, ids=str)
@pytest.mark.parametrize("x_type", TYPES, ids=str)
@pytest.mark.parametrize("offset", [True, False])
@pytest.mark.parametrize("one_share", [True, False])
def test_operators_between_two_grids(
    shape: tuple[int, ...], groups: tuple[int, ...], x_type: torch.dtype, offset: bool, one_share: bool
) -> None:
    """One pass is what two grids one after the other come to, in values, gradient and all sums."""
    pair = [make_grid(groups, signed=True, offset=offset) for _ in range(2)]
    grid = Mixed(pair[0], pair[1], torch.rand(()) if one_share else torch.rand(groups))
    x = torch.randn(shape).to(x_type)
    close_to = {"rtol": 1e-5, "atol": 1e-6} if x_type is torch.float32 else {"rtol": 0.01, "atol": 0.02}
    low, high = (quantize_on(x, own, torch.float32) for own in pair)
    torch.testing.assert_close(quantize_on(x, grid, x_type), torch.lerp(low, high, grid.share).to(x_type), **close_to)
    for grad_type in TYPES:
        grad = torch.randn(shape).to(grad_type)
        grad_x, sums = backward_on(grad, x, grid)
        below, above = (backward_on(grad, x.float(), own) for own in pair)
        expected = torch.lerp(below[0], above[0], grid.share)
        torch.testing.assert_close(grad_x, expected.to(x_type), **close_to)
        parts = [below[1] * (1 - grid.share), above[1] * grid.share, difference_on(grad, x, pair[1], pair[0])[None]]
        tolerance = 2e-6 * max(1, x.numel() // max(1, sums[0].numel())) ** 0.5 * 256
        torch.testing.assert_close(sums, torch.cat(parts), rtol=1e-4, atol=tolerance)
        own = grad.clone() if grad_type is x_type else torch.empty_like(x)
        again, same = backward_on(own if grad_type is x_type else grad, x, grid, own)
        assert again is own and torch.equal(again, grad_x) and torch.equal(same, sums)


@needs_kernels
@pytest.mark.parametrize("order", list(itertools.permutations(range(4)))[1::5], ids=str)
def test_any_order_of_axes(order: tuple[int, ...]) -> None:
    """q, k, v are views of one tensor; gradients come in yet another order."""
    grid, other = (make_grid((3, 1, 1), signed=signed, offset=True) for signed in (True, False))
    sizes = (2, 3, 5, 24)
    x = torch.empty([sizes[i] for i in order]).normal_().permute([order.index(i) for i in range(4)])
    grad = torch.randn(2, 5, 3, 24).transpose(1, 2)
    assert x.shape == sizes == grad.shape
    for view in (x, x[..., ::2], x[:, :, 1:]):
        own = grad[..., : view.shape[3]][:, :, : view.shape[2]]
        assert torch.equal(quantize_on(view, grid), _forward(view, *grid))
        torch.testing.assert_close(backward_on(own, view, grid), _backward(own, view, *grid), rtol=1e-4, atol=1e-3)
        found = difference_on(own, view, grid, other)
        torch.testing.assert_close(found, difference(own, view, grid, other), rtol=1e-4, atol=1e-3)
    expanded = torch.randn(2, 1, 1, 24).expand(sizes)
    assert torch.equal(quantize_on(expanded, grid), _forward(expanded, *grid))


@needs_kernels
@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("groups", [(), (3, 1, 1)])
def test_codes(signed: bool, groups: tuple[int, ...]) -> None:
    grid = make_grid(groups, signed=signed, offset=True)
    x, zero = torch.randn(2, 3, 5, 21), 0 if signed else 128
    codes = codes_on(x, grid, zero)
    assert codes.dtype is torch.int8
    values = (codes.float() + zero) * grid.scale + grid.offset
    assert torch.equal(values, quantize_on(x, grid))


@needs_kernels
def test_numbers_that_are_none() -> None:
    """NaN stays NaN, infinities go to the ends of the grid, halves to the even neighbour, in both forms."""
    grid = Grid(torch.tensor(0.5), None, torch.tensor(-4.0), torch.tensor(3.0))
    x = torch.tensor([float("nan"), float("inf"), float("-inf"), 0.25, 0.75, -0.25, 1.25, -0.0, 1e30])
    expected = [float("nan"), 1.5, -2.0, 0.0, 1.0, -0.0, 1.0, -0.0, 1.5]
    for form in (quantize_on, lambda x, grid: _forward(x, *grid)):
        torch.testing.assert_close(form(x, grid), torch.tensor(expected), rtol=0, atol=0, equal_nan=True)
    assert torch.isnan(quantize_on(x.bfloat16(), grid)[0])
    grad = torch.ones_like(x)
    torch.testing.assert_close(backward_on(grad, x, grid), _backward(grad, x, *grid), equal_nan=True)


@needs_kernels
def test_a_gradient_may_be_overwritten_by_the_result() -> None:
    grid = make_grid((3, 1, 1), signed=True, offset=False)
    x, grad = torch.randn(2, 3, 50, 40), torch.randn(2, 3, 50, 40)
    expected, expected_sums = backward_on(grad, x, grid)
    found, sums = backward_on(grad, x, grid, grad)
    assert found is grad and torch.equal(found, expected) and torch.equal(sums, expected_sums)


def test_operators_are_known_to_torch() -> None:
    grid = make_grid((3, 1, 1), signed=True, offset=True)
    x = torch.randn(2, 3, 5, 7)
    torch.library.opcheck(torch.ops.qvit.fake_quantize.default, (x, *grid))
    torch.library.opcheck(torch.ops.qvit.fake_quantize_backward.default, (x, x, *grid))


@needs_kernels
@pytest.mark.parametrize("learned", [True, False])
@pytest.mark.parametrize("bank", [True, False])
def test_autograd_in_float32(learned: bool, bank: bool) -> None:
    """`FakeQuantize` on compiled kernels beside autograd's own derivatives of the reference."""
    candidates = torch.arange(2.0, 9.0) if bank else torch.zeros(0)
    widths = torch.tensor([2.2, 3.6, 8.0]).view(3, 1, 1) if learned else torch.tensor([2.0, 4.0, 8.0]).view(3, 1, 1)
    leaves = [
        torch.randn(2, 3, 50, 40, requires_grad=True),
        torch.rand(3, 1, 1, 7 if bank else 1).add_(0.02).requires_grad_(),
        torch.randn(3, 1, 1, 7 if bank else 1).mul_(0.2).requires_grad_(),
        widths.requires_grad_(learned),
    ]
    constants = (candidates, (2, 8) if learned else None, False, 1000)
    upstream = torch.randn(2, 3, 50, 40)
    asked = [leaf for leaf in leaves if leaf.requires_grad]
    found = torch.autograd.grad((FakeQuantize.apply(*leaves, *constants) * upstream).sum(), asked)
    expected = torch.autograd.grad((switchable_fake_quantize(*leaves, *constants) * upstream).sum(), asked)
    for own, other in zip(found, expected, strict=True):
        torch.testing.assert_close(own, other, rtol=1e-4, atol=1e-4)


@needs_kernels
@pytest.mark.parametrize("bank", [True, False])
@pytest.mark.parametrize("signed", [True, False])
def test_the_gradient_of_a_width_by_differences(bank: bool, signed: bool) -> None:
    """That of every element between the two neighbouring widths, at a limit to the only one; else as by clipping."""
    candidates = torch.arange(2.0, 9.0) if bank else torch.zeros(0)
    x, upstream = torch.randn(2, 3, 50, 40), torch.randn(2, 3, 50, 40)
    scales = torch.rand(3, 1, 1, 7 if bank else 1).add_(0.02).requires_grad_()
    offsets = torch.randn(3, 1, 1, 7 if bank else 1).mul_(0.2).requires_grad_()
    for widths, sides in (((2.2, 3.6, 8.0), ((2, 3), (3, 5), (7, 8))), ((2.0, 7.4, 5.5), ((2, 3), (6, 8), (5, 7)))):
        width = torch.tensor(widths).view(3, 1, 1).requires_grad_()
        leaves = (x.clone().requires_grad_(), scales, offsets, width)
        results = {}
        for gradient in ("difference", "clipping"):
            out = FakeQuantize.apply(*leaves, candidates, (2, 8), signed, 1000, None, gradient)
            results[gradient] = (out.detach(), *torch.autograd.grad((out * upstream).sum(), leaves))
        for own, other in list(zip(*results.values(), strict=True))[:-1]:
            assert torch.equal(own, other)
        wanted, about = [], (candidates, None, signed, 1)
        for head, (below, above) in enumerate(sides):
            low, high = (
                switchable_fake_quantize(x, scales, offsets, torch.full((3, 1, 1), float(n)), *about).detach()
                for n in (below, above)
            )
            moved = float(((high - low) * upstream)[:, head].sum()) / (above - below)
            wanted.append(moved)
        assert results["difference"][-1].flatten().tolist() == pytest.approx(wanted, rel=1e-4, abs=1e-3)


# ------------------------------------------------------------------------------------------------- layers and attention


def gradients_of(model: nn.Module, images: Tensor, upstream: Tensor, *, bf16: bool = False) -> dict[str, Tensor]:
    """The output and the gradient of every parameter and of the images."""
    model.zero_grad()
    images = images.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        out = model(images)
    (out.float() * upstream).sum().backward()
    own = {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert images.grad is not None
    return {"output": out.detach().float(), "images": images.grad, **own}


def close(found: dict[str, Tensor], expected: dict[str, Tensor], share: float) -> None:
    """Every tensor within `share` of the norm of the expected one."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        distance = (found[name].float() - value.float()).norm()
        assert distance <= share * value.float().norm() + 1e-7, (name, float(distance / value.float().norm()))


def layer(kind: str, inputs: TensorSpec, weights: TensorSpec) -> nn.Module:
    """A calibrated linear layer, or a convolution over patches."""
    if kind == "conv":
        module: Any = adopt(QuantConv2d, nn.Conv2d(3, 10, 4, stride=4))
        example = torch.randn(2, 3, 8, 12)
    else:
        module = adopt(QuantLinear, nn.Linear(24, 10, bias=kind == "bias"))
        example = torch.randn(2, 9, 24)
    sites = {site.name: site for site in linear_sites("layer", module, TensorSpec())}
    add_quantizers(module, "layer", sites, {"layer.input": inputs, "layer.weight": weights})
    for name, value in (("input", example), ("weight", module.weight)):
        quantizer = getattr(module, f"{name}_quantizer")
        observer = quantizer.create_observer()
        observer.observe(value.detach())
        quantizer.initialize(observer)
    return module


SPECS = {
    "per tensor": TensorSpec(bit_width=3),
    "offset": TensorSpec(bit_width=4, signed=False, symmetric=False),
    "8 bits, unsigned": TensorSpec(bit_width=8, signed=False),
    "per channel": TensorSpec(bit_width=3, granularity=PerChannel()),
    "switchable": TensorSpec(bit_width=4, learn_bit_width=True, switchable_scale=True),
    **{
        gradient: TensorSpec(
            bit_width=4,
            learn_bit_width=True,
            switchable_scale=True,
            width_gradient=gradient,
            signed=False,
            symmetric=False,
            scale_gradient=factor,
        )
        for gradient, factor in (("difference", "count"), ("interpolation", "count-linear"))
    },
    "norm": TensorSpec(bit_width=3, scale_gradient="norm"),
}


@needs_kernels
@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("kind", ["bias", "no bias", "conv"])
@pytest.mark.parametrize("spec", SPECS)
def test_a_layer_with_its_input_s_quantizer(plain: Any, kind: str, spec: str, bf16: bool) -> None:
    if kind == "conv" and spec == "per channel":
        pytest.skip("a convolution with a scale per channel has no fused form")
    module = layer(kind, SPECS[spec], TensorSpec(bit_width=4, granularity=PerChannel()))
    off_integers(module)
    images = torch.randn(5, 3, 8, 12) if kind == "conv" else torch.randn(5, 7, 24)
    upstream = torch.randn(5, 10, 2, 3) if kind == "conv" else torch.randn(5, 7, 10)
    found = gradients_of(module, images, upstream, bf16=bf16)
    expected = plain(gradients_of, module, images, upstream, bf16=bf16)
    close(found, expected, 0.02 if bf16 else 1e-5)
    assert "input_quantizer.scale" in found


def off_integers(module: nn.Module) -> None:
    """Moves learned widths by a third of a bit."""
    with torch.no_grad():
        for _, quantizer in quantizers_of(module):
            if quantizer.learns_width:
                quantizer.bit_width.add_(0.3)


class Attention(AttentionSites):
    """Nothing but the products, with a bias."""

    def __init__(self, bias: Tensor | None) -> None:
        super().__init__()
        self.bias = None if bias is None else nn.Parameter(bias)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = x.unflatten(2, (3, 3, 8)).permute(2, 0, 3, 1, 4).unbind(0)
        return self.attend(q, k, v, 8**-0.5, self.bias, nn.Identity())


def attention(bias: Tensor | None, sites: tuple[str, ...], spec: TensorSpec) -> nn.Module:
    module = Attention(bias)
    for site in sites:
        own = spec.changed({"signed": False}) if site == "probs" else spec
        layout = Layout(heads=(3, 1, 1), channels=(3, 1, 8))
        quantizer = create_quantizer(own, layout)
        observer = quantizer.create_observer()
        example = torch.rand(4, 3, 11, 11).softmax(-1) if site == "probs" else torch.randn(4, 3, 11, 8)
        observer.observe(example)
        quantizer.initialize(observer)
        module.add_module(f"{site}_quantizer", quantizer)
    return module


ALL = ("query", "key", "value", "probs")
PER_HEAD = TensorSpec(bit_width=(2, 3, 5), granularity=PerHead())


@needs_kernels
@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("bias", [None, (1, 3, 11, 11), (7, 3, 11, 11), (11, 11)], ids=str)
@pytest.mark.parametrize("sites", [ALL, ("query",), ("probs",), ("key", "value")], ids=str)
def test_attention_beside_its_plain_form(
    plain: Any, monkeypatch: pytest.MonkeyPatch, bias: tuple[int, ...] | None, sites: tuple[str, ...], bf16: bool
) -> None:
    """Several chunks, the last one shorter; a bias for all images or one for each."""
    monkeypatch.setattr("qvit.kernels.attention.SCORES", 3 * 3 * 11 * 11)
    module = attention(None if bias is None else torch.randn(bias), sites, PER_HEAD)
    x, upstream = torch.randn(7, 11, 72), torch.randn(7, 3, 11, 8)
    found = gradients_of(module, x, upstream, bf16=bf16)
    expected = plain(gradients_of, module, x, upstream, bf16=bf16)
    close(found, expected, 0.05 if bf16 else 2e-5)


@needs_kernels
@pytest.mark.parametrize("learn", [None, "clipping", "difference", "interpolation"])
def test_attention_with_learned_widths_and_switchable_scales(plain: Any, learn: Any) -> None:
    spec = TensorSpec(
        bit_width=(3, 4, 6),
        granularity=PerHead(),
        learn_bit_width=learn is not None,
        width_gradient=learn or "clipping",
        switchable_scale=True,
        signed=False,
        symmetric=False,
    )
    module = attention(None, ALL, spec)
    off_integers(module)
    x, upstream = 2 * torch.randn(7, 11, 72), torch.randn(7, 3, 11, 8)
    close(gradients_of(module, x, upstream), plain(gradients_of, module, x, upstream), 2e-5)


@needs_kernels
@pytest.mark.parametrize("beside", [True, False])
def test_gradients_of_q_k_v_that_lie_side_by_side_are_not_copied(beside: bool) -> None:
    qkv = torch.randn(2, 5, 3 * 4 * 6, requires_grad=True)
    parts = split_heads(qkv, 4)
    memory = torch.randn(2, 5, 3, 4, 6)
    grads = memory.permute(2, 0, 3, 1, 4).unbind(0)
    given = grads if beside else [grads[0], grads[1].contiguous(), grads[2]]
    seen: list[Tensor] = []
    qkv.register_hook(seen.append)
    torch.autograd.backward(list(parts), list(given))
    assert torch.equal(seen[0], memory.flatten(2))
    assert (seen[0].data_ptr() == memory.data_ptr()) is beside
    expected = qkv.detach().unflatten(2, (3, 4, 6)).permute(2, 0, 3, 1, 4)
    assert all(torch.equal(part, other) for part, other in zip(parts, expected, strict=True))


@needs_kernels
@pytest.mark.parametrize("plan", ["w3a3", "w4a8", "w2a2"])
def test_a_whole_model(plain: Any, plan: str) -> None:
    model = calibrated_model(plan)
    images, upstream = torch.randn(9, 1, 8, 8), torch.randn(9, 10)
    close(gradients_of(model, images, upstream), plain(gradients_of, model, images, upstream), 2e-4)


@needs_kernels
def test_who_looks_at_a_quantizer_still_sees_what_passes() -> None:
    model = calibrated_model("w3a3")
    seen: list[str] = []
    for name, quantizer in quantizers_of(model):
        quantizer.register_forward_hook(lambda module, inputs, out, name=name: seen.append(name))
    model(torch.randn(2, 1, 8, 8))
    assert sorted(seen) == sorted(name for name, _ in quantizers_of(model))


@needs_kernels
def test_widths_that_change_are_noticed(plain: Any) -> None:
    """Ranges of fixed widths are kept: not across a change in place, and not as tensors that cannot be trained with."""
    model = calibrated_model("w3a3")
    images = torch.randn(2, 1, 8, 8)
    with torch.inference_mode():
        model(images)
    model(images).sum().backward()
    for _, quantizer in quantizers_of(model):
        quantizer.bit_width.fill_(2)
    torch.testing.assert_close(model(images), plain(model, images), rtol=1e-4, atol=1e-4)
    for _, quantizer in quantizers_of(model):
        quantizer.freeze(4)
    torch.testing.assert_close(model(images), plain(model, images), rtol=1e-4, atol=1e-4)


@needs_kernels
def test_only_raw_inputs_are_kept() -> None:
    """A linear layer keeps x and the weights, attention keeps q, k, v: nothing of the size of the scores."""
    module = attention(None, ALL, PER_HEAD)
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        module(torch.randn(7, 11, 72, requires_grad=True))
    assert sorted(size for size in kept if size > 3) == [7 * 3 * 11 * 8] * 3


# ------------------------------------------------------------------------------------------------------------- integers


@needs_kernels
@needs_int8
@pytest.mark.parametrize("weights", ["per tensor", "per channel"])
@pytest.mark.parametrize("inputs", ["per tensor", "offset", "8 bits, unsigned", "switchable"])
@pytest.mark.parametrize("kind", ["bias", "no bias"])
def test_integer_products_are_the_simulated_ones(kind: str, inputs: str, weights: str) -> None:
    """To the rounding of the float sums; gradients are the same computation."""
    module: Any = layer(kind, SPECS[inputs], SPECS[weights].changed({"bit_width": 8}))
    x, upstream = torch.randn(5, 7, 24), torch.randn(5, 7, 10)
    simulated = gradients_of(module, x, upstream)
    module.integer_forward = True
    codes, scale = module.codes()
    assert torch.equal(codes.float() * scale[:, None], module.weight_quantizer(module.weight))
    integers = gradients_of(module, x, upstream)
    assert not torch.equal(integers["output"], simulated["output"]), "another order of operations"
    close(integers, simulated, 1e-6)
    exact = module.input_quantizer(x).double() @ module.weight_quantizer(module.weight).double().t()
    exact = exact if module.bias is None else exact + module.bias
    assert (integers["output"] - exact).norm() <= (simulated["output"] - exact).norm() * 3


@needs_kernels
@needs_int8
def test_integers_in_a_whole_model_and_where_they_cannot_be() -> None:
    model = calibrated_model("w4a4")
    images = torch.randn(9, 1, 8, 8)
    simulated = model(images)
    config = TrainConfig.create(model="vit_digits", method="lsq+", budget="4bit", integer_forward=True)
    run_on_integers(model, config)
    on_integers = [m for m in model.modules() if isinstance(m, (QuantLinear, QuantQKV)) and m.integer_forward]
    assert len(on_integers) == sum(isinstance(m, (QuantLinear, QuantQKV)) for m in model.modules())
    close({"x": model(images).detach()}, {"x": simulated.detach()}, 0.05)
    columns = layer("bias", SPECS["per tensor"], SPECS["per channel"])
    columns.integer_forward = True  # type: ignore[assignment]
    shared = layer("bias", SPECS["per channel"], SPECS["per tensor"])
    shared.integer_forward = True  # type: ignore[assignment]
    shared(torch.randn(2, 3, 24))  # a scale per input channel: simulated, without a complaint
    for inputs, weights in ((8, 12), (12, 8)):
        wide: Any = layer("bias", TensorSpec(bit_width=inputs), TensorSpec(bit_width=weights))
        simulated = wide(images := torch.randn(2, 3, 24))
        wide.integer_forward = True
        assert torch.equal(wide(images), simulated)


def test_what_excludes_integers(monkeypatch: pytest.MonkeyPatch) -> None:
    model = digits_model()
    settings = {"model": "vit_digits", "method": "lsq+", "budget": "4bit", "integer_forward": True}
    with pytest.raises(UsageError, match="compile exclude each other"):
        run_on_integers(model, TrainConfig.create(**settings, compile=True))
    monkeypatch.setattr(cpu, "ENABLED", False)
    with pytest.raises(UsageError, match="has no compiled kernels"):
        run_on_integers(model, TrainConfig.create(**settings))
    monkeypatch.undo()
    monkeypatch.setattr("qvit.kernels.cpu.has_int8_dot_products", lambda: False)
    if cpu.available():
        with pytest.raises(UsageError, match="no 8-bit dot products"):
            run_on_integers(model, TrainConfig.create(**settings))


# ------------------------------------------------------------------------------------------- once per step, compilation


@pytest.mark.parametrize("plan", ["w3a3", "w4a4"])
def test_weights_quantized_once_have_the_gradients_of_each_time(plan: str) -> None:
    model = calibrated_model(plan)
    batches = torch.randn(4, 3, 1, 8, 8)
    model.zero_grad()
    for batch in batches:
        model(batch).square().sum().backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    held, calls = HeldWeights(model), dict.fromkeys(HeldWeights(model).quantizers, 0)
    for name, quantizer in held.quantizers.items():
        original = quantizer.fake_quantize

        def counted(x: Tensor, *more: Any, name: str = name, original: Any = original) -> Tensor:
            calls[name] += 1
            return original(x, *more)

        quantizer.fake_quantize = counted  # type: ignore[method-assign]
    with held.first():
        for batch in batches[:-1]:
            model(batch).square().sum().backward()
        weights = [p for name, p in model.named_parameters() if name.endswith("fc1.weight")]
        assert weights and all(weight.grad is None for weight in weights)
    with held.last():
        model(batches[-1]).square().sum().backward()
    assert calls and set(calls.values()) == {1}
    close({name: p.grad for name, p in model.named_parameters() if p.grad is not None}, expected, 1e-5)
    assert all(quantizer.held is None for quantizer in held.quantizers.values())


def test_no_number_is_asked_for_in_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU that would make the host wait."""
    model = calibrated_model("w3a3")
    images = torch.randn(4, 1, 8, 8)

    def refuse(*_: Any, **__: Any) -> Any:
        raise AssertionError("a tensor's content was asked for")

    for name in ("item", "tolist", "__bool__", "__int__", "__float__", "__index__", "numpy"):
        monkeypatch.setattr(Tensor, name, refuse)
    model(images).sum().backward()


WITHOUT_COMPILER = """
import logging, sys
logging.basicConfig(stream=sys.stdout, format="%(message)s")
import torch
from qvit.kernels import cpu
from qvit.kernels.fake_quantize import Grid, quantize_on
grid = Grid(torch.tensor(0.5), None, torch.tensor(-4.0), torch.tensor(3.0))
print(quantize_on(torch.tensor([0.3, 9.0]), grid).tolist(), cpu.available())
"""


@pytest.mark.parametrize("case", ["no compiler", "a broken one", "nowhere to write", "switched off"])
def test_without_compiled_kernels_the_formulas_run(case: str, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    broken.write_text("#!/bin/sh\necho 'internal compiler error' >&2\nexit 1\n")
    broken.chmod(0o755)
    environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path / "cache")}
    environment |= {
        "no compiler": {"CXX": str(tmp_path / "none")},
        "a broken one": {"CXX": str(broken)},
        "nowhere to write": {"XDG_CACHE_HOME": str(broken)},
        "switched off": {"QVIT_KERNELS": "0"},
    }[case]
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    done = subprocess.run([sys.executable, "-c", WITHOUT_COMPILER], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    *messages, result = done.stdout.strip().splitlines()
    assert result == "[0.5, 1.5] False"
    if case == "switched off":
        assert not messages
    else:
        assert len(messages) == 1 and "no compiled kernels, so quantization is slower" in messages[0]
        assert "internal compiler error" in messages[0] or case != "a broken one"


IN_TRITONS_INTERPRETER = """
import torch
from qvit.kernels import gpu
from qvit.kernels.fake_quantize import Mixed, _backward, _forward, backward_on, quantize_on
from test_kernels import SHAPES, TYPES, difference, make_grid
reduced = 0
for shape, groups in SHAPES[:11]:
    for offset in (True, False):
        for dtype in TYPES:
            grid = make_grid(groups, signed=True, offset=offset)
            x, grad = torch.randn(shape).to(dtype), torch.randn(shape)
            assert torch.equal(gpu.forward(x, grid, torch.float32), _forward(x, *grid, dtype=torch.float32)), shape
            found, expected = gpu.backward(grad, x, grid), _backward(grad, x, *grid)
            if found is not None:
                reduced += 1
                # The interpreter cuts bfloat16 off instead of rounding.
                torch.testing.assert_close(found[0], expected[0], rtol=0 if dtype is TYPES[0] else 0.01, atol=0)
                torch.testing.assert_close(found[1], expected[1], rtol=1e-4, atol=1e-3)
            other = make_grid(groups, signed=False, offset=offset)
            found = gpu.difference(grad, x, grid, other)
            if found is not None:
                reduced += 1
                torch.testing.assert_close(found, difference(grad, x, grid, other), rtol=1e-4, atol=1e-3)
            close_to = {"rtol": 1e-5, "atol": 1e-6} if dtype is TYPES[0] else {"rtol": 0.01, "atol": 0.02}
            for share in (torch.rand(()), torch.rand(groups)):
                pair = Mixed(grid, other, share)
                found = gpu.forward(x, pair.numbers(), torch.float32)
                torch.testing.assert_close(found, quantize_on(x, pair, torch.float32), rtol=1e-5, atol=1e-6)
                found = gpu.backward(grad, x, pair.numbers())
                if found is not None:
                    reduced += 1
                    expected = backward_on(grad, x, pair)
                    torch.testing.assert_close(found[0], expected[0], **close_to)
                    torch.testing.assert_close(found[1], expected[1], rtol=1e-4, atol=1e-3)
q = torch.randn(2, 5, 3, 3, 8).permute(2, 0, 3, 1, 4)[0]
grid, grad = make_grid((3, 1, 1), signed=True, offset=True), torch.randn(2, 5, 3, 8).transpose(1, 2)
assert torch.equal(gpu.forward(q, grid, q.dtype), _forward(q, *grid))
torch.testing.assert_close(gpu.backward(grad, q, grid), _backward(grad, q, *grid), rtol=1e-4, atol=1e-3)
other = make_grid((3, 1, 1), signed=False, offset=True)
torch.testing.assert_close(gpu.difference(grad, q, grid, other), difference(grad, q, grid, other), rtol=1e-4, atol=1e-3)
memory = torch.empty(2, 5, 3, 3, 8)
out = memory.permute(2, 0, 3, 1, 4)[1]
assert gpu.backward(grad, q, grid, out)[0] is out and torch.equal(out, _backward(grad, q, *grid)[0])
pair = Mixed(grid, other, torch.tensor(0.3))
torch.testing.assert_close(gpu.forward(q, pair.numbers(), q.dtype), quantize_on(q, pair), rtol=1e-5, atol=1e-6)
expected = backward_on(grad, q, pair)
torch.testing.assert_close(gpu.backward(grad, q, pair.numbers(), out), expected, rtol=1e-4, atol=1e-3)
print(reduced)
"""


NUMBERS_IN_TRITONS_INTERPRETER = """
import itertools
import torch
from qvit.kernels import gpu
from qvit.kernels.fake_quantize import Grid, Meta, formula_gradients, formula_resolve, parameter_gradients, resolve
made = 0
shapes = [((), ()), ((3, 1, 1), ()), ((), (3, 1, 1)), ((3, 1, 1), (3, 1, 1)), ((40, 1), (40, 1)), ((20, 1), ())]
options = [(True, False), (True, False), (True, False), (None, "count", "tensor", "linear")]
for (rows, widths), learned, offset, signed, counting in itertools.product(shapes, *options):
    for columns in (1, 7):
        if columns == 1 and counting == "tensor":
            continue
        banks = torch.rand(*rows, columns) * 0.1
        banks.view(-1)[0] = 1e-9
        offsets = torch.randn(*rows, columns) if offset else None
        width = torch.rand(widths) * 9 + 0.5 if learned else torch.randint(2, 9, widths).float()
        limits = (2, 8) if learned else None
        of_groups = torch.rand(torch.broadcast_shapes(rows, widths)) * 50 + 1
        elements = {None: None, "count": 70, "tensor": of_groups, "linear": 70}[counting]
        linear = counting == "linear"
        first = 2 if columns > 1 else 0
        meta = Meta(torch.arange(2.0, 9.0)[:columns] if columns > 1 else torch.empty(0), limits, signed, elements)
        meta = meta._replace(linear=linear, gradient="interpolation")
        grid, known = formula_resolve(banks, offsets, width, meta)
        own = gpu.resolve(banks, offsets, width, first, limits, signed, 1e-8)
        for left, right in zip(own, (*grid, known), strict=True):
            assert (left is None and right is None) or torch.equal(left, right.expand_as(left)), (rows, widths)
        sums = torch.randn(3, *(1,) * (3 - own[0].dim()), *own[0].shape)
        about = (first, limits, signed, elements, linear)
        found = gpu.parameter_gradients(sums, own[0], banks, offsets, width, *about)
        wanted = formula_gradients(sums, Grid(*own[:4]), own[4], banks, offsets, width, meta)
        if learned:  # on two grids
            grid, lower = resolve(banks, offsets, width, meta)
            own = gpu.resolve(banks, offsets, width, *about[:3], 1e-8, mixed=True)
            parts = (*grid.lower, lower, *grid.upper, None, grid.share)
            for i, (left, right) in enumerate(zip(own, parts, strict=True)):
                assert i == 9 or left is right or torch.equal(left, right.expand_as(left)), (i, rows, widths)
            sums = torch.randn(7, *(1,) * (3 - own[0].dim()), *own[0].shape)
            found += gpu.parameter_gradients(sums, own[0], banks, offsets, width, *about, mixed=True)
            wanted += parameter_gradients(sums, grid, lower, banks, offsets, width, meta)
        for left, right in zip(found, wanted, strict=True):
            assert (left is None and right is None) or left.shape == right.shape
            if left is not None:
                torch.testing.assert_close(left, right, rtol=1e-5, atol=1e-5)
        made += 1
assert gpu.resolve(torch.rand(3, 1, 7), None, torch.full((1, 4), 3.0), 2, None, True, 1e-8) is None
print(made)
"""


@pytest.mark.parametrize(("script", "least"), [(IN_TRITONS_INTERPRETER, 56), (NUMBERS_IN_TRITONS_INTERPRETER, 200)])
def test_triton_kernels_in_its_interpreter(script: str, least: int) -> None:
    """Values equal, sums close; per channel, backward is left to the formulas."""
    pytest.importorskip("triton")
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), *filter(None, sys.path)])
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(done.stdout) >= least


@pytest.mark.gpu
@pytest.mark.parametrize(("shape", "groups"), SHAPES, ids=str)
def test_operators_on_a_gpu_are_their_formulas(shape: tuple[int, ...], groups: tuple[int, ...]) -> None:
    grid = Grid(*(None if part is None else part.cuda() for part in make_grid(groups, signed=True, offset=False)))
    x, grad = torch.randn(shape).cuda(), torch.randn(shape).cuda()
    assert torch.equal(quantize_on(x, grid), _forward(x, *grid))
    grad_x, sums = backward_on(grad, x, grid)
    expected_x, expected = _backward(grad, x, *grid)
    assert torch.equal(grad_x, expected_x)
    torch.testing.assert_close(sums, expected, rtol=1e-3, atol=1e-2)
    other = Grid(*(None if part is None else part.cuda() for part in make_grid(groups, signed=False, offset=False)))
    found = difference_on(grad, x, grid, other)
    torch.testing.assert_close(found, difference(grad, x, grid, other), rtol=1e-3, atol=1e-2)
    pair = Mixed(grid, other, torch.rand(groups).cuda())
    low, high = (_forward(x, *own) for own in (grid, other))
    torch.testing.assert_close(quantize_on(x, pair), torch.lerp(low, high, pair.share), rtol=1e-5, atol=1e-6)
    grad_x, sums = backward_on(grad, x, pair)
    below, above = (_backward(grad, x, *own) for own in (grid, other))
    torch.testing.assert_close(grad_x, torch.lerp(below[0], above[0], pair.share), rtol=1e-5, atol=1e-6)
    parts = [below[1] * (1 - pair.share), above[1] * pair.share, difference(grad, x, other, grid)[None]]
    torch.testing.assert_close(sums, torch.cat(parts), rtol=1e-3, atol=1e-2)


@pytest.mark.gpu
@pytest.mark.parametrize("gradient", ["interpolation", "difference", "clipping"])
@pytest.mark.parametrize("linear", [True, False])
def test_learned_widths_on_a_gpu_are_those_on_a_cpu(gradient: str, linear: bool) -> None:
    """Values and all gradients, by head, with a scale for each candidate."""
    x, grad = torch.randn(4, 3, 65, 64), torch.randn(4, 3, 65, 64)
    bank, width = torch.rand(3, 1, 1, 7) * 0.3 + 0.05, torch.tensor([2.4, 3.9, 8.0]).view(3, 1, 1)
    results = []
    for device in ("cpu", "cuda"):
        own = [part.detach().to(device).requires_grad_() for part in (x, bank, width)]
        candidates = torch.arange(2.0, 9.0, device=device)
        about = (candidates, (2, 8), True, 4 * 65 * 64, 2, gradient, linear)
        out = FakeQuantize.apply(own[0], own[1], None, own[2], *about)
        out.backward(grad.to(device))
        results.append([out.detach(), *(part.grad for part in own)])
    for left, right in zip(*results, strict=True):
        torch.testing.assert_close(right.cpu(), left, rtol=1e-3, atol=1e-3)


@needs_kernels
@needs_int8
def test_a_run_on_integers(tmp_path: Path) -> None:
    """The whole of a training, with widths that are learned and frozen, and in micro-batches."""
    config = small_config(method="qvit", budget="3bit", epochs=2, integer_forward=True, accumulate=2)
    train(config, tmp_path / "run", quiet=True)
    result = json.loads((tmp_path / "run" / "result.json").read_text(encoding="utf-8"))
    assert 0 <= result["accuracy"] <= 100 and result["bit_operations"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("kernel", ["forward", "backward", "difference", "resolve", "gradients"])
@pytest.mark.parametrize("dtype", ["*fp32", "*bf16"])
@pytest.mark.parametrize("flag", [True, False])
@pytest.mark.parametrize("mixed", [True, False])
def test_triton_kernels_compile_for_a_gpu_that_is_not_there(kernel: str, dtype: str, flag: bool, mixed: bool) -> None:
    triton = pytest.importorskip("triton")
    compiler, backends = pytest.importorskip("triton.compiler"), pytest.importorskip("triton.backends.compiler")
    from qvit.kernels import gpu

    function: Any = getattr(gpu, f"_{kernel}_kernel")
    constants = {"SHIFTED": flag, "COLUMNS": 7 if flag else 0, "VARIES": flag, "BLOCK": 1024, "MIXED": mixed}
    if kernel in ("resolve", "gradients"):
        constants |= {"SIGNED": flag, "LIMITED": flag, "OF_SCALE": int(flag), "OF_WIDTH": int(flag), "BLOCK": 16}
        constants |= {"COLUMNS": 7 if flag else 1, "PADDED": 8 if flag else 1, "SCALED": 1 + flag, "LINEAR": flag}
    constants = {name: value for name, value in constants.items() if name in function.arg_names}
    data = {"x", "out", "grad", "grad_x"} if kernel in ("forward", "backward", "difference") else set()
    pointers = {"scale", "offset", "low", "high", "partial", "scales", "offsets", "widths", "sums", "grid", "elements"}
    pointers |= {"scale2", "offset2", "low2", "high2", "share", "out", "to_scales", "to_offsets", "to_width"}
    pointers -= {"out"} & data
    pointers -= {"grid"} if kernel == "resolve" else set()

    def kind(name: str) -> str:
        if name in constants:
            return "constexpr"
        if name in ("least", "most", "smallest", "number"):
            return "fp32"
        return dtype if name in data else "*fp32" if name in pointers else "i32"

    source = compiler.ASTSource(function, {name: kind(name) for name in function.arg_names}, constants)
    target = backends.GPUTarget("cuda", 90, 32)
    made = triton.compile(source, target=target, options={"enable_fp_fusion": False})
    assert made.asm["cubin"] and made.metadata.shared <= 227 * 1024
