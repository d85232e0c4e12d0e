"""Packed models in the shape of the Hugging Face hub: the folder, the card, downloads and uploads without a network."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
import torch
from tiny_models import SMALL, calibrated_model, digit_batches

import qvit
from qvit.deploy.file.artifact import Artifact
from qvit.errors import QvitError, UsageError
from qvit.models.calibrate import calibrate
from qvit.models.convert import quantize
from qvit.models.create import create_model
from qvit.plan.quant_plan import QuantPlan, Rule


@pytest.fixture(scope="module")
def artifact() -> Artifact:
    plan = QuantPlan.preset("w3a3").with_rules(Rule("blocks.*.attn.query", {"bit_width": [2, 5]}))
    provenance = {"accuracy": 97.125, "float_accuracy": 98.0, "method": "lsq"}
    return Artifact.from_model(
        calibrated_model(plan),
        model_name="vit_digits",
        model_kwargs=SMALL,
        class_names=("null", "eins"),
        provenance=provenance,
        plan_name="small",
    )


def test_a_folder_and_back(artifact: Artifact, tmp_path: Path) -> None:
    folder = tmp_path / "my-model"
    artifact.save_pretrained(folder)
    assert {file.name for file in folder.iterdir()} == {"model.safetensors", "config.json", "README.md"}
    again = Artifact.from_pretrained(folder)
    image = digit_batches()[0]
    assert torch.equal(again.model()(image), artifact.model()(image))
    config = json.loads((folder / "config.json").read_text("utf-8"))
    assert config["model"] == "vit_digits" and config["model_kwargs"] == SMALL and config["plan"] == "small"
    assert config["bit_width"]["blocks.0.attn.query"] == [2, 5] and config["class_names"] == ["null", "eins"]
    assert config["file_bytes"] == (folder / "model.safetensors").stat().st_size


def test_the_card_says_widths_sizes_accuracy_and_how_to_load(artifact: Artifact, tmp_path: Path) -> None:
    artifact.save_pretrained(tmp_path / "my-model")
    card = huggingface_hub.ModelCard.load(tmp_path / "my-model" / "README.md")
    assert card.data.library_name == "qvit" and card.data.pipeline_tag == "image-classification"
    size = (tmp_path / "my-model" / "model.safetensors").stat().st_size
    for text in (
        f"{size:,} bytes", "| top-1 (%) | 97.12 |",
        "| `blocks.*.attn.query` | 1 | 2 to 5 |", "| `head.weight` | 1 | 8 |",
        'qvit.Artifact.from_pretrained("my-model")', "plan `small`",
    ):  # fmt: skip
        assert text in card.text, text
    assert str(tmp_path) not in card.content


def test_a_model_without_classes_is_one_for_features(tmp_path: Path) -> None:
    kwargs = SMALL | {"num_classes": 0}
    model = calibrate(quantize(create_model("vit_digits", **kwargs), "w4a4"), digit_batches()).eval()
    artifact = Artifact.from_model(model, model_name="vit_digits", model_kwargs=kwargs)
    artifact.save_pretrained(tmp_path)
    card = huggingface_hub.ModelCard.load(tmp_path / "README.md")
    assert card.data.pipeline_tag == "image-feature-extraction"
    image = digit_batches()[0]
    assert torch.allclose(qvit.load(tmp_path)(image), artifact.model()(image), atol=1e-4)


def test_a_card_that_is_there_is_kept(artifact: Artifact, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("mine")
    (tmp_path / "config.json").write_text("old")
    artifact.save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == "mine"
    assert json.loads((tmp_path / "config.json").read_text())["library_name"] == "qvit"


def test_a_download(artifact: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    artifact.save(tmp_path / "cached")
    asked: list[tuple[Any, ...]] = []

    def download(repo_id: str, filename: str, **options: Any) -> str:
        asked.append((repo_id, filename, options["revision"], options["token"], options["library_name"]))
        return str(tmp_path / "cached")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    found = Artifact.from_pretrained("someone/small", revision="v1", token="t")
    assert found.plan == artifact.plan
    assert asked == [("someone/small", "model.safetensors", "v1", "t", "qvit")]


def test_a_repository_that_cannot_be_reached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(QvitError, match=r"cannot get 'someone/small': no such folder, and from the hub"):
        Artifact.from_pretrained("someone/small", local_files_only=True, cache_dir=tmp_path)
    with pytest.raises(QvitError, match="cannot get 'no/such/folder'"):
        Artifact.from_pretrained("no/such/folder", local_files_only=True)
    with pytest.raises(QvitError, match=r"no packed model at .*model.safetensors"):
        Artifact.from_pretrained(tmp_path)


def test_an_upload(artifact: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[Any] = []

    def create(api: Any, repo_id: str, **options: Any) -> Any:
        done.append(("create", api.token, repo_id, options))
        return SimpleNamespace(repo_id=f"someone/{repo_id}")

    def upload(api: Any, **options: Any) -> str:
        folder = Path(options.pop("folder_path"))
        files = sorted(file.name for file in folder.iterdir())
        assert Artifact.load(folder / "model.safetensors").plan == artifact.plan
        assert 'from_pretrained("small")' in (folder / "README.md").read_text()
        done.append(("upload", files, options))
        return "https://huggingface.co/someone/small/commit/1"

    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", create)
    monkeypatch.setattr(huggingface_hub.HfApi, "upload_folder", upload)
    assert artifact.push_to_hub("small", private=True, token="t", branch="b").endswith("/commit/1")
    assert done == [
        ("create", "t", "small", {"private": True, "exist_ok": True}),
        (
            "upload",
            ["README.md", "config.json", "model.safetensors"],
            {"repo_id": "someone/small", "repo_type": "model", "commit_message": "Packed model", "revision": "b",
             "create_pr": None},
        ),
    ]  # fmt: skip


def test_an_upload_that_fails_says_why(artifact: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise RuntimeError("no rights\nmore")

    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", refuse)
    with pytest.raises(QvitError, match=r"cannot upload to 'someone/small': no rights$"):
        artifact.push_to_hub("someone/small")


def test_a_file_is_no_folder(artifact: Artifact, tmp_path: Path) -> None:
    (tmp_path / "a").write_text("")
    with pytest.raises(UsageError, match="is a file: give a folder"):
        artifact.save_pretrained(tmp_path / "a")
