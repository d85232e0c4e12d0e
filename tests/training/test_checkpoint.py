"""Checkpoints, and the other files that a run writes: whole or not at all, damage is noticed, nothing is executed."""

from __future__ import annotations

import hashlib
import io
import json
import math
import os
import resource
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save as safetensors_bytes
from timm.optim import list_optimizers
from tiny_models import (
    Evil,
    events,
    float_trainer,
    saved,
    tiny_trainer,
)
from torch import nn

from qvit.errors import QvitError, UsageError
from qvit.files import write_json
from qvit.training.checkpoint import (
    PARTS,
    checkpoints_of,
    last_checkpoint,
    load_checkpoint,
    load_state,
    save_checkpoint,
    save_weights,
    seed_everything,
    step_of,
)
from qvit.training.log import RunLog
from qvit.training.optimizer import create_optimizer, require_fitting_state
from qvit.training.trees import flatten, require_alike, unflatten


@contextmanager
def full_disk(limit: int = 4096) -> Iterator[None]:
    """Within the block no file of this process grows beyond `limit` bytes: writing fails as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_checkpoints_within_an_epoch(tmp_path: Path) -> None:
    trainer = float_trainer(tmp_path, steps=5, epochs=1, checkpoint_steps=2, keep_checkpoints=9)
    trainer.fit(quiet=True)
    assert [step_of(path) for path in checkpoints_of(tmp_path)] == [5, 4, 2]


def test_a_checkpoint_is_everything_the_next_epoch_needs(tmp_path: Path) -> None:
    options = {"searching_ratio": 1.0, "width_lr": 0.1}
    first, _, model = tiny_trainer(tmp_path / "a", epochs=2, ema_decay=0.5, method_options=options)
    whole = first.config
    first.config = whole.model_copy(update={"epochs": 1})
    first.fit(quiet=True)
    second, _, other = tiny_trainer(tmp_path / "a", seed=0, epochs=2, ema_decay=0.5, method_options=options)
    second.restore(load_checkpoint(tmp_path / "a"))
    assert second.epoch == 1
    first.config = whole
    first.fit(quiet=True)
    second.fit(quiet=True)
    for (key, value), other_value in zip(model.state_dict().items(), other.state_dict().values(), strict=True):
        assert torch.equal(value, other_value), key
    averages = (first.result_model.state_dict(), second.result_model.state_dict())
    assert all(torch.equal(averages[0][key], averages[1][key]) for key in averages[0])


def _renamed(path: Path, content: bytes) -> None:
    """Puts content there under the name that it must have: what somebody would do who means harm."""
    path.unlink()
    digest = hashlib.sha256(content).hexdigest()[:16]
    (path.parent / f"{path.name.rpartition('-')[0]}-{digest}.safetensors").write_bytes(content)


def _saved(value: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def _garbage(path: Path) -> None:
    path.write_bytes(b"\x00\x01 this is no checkpoint" * 50)


def _empty(path: Path) -> None:
    path.write_bytes(b"")


def _half(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _all_but_a_byte(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def _one_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


def _named_garbage(path: Path) -> None:
    _renamed(path, b"no checkpoint")


def _other_content(path: Path) -> None:
    _renamed(path, safetensors_bytes({"a": torch.zeros(3)}))


def _incomplete(path: Path) -> None:
    path.unlink()
    save_checkpoint(path.parents[1], {"step": step_of(path), "model": {}})


def _code(path: Path) -> None:
    _renamed(path, _saved({"step": 1, "model": Evil(path.parent / "executed")}))


DAMAGES = [
    _garbage, _empty, _half, _all_but_a_byte, _one_bit, _named_garbage, _other_content, _incomplete, _code
]  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_named_and_nothing_in_it_is_executed(
    tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    damage(saved(float_trainer(tmp_path)))
    with pytest.raises(QvitError) as caught:
        load_checkpoint(tmp_path)
    assert str(last_checkpoint(tmp_path)) in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "checkpoints" / "executed").exists()


@pytest.mark.parametrize("damage", DAMAGES)
def test_the_checkpoint_before_a_damaged_one_is_taken(
    tmp_path: Path, damage: Callable[[Path], None], caplog: pytest.LogCaptureFixture
) -> None:
    trainer = float_trainer(tmp_path)
    saved(trainer)
    trainer.step = 3
    damage(saved(trainer))
    bad = last_checkpoint(tmp_path)
    assert bad is not None and step_of(bad) == 3
    assert load_checkpoint(tmp_path)["step"] == 0
    assert str(bad) in caplog.text


def test_checkpoints_in_the_format_of_torch_are_refused_with_what_to_do(tmp_path: Path) -> None:
    content = _saved({"step": 3, "model": Evil(tmp_path / "executed")})
    path = tmp_path / "checkpoints" / f"step-000000003-{hashlib.sha256(content).hexdigest()[:16]}.pt"
    path.parent.mkdir()
    path.write_bytes(content)
    with pytest.raises(QvitError, match="finish this run with the version of qvit that began it, or .* --overwrite"):
        load_checkpoint(tmp_path)
    assert last_checkpoint(tmp_path) == path, "a run that began with it is not taken for one without checkpoints"
    assert not (tmp_path / "executed").exists()


def test_a_checkpoint_under_the_name_of_another_step_is_refused(tmp_path: Path) -> None:
    path = saved(float_trainer(tmp_path))
    path.rename(path.with_name(path.name.replace("step-00000", "step-10000")))
    with pytest.raises(QvitError, match="'step' is 0, not the 100000000 of its name"):
        load_checkpoint(tmp_path)


STATES = {
    "model/head.bias": lambda s: s["model"].update({"head.bias": torch.zeros(3)}),
    "model/norm.bias": lambda s: s["model"]["norm.bias"].fill_(math.nan),
    "model/norm.weight": lambda s: s["model"].update({"norm.weight": 1.0}),
    "model/more": lambda s: s["model"].update({"more": torch.zeros(1)}),
    "ema/cls_token": lambda s: s["ema"].pop("cls_token"),
    "model/blocks.0.attn.query_quantizer.bit_width": lambda s: s["model"][
        "blocks.0.attn.query_quantizer.bit_width"
    ].fill_(8),
    "model/blocks.0.attn.query_quantizer.scale": lambda s: s["model"]["blocks.0.attn.query_quantizer.scale"].neg_(),
    "optimizer/state/3/exp_avg": lambda s: s["optimizer"]["state"][3].update(exp_avg=torch.zeros(1)),
    "optimizer/state/0/exp_avg_sq": lambda s: s["optimizer"]["state"][0]["exp_avg_sq"].fill_(math.inf),
    "optimizer/state/0/step": lambda s: s["optimizer"]["state"][0].update(step=3),
    "optimizer/state/1/momentum": lambda s: s["optimizer"]["state"][1].update(momentum=1.0),
    "optimizer/state/999": lambda s: s["optimizer"]["state"].update({999: {}}),
    "optimizer/param_groups/0/betas/1": lambda s: s["optimizer"]["param_groups"][0].update(betas=(0.9, 5.0)),
    "optimizer/param_groups/1/fused": lambda s: s["optimizer"]["param_groups"][1].update(fused=None),
    "optimizer/param_groups/0/lr": lambda s: s["optimizer"]["param_groups"][0].update(lr=-1.0),
    "optimizer/param_groups/2": lambda s: s["optimizer"]["param_groups"][2].update(more=1),
    "optimizer/param_groups": lambda s: s["optimizer"]["param_groups"].pop(),
    "sums/parts": lambda s: s.update(sums={"parts": torch.zeros(7), "images": 3}),
    "sums/images": lambda s: s.update(sums={"parts": torch.zeros(4), "images": -3}),
    "hooks/WithRemedy/blocks.0.mlp.fc1.weight/frozen": lambda s: s["hooks"]["WithRemedy"][
        "blocks.0.mlp.fc1.weight"
    ].update(frozen=torch.zeros(1, dtype=torch.bool)),
    "diagnostics/codes": lambda s: s["diagnostics"].update(codes=torch.zeros(1, dtype=torch.int8)),
    "step": lambda s: s.update(step=99),
}


@pytest.fixture(scope="module")
def remembering(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose checkpoint has everything that one can have."""
    run = tmp_path_factory.mktemp("remembering")
    trainer, _, _ = tiny_trainer(run, **REMEMBERING)
    trainer.fit(quiet=True)
    return run


