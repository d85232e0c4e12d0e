"""`qvit export` on the command line: files, the check beside the reference, and refusals."""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import Qvit, qvit  # noqa: F401
from tiny_models import SMALL, calibrated_model
from torch import nn

from qvit.cli.export import _words
from qvit.deploy.engines.openvino import int8_is_exact as openvino_int8_is_exact
from qvit.deploy.engines.reference import ReferenceEngine
from qvit.deploy.export import write as export
from qvit.deploy.file.artifact import Artifact


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("packed") / "model.safetensors"
    Artifact.from_model(calibrated_model("w4a4"), model_name="vit_digits", model_kwargs=SMALL).save(path)
    return path


@pytest.fixture
def runtimes() -> None:
    for package in ("onnx", "onnxscript", "onnxruntime", "openvino"):
        pytest.importorskip(package)


@pytest.mark.usefixtures("runtimes")
def test_onnx_beside_the_packed_file(qvit: Qvit, packed: Path) -> None:  # noqa: F811
    result = qvit("export", packed, "--to", "onnx", "--json").json
    file = packed.with_suffix(".onnx")
    assert (result["file"], result["to"], result["containers"], result["batch"]) == (str(file), "onnx", "small", None)
    assert result["bytes"] == file.stat().st_size
    check = result["check"]
    assert check["images"] == 4 and check["agreement"] == 100 and not check["saturates"]
    assert check["largest_difference"] < 0.01 * check["largest_logit"]
    assert "is there" in qvit("export", packed).failed(2)
    answer = qvit("export", packed, "--containers", "8bit", "--batch", 1, "--overwrite", "--no-check")
    assert answer.code == 0 and "not run: not asked for" in answer.out and str(file) in answer.out
    assert file.stat().st_size != result["bytes"]


@pytest.mark.usefixtures("runtimes")
def test_openvino_of_a_run(qvit: Qvit, packed: Path, tmp_path: Path) -> None:  # noqa: F811
    run = tmp_path / "run"
    run.mkdir()
    assert "pack the run first" in qvit("export", run, "--to", "openvino").failed(2)
    (run / "packed.safetensors").write_bytes(packed.read_bytes())
    answer = qvit("export", run, "--to", "openvino", "--no-vnni", "--out", tmp_path / "model.xml")
    assert answer.code == 0, answer.err
    assert "the same class in 100 %" in answer.out and "saturate" not in answer.out
    (tmp_path / "model.xml").unlink()
    assert "model.bin is there" in qvit("export", run, "--to", "openvino", "--out", tmp_path / "model.xml").failed(2)


@pytest.mark.usefixtures("runtimes")
def test_saturation_is_said(packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reference: Any = lambda *_: lambda images: torch.ones(len(images), 3)  # noqa: E731
    monkeypatch.setattr(export, "ReferenceEngine", reference)
    monkeypatch.setattr(export, "exported_runner", lambda *_: lambda images: torch.full((len(images), 3), 2.0))
    monkeypatch.setattr(export, "export_openvino", lambda artifact, path, **_: (
        path.write_text("x"), path.with_suffix(".bin").write_text("y")))  # fmt: skip
    result = export.export(packed, "openvino", tmp_path / "model.xml")
    assert result["check"]["saturates"] is not openvino_int8_is_exact() and result["bytes"] == 2
    lines = _words(result["check"] | {"saturates": True})
    assert len(lines) == 2 and "--no-vnni" in lines[1] and "differ by 1 at most" in lines[0]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--to", "onx"), "unknown format 'onx'; did you mean 'onnx'"),
        (("--containers", "9bit"), "unknown containers '9bit'; did you mean '8bit'"),
        (("--to", "openvino", "--containers", "8bit"), "containers are chosen for ONNX"),
        (("--no-vnni",), "exact without VNNI"),
        (("--batch", "0"), "at least 1 image"),
        (("--out", "."), "a folder"),
    ],
)
def test_wrong_use_is_one_line(qvit: Qvit, packed: Path, arguments: tuple[str, ...], said: str) -> None:  # noqa: F811
    assert said in qvit("export", packed, *arguments).failed(2)


def test_the_packed_file_is_not_written_over(qvit: Qvit, packed: Path) -> None:  # noqa: F811
    before = packed.read_bytes()
    assert "the packed file" in qvit("export", packed, "--out", packed, "--overwrite").failed(2)
    assert packed.read_bytes() == before


def test_files_that_cannot_be_read(qvit: Qvit, tmp_path: Path) -> None:  # noqa: F811
    (tmp_path / "x.safetensors").write_text("something else")
    assert "cannot load" in qvit("export", tmp_path / "x.safetensors").failed(1)


def test_without_onnx_it_is_said_how_to_install_it(
    qvit: Qvit,  # noqa: F811
    packed: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "onnx" else find(name, *a))
    message = qvit("export", packed, "--out", tmp_path / "m.onnx").failed(2)
    assert 'pip install "qvit[onnx]"' in message and not (tmp_path / "m.onnx").exists()


@pytest.mark.usefixtures("runtimes")
@pytest.mark.parametrize("wrong", [0.0, math.nan, -1.0])
def test_a_file_that_answers_otherwise_is_an_error(
    packed: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    qvit: Qvit,  # noqa: F811
    wrong: float,
) -> None:
    answers = lambda *_: lambda images: wrong * ReferenceEngine(Artifact.load(packed), None)(images)  # noqa: E731
    monkeypatch.setattr(export, "exported_runner", answers)
    monkeypatch.setattr(export, "export_onnx", lambda artifact, path, **_: path.write_text("x"))
    assert "answers otherwise" in qvit("export", packed, "--to", "onnx", "--out", tmp_path / "m.onnx").failed(1)


@pytest.mark.usefixtures("runtimes")
def test_what_cannot_run_here_is_said(packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> nn.Module:
        raise RuntimeError("no kernel\nfor this")

    monkeypatch.setattr(export, "exported_runner", refuse)
    monkeypatch.setattr(export, "export_onnx", lambda artifact, path, **_: path.write_text("x"))
    assert export.export(packed, "onnx", tmp_path / "m.onnx")["check"] == {
        "skipped": "onnxruntime does not take it: no kernel for this"
    }
    monkeypatch.setattr(export, "missing", lambda *_: ["onnxruntime"])
    assert export.export(packed, "onnx", tmp_path / "m.onnx", overwrite=True)["check"] == {
        "skipped": "onnxruntime is not installed"
    }
