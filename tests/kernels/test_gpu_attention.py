"""Attention of training as Triton kernels: equal to the plain form in the interpreter, compiled for a GPU, on a GPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from without_gpu import compiled, interpreted

COMPARED = """
import torch
from qvit.kernels import attention, cpu, gpu_attention
from qvit.kernels.fake_quantize import Learned, Meta

def learned(heads, width, signed, offset, limits=None, banks=1):
    rows = (heads, 1, 1) if heads > 1 else ()
    scales = (torch.rand(*rows, banks) * 0.1 + (0.15 if signed else 0.02)).requires_grad_()
    offsets = (torch.randn(*rows, banks) * 0.05).requires_grad_() if offset else None
    bits = torch.tensor([width + 0.3 * i for i in range(heads)]).view(rows)
    bits = bits.requires_grad_() if limits else bits.round()
    candidates = torch.arange(2.0, 9.0) if banks > 1 else torch.empty(0)
    meta = Meta(candidates, limits, signed, 77, None, 2 if banks > 1 else 0, "clipping", False)
    return Learned(scales, offsets, bits, meta)

def run(q, k, v, bias, factor, quantizers, grad, fused):
    taken = []
    def handles(q, k, bias, grids, dtype):
        taken.append(all(gpu_attention._by_heads(own, q.shape[1]) for own in grids))
        return fused and taken[-1]
    gpu_attention.handles = handles
    leaves = [x.detach().clone().requires_grad_() for x in (q, k, v)]
    own = [None if one is None else one._replace(**{
        name: part.detach().clone().requires_grad_(part.requires_grad)
        for name, part in zip(("scales", "offsets", "bit_width"), one) if part is not None
    }) for one in quantizers]
    out = attention.quantized_attention(*leaves, factor, bias, own)
    out.backward(grad)
    assert taken == [True]
    parts = [part for one in own if one is not None for part in one[:3] if part is not None and part.requires_grad]
    return [out.detach(), *(x.grad for x in leaves), *(part.grad for part in parts)]

torch.manual_seed(0)
cpu.ENABLED = False
H = 3
every = [learned(H, 3, True, False), learned(1, 4, True, True), learned(H, 3, False, True), learned(H, 4, False, False)]
widths = [learned(H, 3, True, False, (2, 8), 7) for _ in range(3)] + [learned(H, 3, False, False, (2, 8), 7)]
cases = [
    ((2, H, 17, 17, 8), None, 0.35, every, torch.float32),
    ((1, H, 70, 70, 24), "bias", torch.rand(H, 1, 1), widths, torch.float32),
    ((2, H, 1, 33, 16), None, 0.25, [None, every[1], None, every[3]], torch.float32),
    ((1, H, 37, 37, 16), "mask", 0.25, every, torch.float16),
]
for (batch, heads, n, m, d), bias, factor, quantizers, dtype in cases:
    side = torch.randn(batch, n, 3, heads, d).to(dtype).permute(2, 0, 3, 1, 4)
    q, k, v = side if n == m else (side[0], *torch.randn(2, batch, heads, m, d).to(dtype))
    bias = None if bias is None else torch.randn(heads, n, m) if bias == "bias" else torch.randn(1, n, m).to(dtype)
    grad = torch.randn(batch, heads, n, d).to(dtype)
    found, expected = (run(q, k, v, bias, factor, quantizers, grad, fused) for fused in (True, False))
    exact = dtype == torch.float32
    for place, (left, right) in enumerate(zip(found, expected, strict=True)):
        assert left.shape == right.shape and left.dtype == right.dtype, place
        scale = float(right.float().abs().max())
        apart = (left.float() - right.float()).abs() / scale
        # A value on the edge between two integers may fall on the other side: few are far apart.
        far = int((apart > (1e-4 if exact else 2e-2)).sum())
        assert far <= (0 if exact else max(1, 0.02 * apart.numel())), (place, far, float(apart.max()))
