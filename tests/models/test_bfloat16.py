"""bfloat16: gradients of scales, offsets and widths are those that float64 gives from the same numbers.

Values, incoming gradients and, with `parameters`, scales, offsets and widths are rounded to bfloat16; float64 then
starts from the same numbers. A sum over many elements is far smaller than its parts, so roundings within would show.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from grids import needs_kernels
from test_fused_layers import ALL, SPECS, attention, close, gradients_of, layer, off_integers
from torch import Tensor

from qvit.functional import switchable_fake_quantize
from qvit.kernels import cpu
from qvit.kernels.fake_quantize import FakeQuantize
from qvit.plan.spec import PerChannel, PerHead, TensorSpec

CANDIDATES = torch.arange(2.0, 9.0)
GROUPS = {"per-tensor": (), "per-head": (3, 1, 1), "per-channel": (3, 1, 8)}
#: A unit of rounding in bfloat16, and what sums of 19,200 terms in float32 that cancel may lose.
ROUNDING = {torch.bfloat16: 2.0**-8, torch.float32: 2e-3}
FORMS = ("fused", "formulas", "reference")


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[bool], None]]:
    yield lambda on: monkeypatch.setattr(cpu, "ENABLED", on)


class Numbers:
    """x, the incoming gradient, and a quantizer's tensors."""

    def __init__(self, granularity: str, bits: int, *, offset: bool, learn: bool, parameters: torch.dtype) -> None:
        groups = GROUPS[granularity]
        scales = torch.rand(*groups, 7) * 0.1 + 2.5 / 2.0 ** (CANDIDATES - 1)
        width = torch.full(groups if granularity == "per-head" else (), float(bits))
        self.x = torch.randn(16, 3, 50, 8).bfloat16()
        self.grad = (torch.randn(16, 3, 50, 8) * 1e-3).bfloat16()
        self.scales = scales.to(parameters)
        self.offsets = (torch.randn(*groups, 7) * 0.3).to(parameters) if offset else None
        self.width = ((width - 0.3).clamp(2.3) if learn else width).to(parameters)
        self.limits, self.signed = (2, 8) if learn else None, not offset

    def gradients(self, form: str, gradient: str, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        """Of x and of all parameters, in `dtype` or in what they have."""

        def leaf(given: Tensor) -> Tensor:
            return given.detach().clone().to(dtype or given.dtype).requires_grad_()

        x, scales, width = leaf(self.x), leaf(self.scales), leaf(self.width)
        offsets = None if self.offsets is None else leaf(self.offsets)
        about = (CANDIDATES.to(scales.dtype), self.limits, self.signed, x.numel())
        if form == "reference":
            out = switchable_fake_quantize(x, scales, offsets, width, *about)
        else:
            out = FakeQuantize.apply(x, scales, offsets, width, *about, None, gradient)
        out.backward(self.grad.to(out.dtype))
        named = {"x": x, "scale": scales, "offset": offsets, "width": width if self.limits else None}
        return {name: given.grad for name, given in named.items() if given is not None and given.grad is not None}


@needs_kernels
@pytest.mark.parametrize("parameters", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("gradient", ["fixed", "clipping", "interpolation", "difference"])
@pytest.mark.parametrize("offset", [False, True], ids=["lsq", "lsq+"])
@pytest.mark.parametrize("granularity", GROUPS)
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_gradients_of_a_quantizer(
    kernels: Callable[[bool], None], granularity: str, bits: int, offset: bool, gradient: str, parameters: torch.dtype
) -> None:
    learn, kind = gradient != "fixed", "clipping" if gradient == "fixed" else gradient
    numbers = Numbers(granularity, bits, offset=offset, learn=learn, parameters=parameters)
    expected = numbers.gradients("formulas", kind, torch.float64)
    assert set(expected) == {"x", "scale", *(("offset",) if offset else ()), *(("width",) if learn else ())}
    for form in FORMS if kind == "clipping" else FORMS[:2]:
        kernels(form == "fused")
        found = numbers.gradients(form, kind)
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            close_to = ROUNDING[torch.bfloat16 if name == "x" else parameters]
            distance = float((found[name].double() - value).norm() / value.norm().clamp_min(1e-12))
            assert distance <= close_to, (form, name, distance)


@needs_kernels
@pytest.mark.parametrize("spec", SPECS)
def test_a_layer_of_bfloat16_values(kernels: Callable[[bool], None], spec: str) -> None:
    module = layer("bias", SPECS[spec], TensorSpec(bit_width=4, granularity=PerChannel()))
    off_integers(module)
    images, upstream = torch.randn(32, 50, 24).bfloat16(), torch.randn(32, 50, 10)
    found = gradients_of(module, images, upstream, bf16=True)
    kernels(False)
    close(found, gradients_of(module, images, upstream, bf16=True), 0.005)


@needs_kernels
@pytest.mark.parametrize("learn", [None, "clipping", "difference", "interpolation"])
def test_attention_of_bfloat16_values(kernels: Callable[[bool], None], learn: Any) -> None:
    spec = TensorSpec(
        bit_width=(3, 4, 6),
        granularity=PerHead(),
        learn_bit_width=learn is not None,
        options={"width_gradient": learn or "clipping", "switchable_scale": True},
        signed=False,
        symmetric=False,
    )
    module = attention(None, ALL, spec)
    off_integers(module)
    x, upstream = torch.randn(7, 11, 72).bfloat16(), torch.randn(7, 3, 11, 8)
    found = gradients_of(module, x, upstream, bf16=True)
    kernels(False)
    close(found, gradients_of(module, x, upstream, bf16=True), 0.005)
