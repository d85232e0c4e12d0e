"""`qvit pack` and `qvit inspect`, from a run that was trained to the table of its bytes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from command_line import SMALL_DIGITS, Qvit, qvit  # noqa: F401
from tiny_models import digit_batches, small_config

import qvit as package
from qvit.deploy.file.artifact import Artifact
from qvit.errors import UsageError
from qvit.runs.finished import load_run
from qvit.runs.run import train


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`float`, and `mixed`, quantized from it."""
    folder = tmp_path_factory.mktemp("runs")
    train(small_config(method="float", epochs=1), folder / "float", quiet=True)
    weights = str(folder / "float")
    train(small_config(method="qvit", budget="3bit", epochs=1, weights=weights), folder / "mixed", quiet=True)
    return folder


@pytest.fixture
def run(runs: Path, tmp_path: Path) -> Path:
    """A copy of the quantized run."""
    shutil.copytree(runs / "mixed", tmp_path / "mixed")
    return tmp_path / "mixed"


def test_a_run_is_packed_and_inspected(qvit: Qvit, run: Path) -> None:  # noqa: F811
    answer = qvit("pack", run)
    assert answer.code == 0 and "packed integers" in answer.out and "packed.safetensors" in answer.out
    file = run / "packed.safetensors"
    facts = qvit("inspect", file, "--json").json
    assert facts["file_bytes"] == file.stat().st_size
    assert facts["payload_bytes"] == sum(row["bytes"] for row in facts["sites"])
    assert facts["payload_bytes"] == json.loads((run / "cost.json").read_text())["weight_bytes"]
    parts = ("header_bytes", "payload_bytes", "scale_bytes", "float_bytes")
    assert sum(facts[part] for part in parts) == facts["file_bytes"]
    assert facts["theory_bytes"] == facts["payload_bytes"] + facts["float_bytes"]
    plan = json.loads((run / "plan.json").read_text())["sites"]
    assert [row["site"] for row in facts["sites"]] == list(plan)
    for row in facts["sites"]:
        assert row["bit_width"] == plan[row["site"]]["bit_width"] and row["scale_bytes"] > 0
        assert (row["bytes"] > 0) == (row["numel"] > 0) == (row["role"] == "weight")
    table = qvit("inspect", file).out
    assert "blocks.0.attn.qkv.query_weight" in table and "per-head" in table and "method: qvit" in table
    image = digit_batches()[0]
    assert torch.equal(Artifact.load(file).model()(image), load_run(run)(image))


def test_json_of_pack_is_that_of_inspect(qvit: Qvit, run: Path) -> None:  # noqa: F811
    written = qvit("pack", run, "--out", run.parent / "new" / "a.safetensors", "--json").json
    assert written == qvit("inspect", run.parent / "new" / "a.safetensors", "--json").json


def test_provenance_has_the_result_and_no_paths(runs: Path, run: Path) -> None:
    artifact = package.pack_run(run)
    found, result = artifact.provenance, json.loads((run / "result.json").read_text())
    assert (found["method"], found["budget"], found["seed"], found["data"]) == ("qvit", "3bit", 0, "digits")
    assert found["accuracy"] == result["accuracy"] and found["float_accuracy"] == result["float_accuracy"]
    assert artifact.class_names == tuple("0123456789") and artifact.data_config["input_size"] == (1, 8, 8)
    assert artifact.plan.name == "qvit-3bit" and artifact.model_kwargs["num_classes"] == 10
    artifact.save(run / "a")
    content = (run / "a").read_bytes()
    assert str(runs).encode() not in content and str(run.parent).encode() not in content


def test_a_path_among_the_options_keeps_its_last_part_only(run: Path) -> None:
    config = json.loads((run / "config.json").read_text())
    config["data"] = "wds//somewhere/images"
    (run / "config.json").write_text(json.dumps(config))
    assert package.pack_run(run).provenance["data"] == "images"


def test_packing_twice_gives_the_same_bytes(qvit: Qvit, run: Path) -> None:  # noqa: F811
    contents = []
    for _ in range(2):
        assert qvit("pack", run).code == 0
        contents.append((run / "packed.safetensors").read_bytes())
    assert contents[0] == contents[1]


