"""Packed models at other sizes than their own: resampled in the file, in the engines, and in exported graphs."""

from __future__ import annotations

import functools
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import Qvit, qvit  # noqa: F401
from family_models import TINY, tiny
from integer_models import make_dyadic
from tiny_models import SMALL, digits_model
from torch import Tensor

from qvit.deploy.engines import base, create_engine, load
from qvit.deploy.export.write import export
from qvit.deploy.file.artifact import Artifact
from qvit.deploy.file.resize import at_size
from qvit.errors import UsageError
from qvit.models.calibrate import calibrate
from qvit.models.convert import freeze, quantize
from qvit.models.sizes import takes_any_size

SIZES = [(8, 8), (8, 12), (12, 8), (4, 6)]


def images_of(size: tuple[int, int], channels: int = 1) -> Tensor:
    return torch.randn(3, channels, *size, generator=torch.Generator().manual_seed(sum(size)))


@functools.cache
def vit(*, free: bool = True) -> Artifact:
    """A ViT that takes any size, or the same for one."""
    own = {"dynamic_img_size": True} if free else {}
    batches = [images_of(size) for size in SIZES[: 3 if free else 1]]
    quantized = calibrate(quantize(digits_model(**own), "w8a8"), batches)
    model = make_dyadic(freeze(quantized.eval()))
    return Artifact.from_model(model, model_name="vit_digits", model_kwargs=SMALL | own)


@functools.cache
def packed(name: str, **changes: Any) -> Artifact:
    """A model of another family that takes any size."""
    changes["dynamic_img_size"] = True
    model = tiny(name, **changes)
    quantized = freeze(calibrate(quantize(model, "w8a8"), [images_of((32, 48), 3)]).eval())
    timm_name, kwargs = TINY[name]
    kwargs = {"num_classes": 5, **kwargs, **changes}
    return Artifact.from_model(quantized, model_name=timm_name, model_kwargs=kwargs)


@pytest.mark.parametrize("name", ["vit", "swin", "dinov3"])
def test_a_file_for_one_size_answers_as_the_model_that_takes_any(name: str, tmp_path: Path) -> None:
    artifact, channels = (vit(), 1) if name == "vit" else (packed(name), 3)
    free = create_engine(artifact, "reference")
    for height, width in SIZES if name == "vit" else [(32, 48), (64, 32)]:
        resized, images = at_size(artifact, (height, width)), images_of((height, width), channels)
        assert resized.data_config["input_size"] == (channels, height, width)
        assert not takes_any_size(resized.skeleton)
        resized.save(tmp_path / "resized.safetensors")
        assert torch.equal(load(tmp_path / "resized.safetensors", "reference")(images), free(images))


def test_windows_that_would_be_others_stay_as_they_are() -> None:
    """One window of 4 tokens a side is the whole image of 16 pixels, and is not shifted there."""
    artifact, images = packed("swin"), images_of((16, 16), 3)
    resized = at_size(artifact, (16, 16))
    assert takes_any_size(resized.skeleton) and resized.data_config["input_size"] == (3, 16, 16)
    found = create_engine(resized, "reference")(images)
    assert torch.equal(found, create_engine(artifact, "reference")(images))
    with pytest.raises(UsageError, match="engine 'native' does not run this model: its image size is not fixed"):
        create_engine(artifact, "native")(images)
    _same_at_each_size(artifact, "native", [(32, 32), (64, 96)], 3)


def test_a_model_for_one_size_is_taken_to_another(tmp_path: Path) -> None:
    fixed = vit(free=False)
    assert at_size(fixed, (8, 8)) is fixed
    fixed.save(tmp_path / "fixed.safetensors")
    free = replace(fixed, model_kwargs={**fixed.model_kwargs, "dynamic_img_size": True})
    for engine in ("reference", "native"):
        found = load(tmp_path / "fixed.safetensors", engine, image_size=(12, 8))(images_of((12, 8)))
        torch.testing.assert_close(found, create_engine(free, "reference")(images_of((12, 8))), rtol=1e-4, atol=1e-4)
    with pytest.raises(UsageError, match="takes images of 8x8 pixels, not 12x8"):
        create_engine(fixed, "reference")(images_of((12, 8)))


def test_what_cannot_be_taken_to_another_size() -> None:
    with pytest.raises(UsageError, match="images of 7x8 pixels are not made of whole patches: give multiples of 2x2"):
        at_size(vit(), (7, 8))
    beit = tiny("beit")
    quantized = freeze(calibrate(quantize(beit, "w8a8"), [images_of((32, 32), 3)]).eval())
    kwargs = {"num_classes": 5, "depth": 1, "embed_dim": 32, "num_heads": 2, "img_size": 32}
    artifact = Artifact.from_model(quantized, model_name="beit_base_patch16_224", model_kwargs=kwargs)
    with pytest.raises(UsageError, match="this Beit takes images of 32x32 pixels, not 48x32"):
        at_size(artifact, (48, 32))