print("equal")
"""


MODEL = """
import torch
from tiny_models import digit_batches, digits_model
from qvit.kernels import gpu_attention
from qvit.models.calibrate import calibrate
from qvit.models.convert import quantize

images, taken, results = digit_batches(1, 2)[0], [], []
model = calibrate(quantize(digits_model(depth=1), "w4a4"), [images]).train()
for on in (False, True):
    gpu_attention.handles = lambda *given: taken.append(on) or on
    model.zero_grad()
    loss = model(images).square().mean()
    loss.backward()
    results.append([loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)])
assert taken == [False, True] and len(results[0]) > 20
for left, right in zip(*results, strict=True):
    assert float((left - right).abs().max()) <= 1e-4 * float(left.abs().max())
print("equal")
"""


@pytest.mark.slow
def test_a_model_trains_the_same_in_the_interpreter() -> None:
    """The loss and the gradients of all parameters, with what comes before and after attention."""
    assert interpreted(MODEL) == "equal\n"


@pytest.mark.slow
def test_values_and_gradients_in_the_interpreter() -> None:
    """Of q, k, v and all scales, offsets and widths; biases, masks, operands in float, one query, half precision."""
    assert interpreted(COMPARED) == "equal\n"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["forward", "queries", "keys"])
def test_kernels_compile_for_a_gpu_that_is_not_there(name: str, tmp_path: Path) -> None:
    triton = pytest.importorskip("triton")
    from qvit.kernels import gpu_attention_kernels

    kernel: Any = getattr(gpu_attention_kernels, f"{name}_kernel")
    constants: dict[str, Any] = {key: True for key in "QKVP"} | {f"{key}_SHIFTED": False for key in "QKVP"}
    constants |= {"BIAS": False, "FACTORS": False, "HALF": triton.language.bfloat16}
    constants |= {"QUERIES": 32, "KEYS": 64 if name == "keys" else 256, "DIM": 64}
    inputs = dict.fromkeys(("grad", "q", "k", "v", "out", "grad_q", "grad_k", "grad_v"), "*bf16")
    numbers = {f"{key}_{part}" for key in "qkvp" for part in ("scale", "offset", "low", "high")}
    floats = dict.fromkeys(numbers | {"bias", "factors", "rows", "partial"}, "*fp32")
    types = dict.fromkeys(kernel.arg_names, "i32") | inputs | floats | {"factor": "fp32"}
    assert compiled(kernel, types, constants, tmp_path, warps=8)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(2, 3, 197, 64), (3, 2, 49, 32), (1, 1, 17, 24)], ids=str)
def test_on_a_gpu(shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """Values and gradients in bfloat16 beside those of the plain products."""
    from qvit.kernels import attention, gpu_attention
    from qvit.kernels.fake_quantize import Learned, Meta

    results = []
    for on in (False, True):
        torch.manual_seed(0)
        monkeypatch.setattr(gpu_attention, "ENABLED", on)
        leaves = [torch.randn(shape).cuda().bfloat16().requires_grad_() for _ in range(3)]
        own = []
        for size, signed in (*((0.4, True),) * 3, (0.01, False)):
            scales = torch.full((shape[1], 1, 1, 1), size).cuda().requires_grad_()
            meta = Meta(torch.empty(0), None, signed, 100, None, 0)
            own.append(Learned(scales, None, torch.tensor(4.0).cuda(), meta))
        out = attention.quantized_attention(*leaves, shape[3] ** -0.5, None, own)
        out.backward(torch.randn(shape).cuda().bfloat16())
        results.append([out.detach(), *(x.grad for x in leaves), *(one.scales.grad for one in own)])
    for left, right in zip(*results, strict=True):
        apart = (left.float() - right.float()).abs() / left.float().abs().max()
        assert float((apart > 0.05).float().mean()) < 0.02, float(apart.max())
