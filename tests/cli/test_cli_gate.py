"""`qvit ptq --max-drop`: what it prints and writes, who decides, and a call that was killed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import SMALL_DIGITS, Qvit, qvit  # noqa: F401  (a fixture)
from image_sets import make_images, make_shards
from tiny_models import small_config

from qvit.data.open import beside_calibration, calibration_batches, eval_loader, open_data, open_source
from qvit.errors import UsageError
from qvit.methods.ptq import method
from qvit.models.create import create_model
from qvit.runs.finished import load_run
from qvit.runs.run import resume, train
from qvit.runs.subject import open_subject

OPTIONS = ["--device", "cpu", "--threads", "1", "--calibration-images", "32", "--deciding-images", "400"]


@pytest.fixture(scope="module")
def float_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A float model of digits, trained for a while."""
    out = tmp_path_factory.mktemp("float") / "run"
    train(small_config(method="float", epochs=15, lr=5e-3), out, quiet=True)
    return out


@pytest.fixture
def gate(qvit: Qvit, float_run: Path, tmp_path: Path) -> Any:  # noqa: F811
    """Runs `qvit ptq` on digits into `tmp_path/run`."""

    def call(*arguments: Any, out: str = "run") -> Any:
        return qvit("ptq", *SMALL_DIGITS, "--weights", float_run, "--out", tmp_path / out, *OPTIONS, *arguments)

    return call


def test_result(gate: Any, qvit: Qvit, tmp_path: Path) -> None:  # noqa: F811
    answer = gate("--max-drop", "2")
    assert answer.code == 0, answer.err
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    found = result["gate"]
    assert found["measure"] == "accuracy" and found["images"] == found["search_images"] == 200
    assert found["drop"] <= 2 and found["search_drop"] <= 2 and 0 < found["confidence"] <= 1
    last = found["trials"][-1]
    assert last["step"] == "confirm" and last["within"] and last["bit_operations"] == result["bit_operations"]
    assert last["plan"] == json.loads((tmp_path / "run" / "plan.json").read_text())["name"]
    for trial in found["trials"]:
        assert f"{trial['step']} {trial['plan']}: " in answer.out + answer.err
    assert "200 images search, 200 others confirm; one image is 0.5 points" in answer.out + answer.err
    assert f"gate: {last['plan']} loses {found['drop']:.2f} points of top-1 on 200 images" in answer.out
    assert list(result["seconds"])[0] == "search" and result["budget"] is None
    page = tmp_path / "page.html"
    assert qvit("report", tmp_path / "run", "--out", page).code == 0
    text = page.read_text()
    assert (
        "Accuracy gate" in text and f"The cheapest plan by bops within 2 points. It loses {found['drop']:.2f}" in text
    )


def test_the_loss_is_that_of_the_model_that_is_returned(gate: Any, float_run: Path, tmp_path: Path) -> None:
    result = gate("--max-drop", "9", "--objective", "bytes", "--unlabelled", "--json").json
    assert result["accuracy"] is None and result["gate"]["measure"] == "agreement"
    assert result["gate"]["objective"] == "bytes"
    config = small_config(method="ptq", weights=str(float_run), calibration_images=32)
    subject = open_subject(config)
    kept = load_run(tmp_path / "run")
    half = subject.deciding_images(400, 32)[1]
    with torch.no_grad():
        changed = [(kept(x).argmax(-1) != subject.model(x).argmax(-1)).double() for x, _ in half]
    assert 100 * float(torch.cat(changed).mean()) == pytest.approx(result["gate"]["drop"])


def test_images_that_decide_do_not_calibrate_and_are_not_judged(tmp_path: Path) -> None:
    bundle = open_data("digits")
    config = {"input_size": (1, 8, 8), "mean": (0.0,), "std": (1.0,), "crop_pct": 1.0, "interpolation": "bicubic"}
    calibrating = torch.cat(list(calibration_batches(bundle.train, config, images=64, seed=5)))
    source = beside_calibration(bundle.train, 5, 64, 300)
    deciding = torch.cat([x for x, _ in eval_loader(source, config)])
    test = torch.cat([x for x, _ in eval_loader(bundle.test, config)])
    distances = torch.cdist(deciding.flatten(1), torch.cat([calibrating, test]).flatten(1))
    assert len(deciding) == 300 and float(distances.min()) > 0
    config_of_run = small_config(method="ptq", budget="w8a8")
    halves = open_subject(config_of_run).deciding_images(300, 64)
    rows = [torch.cat([x for x, _ in half]).flatten(1) for half in halves]
    assert [len(half) for half in rows] == [150, 150] and float(torch.cdist(*rows).min()) > 0


def test_refusals(gate: Any, qvit: Qvit, tmp_path: Path) -> None:  # noqa: F811
    for extra in (["--budget", "w8a8"], ["--plan", "w8a8"]):
        assert "give either --budget" in gate("--max-drop", "1", *extra).failed(2)
    assert "give either --budget" in gate().failed(2)
    assert "max_drop" in gate("--max-drop", "-1").failed(2)
    assert "go together" in gate("--max-drop", "1", "--objective", "latency").failed(2)
    assert "go together" in gate("--max-drop", "1", "--latency-table", "t.json").failed(2)
    assert "t.json" in gate("--max-drop", "1", "--objective", "latency", "--latency-table", "t.json").failed(2)
    photos = make_images(tmp_path / "few", {"one": 50})
    message = gate("--max-drop", "1", "--data", photos).failed(1)
    assert "8 of the 40 training images are left to decide by, beside 32 that calibrate; at least 16" in message


def test_a_model_that_8_bits_break_is_refused_with_its_loss(
    gate: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(model: Any, *arguments: Any, **options: Any) -> Any:
        torch.manual_seed(0)
        return create_model("vit_digits", depth=1, embed_dim=16, num_heads=2).eval()

    monkeypatch.setattr(method, "ptq", broken)
    message = gate("--max-drop", "5").failed(1)
    loss = json.loads((tmp_path / "run" / "gate.json").read_text())["trials"][0]["drop"]
    assert (
        f"no plan loses at most 5 points: even w8a8 loses {loss:.2f} points of top-1 on images that did not" in message
    )
    assert loss > 5 and not (tmp_path / "run" / "result.json").exists()


def test_a_killed_call_goes_on_where_it_was(gate: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    quantize, calls = method.ptq, []

    def counted(*arguments: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) == limit:
            raise KeyboardInterrupt
        return quantize(*arguments, **options)

    monkeypatch.setattr(method, "ptq", counted)
    limit = 0
    assert gate("--max-drop", "1", out="whole").code == 0
    needed, limit = len(calls), 4
    calls.clear()
    assert gate("--max-drop", "1").code != 0
    limit = 0
    calls.clear()
    result = resume(tmp_path / "run", quiet=True)
    expected = json.loads((tmp_path / "whole" / "result.json").read_text())
    assert result | {"seconds": 0} == expected | {"seconds": 0}
    assert len(calls) == needed - 3
    for name in ("plan.json", "model.safetensors"):
        assert (tmp_path / "run" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_shards_cannot_be_kept_apart(tmp_path: Path) -> None:
    pytest.importorskip("webdataset")
    make_shards(tmp_path / "shards", [0, 1] * 4, 4)
    with pytest.raises(UsageError, match="is read as a stream, of which no images can be kept apart"):
        beside_calibration(open_source(f"wds/{tmp_path / 'shards'}"), 0, 2, 2)