def test_what_is_no_packed_model_is_not_replaced(qvit: Qvit, run: Path) -> None:  # noqa: F811
    other = run.parent / "precious.txt"
    other.write_text("precious")
    assert "is no packed model" in qvit("pack", run, "--out", other).failed(2)
    assert other.read_text() == "precious"
    assert qvit("pack", run, "--out", other, "--overwrite").code == 0 and Artifact.load(other)
    assert "belongs to the run" in qvit("pack", run, "--out", run / "model.safetensors", "--overwrite").failed(2)
    assert "is a directory" in qvit("pack", run, "--out", run.parent).failed(2)
    load_run(run)


def test_failures_are_one_line(qvit: Qvit, runs: Path, run: Path) -> None:  # noqa: F811
    assert "holds a float model: quantize it" in qvit("pack", runs / "float").failed(2)
    assert "no run at" in qvit("pack", runs / "none").failed(1)
    assert "no packed model at" in qvit("inspect", runs / "none").failed(1)
    assert "directory" in qvit("inspect", runs).failed(1)
    assert "no checksum of a packed model" in qvit("inspect", runs / "mixed" / "model.safetensors").failed(1)
    qvit("pack", run)
    file = run / "packed.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    assert "packed.safetensors: it is damaged" in qvit("inspect", file).failed(1)
    file.unlink()
    (run / "result.json").unlink()
    assert "interrupted run" in qvit("pack", run).failed(1)


def test_overwriting_a_run_takes_its_packed_model_along(run: Path) -> None:
    package.pack_run(run).save(run / "packed.safetensors")
    train(small_config(method="float", epochs=1), run, quiet=True, overwrite=True)
    assert not (run / "packed.safetensors").exists()
    with pytest.raises(UsageError, match="float model"):
        package.pack_run(run)


@pytest.mark.parametrize("probs", ["uniform", "log-sqrt2"])
def test_a_post_training_run_is_packed(qvit: Qvit, runs: Path, tmp_path: Path, probs: str) -> None:  # noqa: F811
    """Scales per channel and per head, reparameterized norms, corrected biases."""
    run = tmp_path / "run"
    given = ["--weights", runs / "float", "--out", run, "--budget", "w4a6", "--probs", probs, "--bias-correction"]
    assert qvit("ptq", *SMALL_DIGITS, *given, "--device", "cpu", "--calibration-images", "32").code == 0
    assert qvit("pack", run).code == 0
    image = digit_batches()[0]
    artifact = Artifact.load(run / "packed.safetensors")
    assert torch.equal(artifact.model()(image), load_run(run)(image))
    assert artifact.provenance["method"] == "ptq" and artifact.provenance["calibration_images"] == 32


def test_a_run_that_cannot_be_told_is_one_line(qvit: Qvit, run: Path) -> None:  # noqa: F811
    (run / "result.json").write_text("{")
    assert "cannot read" in qvit("pack", run).failed(1)
    (run / "result.json").write_text("[]")
    assert "must hold a JSON object, not a list" in qvit("pack", run).failed(1)


@pytest.mark.parametrize("engine", ["reference", pytest.param("torch", marks=pytest.mark.slow)])
def test_a_packed_model_is_scored_on_integers(qvit: Qvit, run: Path, engine: str) -> None:  # noqa: F811
    qvit("pack", run)
    simulated = json.loads(qvit("evaluate", run, "--data", "digits", "--json").out)
    options = ("--data", "digits", "--engine", engine, "--json")
    found = json.loads(qvit("evaluate", run / "packed.safetensors", *options).out)
    assert found["images"] == simulated["images"] == 597 and found["engine"] == engine
    assert abs(found["top1"] - simulated["top1"]) < 1 and "in integers" in found["arithmetic"]


def test_engines_are_for_packed_models(qvit: Qvit, run: Path) -> None:  # noqa: F811
    failed = qvit("evaluate", run, "--data", "digits", "--engine", "torch")
    assert failed.code == 2 and "qvit pack" in failed.err
    qvit("pack", run)
    failed = qvit("evaluate", run / "packed.safetensors", "--data", "digits", "--engine", "refrence")
    assert failed.code == 2 and "reference" in failed.err
