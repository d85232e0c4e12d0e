"""The methods `vvtq` and `qvit+vvtq`: their plans, gradient factors in closed form, composition with Q-ViT."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import digits_model, small_config, tiny_trainer
from torch import Tensor

from qvit.errors import UsageError
from qvit.functional import fake_quantize, integer_range
from qvit.methods import create_method
from qvit.models.families import inspect_model
from qvit.plan.cost import CostModel
from qvit.plan.options import ScaleOptions
from qvit.plan.quant_plan import QuantPlan
from qvit.plan.spec import Layout, TensorSpec
from qvit.quantizers import create_quantizer
from qvit.quantizers.lsq import LSQQuantizer
from qvit.training.oscillation.remedies import Regularizer


@pytest.fixture
def cost() -> CostModel:
    return inspect_model(digits_model())


def plan_for(cost: CostModel, method: str, budget: str | None = "3bit", plan: str | None = None, **options: Any) -> Any:
    resolved = create_method(small_config(method=method, budget=budget, plan=plan, method_options=options)).plan(cost)
    assert resolved is not None
    return resolved.sites


# -------------------------------------------------------------------------------------------- gradient factors

LAYOUTS = {
    "per tensor": ((6, 8), Layout(channels=(6, 1)), "per-tensor"),
    "per channel": ((6, 8), Layout(channels=(6, 1)), "per-channel"),
    "rows per head": ((6, 8), Layout(view=(3, 2, 8), heads=(3, 1, 1), channels=(3, 2, 1)), "per-head"),
    "columns per head": ((6, 8), Layout(view=(6, 4, 2), heads=(4, 1), channels=(6, 1, 1)), "per-head"),
}


def factors(form: str, x: Tensor, groups: tuple[int, ...], quant_max: float) -> Tensor:
    """The factor of every scale, as in the literature."""
    norm = x.abs().sum_to_size(groups)
    count = torch.ones_like(x).sum_to_size(groups)
    return {
        "count": 1 / (count * quant_max).sqrt(),
        "norm": 1 / (norm * quant_max).sqrt(),
        "norm-squared": 1 / (norm * quant_max**0.5),
        "count-linear": 1 / (count.sqrt() * quant_max),
    }[form]


@pytest.mark.parametrize("form", ["count", "norm", "norm-squared", "count-linear"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("learned", [False, True])
def test_gradient_of_the_scale_in_closed_form(form: str, layout: str, learned: bool) -> None:
    shape, axes, granularity = LAYOUTS[layout]
    changes = {"bit_width": 3, "granularity": granularity, "scale_gradient": form, "learn_bit_width": learned}
    quantizer = create_quantizer(TensorSpec().changed(changes), axes)
    assert isinstance(quantizer, LSQQuantizer)
    x = torch.randn(shape)
    upstream = torch.randn(shape)
    with torch.no_grad():
        quantizer.scale.copy_(0.2 + 0.1 * torch.rand(quantizer.scale.shape))
    quantizer.calibrated = True
    (quantizer(x) * upstream).sum().backward()
    quant_max = float(integer_range(3, True)[1])
    viewed, scale = quantizer.view(x), quantizer.scale.detach()[..., 0].requires_grad_()
    plain = fake_quantize(viewed, scale, torch.tensor(3.0), True)
    (plain * quantizer.view(upstream)).sum().backward()
    assert scale.grad is not None and quantizer.scale.grad is not None
    expected = scale.grad * factors(form, viewed, quantizer.groups, quant_max)
    torch.testing.assert_close(quantizer.scale.grad[..., 0], expected)
    other = scale.detach().clone().requires_grad_()
    elements = quantizer._elements_per_scale(viewed.numel(), viewed) * (quant_max if form == "count-linear" else 1)
    reference = fake_quantize(viewed, other, torch.tensor(3.0), True, None, elements)
    (reference * quantizer.view(upstream)).sum().backward()
    assert other.grad is not None
    torch.testing.assert_close(other.grad, expected)


def test_a_weight_of_zeros_has_no_gradient_that_is_not_finite() -> None:
    quantizer = create_quantizer(TensorSpec(options={"scale_gradient": "norm-squared"}), Layout())
    torch.nn.init.constant_(quantizer.scale, 0.1)  # type: ignore[arg-type]
    quantizer.calibrated = True
    quantizer(torch.zeros(4, 4)).sum().backward()
    assert isinstance(quantizer.scale, Tensor) and quantizer.scale.grad is not None
    assert torch.isfinite(quantizer.scale.grad).all()


def test_plans_name_the_form_only_where_it_is_not_lsq_s(cost: CostModel) -> None:
    assert "scale_gradient" not in TensorSpec().to_json()
    spec = TensorSpec(options={"scale_gradient": "norm"})
    assert spec.to_json()["scale_gradient"] == "norm" and TensorSpec().changed(spec.to_json()) == spec
    assert ScaleOptions.of(TensorSpec().changed({"bit_width": 4})).scale_gradient == "count"
    with pytest.raises(UsageError, match="scale_gradient 'nrom' must be one of count, norm"):
        TensorSpec().changed({"scale_gradient": "nrom"})


# ------------------------------------------------------------------------------------------------------- plans


def test_the_plan_of_vvtq(cost: CostModel) -> None:
    baseline = plan_for(cost, "lsq+", scales="shared")
    for name, spec in plan_for(cost, "vvtq").items():
        form = "norm" if cost.sites[name].role == "weight" else "count-linear"
        assert spec == baseline[name].changed({"scale_gradient": form}), name
    per_head = plan_for(cost, "vvtq", scales="per-head", scale_gradient="count", activation_scale_gradient="count")
    assert per_head == plan_for(cost, "lsq+")


def test_the_plan_of_qvit_with_vvtq(cost: CostModel) -> None:
    baseline = plan_for(cost, "qvit", searching_ratio=0.5)
    for name, spec in plan_for(cost, "qvit+vvtq", searching_ratio=0.5, scale_gradient="norm-squared").items():
        form = "norm-squared" if cost.sites[name].role == "weight" else "count-linear"
        assert spec == baseline[name].changed({"scale_gradient": form}), name


def test_sites_left_in_float_stay_so(cost: CostModel, tmp_path: Path) -> None:
    plan = QuantPlan.preset("w4a4").resolve(cost.sites)
    QuantPlan("part", (), {**plan.sites, "blocks.0.attn.key": None}).save(tmp_path / "part.json")
    for method in ("vvtq", "lsq", "lsq+"):
        sites = plan_for(cost, method, None, str(tmp_path / "part.json"), scales="shared")
        assert sites["blocks.0.attn.key"] is None and sites["blocks.0.attn.query"] is not None


def test_messages_name_the_method(cost: CostModel) -> None:
    with pytest.raises(UsageError, match=r"'qvit\+vvtq' needs a --budget"):
        plan_for(cost, "qvit+vvtq", None)
    with pytest.raises(UsageError, match="'vvtq' needs either --budget"):
        plan_for(cost, "vvtq", None)
    with pytest.raises(UsageError, match="did you mean 'regularizer_peak'"):
        plan_for(cost, "vvtq", regularizer_peek=1)


# ---------------------------------------------------------------------------------------------------- training


def test_the_regularizer_waits_for_the_widths(tmp_path: Path) -> None:
    options = {"searching_ratio": 0.5, "regularizer_start": 0.1, "regularizer_peak": 1.0}
    _, method, _ = tiny_trainer(tmp_path, method="qvit+vvtq", epochs=4, method_options=options)
    assert isinstance(method.remedy, Regularizer) and method.remedy.start == 0.5
    penalty = method.penalty(0)
    assert penalty is not None
    assert penalty.item() == pytest.approx(50 * (method.bit_operations() / method.limit - 1).clamp_min(0).item() ** 2)


@pytest.mark.parametrize("method", ["vvtq", "qvit+vvtq"])
def test_training_reaches_the_regularizer(tmp_path: Path, method: str) -> None:
    options: dict[str, Any] = {"regularizer_start": 0.0, "regularizer_peak": 3.0}
    options |= {"searching_ratio": 0.4} if method == "qvit+vvtq" else {}
    trainer, own, model = tiny_trainer(tmp_path, method=method, epochs=5, method_options=options)
    trainer.fit(quiet=True)
    own.finish(trainer)
    late = own.penalty(trainer.total_steps)
    assert late is not None and late.item() == pytest.approx(3.0 * own.remedy.loss().item(), rel=1e-5)
