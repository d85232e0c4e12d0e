"""Relevance is conserved, its table has the closed form, and Mix-QViT's is that times what is measured."""

from __future__ import annotations

import pytest
import timm
import torch
from tiny_models import digit_batches, digits_model, shake
from torch import Tensor, nn

from qvit.measure import measure_sensitivity
from qvit.measure.metric import Task
from qvit.measure.mix_qvit import importance
from qvit.measure.probe import Probe
from qvit.measure.relevance import predicted_class, relevance_graph, share_of
from qvit.models.calibrate import calibrate
from qvit.models.convert import quantize
from qvit.plan.quant_plan import QuantPlan
from qvit.quantizers import quantizers_of

TINY = {"img_size": 32, "patch_size": 16, "embed_dim": 16, "depth": 2, "num_heads": 2}


def model_of(kind: str) -> nn.Module:
    torch.manual_seed(0)
    if kind == "gated, rotary":
        return shake(timm.create_model("eva02_tiny_patch14_224", **TINY, num_classes=5)).eval()
    options = {"qk_norm": True} if kind == "qk-norm" else {}
    return shake(timm.create_model("vit_tiny_patch16_224", **TINY, **options, num_classes=5)).eval()


@pytest.mark.parametrize("kind", ["plain", "qk-norm", "gated, rotary"])
def test_relevance_is_conserved(kind: str) -> None:
    """Pixels, biases, embeddings and what softmaxes keep have all of the logit; so has what the classifier reads."""
    probe = Probe(model_of(kind), [torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(1))])
    image = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(2)).requires_grad_()
    # Whatever is added to what comes from the pixels.
    added = {
        name: parameter.requires_grad_()
        for name, parameter in probe.model.named_parameters()
        if name.endswith("bias") or name in ("cls_token", "pos_embed")
    }
    with relevance_graph(probe), probe.watched() as seen:
        logits = probe.model(image)
        start = predicted_class(logits, torch.Generator())
        leaves = [image, *added.values(), *(tensor for _, tensor in seen)]
        grads = torch.autograd.grad(logits, leaves, start, allow_unused=True)
    shares = [0.0 if g is None else float((leaf.detach() * g).sum()) for leaf, g in zip(leaves, grads, strict=True)]
    sites: dict[str, float] = {}
    for (site, _), own in zip(seen, shares[1 + len(added) :], strict=True):
        sites[site] = share_of(site) * own
    kept = sum(
        own - sites[site.replace("probs", "query")] - sites[site.replace("probs", "key")]
        for site, own in sites.items()
        if site.endswith("probs")
    )
    logit = float(logits.detach().max())
    assert sum(shares[: 1 + len(added)]) + kept == pytest.approx(logit, abs=1e-4)
    bias = shares[1 + list(added).index("head.bias")]
    assert sites["head.input"] + bias == pytest.approx(logit, abs=1e-5)
    assert sites["head.weight"] == pytest.approx(sites["head.input"], abs=1e-5)
    # A residual stream carries less after each block where biases add to it, but never all of one block's operands.
    assert abs(kept) > 1e-4


def test_the_table_is_what_is_carried_times_the_relative_error() -> None:
    """Worked out by hand for the classifier: one linear layer, of which one row counts."""
    images, model = digit_batches(1, 4)[0], digits_model()
    found = measure_sensitivity(model, [images], metric="relevance", widths=(3,))
    quantized = calibrate(quantize(model, QuantPlan.preset("w3a3", boundary_bits=3)), [images]).eval()
    quantizer = dict(quantizers_of(quantized))["head.weight"]
    weight = model.get_parameter("head.weight").detach()
    inputs: list[Tensor] = []
    hook = model.get_submodule("head").register_forward_pre_hook(lambda _m, given: inputs.append(given[0].detach()))
    with torch.no_grad():
        rows = weight[model(images).argmax(-1)]
        error = quantizer.fake_quantize(weight) - weight
    hook.remove()
    carried = (rows * inputs[0]).abs().sum(-1).mean()
    expected = 0.5 * carried * error.square().sum() / weight.square().sum()
    assert found.raw["head.weight"].item() == pytest.approx(float(expected), rel=1e-4)


def test_mix_qvit_weighs_what_is_measured() -> None:
    images, model = digit_batches(1, 4), digits_model(depth=2)
    damage, mixed = (measure_sensitivity(model, images, metric=name, widths=(2, 4)) for name in ("kl", "mix-qvit"))
    plan = QuantPlan("default").resolve(Probe(model, images).sites)
    weights = importance(Task("mix-qvit", model, (2, 4), plan, images))
    for site, values in mixed.raw.items():
        assert values == pytest.approx(damage.raw[site] * weights[site].numpy()[:, None], rel=1e-5)
        assert 0 <= weights[site].min() <= weights[site].max() <= 1
    assert max(float(own.max()) for site, own in weights.items() if site.endswith(".probs")) == 1
