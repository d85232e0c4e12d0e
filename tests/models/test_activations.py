"""Grids at the output of activation functions: told from the function, the same in plan, file and every engine."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from timm.layers import SwiGLU
from timm.layers.create_act import get_act_fn, get_act_layer
from tiny_models import SMALL, digit_batches, digits_model
from torch import Tensor, nn

from qvit.deploy.engines import ENGINES, available_engines, create_engine
from qvit.deploy.file.artifact import Artifact
from qvit.models.calibrate import calibrate
from qvit.models.convert import freeze, quantize
from qvit.models.families import inspect_model
from qvit.models.families.activations import activation_spec
from qvit.models.families.parts import mlp_parts
from qvit.plan.spec import TensorSpec
from qvit.quantizers import quantizers_of
from qvit.runs.analysis import part_of

FC2 = "blocks.0.mlp.fc2.input"
#: The grid of every activation that timm knows by name.
GRIDS = {
    "offset": ("gelu", "gelu_tanh", "quick_gelu", "silu", "swish", "hard_swish", "mish", "hard_mish", "elu", "celu",
               "selu"),
    "unsigned": ("relu", "relu6", "sigmoid", "hard_sigmoid"),
    "signed": ("leaky_relu", "prelu", "tanh", "identity"),
}  # fmt: skip


def kind(spec: TensorSpec) -> str:
    return "signed" if spec.signed else "unsigned" if spec.symmetric else "offset"


@pytest.mark.parametrize(("name", "expected"), [(name, grid) for grid, names in GRIDS.items() for name in names])
def test_every_activation_of_timm(name: str, expected: str) -> None:
    made: Any = get_act_layer(name)
    assert kind(activation_spec(made())) == expected
    if name not in ("prelu", "identity"):
        assert kind(activation_spec(get_act_fn(name))) == expected, "as a function"
    sites = inspect_model(digits_model(act_layer=name)).sites
    assert kind(sites[FC2].default) == expected
    assert part_of(sites[FC2]) == ("fc" if expected == "signed" else "gelu")


class Wrapped(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (lambda x: x * torch.sigmoid(1.702 * x), "offset"),
        (lambda x: torch.relu(x).square(), "unsigned"),
        (lambda x: torch.relu(x) - 0.3, "offset"),
        (lambda x: nn.functional.leaky_relu(x, 0.001), "signed"),
        (lambda x: torch.where(x > 0, x, -torch.log1p(-x)), "signed"),
        (torch.sin, "signed"),
        (lambda x: x.exp(), "signed"),  # no number far out
        (lambda x: x[..., ::2], "signed"),
        (lambda x: x.view(-1, 7), "signed"),
    ],
)
def test_any_function(function: Callable[[Tensor], Tensor], expected: str) -> None:
    assert kind(activation_spec(function)) == kind(activation_spec(Wrapped(function))) == expected


def test_a_function_is_asked_without_traces() -> None:
    """On no device but the CPU, without gradients and hooks; what works in place or learns is known as well."""
    activation = nn.GELU()
    activation.register_forward_hook(lambda *_: pytest.fail("a hook was called"))
    with torch.device("meta"):
        assert kind(activation_spec(activation)) == "offset"
    assert kind(activation_spec(nn.ReLU(inplace=True))) == "unsigned"
    assert kind(activation_spec(nn.Sequential(nn.GELU(), nn.BatchNorm1d(3)))) == "signed"
    assert kind(activation_spec(nn.PReLU(init=0.0))) == kind(activation_spec(None)) == "signed"


def test_a_gate_has_both_signs_whatever_its_activation() -> None:
    for mlp in (SwiGLU(8, 16), SwiGLU(8, 16, act_layer=nn.GELU)):
        assert {kind(part.sites[0].default) for part in mlp_parts("mlp", mlp, 4)} == {"signed"}


@pytest.mark.parametrize(
    ("name", "kwargs", "expected"),
    [
        ("vit_base_patch16_clip_quickgelu_224", {"embed_dim": 24, "num_heads": 3, "img_size": 32}, "offset"),
        ("eva02_tiny_patch14_224", {"embed_dim": 32, "num_heads": 2, "img_size": 28}, "signed"),
        ("eva_giant_patch14_224", {"embed_dim": 32, "num_heads": 2, "img_size": 28}, "offset"),
    ],
)
def test_models_of_timm(name: str, kwargs: dict[str, Any], expected: str) -> None:
    sites = inspect_model(timm.create_model(name, num_classes=3, depth=1, **kwargs)).sites
    assert kind(sites[FC2].default) == expected


def test_levels_lie_where_values_are() -> None:
    """Four levels of QuickGELU's output: one at most where it is negative."""
    model = calibrate(quantize(digits_model(act_layer="quick_gelu"), "w2a2"), digit_batches())
    quantizer = dict(quantizers_of(model))[FC2]
    levels = quantizer.from_int(torch.arange(4.0))
    assert int((levels < -0.1).sum()) <= 1 and float(levels.min()) > -0.4


@pytest.mark.parametrize("name", ["quick_gelu", "relu"])
def test_all_forms_give_the_same_answers(name: str, tmp_path: Path) -> None:
    images = digit_batches(1, 8)[0]
    model = freeze(calibrate(quantize(digits_model(act_layer=name), "w4a4"), [images]).eval())
    with torch.no_grad():
        simulated = model(images)
    kwargs = {**SMALL, "act_layer": name}
    Artifact.from_model(model, model_name="vit_digits", model_kwargs=kwargs).save(tmp_path / "model.safetensors")
    artifact = Artifact.load(tmp_path / "model.safetensors")
    with torch.no_grad():
        assert torch.equal(artifact.model()(images), simulated)
    engines = {}
    for engine in set(ENGINES) & set(available_engines()):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            options = {"compiled": False} if engine == "torch" else {}
            engines[engine] = create_engine(artifact, engine, threads=1, **options)
    for engine, own in engines.items():
        assert own.arithmetic.startswith("all 8 products in integers"), engine
        apart = (own(images) - simulated).abs().amax(1) / simulated.abs().max()
        assert int((apart > 1e-5).sum()) <= 1 and float(apart.max()) < 0.2, (engine, apart)
    assert torch.equal(engines["reference"](images), engines["torch"](images))
