"""Integer forms within models: where they are put, what a plan says of them, training, packing, and engines."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from integer_models import FAMILIES, float_model, frozen, make_dyadic, packed_arguments
from torch import nn

from qvit.deploy.engines import create_engine
from qvit.deploy.export.onnx import OnnxRuntimeArithmetic, artifact_graph
from qvit.deploy.file.artifact import Artifact
from qvit.errors import UsageError
from qvit.models.calibrate import calibrate
from qvit.models.convert import plan_of, quantize, quantizers_disabled
from qvit.models.integer_functions import FLOAT, forms_of, functions_of, parse_forms, places, use_forms
from qvit.models.network import network_of
from qvit.plan.quant_plan import QuantPlan

FORMS = {"layernorm": "i-vit", "softmax": "i-bert", "gelu": "i-bert", "blocks.1.mlp.act": "i-vit", "norm": "float"}
PLAN = replace(QuantPlan.preset("w8a8"), nonlinear=FORMS)


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_has_forms_that_a_plan_gives_back(name: str) -> None:
    model, images = float_model(name)
    plain = calibrate(quantize(model, "w8a8"), [images]).eval()
    forms = {kind: "i-vit" for kind in set(places(plain).values())}
    plan = replace(plan_of(plain), nonlinear=forms)
    own = calibrate(quantize(model, QuantPlan.from_json(plan.to_json())), [images]).eval()
    assert forms_of(own) == plan_of(own).nonlinear == forms and len(list(functions_of(own))) == len(places(plain))
    assert list(own.state_dict()) == list(plain.state_dict())
    with torch.no_grad():
        assert 0 < float((own(images) - plain(images)).abs().max()) < 0.1 * float(plain(images).abs().max())
        with quantizers_disabled(own):
            assert torch.allclose(own(images), model(images), rtol=1e-4, atol=1e-5)


def test_a_plan_without_forms_is_what_it_was_and_one_with_them_says_the_difference() -> None:
    without = QuantPlan.preset("w8a8")
    assert "nonlinear" not in without.to_json()
    assert QuantPlan.from_json(PLAN.to_json()) == PLAN
    assert {row["site"]: row["here"] for row in PLAN.diff(without)} == FORMS
    for wrong in (["i-vit"], {"softmax": 3}):
        with pytest.raises(UsageError, match="nonlinear"):
            QuantPlan.from_json(without.to_json() | {"nonlinear": wrong})


@pytest.mark.parametrize(
    ("forms", "message"),
    [
        ({"softmax": "i-brt"}, "did you mean 'i-bert'"),
        ({"gelu": "fq-vit"}, "unknown integer GELU"),
        ({"blocks.0.norm3": "i-vit"}, "no operation 'blocks.0.norm3'"),
    ],
)
def test_what_cannot_be_is_refused(forms: dict[str, str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        quantize(float_model("vit")[0], replace(PLAN, nonlinear=forms))


def test_names_of_forms_are_read() -> None:
    model = quantize(float_model("vit")[0], "w8a8")
    assert parse_forms("float", model) == {}
    assert parse_forms("i-bert", model) == {"layernorm": "i-bert", "softmax": "i-bert", "gelu": "i-bert"}
    assert parse_forms("fq-vit", model) == {"softmax": "fq-vit"}
    assert parse_forms("softmax=i-bert, blocks.0.mlp.act=i-vit", model) == {
        "softmax": "i-bert",
        "blocks.0.mlp.act": "i-vit",
    }
    with pytest.raises(UsageError, match="did you mean 'i-vit'"):
        parse_forms("i-vti", model)


def test_training_sees_the_integers_and_differentiates_the_float_functions() -> None:
    model, images = float_model("vit")
    own = calibrate(quantize(model, PLAN), [images]).train()
    before = own(images).square().sum()
    before.backward()
    gradients = [parameter.grad for parameter in own.parameters()]
    assert all(gradient is not None and bool(gradient.isfinite().all()) for gradient in gradients)
    optimizer = torch.optim.SGD(own.parameters(), lr=1e-3)
    optimizer.step()
    assert own(images).square().sum() < before


def packed(model: nn.Module) -> Artifact:
    return Artifact.from_model(model, **packed_arguments("vit"))


def test_packed_models_keep_their_forms_and_the_reference_engine_equals_the_simulation(tmp_path: Path) -> None:
    model, images = frozen("vit", PLAN)
    make_dyadic(model)
    packed(model).save(tmp_path / "packed.safetensors")
    artifact = Artifact.load(tmp_path / "packed.safetensors")
    assert artifact.plan.nonlinear == FORMS == network_of(artifact.skeleton)["nonlinear"]
    with torch.no_grad():
        simulated = model(images)
    assert torch.equal(artifact.model()(images), simulated)
    reference = create_engine(artifact, "reference")
    assert torch.equal(reference(images), simulated)
    assert (
        "4 of 5 LayerNorms in integers, 2 of 2 softmaxes in integers, 2 of 2 GELUs in integers" in reference.arithmetic
    )
    assert torch.equal(create_engine(artifact, "torch", compiled=False)(images), simulated)
    without = create_engine(packed(frozen("vit", "w8a8")[0]), "reference")
    assert "LayerNorm" not in without.arithmetic


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_models_have_a_form_as_one_operator(backend: str) -> None:
    """Inlined, forms of a few layers took a compiler half an hour."""
    torch._dynamo.reset()
    model, images = frozen("vit", PLAN)
    make_dyadic(model)
    with torch.no_grad():
        expected = model(images)
        found = torch.compile(model, backend=backend, fullgraph=True)(images)
    assert torch.allclose(found, expected, atol=1e-5 if backend == "aot_eager" else 1e-3)


def test_engines_that_have_no_integer_forms_refuse_by_name() -> None:
    artifact = packed(frozen("vit", PLAN)[0])
    with pytest.raises(UsageError, match=r"exported graph does not run .*norm1.* 'i-vit'.*'native', 'reference' and"):
        artifact_graph(artifact, OnnxRuntimeArithmetic())


def test_a_changed_form_of_a_file_is_another_function() -> None:
    model, images = frozen("vit", PLAN)
    other = copy.deepcopy(model)
    use_forms(other, {"softmax": "fq-vit", "gelu": FLOAT})
    assert dict(functions_of(other))["blocks.0.attn.softmax"].form == "fq-vit"
    with torch.no_grad():
        assert not torch.equal(model(images), other(images))
