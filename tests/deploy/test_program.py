"""Programs of torch.export and ExecuTorch: the reference's answers, where nothing of qvit can be imported."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from integer_models import frozen, packed_arguments
from test_export import MIXED
from test_integer import patchwise
from torch import Tensor

from qvit.deploy.engines.reference import ReferenceEngine
from qvit.deploy.export.program import ABOUT, export_executorch, export_program
from qvit.deploy.export.write import export
from qvit.deploy.file.artifact import Artifact
from qvit.errors import UsageError
from qvit.methods.pmq import Split
from qvit.plan.quant_plan import Rule

ALONE = """
import sys
sys.modules |= {"qvit": None, "timm": None, "torchvision": None}
import torch
torch.set_num_threads(1)
program = torch.export.load(sys.argv[1]).module()
answers = [program(images) for images in torch.load(sys.argv[2])]
torch.save(answers, sys.argv[3])
"""


def answers_alone(program: Path, batches: list[Tensor]) -> list[Tensor]:
    """What a program answers in a process that cannot import qvit, timm or torchvision."""
    images, answers = program.with_suffix(".images"), program.with_suffix(".answers")
    torch.save(batches, images)
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    command = [sys.executable, "-c", ALONE, program, images, answers]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=program.parent, timeout=120)
    assert done.returncode == 0, done.stderr
    return torch.load(answers)


@pytest.mark.parametrize("name", ["vit", "swin", "beit", "cait"])
def test_a_program_answers_like_the_reference_without_qvit(name: str, tmp_path: Path) -> None:
    """Widths and offsets of every kind, for any number of images; the sums are equal, so are all their digits."""
    model, images = frozen(name, MIXED if name == "vit" else "w4a4")
    artifact = Artifact.from_model(model, **packed_arguments(name))
    batches = [images[:1], images[:3], images]
    found = answers_alone(export_program(artifact, tmp_path / "model.pt2"), batches)
    engine = ReferenceEngine(artifact, None)
    for batch, answer in zip(batches, found, strict=True):
        torch.testing.assert_close(answer, engine(batch), atol=1e-5, rtol=1e-5)


def test_sums_beyond_float32_are_exact(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows whose sums may pass 2^24 are multiplied in float64."""
    model, images = frozen("vit", MIXED.with_rules(Rule("*.mlp.fc2.*", {"bit_width": 8})))
    artifact = Artifact.from_model(model, **packed_arguments("vit"))
    site = "blocks.0.mlp.fc2.weight"
    artifact.integers[site].fill_(127)
    assert artifact.integers[site].shape[1] * 127 * 255 < 2**24, "this small model has none: the limit is lowered"
    monkeypatch.setattr("qvit.deploy.integer.torch.EXACT_BELOW", 100)
    export_program(artifact, tmp_path / "model.pt2")
    program = torch.export.load(tmp_path / "model.pt2")
    kinds = {node.meta["val"].dtype for node in program.graph.nodes if str(node.target) == "aten.matmul.default"}
    assert kinds == {torch.float64}
    torch.testing.assert_close(program.module()(images), ReferenceEngine(artifact, None)(images), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["vit", "swin"])
def test_widths_that_follow_the_image(name: str, tmp_path: Path) -> None:
    """PyTorch has the stable order that ONNX lacks; a program is for one number of images."""
    model, images = patchwise(name, Split(5, 3, 0.5))
    artifact = Artifact.from_model(model, **packed_arguments(name))
    with pytest.raises(UsageError, match="takes one number of images only: give it as `batch`"):
        export_program(artifact, tmp_path / "model.pt2")
    (found,) = answers_alone(export_program(artifact, tmp_path / "model.pt2", batch=len(images)), [images])
    torch.testing.assert_close(found, ReferenceEngine(artifact, None)(images), atol=1e-5, rtol=1e-5)


def test_a_program_says_what_it_is_and_keeps_bytes(tmp_path: Path) -> None:
    model, _ = frozen("vit", "w4a4")
    artifact = Artifact.from_model(model, class_names=("a", "b"), **packed_arguments("vit"))
    path = export_program(artifact, tmp_path / "model.pt2", batch=2)
    about = {ABOUT: ""}
    program = torch.export.load(path, extra_files=about)
    said = json.loads(about[ABOUT])
    assert said["qvit.model"] == "vit_digits" and json.loads(said["qvit.class_names"]) == ["a", "b"]
    weights = [value for key, value in program.state_dict.items() if key.rpartition(".")[2].startswith("weight_0")]
    assert len(weights) == 10 and {value.dtype for value in weights} == {torch.int8}
    assert not [name for name in zipfile.ZipFile(path).namelist() if name.endswith(".pkl")]
    with pytest.raises(Exception, match="2"):
        program.module()(torch.zeros(3, 1, 8, 8))


def test_what_was_written_is_compared(tmp_path: Path) -> None:
    model, _ = frozen("vit", "w4a4")
    Artifact.from_model(model, **packed_arguments("vit")).save(tmp_path / "model.safetensors")
    result = export(tmp_path / "model.safetensors", "torch")
    assert result["file"] == str(tmp_path / "model.pt2") and result["bytes"] == (tmp_path / "model.pt2").stat().st_size
    assert result["check"]["agreement"] == 100 and result["check"]["largest_difference"] < 1e-5
    with pytest.raises(UsageError, match="exact without VNNI"):
        export(tmp_path / "model.safetensors", "torch", tmp_path / "b.pt2", vnni=False)
    with pytest.raises(UsageError, match="containers are chosen for ONNX files"):
        export(tmp_path / "model.safetensors", "torch", tmp_path / "b.pt2", containers="8bit")


def test_executorch_is_missed_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = frozen("vit", "w4a4")
    artifact = Artifact.from_model(model, **packed_arguments("vit"))
    monkeypatch.setattr("qvit.deploy.export.program.missing", lambda *packages: list(packages))
    with pytest.raises(UsageError, match="pip install executorch"):
        export_executorch(artifact, tmp_path / "model.pte")


# What it uses of importlib-resources and torch is deprecated there; users see nothing of it.
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
def test_executorch_answers_like_the_reference(tmp_path: Path) -> None:
    pytest.importorskip("executorch", exc_type=ImportError)
    model, _ = frozen("vit", MIXED)
    Artifact.from_model(model, **packed_arguments("vit")).save(tmp_path / "model.safetensors")
    result = export(tmp_path / "model.safetensors", "executorch", batch=4)
    assert result["batch"] == 4 and result["check"]["images"] == 4
    assert result["check"]["agreement"] == 100 and result["check"]["largest_difference"] < 1e-4
