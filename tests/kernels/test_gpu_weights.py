"""Weights of all layers quantized in one launch: in Triton's interpreter, compiled for a GPU, on a GPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from without_gpu import compiled, interpreted

from qvit.kernels import gpu_weights
from qvit.kernels.fake_quantize import FakeQuantize, Learned, Meta

COMPARED = """
import sys
sys.path.insert(0, sys.argv[1])
from test_gpu_weights import at_once, one_by_one, several_weights, values_and_gradients
import torch
from qvit.kernels import cpu, gpu_weights

cpu.ENABLED = False
torch.manual_seed(0)
gpu_weights._BLOCK = 64
for offsets in (True, False):
    weights = several_weights("cpu", offsets)
    assert all(gpu_weights.fits(*own) for own in weights)
    found, expected = (values_and_gradients(way, weights) for way in (at_once, one_by_one))
    for left, right in zip(found[0], expected[0], strict=True):
        assert torch.equal(left, right)
    for left, right in zip(found[1], expected[1], strict=True):
        torch.testing.assert_close(left, right, rtol=1e-5, atol=1e-5)
print("equal")
"""

MODEL = """
import torch
from tiny_models import calibrated_model, digit_batches
from qvit.kernels import cpu, gpu_weights
from qvit.training.held_weights import HeldWeights

images, launched = digit_batches(1, 2)[0], []
together = gpu_weights.quantize_together
gpu_weights.handles = gpu_weights.fits
gpu_weights.quantize_together = lambda weights, tables: launched.append(len(weights)) or together(weights, tables)
for plan in ("w4a4", "w3a8"):
    model = calibrated_model(plan).train()
    held = HeldWeights(model)
    def losses():
        model.zero_grad()
        loss = model(images).square().mean()
        loss.backward()
        return [loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]
    expected = losses()
    with held.together():
        found = losses()
    assert torch.equal(found[0], expected[0]) and len(found) == len(expected) > 20
    for left, right in zip(found, expected, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-6)
    assert launched.pop() == len(held.quantizers) > 4
