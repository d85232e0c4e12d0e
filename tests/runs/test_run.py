"""Runs: files and their contract, resuming bit for bit, what a directory may hold, test images that stay unseen."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import events, make_images, small_config

from qvit.data import images as image_files
from qvit.data.open import open_data
from qvit.errors import QvitError, UsageError
from qvit.kernels import trial
from qvit.models.convert import Stage, plan_of, stage_of
from qvit.plan.quant_plan import QuantPlan
from qvit.runs import run as runs
from qvit.runs import subject as subjects
from qvit.runs.finished import evaluate_run, load_run
from qvit.runs.run import resume, train
from qvit.training.checkpoint import checkpoints_of
from qvit.training.config import TrainConfig
from qvit.training.loop import Trainer

RESULT_TYPES: dict[str, Any] = {
    "model": str,
    "method": str,
    "accuracy": float,
    "float_accuracy": float,
    "budget": (str, type(None)),
    "bit_operations": int,
    "weight_bytes": int,
    "seconds": dict,
    "version": int,
    "top5": float,
    "images": int,
    "seed": int,
}

METHODS: dict[str, dict[str, Any]] = {
    "float": {"method": "float", "ema_decay": 0.9, "mixup": 0.4, "cutmix": 0.5, "warmup_epochs": 1, "lr": 3e-3},
    "lsq+": {"method": "lsq+", "budget": "3bit", "mixup": 0.2, "distill": 0.5, "label_smoothing": 0.1},
    "qvit": {
        "method": "qvit",
        "budget": "3bit",
        "ema_decay": 0.8,
        "mixup": 0.3,
        "clip_grad": 1.0,
        "method_options": {"searching_ratio": 0.5},
    },
    "qvit to the end": {
        "method": "qvit",
        "budget": "2bit",
        "checkpoint_every": 2,
        "monitor_share": 0.1,
        "method_options": {"searching_ratio": 1.0, "width_gradient": "interpolation"},
    },
    "lsq+ on integers": {"method": "lsq+", "budget": "4bit", "nonlinear": "sqnr"},
}
EPOCHS = 6
TRAIN = """
import json, sys
from qvit import TrainConfig, train
train(TrainConfig.create(**json.loads(sys.argv[1])), sys.argv[2], quiet=True)
"""


TRAIN_OR_RESUME = """
import json, sys
from pathlib import Path
from qvit import TrainConfig, resume, train
print("begin", flush=True)
if (Path(sys.argv[2]) / "config.json").is_file():
    resume(sys.argv[2], quiet=True)
else:
    train(TrainConfig.create(**json.loads(sys.argv[1])), sys.argv[2], quiet=True)
"""


def run_config(name: str, **changes: Any) -> TrainConfig:
    return small_config(**({"epochs": EPOCHS} | METHODS[name] | changes))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an uninterrupted run of every configuration, made on demand by `whole_run`."""
    return tmp_path_factory.mktemp("finished")


def whole_run(finished: Path, name: str) -> Path:
    if not (finished / name / runs.RESULT).is_file():
        train(run_config(name), finished / name, quiet=True)
    return finished / name


def last_of_each_step(run: Path) -> dict[tuple[str, int], dict[str, Any]]:
    """The log as readers see it: the last line of each event and step, without times."""
    found = {}
    for kind in ("step", "epoch", "freeze", "end"):
        for event in events(run, kind):
            for clock in ("seconds", "images_per_second"):
                event.pop(clock, None)
            found[kind, event["step"]] = event
    return found


def assert_same_run(actual: Path, expected: Path) -> None:
    """The files of two runs are equal, bit for bit, but for what clocks say."""
    for name in ("model.safetensors", "plan.json", "cost.json"):
        assert (actual / name).read_bytes() == (expected / name).read_bytes(), name
    results = [json.loads((run / "result.json").read_text()) for run in (actual, expected)]
    for result in results:
        result.pop("seconds")
    assert results[0] == results[1]
    assert last_of_each_step(actual) == last_of_each_step(expected)


# ------------------------------------------------------------------------------------------------- the files of a run