def _same_at_each_size(artifact: Artifact, engine: str, sizes: list[tuple[int, int]], channels: int) -> None:
    reference, running = create_engine(artifact, "reference"), create_engine(artifact, engine)
    for size in sizes:
        images = images_of(size, channels)
        torch.testing.assert_close(running(images), reference(images), rtol=1e-3, atol=1e-3)
    assert running.name == engine


def test_the_native_engine_is_made_for_each_size(monkeypatch: pytest.MonkeyPatch) -> None:
    _same_at_each_size(vit(), "native", SIZES, 1)
    assert create_engine(vit()).name == "native"
    monkeypatch.setattr(base, "MOST_SIZES", 1)
    engine = create_engine(vit(), "native")
    first = engine(images_of((8, 12)))
    engine(images_of((12, 8)))
    assert torch.equal(engine(images_of((8, 12))), first)
    with pytest.raises(UsageError, match="whole patches"):
        engine(images_of((7, 8)))


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
def test_graph_engines_are_made_for_each_size(engine: str) -> None:
    pytest.importorskip(engine)
    pytest.importorskip("onnxscript")
    _same_at_each_size(vit(), engine, SIZES[:3], 1)
    _same_at_each_size(packed("swin"), engine, [(32, 32), (36, 60)], 3)


@pytest.mark.slow
def test_one_compiled_engine_runs_every_size() -> None:
    reference, compiled = create_engine(vit(), "reference"), create_engine(vit(), "torch", compiled=True)
    for size in SIZES:
        torch.testing.assert_close(compiled(images_of(size)), reference(images_of(size)), rtol=1e-3, atol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "to"), [("vit", "onnx"), ("vit", "torch"), ("swin", "openvino")])
def test_graphs_of_any_size(name: str, to: str, tmp_path: Path) -> None:
    """The check runs at another size than the traced one."""
    pytest.importorskip("onnxscript")
    pytest.importorskip("openvino")
    artifact = vit() if name == "vit" else packed("swin", depths=(2,), num_heads=(2,))
    (tmp_path / "m.safetensors").write_bytes(artifact.to_bytes())
    found = export(tmp_path / "m.safetensors", to, any_size=True, containers="8bit" if to == "onnx" else None)
    assert found["image_size"] is None
    assert found["check"]["largest_difference"] < 1e-3 * found["check"]["largest_logit"], found


@pytest.mark.slow
def test_a_graph_of_one_other_size(tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    (tmp_path / "m.safetensors").write_bytes(vit(free=False).to_bytes())
    found = export(tmp_path / "m.safetensors", "onnx", image_size=(8, 12))
    assert found["image_size"] == [8, 12] and found["check"]["agreement"] == 100


def test_graphs_of_any_size_that_are_refused(tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    pytest.importorskip("openvino")
    free, fixed = tmp_path / "free.safetensors", tmp_path / "fixed.safetensors"
    free.write_bytes(vit().to_bytes())
    fixed.write_bytes(vit(free=False).to_bytes())
    with pytest.raises(UsageError, match="OpenVINO resamples position embeddings otherwise than PyTorch"):
        export(free, "openvino", any_size=True)
    for to in ("onnx", "torch"):
        with pytest.raises(UsageError, match=r"takes images of 8x8 pixels: write a file for each size \(--image-size"):
            export(fixed, to, any_size=True)
    for arguments in ({"to": "executorch"}, {"to": "onnx", "image_size": (8, 8)}):
        with pytest.raises(UsageError, match="leave out --any-size"):
            export(free, any_size=True, **arguments)  # type: ignore[arg-type]


def test_a_packed_model_is_scored_at_a_size(qvit: Qvit, tmp_path: Path) -> None:  # noqa: F811
    file = tmp_path / "m.safetensors"
    file.write_bytes(vit(free=False).to_bytes())
    call = ("evaluate", file, "--data", "digits", "--engine", "reference", "--json")
    own, wide = qvit(*call).json, qvit(*call, "--image-size", "8x12").json
    assert own["images"] == wide["images"] == 597 and wide["top1"] >= 0
    assert qvit(*call, "--image-size", "8x8").json == own
    assert "HEIGHTxWIDTH" in qvit(*call, "--image-size", "8by8").failed(2)
    assert "whole patches" in qvit(*call, "--image-size", "7").failed(2)
    of_run = qvit("evaluate", tmp_path, "--data", "digits", "--image-size", 8)
    assert "--image-size is for packed models" in of_run.failed(2)