print("equal")
"""


def several_weights(device: str, offsets: bool = True) -> list[gpu_weights.Weight]:
    """One for all, rows, blocks of rows, blocks of columns, channels of heads; banks and single scales; all widths."""

    def some(*widths: float) -> torch.Tensor:
        return torch.tensor(widths, dtype=torch.float32, device=device)

    cases: list[Any] = [
        ((5, 7), (), 1, True, False, some(4).view(())),
        ((4, 70), (4, 1), 7, True, True, some(3).view(())),
        ((3, 4, 20), (3, 1, 1), 7, True, False, some(2, 8, 5).view(3, 1, 1)),
        ((6, 3, 50), (3, 1), 1, True, True, some(2, 4, 3).view(3, 1)),
        ((20, 16), (), 7, False, False, some(8).view(())),
        ((3, 3, 4, 4), (3, 1, 1, 1), 1, True, False, some(5).view(())),
        ((3, 2, 20), (3, 2, 1), 1, True, False, some(2, 8, 5).view(3, 1, 1)),
    ]
    weights: list[gpu_weights.Weight] = []
    for shape, groups, columns, signed, shifted, width in cases:
        tensor = torch.randn(shape).to(device).requires_grad_()
        scales = (torch.rand(*groups, columns) * 0.2 + 0.05).to(device).requires_grad_()
        own = (torch.randn(*groups, columns) * 0.1).to(device).requires_grad_() if shifted and offsets else None
        candidates = torch.arange(2.0, 9.0, device=device)[: columns if columns > 1 else 0]
        meta = Meta(candidates, None, signed, 77, None, 2 if columns > 1 else 0)
        weights.append((tensor, Learned(scales, own, width, meta)))
    return weights


def at_once(weights: list[gpu_weights.Weight]) -> list[torch.Tensor]:
    return gpu_weights.quantize_together(weights, {})


def one_by_one(weights: list[gpu_weights.Weight]) -> list[torch.Tensor]:
    return [FakeQuantize.apply(tensor, *own[:3], *own.meta[:4], own.meta.first) for tensor, own in weights]


def values_and_gradients(way: Any, weights: list[gpu_weights.Weight]) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """x̂ of all, and the gradients of tensors, scales and offsets."""
    leaves = [part for tensor, own in weights for part in (tensor, own.scales, own.offsets) if part is not None]
    for leaf in leaves:
        leaf.grad = None
    values = way(weights)
    generator = torch.Generator().manual_seed(1)
    upstream = [torch.randn(value.shape, generator=generator).to(value.device) for value in values]
    torch.autograd.backward(values, upstream)
    return [value.detach() for value in values], [leaf.grad.clone() for leaf in leaves]  # type: ignore[union-attr]


@pytest.mark.slow
def test_values_and_gradients_in_the_interpreter() -> None:
    """Values bit for bit, gradients of weights, scales and offsets to rounding, in blocks that divide nothing."""
    assert interpreted(COMPARED, str(Path(__file__).parent)) == "equal\n"


@pytest.mark.slow
def test_a_model_trains_the_same_in_the_interpreter() -> None:
    """The loss bit for bit, the gradients of all parameters to rounding."""
    assert interpreted(MODEL) == "equal\n"


def test_which_weights_are_quantized_together() -> None:
    tensor, meta = torch.randn(6, 4, 5), Meta(torch.empty(0), None, True, 10, None, 0)
    width = torch.tensor(4.0)

    def fits(scales: tuple[int, ...], bits: torch.Tensor = width, x: torch.Tensor = tensor, **changes: Any) -> bool:
        return gpu_weights.fits(x, Learned(torch.ones(*scales, 1), None, bits, meta._replace(**changes)))

    assert fits(()) and fits((4, 1)) and fits((6, 1, 1)) and fits((6, 4, 1)) and fits((6, 4, 5))
    assert fits((6, 4, 1), torch.ones(4, 1))
    assert not fits((6, 1, 5))  # no runs
    assert not fits((), torch.ones(4, 1)) and not fits((6, 1, 1), torch.ones(4, 1))  # scales that groups share
    assert not fits((), limits=(2, 8)) and not fits((), linear=True) and not fits((), elements_per_scale=torch.ones(()))
    assert not fits((), x=tensor.half()) and not fits((), x=tensor.transpose(0, 1)) and not fits((), x=tensor[:0])
    assert not gpu_weights.handles(tensor, Learned(torch.ones(1), None, width, meta))  # on no GPU


@pytest.mark.slow
@pytest.mark.parametrize("shifted", [True, False])
@pytest.mark.parametrize("name", ["forward", "backward", "gradients"])
def test_kernels_compile_for_a_gpu_that_is_not_there(name: str, shifted: bool, tmp_path: Path) -> None:
    pytest.importorskip("triton")
    from qvit.kernels import gpu_weights_kernels

    kernel: Any = getattr(gpu_weights_kernels, f"{name}_kernel")
    constants = {"FIELDS": gpu_weights._FIELDS, "SHIFTED": shifted, "BLOCK": 256 if name == "gradients" else 1024}
    constants |= {"COLUMNS": 8} if name == "gradients" else {}
    types = dict.fromkeys(kernel.arg_names, "*fp32") | {"owners": "*i32", "table": "*i64", "programs": "i32"}
    assert compiled(kernel, types | {"smallest": "fp32"}, constants, tmp_path)


@pytest.mark.gpu
@pytest.mark.parametrize("offsets", [True, False])
def test_on_a_gpu(offsets: bool) -> None:
    """The same values; once the table is made nothing waits for the device."""
    weights, tables = several_weights("cuda", offsets), {}
    expected = values_and_gradients(one_by_one, weights)
    gpu_weights.quantize_together(weights, tables)
    torch.cuda.set_sync_debug_mode("error")
    try:
        torch.stack([x.square().sum() for x in gpu_weights.quantize_together(weights, tables)]).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    found = values_and_gradients(at_once, weights)
    assert all(map(torch.equal, found[0], expected[0]))
    for left, right in zip(found[1], expected[1], strict=True):
        torch.testing.assert_close(left, right, rtol=1e-3, atol=1e-3)
