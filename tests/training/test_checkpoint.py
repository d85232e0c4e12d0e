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
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
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
    checkpoints_of,
    last_checkpoint,
    load_checkpoint,
    save_checkpoint,
    save_weights,
    seed_everything,
    step_of,
)
from qvit.training.log import RunLog


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
    (path.parent / f"{path.name.rpartition('-')[0]}-{digest}.pt").write_bytes(content)


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
    _renamed(path, _saved(torch.zeros(3)))


def _incomplete(path: Path) -> None:
    _renamed(path, _saved({"step": 1, "model": {}}))


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
