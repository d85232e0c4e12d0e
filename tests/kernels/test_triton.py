"""The Triton kernels: in Triton's interpreter, compiled for a GPU that is not there, and on a GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from grids import SHAPES, difference, make_grid
from without_gpu import interpreted

from qvit.kernels.fake_quantize import (
    FakeQuantize,
    Grid,
    Mixed,
    _backward,
    _forward,
    backward_on,
    difference_on,
    quantize_on,
)

IN_TRITONS_INTERPRETER = """
import torch
from qvit.kernels import gpu
from qvit.kernels.fake_quantize import Mixed, _backward, _forward, backward_on, quantize_on
from grids import SHAPES, TYPES, difference, make_grid
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
    assert int(interpreted(script)) >= least


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


@pytest.mark.slow
@pytest.mark.parametrize("kernel", ["forward", "backward", "difference", "resolve", "gradients"])
@pytest.mark.parametrize("dtype", ["*fp32", "*bf16"])
@pytest.mark.parametrize("flag", [True, False])
@pytest.mark.parametrize("mixed", [True, False])
def test_triton_kernels_compile_for_a_gpu_that_is_not_there(kernel: str, dtype: str, flag: bool, mixed: bool) -> None:
    triton = pytest.importorskip("triton")
    compiler, backends = pytest.importorskip("triton.compiler"), pytest.importorskip("triton.backends.compiler")
    from qvit.kernels import gpu_kernels

    function: Any = getattr(gpu_kernels, f"{kernel}_kernel")
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
