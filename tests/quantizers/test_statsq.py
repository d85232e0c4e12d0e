"""StatsQ: levels and scales by hand, the gradient, and its way through calibration, freezing and files."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import digit_batches, digits_model

from qvit.errors import UsageError
from qvit.models.calibrate import calibrate
from qvit.models.convert import quantize
from qvit.plan.quant_plan import QuantPlan, Rule
from qvit.plan.spec import Layout, PerChannel, TensorSpec
from qvit.quantizers import Quantizer, create_quantizer, quantizers_of


def made(bits: int = 2, rows: int = 3) -> Quantizer:
    spec = TensorSpec(bit_width=bits, quantizer="statsq", granularity=PerChannel())
    quantizer = create_quantizer(spec, Layout(channels=(rows, 1)))
    quantizer.calibrated = True
    return quantizer


def test_levels_written_by_hand() -> None:
    """mean|w| = 1, so s = 2, and 2 bits have the levels ±0.5 and ±1.5."""
    q = made(2, 1)
    weight = torch.tensor([[0.1, -0.3, 0.9, 1.2, -2.5]])
    assert torch.allclose(q(weight), torch.tensor([[0.5, -0.5, 0.5, 1.5, -1.5]]))
    assert q.to_int(weight).tolist() == [[0, -1, 0, 1, -2]]


@given(bits=st.integers(2, 8), rows=st.integers(1, 4), columns=st.integers(2, 9), seed=st.integers(0, 999))
def test_the_formula_of_the_paper(bits: int, rows: int, columns: int, seed: int) -> None:
    """x̂ = s·(round(c·n - 1/2) + 1/2)/n with c = clamp(w/s, -1, 1) and n = 2^(b-1), in float64."""
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    q = made(bits, rows)
    found, n = q(weight), 2 ** (bits - 1)
    s = 2 * weight.double().abs().mean(1, keepdim=True)
    code = (torch.clamp(weight / s, -1, 1) * n - 0.5).round().clamp(-n, n - 1)
    assert torch.allclose(found.double(), s * (code + 0.5) / n, atol=1e-5)
    assert torch.equal(q.from_int(q.to_int(weight)), found), "codes and forward agree, bit for bit"


def test_the_gradient_passes_everywhere() -> None:
    weight = torch.tensor([[0.1, -0.3, 0.9, 1.2, -25.0]], requires_grad=True)
    made(2, 1)(weight).backward(torch.arange(5.0)[None])
    assert weight.grad is not None and torch.equal(weight.grad, torch.arange(5.0)[None])


@pytest.mark.parametrize("granularity", ["per-tensor", "per-channel", "per-head"])
def test_in_a_model(granularity: str) -> None:
    rule = Rule("blocks.*.attn.qkv.*_weight", {"quantizer": "statsq", "granularity": granularity})
    model = calibrate(quantize(digits_model(), QuantPlan.preset("w3a3").with_rules(rule)), digit_batches())
    quantizer = dict(quantizers_of(model))["blocks.0.attn.qkv.query_weight"]
    assert isinstance(quantizer.get_buffer("scale"), torch.Tensor) and not list(quantizer.parameters())
    calibrated = quantizer.get_buffer("scale").clone()
    answer = model(digit_batches()[0])
    assert torch.allclose(quantizer.get_buffer("scale"), calibrated, rtol=0.02), "calibration chose another scale"
    again = quantize(digits_model(), QuantPlan.preset("w3a3").with_rules(rule))
    again.load_state_dict(model.state_dict())
    assert torch.equal(again.eval()(digit_batches()[0]), model.eval()(digit_batches()[0])) and answer.isfinite().all()


@pytest.mark.parametrize("changes", [{"signed": False}, {"learn_bit_width": True}])
def test_refusals(changes: dict[str, bool]) -> None:
    with pytest.raises(UsageError, match="statsq"):
        create_quantizer(TensorSpec(quantizer="statsq").changed(changes), Layout())