@pytest.mark.parametrize("name", METHODS)
def test_result_json_keeps_its_contract(finished: Path, name: str) -> None:
    run = whole_run(finished, name)
    result = json.loads((run / "result.json").read_text())
    assert set(RESULT_TYPES) <= set(result)
    for key, kind in RESULT_TYPES.items():
        assert isinstance(result[key], kind) and not isinstance(result[key], bool), f"{key} = {result[key]!r}"
    config = run_config(name)
    assert result["model"] == "vit_digits" and result["method"] == config.method
    assert result["budget"] == config.budget and result["seed"] == config.seed
    assert 0 <= result["accuracy"] <= 100 and 0 <= result["float_accuracy"] <= 100
    assert result["images"] == 597 and result["seconds"]["total"] >= result["seconds"]["train"] > 0
    cost = json.loads((run / "cost.json").read_text())
    assert cost["bit_operations"] == result["bit_operations"] and cost["weight_bytes"] == result["weight_bytes"]
    if config.method == "float":
        weights = sum(v.numel() for k, v in load_file(run / "model.safetensors").items() if v.dim() in (2, 4))
        assert result["bit_operations"] == cost["macs"] * 32 * 32 and result["weight_bytes"] == 4 * weights
        assert result["accuracy"] == result["float_accuracy"]


@pytest.mark.parametrize("name", METHODS)
def test_cost_json_adds_up_and_is_the_plan_s(finished: Path, name: str) -> None:
    run = whole_run(finished, name)
    cost, plan = json.loads((run / "cost.json").read_text()), QuantPlan.load(run)
    assert set(cost) == {"model", "plan", "macs", "bit_operations", "weight_bytes", "sites"}
    for row in cost["sites"]:
        assert set(row) == {"site", "macs", "bit_width", "bit_operations", "weight_bytes"}
        widths = row["bit_width"] if isinstance(row["bit_width"], list) else [row["bit_width"]]
        assert tuple(widths) == plan.widths()[row["site"]]
    for key in ("macs", "bit_operations", "weight_bytes"):
        assert cost[key] == sum(row[key] for row in cost["sites"]) and isinstance(cost[key], int)


@pytest.mark.parametrize("name", METHODS)
def test_the_log_tells_the_run_in_order(finished: Path, name: str) -> None:
    run = whole_run(finished, name)
    log = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    start, end = log[0], log[-1]
    assert start["event"] == "start" and end["event"] == "end"
    assert [event["event"] for event in log].count("start") == 1
    steps = start["steps_per_epoch"]
    assert start["step"] == 0 and start["epochs"] == EPOCHS and steps == (5 if "end" in name else 6)
    assert set(start["uniform_bit_operations"]) == {str(bits) for bits in range(2, 9)}
    config = run_config(name)
    budget = start["uniform_bit_operations"][config.budget[0]] if config.budget else None
    assert start["budget_bit_operations"] == budget
    positions = [event["step"] for event in log]
    assert positions == sorted(positions) and end["step"] == EPOCHS * steps
    epochs = [event for event in log if event["event"] == "epoch"]
    assert [event["epoch"] for event in epochs] == list(range(EPOCHS))
    assert all((event["accuracy"] is None) != bool(config.monitor_share) for event in epochs)
    kinds = {"start", "step", "epoch", "end"} | ({"freeze"} if config.method == "qvit" else set())
    kinds |= set() if config.method == "float" else {"diagnostics"}
    assert {event["event"] for event in log} == kinds
    result = json.loads((run / "result.json").read_text())
    assert end["accuracy"] == result["accuracy"] and end["seconds"] == result["seconds"]["total"]
    for event in log:
        if event["event"] == "step":
            assert {"loss", "task_loss", "penalty", "bit_operations", "lr", "images_per_second", "epoch"} <= set(event)


def test_the_log_names_operators_that_were_plain(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trial, "_chosen", {"forward": True, "difference": False, "backward": False})
    train(run_config("float"), tmp_path, quiet=True)
    end = json.loads((tmp_path / "log.jsonl").read_text().splitlines()[-1])
    assert end["event"] == "end" and end["plain_operators"] == ["backward", "difference"]


