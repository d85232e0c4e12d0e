"""The operators beside their formulas: values, every gradient, both dtypes, all granularities, odd shapes."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from grids import SHAPES, TYPES, difference, make_grid, needs_kernels

from qvit.errors import UsageError
from qvit.functional import switchable_fake_quantize
from qvit.kernels import cpu
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
@pytest.mark.parametrize("name", cpu.INSTRUCTION_SETS)
@pytest.mark.parametrize(("shape", "groups"), SHAPES, ids=str)
@pytest.mark.parametrize("x_type", TYPES, ids=str)
def test_instruction_sets_agree_bit_for_bit(
    name: str, shape: tuple[int, ...], groups: tuple[int, ...], x_type: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Values, gradients, codes and sums: a run goes on alike on another processor."""
    if not cpu.has_instructions(name):
        pytest.skip(f"no {name} on this processor")
    pair = [make_grid(groups, signed=True, offset=offset) for offset in (True, False)]
    mixed = Mixed(pair[0], pair[1]._replace(offset=pair[0].offset), torch.rand(groups))
    x, grad = torch.randn(shape).to(x_type), torch.randn(shape).to(x_type)

    def results() -> list[torch.Tensor]:
        found = [codes_on(x, pair[1]), difference_on(grad, x, *pair)]
        for grid in (*pair, mixed):
            found += [quantize_on(x, grid), *backward_on(grad, x, grid)]
        return found

    native = results()
    monkeypatch.setattr(cpu, "_library", lambda: cpu.compiled(name))
    assert all(torch.equal(own, other) for own, other in zip(results(), native, strict=True))


def test_instruction_sets_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="QVIT_KERNELS='sse9': set it to 0 .no kernels., or to one of avx2, avx512"):
        cpu.compiled("sse9")
    monkeypatch.setattr(cpu, "_capabilities", dict)
    with pytest.raises(UsageError, match="this processor has no such instructions"):
        cpu.compiled("avx2")


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


WITHOUT_COMPILER = """
import logging, sys
logging.basicConfig(stream=sys.stdout, format="%(message)s")
import torch
from qvit.kernels import cpu
from qvit.kernels.fake_quantize import Grid, quantize_on
grid = Grid(torch.tensor(0.5), None, torch.tensor(-4.0), torch.tensor(3.0))
print(quantize_on(torch.tensor([0.3, 9.0]), grid).tolist(), cpu.available())
"""


@pytest.mark.parametrize("case", ["no compiler", "a broken one", "switched off"])
def test_without_compiled_kernels_the_formulas_run(case: str, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    broken.write_text("#!/bin/sh\necho 'internal compiler error' >&2\nexit 1\n")
    broken.chmod(0o755)
    environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path / "cache")}
    environment |= {
        "no compiler": {"CXX": str(tmp_path / "none")},
        "a broken one": {"CXX": str(broken)},
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
