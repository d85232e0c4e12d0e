"""Information rectification: the normalisation by hand, its start, and its gradients."""

from __future__ import annotations

import torch
from tiny_models import digit_batches, digits_model

from qvit.models.calibrate import calibrate
from qvit.models.convert import quantize, quantizers_disabled
from qvit.plan.quant_plan import QuantPlan, Rule
from qvit.plan.spec import Layout, PerHead, TensorSpec
from qvit.quantizers import create_quantizer, quantizers_of

RULES = [Rule(f"blocks.*.attn.{name}", {"quantizer": "irm"}) for name in ("query", "key")]


def test_layer_norm_then_lsq() -> None:
    torch.manual_seed(0)
    spec = TensorSpec(bit_width=4, granularity=PerHead())
    own, plain = (
        create_quantizer(spec.changed(change), Layout(heads=(2, 1, 1))) for change in ({"quantizer": "irm"}, {})
    )
    x = torch.randn(3, 2, 5, 8) * 3 + 1
    with torch.no_grad():
        for quantizer in (own, plain):
            quantizer.get_parameter("scale").fill_(0.2)
            quantizer.calibrated = True
        own.get_parameter("gain").copy_(torch.tensor([0.5, 2.0]).view(2, 1, 1))
        own.get_parameter("shift").copy_(torch.tensor([0.1, -0.3]).view(2, 1, 1))
    rectified = torch.nn.functional.layer_norm(x, (8,)) * own.get_parameter("gain") + own.get_parameter("shift")
    assert torch.allclose(own(x), plain(rectified), atol=0.21) and (own(x) - plain(rectified)).abs().mean() < 1e-3
    assert torch.equal(own.from_int(own.to_int(x)), own(x).detach())
    x.requires_grad_()
    own(x).square().sum().backward()
    for tensor in (x, own.get_parameter("gain"), own.get_parameter("shift"), own.get_parameter("scale")):
        assert tensor.grad is not None and tensor.grad.isfinite().all() and tensor.grad.abs().sum() > 0


def test_it_starts_at_what_calibration_saw() -> None:
    images = digit_batches()
    model = calibrate(quantize(digits_model(), QuantPlan.preset("w8a8").with_rules(*RULES)), images)
    quantizer = dict(quantizers_of(model))["blocks.0.attn.query"]
    seen = []
    hook = quantizer.register_forward_hook(lambda _module, inputs, _output: seen.append(inputs[0]))
    with quantizers_disabled(model), torch.no_grad():
        exact = [model(batch) for batch in images]
    hook.remove()
    x = torch.cat(seen).transpose(0, 1).flatten(1)
    assert torch.allclose(quantizer.get_parameter("gain").flatten(), x.std(1), rtol=0.05)
    assert torch.allclose(quantizer.get_parameter("shift").flatten(), x.mean(1), atol=0.05 * float(x.std()))
    floating = torch.cat([digits_model().eval()(batch) for batch in images])
    assert torch.allclose(torch.cat(exact), floating, atol=1e-5), "switched off, the float model is what it was"
