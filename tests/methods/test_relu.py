"""ReLU in place of GELU: each MLP answers nearly as before, and the run, the file and all engines know the change."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from tiny_models import SMALL, digit_batches, digits_model
from torch import nn

from qvit.deploy.engines import create_engine
from qvit.deploy.file.artifact import Artifact
from qvit.errors import QvitError, UsageError
from qvit.methods.ptq.relu import ReluOptions, changed_mlps, to_relu
from qvit.runs.finished import load_run
from qvit.runs.packed import pack_run
from qvit.runs.run import train
from qvit.training.config import TrainConfig


def test_mlps_learn_to_answer_as_before() -> None:
    model, batches = digits_model(depth=2), digit_batches(4, 16)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    told: list[str] = []
    steps: list[tuple[str, int, int]] = []
    losses: list[float] = []

    def progress(path: str, step: int, total: int, figures: str) -> None:
        steps.append((path, step, total))
        losses.append(float(figures.removeprefix("error ")))

    errors = to_relu(model, batches, ReluOptions(100, 48, 16), progress=progress, notify=told.append)
    assert [error.mlp for error in errors] == ["blocks.0.mlp", "blocks.1.mlp"] == changed_or_not(model)
    assert all(0 < error.after < error.before / 3 for error in errors), errors
    assert steps[0] == ("blocks.0.mlp", 1, 200) and steps[-1] == ("blocks.1.mlp", 200, 200)
    assert losses[99] < losses[0] / 3
    assert "this changes the model" in told[0] and "before training" in told[1]
    moved = {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    layers = {f"blocks.{i}.mlp.fc{j}.{name}" for i in (0, 1) for j in (1, 2) for name in ("weight", "bias")}
    assert moved == layers
    again = digits_model(depth=2)
    to_relu(again, batches, ReluOptions(100, 48, 16))
    assert torch.equal(again(batches[0]), model(batches[0]))


def changed_or_not(model: nn.Module) -> list[str]:
    return [path for path, module in model.named_modules() if isinstance(getattr(module, "act", None), nn.ReLU)]


@pytest.mark.parametrize(
    ("name", "kwargs", "reason"),
    [
        ("swin_tiny_patch4_window7_224", {}, "a SwinTransformer with one activation function alone"),
        ("vit_giant_patch14_reg4_dinov2", {"depth": 1, "embed_dim": 48, "num_heads": 2}, "'blocks.0.mlp' is a GluMlp"),
        ("cait_xxs24_224", {}, "a Cait with one activation function alone"),
        ("vit_digits", {"act_layer": "relu"}, "have a ReLU already"),
    ],
)
def test_other_models_are_refused(name: str, kwargs: dict[str, Any], reason: str) -> None:
    with torch.device("meta"), pytest.raises(UsageError, match=reason):
        changed_mlps(timm.create_model(name, **kwargs))


def test_a_loss_that_is_not_finite_names_the_mlp() -> None:
    model = digits_model()
    with torch.no_grad():
        model.get_submodule("blocks.0.mlp.fc2").get_parameter("bias").fill_(float("nan"))
    with pytest.raises(QvitError, match=r"'blocks\.0\.mlp'"):
        to_relu(model, digit_batches(), ReluOptions(2, 8, 8))


def test_a_run_packs_and_every_engine_answers(tmp_path: Path) -> None:
    model = digits_model()
    torch.save(model.state_dict(), tmp_path / "float.pt")
    config = TrainConfig.create(
        model="vit_digits", model_kwargs=SMALL, weights=str(tmp_path / "float.pt"), data="digits", method="ptq",
        budget="w4a4", calibration_images=32, device="cpu", threads=1,
        method_options={"mlp": "relu", "mlp_steps": 20, "recon_images": 40, "recon_batch": 16, "class_token": "off"},
    )  # fmt: skip
    lines: list[str] = []
    result = train(config, tmp_path / "run", quiet=True, notify=lines.append)
    assert any("this changes the model" in line for line in lines) and "relu" in result["seconds"]
    assert [error["mlp"] for error in result["relu"]] == ["blocks.0.mlp"]
    assert result["relu"][0]["after"] < result["relu"][0]["before"]
    loaded: Any = load_run(tmp_path / "run")
    spec = loaded.blocks[0].mlp.fc2.input_quantizer.spec
    assert isinstance(loaded.blocks[0].mlp.act, nn.ReLU) and not spec.signed and spec.symmetric
    artifact = pack_run(tmp_path / "run")
    artifact.save(tmp_path / "packed.safetensors")
    artifact = Artifact.load(tmp_path / "packed.safetensors")
    assert artifact.model_kwargs["act_layer"] == "relu" and "act_layer" not in artifact.float_kwargs
    images = digit_batches(1, 8)[0]
    with torch.no_grad():
        expected = loaded(images)
    assert torch.equal(artifact.model()(images), expected)
    for engine in ("reference", "torch", "native", "onnxruntime", "openvino"):
        if engine in ("onnxruntime", "openvino"):
            pytest.importorskip(engine)
        options = {"compiled": False} if engine == "torch" else {}
        apart = (create_engine(artifact, engine, **options)(images) - expected).abs().amax(-1) / expected.abs().max()
        assert int((apart > 1e-4).sum()) <= 1 and float(apart.max()) < 0.2, (engine, apart)