REMEMBERING: dict[str, Any] = {
    "method": "vvtq", "epochs": 1, "ema_decay": 0.5,
    "method_options": {"oscillation": "freezing", "freezing_from": 0.1, "freezing_to": 0.05},
}  # fmt: skip


@pytest.mark.parametrize("key", STATES)
def test_a_state_that_is_not_of_this_run_is_refused_by_name(remembering: Path, key: str, tmp_path: Path) -> None:
    state = load_checkpoint(remembering)
    STATES[key](state)
    trainer, _, _ = tiny_trainer(tmp_path, **REMEMBERING)
    with pytest.raises(QvitError, match="does not fit this run: ") as caught:
        trainer.restore(state)
    assert f"'{key}'" in str(caught.value)


def test_a_checkpoint_gives_back_what_was_saved_exactly(tmp_path: Path) -> None:
    state: dict[str, Any] = {
        "a/b": torch.tensor(1.5, dtype=torch.bfloat16), "a": {"b": torch.tensor([], dtype=torch.int64), "": None},
        "numbers": {0: {}, 7: [0.1, -0.0, 1e-320, math.inf, -math.inf, 2**62, True, torch.float16]},
        "tuples": (3, (), [("x", False)]),
        "bool": torch.tensor([True, False]),
    }  # fmt: skip
    structure, tensors = flatten(state)
    found = unflatten(json.loads(json.dumps(structure, allow_nan=False)), tensors)
    require_alike(found, state, "", equal=True)
    assert found["tuples"] == state["tuples"] and repr(found["numbers"]) == repr(state["numbers"])
    assert found["a/b"] is state["a/b"] and found["a"]["b"] is state["a"]["b"] and found["bool"] is state["bool"]
    for odd in ({1.5: 0}, {"a": object()}, {"a": 2**64}, {True: 1}):
        with pytest.raises(UsageError, match="a state cannot be saved"):
            flatten(odd)


