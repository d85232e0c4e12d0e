"""A norm and the quantizer behind it in one kernel: in Triton's interpreter, compiled for a GPU, on a GPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import calibrated_model, digit_batches
from torch.nn import functional as F
from without_gpu import compiled, interpreted

from qvit.errors import UsageError
from qvit.kernels import gpu_norm
from qvit.kernels.fake_quantize import Learned, Meta
from qvit.kernels.switches import forms_on
from qvit.models.norms import fused_norms

COMPARED = """
import itertools
import torch
from torch.nn import functional as F
from qvit.kernels import cpu, gpu_norm
from qvit.kernels.fake_quantize import FakeQuantize, Meta
from qvit.kernels.gpu_norm import Norm
from qvit.kernels.fake_quantize import Learned
from qvit.kernels.linear import quantized_linear

cpu.ENABLED = False
gpu_norm.handles = None  # whoever asks has decided already
gpu_norm._PROGRAMS = 3
F32, BF16 = torch.float32, torch.bfloat16
NAMES = ("output", "x", "gain", "shift", "scales", "offsets", "width", "weight")

def run(fused, x, norm, scales, offsets, width, meta, weight, grad):
    leaves = [None if part is None else part.detach().clone().requires_grad_()
              for part in (x, norm.weight, norm.bias, scales, offsets, width if meta.limits else None, weight)]
    x, gain, shift, scales, offsets, own, weight = leaves
    learned = Learned(scales, offsets, width if own is None else own, meta)
    if fused:
        out = quantized_linear(x, weight, None, learned, norm=norm._replace(weight=gain, bias=shift))
    else:
        shape, about = x.shape[-1:], (gain, norm.epsilon)
        y = (F.rms_norm(x.float(), shape, *about) + (0 if shift is None else shift) if norm.rms else
             F.layer_norm(x.float(), shape, gain, shift, norm.epsilon))
        if norm.dtype == BF16:  # the interpreter cuts off instead of rounding
            y = (y.detach().view(torch.int32) & ~0xFFFF).view(F32) + (y - y.detach())
        out = F.linear(FakeQuantize.apply(y, *learned[:3], *meta[:4], meta.first, meta.gradient).to(x.dtype), weight)
    out.backward(grad)
    return [out.detach(), *(None if part is None else part.grad for part in leaves)]

torch.manual_seed(0)
shapes = [((3, 7, 40), 5), ((1, 9, 11), 2), ((4, 2500), 3)]
for (shape, outputs), rms, (signed, offset), shift, learned in itertools.product(
    shapes, (False, True), ((True, False), (False, True)), (True, False), (None, "clipping", "interpolation")
):
    channels = shape[-1]
    x, grad = torch.randn(shape) * 3 + 1, torch.randn(*shape[:-1], outputs)
    norm = Norm(torch.randn(channels), torch.randn(channels) if shift else None, 1e-6, rms, F32)
    scales, offsets = torch.tensor([0.21, 0.13, 0.17]), torch.tensor([0.0, -0.8, 0.3]) if offset else None
    limits = (3, 5) if learned else None
    meta = Meta(torch.arange(3.0, 6.0), limits, signed, 77, None, 3, learned or "clipping")
    weight = torch.randn(outputs, channels)
    given = (norm, scales, offsets, torch.tensor(3.7 if limits else 4.0), meta)
    for name, left, right in zip(NAMES, *(run(fused, x, *given, weight, grad) for fused in (True, False)), strict=True):
        assert (left is None) == (right is None), name
        if left is not None:
            assert left.shape == right.shape and left.dtype == right.dtype, name
            apart = float((left - right).abs().max() / right.abs().max())
            assert apart < 1e-4, (name, shape, rms, apart)
    for kind in (F32, BF16) if channels == 40 else ():  # y in float32, as under autocast, or in half precision
        half = [part.to(BF16) for part in (x, weight, grad)]
        own = (norm._replace(dtype=kind), *given[1:])
        results = [run(fused, half[0], *own, *half[1:]) for fused in (True, False)]
        for name, left, right in zip(NAMES, *results, strict=True):
            if left is not None:
                assert left.dtype == right.dtype and left.shape == right.shape, name
                apart = float((left.float() - right.float()).norm() / right.float().norm())
                assert apart < 0.03, (name, kind, shape, rms, apart)
print("equal")
"""

MODEL = """
import torch
from tiny_models import calibrated_model, digit_batches
from qvit.kernels import gpu_norm
from qvit.models.norms import fused_norms

images, taken, results = digit_batches(1, 2)[0], [], []
model = calibrated_model().train()
gpu_norm.handles = lambda *given: taken.append(given) or gpu_norm.fits(*given)
def losses():
    model.zero_grad()
    loss = model(images).square().mean()
    loss.backward()
    return [loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]
expected = losses()
with fused_norms(model) as count:
    found = losses()
assert count == len(taken) == 2 and len(found) > 20
for left, right in zip(found, expected, strict=True):
    assert float((left - right).abs().max()) <= 1e-4 * float(left.abs().max())
print("equal")
"""


@pytest.mark.slow
def test_values_and_gradients_in_the_interpreter() -> None:
    """Of x, γ, β, scales, offsets, widths and the layer's weight: LayerNorm and RmsNorm, in fp32 and bf16."""
    assert interpreted(COMPARED) == "equal\n"


@pytest.mark.slow
def test_a_model_trains_the_same_in_the_interpreter() -> None:
    """The loss and the gradients of all parameters."""
    assert interpreted(MODEL) == "equal\n"