def test_config_json_is_enough_to_start_again(finished: Path, tmp_path: Path) -> None:
    record = json.loads((whole_run(finished, "lsq+") / "config.json").read_text())
    assert {"qvit", "torch", "timm", "python"} <= set(record["versions"])
    assert record["hardware"] and record["command"] and record["class_names"] == [str(digit) for digit in range(10)]
    config = TrainConfig.create(**{key: record[key] for key in TrainConfig.model_fields})
    assert config == run_config("lsq+")
    train(config, tmp_path / "again", quiet=True)
    assert_same_run(tmp_path / "again", finished / "lsq+")


def test_the_plan_of_a_run_loads_anywhere(finished: Path) -> None:
    plan = QuantPlan.load(whole_run(finished, "qvit"))
    assert plan.model == "vit_digits" and plan.name == "qvit-3bit"
    assert not any(spec.learn_bit_width for spec in plan.sites.values() if spec)
    assert set(QuantPlan.load(whole_run(finished, "float")).sites.values()) == {None}


@pytest.mark.parametrize("name", ["qvit", "qvit to the end"])
def test_a_run_stays_within_its_budget(finished: Path, name: str) -> None:
    run = whole_run(finished, name)
    (start,), (freeze,) = events(run, "start"), events(run, "freeze")
    result = json.loads((run / "result.json").read_text())
    assert result["bit_operations"] == freeze["bit_operations"] <= start["budget_bit_operations"]
    assert freeze["budget_bit_operations"] == start["budget_bit_operations"]


def test_nothing_else_is_left_in_the_directory(finished: Path) -> None:
    run = whole_run(finished, "qvit")
    expected = {"config.json", "plan.json", "cost.json", "log.jsonl", "model.safetensors", "result.json"}
    files = {str(path.relative_to(run)) for path in run.rglob("*") if path.is_file()}
    kept = checkpoints_of(run)
    assert len(kept) == 2 and files == expected | {str(path.relative_to(run)) for path in kept}


# --------------------------------------------------------------------------------------------------------------- seeds


def test_a_seed_decides_everything(finished: Path, tmp_path: Path) -> None:
    random.seed(99)
    np.random.seed(99)
    torch.manual_seed(99)  # what happened before must not matter
    train(run_config("qvit"), tmp_path / "same", quiet=True)
    assert_same_run(tmp_path / "same", whole_run(finished, "qvit"))
    train(run_config("qvit", seed=1), tmp_path / "other", quiet=True)
    other, same = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("other", "same"))
    assert other != same


# ------------------------------------------------------------------------------------------------- killed and resumed


class Killed(BaseException):
    """Stands for a kill: nothing in the library may catch it."""


