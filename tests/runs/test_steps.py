"""Multi-step distillation: the chain of runs, scales carried over, a killed chain, requests that make no sense."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import calibrated_model, digit_batches, digits_model, small_config

from qvit.errors import UsageError
from qvit.models.convert import Stage, freeze, quantize, quantizers_disabled, stage_of
from qvit.models.inherit import inherit
from qvit.quantizers import quantizers_of
from qvit.runs import run as runs
from qvit.runs.dry_run import dry_run
from qvit.runs.finished import load_run
from qvit.runs.run import resume, train
from qvit.runs.steps import step_configs

CHAIN: dict[str, Any] = {"method": "lsq+", "steps": "w8a8, 2bit", "distill": 0.5, "epochs": 3, "seed": 5}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("steps") / "run"
    train(small_config(**CHAIN), run, quiet=True)
    return run


def test_a_chain_is_ordinary_runs_and_the_last_one_is_the_result(finished: Path) -> None:
    result = json.loads((finished / "result.json").read_text())
    first, last = finished / "steps" / "1-w8a8", finished / "steps" / "2-2bit"
    assert [step["name"] for step in result["steps"]] == [first.name, last.name]
    assert [step["epochs"] for step in result["steps"]] == [1, 2] and result["epochs"] == 3
    own = json.loads((last / "result.json").read_text())
    assert {key: own[key] for key in own if key not in ("seconds", "epochs")} == {
        key: result[key] for key in own if key not in ("seconds", "epochs")
    }
    assert result["seconds"]["train"] > own["seconds"]["train"]
    assert (finished / "model.safetensors").read_bytes() == (last / "model.safetensors").read_bytes()
    config = json.loads((last / "config.json").read_text())
    assert config["teacher"] == config["start"] == str(first) and config["steps"] is None
    assert json.loads((first / "config.json").read_text())["teacher"] is None
    images = digit_batches()[0]
    assert stage_of(load_run(finished)) is Stage.FROZEN
    assert torch.equal(load_run(finished)(images), load_run(last)(images))


@pytest.mark.parametrize("killed", ["second step", "before the result"])
def test_a_killed_chain_ends_as_the_whole_one(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, killed: str
) -> None:
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        if killed == "second step":
            whole = runs._execute

            def execute(config: Any, folder: Path, *rest: Any, **options: Any) -> Any:
                if folder.name == "2-2bit":
                    raise KeyboardInterrupt
                return whole(config, folder, *rest, **options)

            patch.setattr(runs, "_execute", execute)
        else:
            patch.setattr(runs, "conclude", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            train(small_config(**CHAIN), run, quiet=True)
    assert not (run / "result.json").exists()
    with pytest.raises(UsageError, match="--resume"):
        train(small_config(**CHAIN), run, quiet=True)
    began = (run / "steps" / "1-w8a8" / "result.json").stat().st_mtime_ns
    result = resume(run, quiet=True)
    assert (run / "steps" / "1-w8a8" / "result.json").stat().st_mtime_ns == began
    assert (run / "model.safetensors").read_bytes() == (finished / "model.safetensors").read_bytes()
    assert result["accuracy"] == json.loads((finished / "result.json").read_text())["accuracy"]
    assert resume(run, quiet=True) == result


def test_a_step_begins_with_the_weights_of_the_one_before(finished: Path, tmp_path: Path) -> None:
    first = finished / "steps" / "1-w8a8"
    config = small_config(method="lsq+", plan="w4a4", start=str(first), epochs=1, lr=1e-12, weight_decay=0.0)
    train(config, tmp_path / "run", quiet=True)
    before, after = load_file(first / "model.safetensors"), load_file(tmp_path / "run" / "model.safetensors")
    for key in (key for key in before if "_quantizer" not in key):
        torch.testing.assert_close(after[key], before[key], rtol=0, atol=1e-9)
    boundary = "head.input_quantizer.scale"  # 8 bits in both
    torch.testing.assert_close(after[boundary], before[boundary], rtol=0, atol=1e-9)


def test_scales_follow_the_width_within_the_range_that_was_learned() -> None:
    source = freeze(calibrated_model("w8a8", seed=3))
    clipped: Any = dict(quantizers_of(source))["blocks.0.mlp.fc1.weight"]
    with torch.no_grad():
        clipped.scale.mul_(0.25)  # training decided to clip
    batches = digit_batches()
    same = inherit(quantize(digits_model(seed=4), "w8a8"), source, batches)
    with torch.no_grad():
        assert torch.equal(same(batches[0]), source(batches[0]))
    lower = inherit(quantize(digits_model(seed=4), "w2a2"), source, batches)
    weight = source.get_parameter("blocks.0.mlp.fc1.weight")
    quantizer: Any = dict(quantizers_of(lower))["blocks.0.mlp.fc1.weight"]
    steps = clipped.scale.detach().clone()
    target = weight.clamp(-128 * steps, 127 * steps)
    chosen = quantizer.scale.detach().clone()
    assert 1 < float(chosen / steps) < 127  # between the steps kept and the range kept
    error = (quantizer(weight) - target).square().mean()
    with torch.no_grad():
        for ratio in torch.linspace(1, 127, 200):
            quantizer.scale.copy_(steps * ratio)
            assert error <= 1.05 * (quantizer(weight) - target).square().mean()
        quantizer.scale.copy_(chosen)
    with quantizers_disabled(lower), quantizers_disabled(source), torch.no_grad():
        assert torch.equal(lower(batches[0]), source(batches[0]))


def test_a_model_is_continued_from_a_finished_one_of_its_kind() -> None:
    model = quantize(digits_model(), "w4a4")
    for source in (digits_model(), freeze(calibrated_model(depth=2))):
        with pytest.raises(UsageError, match="continued"):
            inherit(model, source, digit_batches())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": "4bit"}, "two or more widths"),
        ({"steps": "4bit,,2bit"}, "two or more widths"),
        ({"budget": "2bit"}, "leave out budget"),
        ({"distill": 0.0}, "--distill 1"),
        ({"epochs": 1}, "cannot be shared"),
        ({"steps": "w8a8,w4q4"}, "w4q4"),
        ({"method": "float", "steps": "8bit,4bit"}, "takes no --budget"),
    ],
)
def test_chains_that_cannot_be_meant(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        train(small_config(**CHAIN | changes), tmp_path / "run", quiet=True)
    assert not (tmp_path / "run").exists()


def test_widths_may_be_learned_in_each_step(tmp_path: Path) -> None:
    config = small_config(method="qvit", steps="4bit,3bit", distill=1.0, epochs=2)
    result = train(config, tmp_path / "run", quiet=True)
    assert result["bit_operations"] < result["steps"][0]["bit_operations"]


def test_a_dry_run_shows_the_last_step() -> None:
    report = dry_run(small_config(**CHAIN))
    direct = dry_run(small_config(method="lsq+", budget="2bit", distill=0.5, epochs=3))
    assert report["bit_operations"] == direct["bit_operations"] and report["steps"] == direct["steps"]
    parts = report["memory"]["parts"]
    assert report["memory"]["total"] - direct["memory"]["total"] == parts["teacher"] == parts["parameters"]


def test_names_of_steps(tmp_path: Path) -> None:
    steps = step_configs(small_config(**CHAIN | {"steps": "25%,w4a8,0.1", "epochs": 7}), tmp_path)
    assert [folder.name for folder in steps] == ["1-25%", "2-w4a8", "3-0.1"]
    assert [(step.budget, step.plan) for step in steps.values()] == [("25%", None), (None, "w4a8"), ("0.1", None)]
    assert [step.epochs for step in steps.values()] == [2, 2, 3]