def test_a_model_with_norms_left_to_layers_is_the_same() -> None:
    """Without a kernel layers do one after the other; a module that somebody looks at sees what it always saw."""
    model, images = calibrated_model(depth=2), digit_batches(1)[0]
    expected, classes = model(images), [type(module) for module in model.modules()]
    keys, parameters = list(model.state_dict()), [id(parameter) for parameter in model.parameters()]
    seen: list[Any] = []
    with fused_norms(model) as count:
        assert count == 4 and torch.equal(model(images), expected)
        assert list(model.state_dict()) == keys and [id(parameter) for parameter in model.parameters()] == parameters
        handle = model.get_submodule("blocks.0.mlp").register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        assert torch.equal(model(images), expected)
        handle.remove()
    assert isinstance(seen[0], torch.Tensor) and seen[0].shape[-1] == 16
    assert [type(module) for module in model.modules()] == classes and torch.equal(model(images), expected)


def test_which_norms_have_a_kernel() -> None:
    meta, width = Meta(torch.empty(0), None, True, 10, None, 0), torch.tensor(4.0)

    def fits(scales: int = 1, columns: int = 8, dtype: torch.dtype = torch.float32, **changes: Any) -> bool:
        x = torch.empty(3, columns, dtype=dtype)
        norm = gpu_norm.Norm(torch.ones(columns), None, 1e-6, False, dtype)
        learned = Learned(torch.ones(scales, 1), None, width, meta._replace(**changes))
        assert not gpu_norm.handles(x, norm, learned)  # on no GPU
        return gpu_norm.fits(x, norm, learned)

    assert fits() and fits(dtype=torch.bfloat16) and fits(columns=4096) and fits(limits=(2, 8), gradient="clipping")
    assert not fits(scales=8) and not fits(columns=4097) and not fits(columns=1) and not fits(dtype=torch.float64)
    assert not fits(limits=(2, 8), gradient="difference")


def test_which_forms_the_environment_turns_on() -> None:
    assert forms_on({}) == frozenset()
    assert forms_on({"QVIT_GPU_FUSED": " norm"}) == {"norm"}
    assert forms_on({"QVIT_GPU_FUSED": "norm", "QVIT_GPU_ATTENTION": "1"}) == {"attention", "norm"}
    assert forms_on({"QVIT_GPU_FUSED": "all"}) >= {"attention", "norm"}
    with pytest.raises(UsageError, match="QVIT_GPU_FUSED names 'norms': give some of attention, norm"):
        forms_on({"QVIT_GPU_FUSED": "attention,norms"})


@pytest.mark.slow
@pytest.mark.parametrize("columns", [192, 1024, 4096])
@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("name", ["forward", "backward"])
def test_kernels_compile_for_a_gpu_that_is_not_there(name: str, mixed: bool, columns: int, tmp_path: Path) -> None:
    triton = pytest.importorskip("triton")
    from qvit.kernels import gpu_norm_kernels

    x = torch.empty(2, columns)
    norm = gpu_norm.Norm(torch.empty(columns), torch.empty(columns), 1e-6, False, torch.float32)
    constants = gpu_norm._Call(x, norm, (torch.ones(()),) * (9 if mixed else 4)).constants
    warps = constants.pop("num_warps")
    constants.pop("enable_fp_fusion")
    kernel: Any = getattr(gpu_norm_kernels, f"{name}_kernel")
    assert constants["KIND"] == triton.language.float32
    numbers = {"weight", "bias", "partial", "of_channels", "scale", "offset", "low", "high", "x", "grad_x", "share"}
    numbers |= {f"{name}2" for name in ("scale", "offset", "low", "high")}
    types = dict.fromkeys(kernel.arg_names, "i32") | dict.fromkeys(numbers, "*fp32")
    types |= dict.fromkeys(("grad", "out"), "*bf16") | {"epsilon": "fp32"}
    assert compiled(kernel, types, constants, tmp_path, warps=warps)


@pytest.mark.gpu
@pytest.mark.parametrize("rms", [False, True])
@pytest.mark.parametrize("columns", [192, 1280])
def test_on_a_gpu(columns: int, rms: bool) -> None:
    """Values and gradients beside those of the norm, the quantizer and the layer one after another."""
    from qvit.kernels.gpu_norm import Norm
    from qvit.kernels.linear import quantized_linear

    results = []
    for fused in (False, True):
        torch.manual_seed(0)
        x, gain, shift = (
            torch.randn(*shape).cuda().requires_grad_() for shape in ((8, 197, columns),) + ((columns,),) * 2
        )
        weight = torch.randn(64, columns).cuda().requires_grad_()
        scales, offsets = (torch.tensor([size]).cuda().requires_grad_() for size in (0.2, 0.1))
        learned = Learned(scales, offsets, torch.tensor(4.0).cuda(), Meta(torch.empty(0), None, True, 100, None, 0))
        if fused:
            norm = Norm(gain, None if rms else shift, 1e-6, rms, torch.float32)
            out = quantized_linear(x, weight, None, learned, norm=norm)
        else:
            shape = (columns,)
            y = F.rms_norm(x, shape, gain, 1e-6) if rms else F.layer_norm(x, shape, gain, shift, 1e-6)
            out = quantized_linear(y, weight, None, learned)
        out.backward(torch.randn(8, 197, 64).cuda())
        own = (x, gain, weight, scales, offsets, *(() if rms else (shift,)))
        results.append([out.detach(), *(part.grad for part in own)])
    for left, right in zip(*results, strict=True):
        assert float((left - right).norm()) < 1e-2 * float(left.norm())
