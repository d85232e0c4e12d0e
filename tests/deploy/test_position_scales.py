"""A scale for each position of a token: every token is quantized as if it were alone, and integers stay integers."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from integer_models import frozen, make_dyadic, packed_arguments
from test_integer import check, same_answers
from tiny_models import digit_batches, digits_model
from torch import Tensor, nn

from qvit.deploy.engines import create_engine
from qvit.deploy.file.artifact import Artifact
from qvit.deploy.integer.reference import integer_form, report_of
from qvit.deploy.integer.torch import TorchArithmetic
from qvit.errors import UsageError
from qvit.models.calibrate import calibrate
from qvit.models.convert import quantize
from qvit.models.families.tokens import POSITION_SITES
from qvit.plan.quant_plan import QuantPlan, Rule
from qvit.quantizers import quantizers_of

POSITIONS = {"granularity": "per-position"}
CLASS_TOKEN = {"bit_width": 8, "switchable_scale": True, "token_bit_width": {"share": 0, "low": 4}}
ROWS = ("attn.qkv.input", "attn.query", "mlp.fc1.input", "mlp.fc2.input")


def plan_of(*, class_token: bool = False, offsets: bool = False) -> QuantPlan:
    rules = [Rule(f"blocks.*.{site}", POSITIONS) for site in POSITION_SITES]
    if class_token:
        rules += [Rule(f"blocks.*.{site}", CLASS_TOKEN) for site in ROWS]
    if offsets:
        sites = ("attn.qkv.input", "attn.key", "mlp.fc1.input")
        rules += [Rule(f"blocks.*.{site}", {"signed": False, "symmetric": False}) for site in sites]
    return QuantPlan.preset("w4a4").with_rules(*rules)


def test_each_position_is_quantized_as_if_it_were_alone() -> None:
    """Calibrated on one token, a quantizer with one scale finds the scale of that position, and rounds alike."""
    model, images = digits_model(depth=1), digit_batches(1, 16)[0]
    seen: dict[str, Tensor] = {}

    def keep(site: str, _quantizer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        seen[site] = inputs[0]

    quantized: Any = calibrate(quantize(model, plan_of()), [images])
    for site, quantizer in quantizers_of(quantized):
        quantizer.enabled = False
        quantizer.register_forward_pre_hook(partial(keep, site))
    quantized(images)
    found = dict(quantizers_of(quantized))
    for site in POSITION_SITES:
        quantizer, x = found[f"blocks.0.{site}"], seen[f"blocks.0.{site}"]
        quantizer.enabled = True
        x, whole = (t if t.dim() == 4 else t.unsqueeze(1) for t in (x, quantizer(x)))
        assert quantizer.grid()[0].numel() == x.shape[1] * x.shape[2]
        for head in range(x.shape[1]):
            for token in range(x.shape[2]):
                own = x[:, head, token]
                alone = type(quantizer)(quantizer.spec.changed({"granularity": "per-tensor"}), type(quantizer.layout)())
                alone.observer = alone.create_observer()
                alone(own)
                alone.initialize(alone.observer)
                alone.observer = None
                assert torch.equal(alone(own), whole[:, head, token]), (site, head, token)


@pytest.mark.parametrize("offsets", [False, True])
def test_products_are_those_of_integers(offsets: bool) -> None:
    model, images = frozen("vit", plan_of(offsets=offsets))
    assert set(report_of(integer_form(model)).values()) == {None}
    check(model, images)
    check(make_dyadic(model), images, equal=True)


@pytest.mark.parametrize("class_token", [pytest.param(False, marks=pytest.mark.slow), True])
def test_engines_answer_alike(class_token: bool, tmp_path: Path) -> None:
    model, images = frozen("vit", plan_of(class_token=class_token))
    same_answers(model, images)
    form = integer_form(model)
    with torch.no_grad():
        expected = form(images)
        for int8 in (False, True):
            assert torch.equal(integer_form(model, TorchArithmetic(int8=int8))(images), expected)
    Artifact.from_model(model, **packed_arguments("vit")).save(tmp_path / "packed.safetensors")
    artifact = Artifact.load(tmp_path / "packed.safetensors")
    assert torch.equal(artifact.model()(images), model(images))
    with pytest.raises(UsageError, match="does not run this model: .* a scale for each position of a token"):
        create_engine(artifact, "native")
    for engine in ("onnxruntime", "openvino"):
        pytest.importorskip(engine)
        found = create_engine(artifact, engine)(images)
        apart = (found - expected).abs().amax(-1) / expected.abs().max()
        assert int((apart > 1e-5).sum()) <= 1 and float(apart.max()) < 0.2, (engine, apart)
