"""Engines: which there are, how one is chosen, and that all of them give the same answers."""

from __future__ import annotations

import functools
import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from integer_models import frozen, packed_arguments
from torch import Tensor

import qvit
from qvit.deploy.engines import ENGINES, available_engines, create_engine, load
from qvit.deploy.engines.base import Entry
from qvit.deploy.engines.onnxruntime import int8_is_exact as onnxruntime_int8_is_exact
from qvit.deploy.engines.openvino import int8_is_exact as openvino_int8_is_exact
from qvit.deploy.file.artifact import Artifact
from qvit.errors import QvitError, UsageError
from qvit.kernels.build import CannotBuild


@functools.cache
def packed() -> tuple[Artifact, Tensor, Tensor]:
    """A packed model, images, and the simulated model's answers."""
    model, images = frozen("vit", "w4a4")
    with torch.no_grad():
        return Artifact.from_model(model, **packed_arguments("vit")), images, model(images)


def without(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name in names else find(name, *a))


def test_the_best_installed_engine_comes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    assert list(ENGINES) == ["native", "openvino", "onnxruntime", "torch", "cuda", "reference"]
    everything = [name for name in ENGINES if name in available_engines()]
    assert available_engines() == everything and everything[0] == "native" and everything[-2:] == ["torch", "reference"]
    without(monkeypatch, "openvino")
    assert "openvino" not in available_engines()
    without(monkeypatch, "onnxscript")
    assert available_engines() == ["native", "torch", "reference"]
    made: list[Any] = []
    entry = Entry(lambda artifact, threads, **options: made.append(options), (), 30)  # type: ignore[arg-type]
    monkeypatch.setitem(ENGINES._found, "torch", entry)

    def refuses(*_: Any, **__: Any) -> None:
        raise UsageError("not this model")

    monkeypatch.setitem(ENGINES._found, "native", Entry(refuses, (), 5))  # type: ignore[arg-type]
    create_engine(packed()[0])
    assert made == [{}]