@pytest.mark.parametrize(
    ("structure", "message"),
    [
        ({"tensor": "none"}, "none of a state"),
        ([{"tensor": "a"}, {"tensor": "a"}], "none of a state"),
        ({"object": {}, "tuple": []}, "none of a state"),
        ({"float": "1.0"}, "none of a state"),
        ({"dtype": "Tensor"}, "none of a state"),
        ({"numbered": {"x": 1}}, "no numbers"),
        ({}, "none of a state"),
        ([], "'a' belongs to nothing"),
    ],
)
def test_a_structure_that_nobody_saved_is_refused(structure: Any, message: str) -> None:
    with pytest.raises(QvitError, match=message):
        unflatten(structure, {"a": torch.zeros(1)})


@pytest.mark.filterwarnings("ignore:It is highly recommended to have 'opt_einsum'")
@pytest.mark.parametrize(
    "opt",
    [  # kron compiles
        pytest.param(name, marks=pytest.mark.slow) if name.startswith("kron") else name
        for name in list_optimizers(exclude_filters=["bnb*", "fused*"])
    ],
)
def test_every_optimizer_goes_on_from_a_checkpoint_bit_for_bit(tmp_path: Path, opt: str) -> None:
    def started() -> tuple[nn.Module, Callable[[], torch.optim.Optimizer]]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(1, 4, 2), nn.Flatten(), nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 3))
        return model, partial(create_optimizer, model, opt=opt, lr=1e-2, weight_decay=0.01, width_lr=1e-2)

    def step(model: nn.Module, optimizer: torch.optim.Optimizer, number: int) -> None:
        seed_everything(number)
        model(torch.randn(5, 1, 2, 2)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    model, create = started()
    try:
        optimizer = create()
        step(model, optimizer, 0)
    except (UsageError, RuntimeError):
        pytest.skip("not an optimizer for this loop, or not for this machine")
    parts = dict.fromkeys(PARTS, "")
    save_checkpoint(tmp_path, parts | {"step": 1, "model": model.state_dict(), "optimizer": optimizer.state_dict()})
    state = load_checkpoint(tmp_path)
    other, create = started()
    resumed = create()
    require_fitting_state(state["optimizer"], resumed, create)
    load_state(other, state["model"])
    resumed.load_state_dict(state["optimizer"])
    for number in range(1, 4):
        step(model, optimizer, number)
        step(other, resumed, number)
    for key, value in model.state_dict().items():
        assert torch.equal(value, other.state_dict()[key]), key


def test_the_newest_checkpoints_are_kept_and_nothing_half_written(tmp_path: Path) -> None:
    trainer = float_trainer(tmp_path, keep_checkpoints=3)
    for step in (1, 2, 3, 4, 5):
        trainer.step = step
        folder = saved(trainer).parent
        (folder / ".step-000000009-0.pt.abc").write_bytes(b"a process was killed while it wrote this")
    saved(trainer)
    assert [step_of(path) for path in checkpoints_of(tmp_path)] == [5, 4, 3]
    assert len(list(folder.iterdir())) == 3


def test_no_checkpoint_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(QvitError, match="no checkpoint to resume from.*--overwrite"):
        load_checkpoint(tmp_path)


def test_a_checkpoint_of_another_model_does_not_fit(tmp_path: Path) -> None:
    trainer = float_trainer(tmp_path)
    state = load_checkpoint(tmp_path) if saved(trainer) else {}
    other, _, _ = tiny_trainer(tmp_path / "other")
    with pytest.raises(QvitError, match="does not fit this run"):
        other.restore(state)


def test_a_full_disk_leaves_the_previous_checkpoint(tmp_path: Path) -> None:
    trainer = float_trainer(tmp_path, keep_checkpoints=1)
    path = saved(trainer)
    before = path.read_bytes()
    trainer.step = 5
    with full_disk(), pytest.raises(QvitError, match=f"cannot write {path.parent}/step-000000005"):
        trainer.save()
    assert path.read_bytes() == before
    assert [entry.name for entry in path.parent.iterdir()] == [path.name], "a partial file is left behind"
    assert load_checkpoint(tmp_path)["step"] == 0


@pytest.mark.parametrize("kind", ["weights", "json"])
def test_a_full_disk_leaves_the_previous_file(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "file"

    def write(size: int) -> None:
        if kind == "json":
            write_json(path, ["x" * size])
        else:
            save_weights(path, nn.Linear(1, size))

    write(1)
    before = path.read_bytes()
    with full_disk(), pytest.raises(QvitError, match=f"cannot write {path}"):
        write(10_000)
    assert path.read_bytes() == before and len(list(tmp_path.iterdir())) == 1


def test_a_write_that_is_interrupted_leaves_the_previous_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save_checkpoint(tmp_path, {"step": 1})
    before = path.read_bytes()

    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(tmp_path, {"step": 2})
    assert path.read_bytes() == before and len(list(path.parent.iterdir())) == 1


def test_a_file_changes_by_being_renamed_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is read while a file is written is the old content or the new."""
    path = tmp_path / "file.json"
    write_json(path, "old")
    seen: list[str] = []

    def replace(source: str, target: Path) -> None:
        seen.append(json.loads(path.read_text()) + " " + json.loads(Path(source).read_text()))
        raise OSError("no rename today")

    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(QvitError, match="no rename today"):
        write_json(path, "new")
    assert seen == ["old new"] and json.loads(path.read_text()) == "old"


def test_json_without_nan(tmp_path: Path) -> None:
    with pytest.raises(ValueError):
        write_json(tmp_path / "file.json", {"accuracy": math.nan})
    assert not list(tmp_path.iterdir())


def test_the_log_is_json_lines_and_its_errors_are_ours(tmp_path: Path) -> None:
    log = RunLog(tmp_path / "log.jsonl")
    log.write("step", step=1, loss=torch.tensor(0.5))
    log.write("end", step=1)
    first, second = (json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines())
    assert first == {"event": "step", "step": 1, "loss": 0.5} and second == {"event": "end", "step": 1}
    with pytest.raises(QvitError, match="cannot write the log"):
        RunLog(tmp_path / "missing" / "log.jsonl").write("step")


def test_a_line_that_was_cut_off_does_not_swallow_the_next(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    path.write_text('{"event": "step", "step": 1}\n{"event": "step", "st')
    RunLog(path).write("resume", step=1)
    parsed = []
    for line in path.read_text().splitlines():
        try:
            parsed.append(json.loads(line)["event"])
        except json.JSONDecodeError:
            parsed.append("cut off")
    assert parsed == ["step", "cut off", "resume"]


def test_tensorboard_gets_the_figures_of_the_log(tmp_path: Path) -> None:
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    trainer, _, _ = tiny_trainer(tmp_path, epochs=1, tensorboard=True)
    trainer.fit(quiet=True)
    board = event_accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    board.Reload()
    assert {"step/loss", "step/lr", "step/bit_operations", "epoch/train_accuracy"} <= set(board.Tags()["scalars"])
    assert any(tag.startswith("bit_widths/blocks.0.attn") for tag in board.Tags()["scalars"])
    losses = [(entry.step, entry.value) for entry in board.Scalars("step/loss")]
    logged = [(event["step"], event["loss"]) for event in events(tmp_path, "step")]
    assert losses == [(step, pytest.approx(loss, rel=1e-6)) for step, loss in logged]


def test_without_tensorboard_the_error_says_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard.writer", None)
    with pytest.raises(UsageError, match="pip install"):
        tiny_trainer(tmp_path, tensorboard=True)


def test_seeds_are_of_all_their_numbers() -> None:
    def draw(seed: int, epoch: int) -> tuple[float, float, float]:
        import random

        seed_everything(seed, epoch)
        return random.random(), float(np.random.rand()), float(torch.rand(()))

    assert draw(1, 2) == draw(1, 2)
    assert len({draw(seed, epoch) for seed in range(3) for epoch in range(3)}) == 9