def kill_at(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """The process ends in the middle of a step, counted from 1 over all epochs."""
    whole_step = Trainer._step

    def dying_step(self: Trainer, batches: Any, number: int) -> Any:
        if number == step:
            raise Killed
        return whole_step(self, batches, number)

    monkeypatch.setattr(Trainer, "_step", dying_step)


@pytest.mark.parametrize(
    ("name", "steps"),
    [
        ("float", [9]),
        ("lsq+", [7, 20]),
        ("lsq+ on integers", [9]),
        ("qvit", [8, 17, 19, 36]),  # searching, its last epoch, just frozen, the last step
        ("qvit to the end", [12, 29]),
    ],
)
def test_resumed_equals_uninterrupted(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, steps: list[int]
) -> None:
    for attempt, step in enumerate(steps):
        with monkeypatch.context() as patch:
            kill_at(patch, step)
            with pytest.raises(Killed):
                if attempt:
                    resume(tmp_path / "run", quiet=True)
                else:
                    train(run_config(name), tmp_path / "run", quiet=True)
        assert not (tmp_path / "run" / "result.json").exists()
        assert not (tmp_path / "run" / "model.safetensors").exists()
    resume(tmp_path / "run", quiet=True)
    assert_same_run(tmp_path / "run", whole_run(finished, name))
    assert len(events(tmp_path / "run", "resume")) == len(steps)


@pytest.mark.parametrize("name", ["qvit to the end", "lsq+"])
@pytest.mark.parametrize("stage", ["save_weights", "evaluate", "write_json"])
def test_a_kill_after_the_last_step_is_made_good(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, stage: str
) -> None:
    expected = whole_run(finished, name)
    config = run_config(name)
    with monkeypatch.context() as patch:
        calls = 0
        original = getattr(runs, stage)

        def dying(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            last = {"save_weights": True, "write_json": args[0] == tmp_path / "run" / "result.json"}.get(stage)
            # the monitor evaluates too: the evaluation of the result has the 597 test images
            if last if last is not None else sum(len(batch) for batch, _ in args[1]) == 597:
                raise Killed
            return original(*args, **kwargs)

        patch.setattr(runs, stage, dying)
        with pytest.raises(Killed):
            train(config, tmp_path / "run", quiet=True)
    assert not (tmp_path / "run" / "result.json").exists()
    resume(tmp_path / "run", quiet=True)
    assert_same_run(tmp_path / "run", expected)


def test_a_run_that_stopped_before_its_first_checkpoint_starts_again(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        kill_at(patch, 3)
        with pytest.raises(Killed):
            train(run_config("lsq+"), tmp_path / "run", quiet=True)
    told: list[str] = []
    resume(tmp_path / "run", quiet=True, notify=told.append)
    assert any("starts again" in line for line in told)
    assert_same_run(tmp_path / "run", whole_run(finished, "lsq+"))


def test_a_log_that_was_cut_off_is_continued(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        kill_at(patch, 11)
        with pytest.raises(Killed):
            train(run_config("lsq+"), tmp_path / "run", quiet=True)
    log = tmp_path / "run" / "log.jsonl"
    log.write_bytes(log.read_bytes()[:-25])
    resume(tmp_path / "run", quiet=True)
    assert len(events(tmp_path / "run", "resume")) == 1, "the first line of the resumed run was lost, too"
    assert last_of_each_step(tmp_path / "run") == last_of_each_step(whole_run(finished, "lsq+"))


def test_resuming_a_finished_run_returns_its_result(finished: Path) -> None:
    run = whole_run(finished, "lsq+")
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    assert resume(run, quiet=True) == json.loads((run / "result.json").read_text())
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before


@pytest.mark.parametrize(("name", "wait_for"), [("qvit", "epoch"), ("qvit", "freeze")])
def test_a_process_that_was_killed_is_resumed_bit_for_bit(
    finished: Path, tmp_path: Path, name: str, wait_for: str
) -> None:
    """SIGKILL at a random moment after the first checkpoint (while searching, or after the freeze), then `resume`.

    What resumes is the same for each method; `test_resumed_equals_uninterrupted` has them all.
    """
    config = run_config(name, epochs=10, checkpoint_every=1)
    killed, whole = tmp_path / "killed", finished / f"{name}, longer"
    log = killed / "log.jsonl"
    process = subprocess.Popen(
        [sys.executable, "-c", TRAIN, json.dumps(config.model_dump()), str(killed)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        deadline = time.monotonic() + 300
        while not (checkpoints_of(killed) and events(killed, wait_for)):
            assert process.poll() is None, process.stderr.read() if process.stderr else ""
            assert time.monotonic() < deadline
            time.sleep(0.005)
        time.sleep(random.Random(os.getpid()).uniform(0, 3 * events(killed, "epoch")[-1]["seconds"]))
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL, "the run had ended before it could be killed"
    finally:
        process.kill()
        process.communicate()
    assert not (killed / "result.json").exists() and log.is_file()
    with pytest.raises(QvitError, match="interrupted run.*--resume"):
        load_run(killed)
    resume(killed, quiet=True)
    if not (whole / runs.RESULT).is_file():
        train(config, whole, quiet=True)
    assert_same_run(killed, whole)


@pytest.mark.slow
def test_twenty_kills_at_random_moments_change_nothing(tmp_path: Path) -> None:
    """SIGKILL at any moment, while a checkpoint is written too: one is written after every step."""
    config = run_config("qvit", epochs=150, checkpoint_steps=1, keep_checkpoints=2, log_every=1)
    moments = random.Random(20)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    train(config, whole, quiet=True)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"}
    arguments = [sys.executable, "-c", TRAIN_OR_RESUME, json.dumps(config.model_dump()), str(killed)]
    steps = []
    for attempt in range(20):
        process = subprocess.Popen(
            arguments, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        try:
            assert process.stdout and process.stderr
            assert process.stdout.readline() == "begin\n", process.stderr.read()
            begun = len(events(killed, "start") + events(killed, "resume"))
            while attempt % 5 and len(events(killed, "start") + events(killed, "resume")) == begun:
                assert process.poll() is None, process.stderr.read()
                time.sleep(0.01)  # else, every fifth time, it is killed while it reads data, model and checkpoint
            time.sleep(moments.uniform(0, 2))
            process.send_signal(signal.SIGKILL)
            assert process.wait() == -signal.SIGKILL, process.stderr.read()
        finally:
            process.kill()
            process.communicate()
        steps.append(max((event["step"] for event in events(killed, "step")), default=0))
    assert len(set(steps)) > 10, f"hardly any kill met the run at work: {steps}"
    resume(killed, quiet=True)
    assert_same_run(killed, whole)


# ------------------------------------------------------------------------------------------- what a directory may hold


@pytest.fixture
def interrupted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    with monkeypatch.context() as patch:
        kill_at(patch, 8)
        with pytest.raises(Killed):
            train(run_config("lsq+"), tmp_path / "interrupted", quiet=True)
    return tmp_path / "interrupted"


def test_an_interrupted_run_is_refused_with_the_way_out(interrupted: Path) -> None:
    for use in (lambda: load_run(interrupted), lambda: evaluate_run(interrupted, "digits")):
        with pytest.raises(QvitError, match=f"interrupted run .*qvit train --resume {interrupted}"):
            use()
    with pytest.raises(UsageError, match=f"interrupted run, which `qvit train --resume {interrupted}` continues"):
        train(run_config("lsq+"), interrupted, quiet=True)


def test_overwriting_replaces_a_run_and_spares_other_files(interrupted: Path) -> None:
    (interrupted / "notes.txt").write_text("mine")
    train(run_config("float", epochs=1), interrupted, overwrite=True, quiet=True)
    assert (interrupted / "notes.txt").read_text() == "mine"
    assert json.loads((interrupted / "result.json").read_text())["method"] == "float"
    assert len(events(interrupted, "start")) == 1 and len(events(interrupted, "epoch")) == 1


def test_a_finished_run_is_not_overwritten_by_accident(finished: Path) -> None:
    run = whole_run(finished, "lsq+")
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    with pytest.raises(UsageError, match="holds a finished run: choose another --out, or --overwrite"):
        train(run_config("float", epochs=1), run, quiet=True)
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_folder_of_something_else_is_never_touched(tmp_path: Path, overwrite: bool) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(UsageError, match="not empty and holds no run"):
        train(run_config("float"), tmp_path, overwrite=overwrite, quiet=True)
    (tmp_path / "file").write_text("")
    with pytest.raises(QvitError, match="cannot make"):
        train(run_config("float"), tmp_path / "file", overwrite=overwrite, quiet=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "thesis.tex"]


def test_what_is_no_run_is_said_to_be_none(tmp_path: Path) -> None:
    for use in (load_run, resume, lambda run: evaluate_run(run, "digits")):
        with pytest.raises(QvitError, match="no run at"):
            use(tmp_path / "missing")
        with pytest.raises(QvitError, match=r"is not a run directory: it has no config\.json"):
            use(tmp_path)
    (tmp_path / "config.json").write_text("{ broken")
    with pytest.raises(QvitError, match=r"cannot read .*config\.json"):
        load_run(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(QvitError, match=r"config\.json must hold a JSON object, not a list"):
        load_run(tmp_path)


def test_a_damaged_run_is_named(finished: Path, tmp_path: Path) -> None:
    for name in ("config.json", "plan.json", "result.json"):
        (tmp_path / name).write_bytes((whole_run(finished, "lsq+") / name).read_bytes())
    with pytest.raises(QvitError, match=f"cannot read the weights of {tmp_path}"):
        load_run(tmp_path)
    state = load_file(finished / "lsq+" / "model.safetensors")
    state.pop("norm.bias")
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(QvitError, match=f"cannot read the weights of {tmp_path}"):
        load_run(tmp_path)
    (tmp_path / "plan.json").unlink()
    with pytest.raises(QvitError, match=r"no plan at .*plan\.json"):
        load_run(tmp_path)


def test_devices_that_are_not_there_are_refused(tmp_path: Path) -> None:
    for device in ("cuda:99", "abacus"):
        with pytest.raises(UsageError, match=f"device '{device}' is not available"):
            train(run_config("float", device=device), tmp_path / device, quiet=True)


def test_a_failed_start_leaves_nothing_that_blocks_the_next(tmp_path: Path) -> None:
    with pytest.raises(UsageError):
        train(run_config("qvit", budget="3bits and a half"), tmp_path / "run", quiet=True)
    with pytest.raises(QvitError, match="too few images to calibrate"):
        train(run_config("lsq+", calibration_images=5000), tmp_path / "run", quiet=True)
    train(run_config("float", epochs=1), tmp_path / "run", quiet=True)


# ---------------------------------------------------------------------------------------------------- loading a run


@pytest.mark.parametrize("name", METHODS)
def test_a_loaded_run_is_the_model_that_was_evaluated(finished: Path, name: str) -> None:
    run = whole_run(finished, name)
    result = json.loads((run / "result.json").read_text())
    model = load_run(run)
    assert not model.training
    assert stage_of(model) is (Stage.FLOAT if name == "float" else Stage.FROZEN)
    if name != "float":
        assert plan_of(model).sites == QuantPlan.load(run).sites
    batch_size = max(64, run_config(name).batch_size)
    scores = evaluate_run(run, "digits", batch_size=batch_size, device="cpu")
    assert scores == {"top1": result["accuracy"], "top5": result["top5"], "images": 597}


def test_float_weights_of_a_run_are_where_a_quantized_run_starts(finished: Path, tmp_path: Path) -> None:
    """The float accuracy that a quantized run reports is that of the run it came from."""
    source = whole_run(finished, "float")
    result = train(run_config("lsq+", weights=str(source), epochs=1), tmp_path / "run", quiet=True)
    assert result["float_accuracy"] == json.loads((source / "result.json").read_text())["accuracy"]
    with pytest.raises(QvitError, match="a quantized model; give the weights of the float model"):
        train(run_config("lsq+", weights=str(tmp_path / "run"), epochs=1), tmp_path / "again", quiet=True)


def test_eight_bits_without_training_are_as_good_as_float(tmp_path: Path) -> None:
    float_run = small_config(method="float", epochs=15, lr=1e-2, batch_size=50)
    train(float_run, tmp_path / "float", quiet=True)
    config = small_config(method="lsq+", plan="w8a8", epochs=1, lr=1e-9, weights=str(tmp_path / "float"))
    result = train(config, tmp_path / "w8a8", quiet=True)
    assert result["float_accuracy"] > 30, "too little was learned to compare anything"
    assert abs(result["accuracy"] - result["float_accuracy"]) < 2
    low = train(config.model_copy(update={"plan": "w2a2"}), tmp_path / "w2a2", quiet=True)
    assert low["accuracy"] < result["accuracy"] - 5 and low["float_accuracy"] == result["float_accuracy"]
    assert low["bit_operations"] < result["bit_operations"] and low["weight_bytes"] < result["weight_bytes"]


# ----------------------------------------------------------------------------------------- test images stay unseen


@pytest.mark.parametrize("name", ["float", "qvit to the end"])
def test_training_calibration_and_monitoring_never_see_test_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    seen: dict[str, list[set[int]]] = {"train_loader": [], "CalibrationImages": [], "eval_loader": []}
    for function in seen:
        module = runs if function == "train_loader" else subjects
        original = getattr(module, function)

        def spy(source: Any, *args: Any, function: str = function, original: Any = original, **kwargs: Any) -> Any:
            seen[function].append(set(source.rows.tolist()))
            return original(source, *args, **kwargs)

        monkeypatch.setattr(module, function, spy)
    train(run_config(name, epochs=1, monitor_share=0.1), tmp_path / "run", quiet=True)
    test = set(open_data("digits").test.rows.tolist())
    assert len(test) == 597
    (trained,), calibrated = seen["train_loader"], seen["CalibrationImages"]
    watched, tested = seen["eval_loader"]
    assert tested == test
    assert not (trained & test) and not (watched & test) and not (trained & watched)
    assert trained | watched == set(range(1797)) - test
    assert calibrated == ([] if name == "float" else [trained])


@pytest.mark.parametrize("method", ["lsq+", "qvit"])
def test_test_images_are_opened_when_training_is_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    folder = make_images(tmp_path / "images", {"ant": 12, "bee": 12, "cow": 12}, size=16)
    run = tmp_path / "run"
    opened: list[tuple[str, bool]] = []
    original = image_files._FolderStore.read

    def spy(self: Any, row: int) -> bytes:
        opened.append((self.name(row), (run / "model.safetensors").exists()))
        return original(self, row)

    monkeypatch.setattr(image_files._FolderStore, "read", spy)
    config = small_config(
        method=method, budget="4bit", data=str(folder), batch_size=4, calibration_images=8, monitor_share=0.2, epochs=2
    )
    result = train(config, run, quiet=True)
    bundle = open_data(folder, test_share=config.test_share, monitor_share=0.2, seed=config.seed)
    test = {bundle.test.filename(index) for index in range(len(bundle.test))}
    before = {name for name, over in opened if not over}
    after = {name for name, over in opened if over}
    assert before and not (before & test) and after == test and result["images"] == len(test)


def test_the_test_images_are_the_same_for_every_seed(tmp_path: Path) -> None:
    folder = make_images(tmp_path / "images", {"ant": 12, "bee": 12}, size=8)
    chosen = []
    for seed in (0, 1):
        bundle = open_data(folder, test_share=0.25, monitor_share=0.2, seed=seed)
        chosen.append([bundle.test.filename(index) for index in range(len(bundle.test))])
    assert chosen[0] == chosen[1] and len(chosen[0]) == 6


def test_more_classes_in_the_data_than_in_the_model(tmp_path: Path) -> None:
    config = run_config("float", model_kwargs={"depth": 1, "embed_dim": 16, "num_heads": 2, "num_classes": 4})
    with pytest.raises(UsageError, match="the data have 10 classes, the model is asked for 4"):
        train(config, tmp_path / "run", quiet=True)


# ---------------------------------------------------------------------------------------------------- real photographs


@pytest.fixture
def photographs(real_data: Path, tmp_path: Path) -> Path:
    """24 ImageNet photographs of 24 classes, unpacked into folders."""
    archive = real_data / "imagenet-sample.tar"
    if not archive.is_file():
        pytest.skip(f"{archive} is not there")
    with tarfile.open(archive) as tar:
        members = [member for member in tar.getmembers() if member.isfile()][:24]
        tar.extractall(tmp_path / "photographs", members=members, filter="data")
    return tmp_path / "photographs"


@pytest.mark.slow
def test_deit_tiny_with_real_weights_on_real_photographs(real_data: Path, photographs: Path, tmp_path: Path) -> None:
    weights, classes = real_data / "deit_tiny_patch16_224.safetensors", real_data / "imagenet-classes.txt"
    for path in (weights, classes):
        if not path.is_file():
            pytest.skip(f"{path} is not there")
    config = TrainConfig.create(
        model="deit_tiny_patch16_224",
        weights=str(weights),
        method="qvit",
        budget="6bit",
        data=str(photographs),
        eval_data=str(real_data / "imagenet-sample.tar"),
        class_map=str(classes),
        epochs=2,
        batch_size=8,
        lr=1e-6,
        augment="none",
        calibration_images=16,
        device="cpu",
        method_options={"searching_ratio": 0.5},
    )
    result = train(config, tmp_path / "run", quiet=True)
    assert result["images"] == 500 and result["float_accuracy"] == pytest.approx(76.6, abs=0.5)
    assert result["accuracy"] > 60, "6 bits cost a few points, not the model"
    (start,) = events(tmp_path / "run", "start")
    assert start["budget_bit_operations"] == pytest.approx(45.947e9, rel=1e-4)
    assert result["bit_operations"] <= start["budget_bit_operations"]
    scores = evaluate_run(tmp_path / "run", str(photographs), class_map=classes, device="cpu")
    assert scores["images"] == 24 and scores["top5"] >= scores["top1"] > 50