def test_an_engine_that_cannot_be_built_is_passed_over(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def cannot(*_: Any, **__: Any) -> None:
        raise CannotBuild("there is no compiler")

    without(monkeypatch, "openvino", "onnxscript")
    monkeypatch.setitem(ENGINES._found, "native", Entry(cannot, (), 5))  # type: ignore[arg-type]
    assert create_engine(packed()[0]).name == "torch"
    assert "engine 'native' is passed over, 'torch' serves instead: there is no compiler" in caplog.text


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("onnxrutime", "did you mean 'onnxruntime'"),
        ("tensorrt", "native, openvino, onnxruntime, torch, cuda, reference"),
    ],
)
def test_an_unknown_engine(name: str, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        create_engine(packed()[0], name)


def test_an_engine_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    without(monkeypatch, "openvino", "onnxscript")
    with pytest.raises(UsageError, match="'openvino' needs openvino, onnxscript: pip install openvino onnxscript"):
        create_engine(packed()[0], "openvino")


def test_an_option_of_another_engine() -> None:
    with pytest.raises(UsageError, match="'reference' has no option 'compiled'"):
        create_engine(packed()[0], "reference", compiled=False)


def test_reference_and_torch_agree_bit_for_bit() -> None:
    artifact, images, simulated = packed()
    reference, fast = create_engine(artifact, "reference"), create_engine(artifact, "torch", compiled=False)
    assert (reference.name, fast.name) == ("reference", "torch") and reference.artifact is artifact
    answers = reference(images)
    assert torch.equal(fast(images), answers) and answers.dtype == torch.float32 and not answers.requires_grad
    torch.testing.assert_close(answers, simulated, rtol=1e-4, atol=1e-4)
    assert torch.equal(reference(images.double()), answers)
    assert reference.arithmetic == "all 14 products in integers"
    assert fast.arithmetic.startswith("all 14 products in integers, by ")


def test_torch_compiles_where_a_compiler_is(monkeypatch: pytest.MonkeyPatch) -> None:
    artifact, images, _ = packed()
    compiled: list[Any] = []
    monkeypatch.setattr(torch, "compile", lambda module: compiled.append(module) or module)
    for there, option, expected in ((None, None, 0), ("/usr/bin/g++", None, 1), (None, True, 1), ("/x", False, 0)):
        monkeypatch.setattr(shutil, "which", lambda _, there=there: there)
        compiled.clear()
        engine = create_engine(artifact, "torch", **({} if option is None else {"compiled": option}))
        assert len(compiled) == expected and engine(images).shape == (8, 10)


def test_threads_are_those_of_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", asked.append)
    create_engine(packed()[0], "torch", threads=3, compiled=False)
    create_engine(packed()[0], "torch", compiled=False)
    assert asked == [3]


@pytest.mark.parametrize("name", ["onnxruntime", "openvino"])
def test_runtimes_agree_with_the_reference(name: str) -> None:
    if name not in available_engines():
        pytest.skip(f"{name} is not installed")
    artifact, images, _ = packed()
    expected = create_engine(artifact, "reference")(images)
    engine = create_engine(artifact, name, threads=1)
    for count in (8, 1):
        answers = engine(images[:count])
        assert answers.dtype == torch.float32
        apart = (answers - expected[:count]).abs().amax(1) / expected.abs().max()
        assert int((apart > 1e-5).sum()) <= 1 and float(apart.max()) < 0.2, apart
    first, second = engine(images[:2]), engine(images[2:4])
    assert not torch.equal(first, second) and torch.equal(first, engine(images[:2])), "answers are no shared memory"
    unit = (
        ("uint8 and int8" if onnxruntime_int8_is_exact() else "uint8")
        if name == "onnxruntime"
        else "int8"
        if openvino_int8_is_exact()
        else "exact float32 elsewhere"
    )
    assert engine.name == name and engine.arithmetic.startswith("all 14 products in integers")
    assert engine.arithmetic.endswith(unit)


def test_a_packed_file_runs_after_one_call(tmp_path: Path) -> None:
    artifact, images, _ = packed()
    artifact.save(tmp_path / "model.safetensors")
    engine = qvit.load(tmp_path / "model.safetensors", "torch", compiled=False)
    assert torch.equal(engine(images), create_engine(artifact, "reference")(images))
    assert engine.artifact.model_name == "vit_digits" and qvit.load is load


def test_files_that_are_no_packed_model(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"something else")
    with pytest.raises(QvitError, match=r"cannot load .*model\.safetensors"):
        load(tmp_path / "model.safetensors", "reference")


def test_what_is_simulated_is_said() -> None:
    model, images = frozen("vit", qvit.QuantPlan.preset("w4a4").with_rules(qvit.Rule("*.probs", {"quantizer": "log2"})))
    artifact = Artifact.from_model(model, **packed_arguments("vit"))
    engine = create_engine(artifact, "reference")
    assert engine.arithmetic == "12 of 14 products in integers, 2 simulated (2: a logarithmic grid)"
    with torch.no_grad():
        torch.testing.assert_close(engine(images), model(images), rtol=1e-4, atol=1e-4)


SIGNAL_AFTER_OPENVINO = """
import gc, signal, subprocess, numpy
from qvit.deploy.packages import openvino_core
signal.signal(signal.SIGCHLD, lambda *_: None)
from qvit.deploy.engines.openvino import int8_is_exact
import openvino
from openvino import opset15 as ops
x = ops.parameter([1, 4], numpy.float32)
first, second = (openvino_core().compile_model(openvino.Model([ops.relu(x)], [x]), "CPU") for _ in range(2))
int8_is_exact()
del first; gc.collect()
del second; gc.collect()
subprocess.run(["true"], check=True)
print("alive")
"""


def test_a_signal_finds_the_process_alive_when_openvino_s_models_are_gone() -> None:
    """Several `openvino.Core` leave a freed signal stack behind: with a handler, the next child that ends kills."""
    pytest.importorskip("openvino")
    done = subprocess.run([sys.executable, "-c", SIGNAL_AFTER_OPENVINO], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and done.stdout == "alive\n", done.stderr
