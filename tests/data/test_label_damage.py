"""Stores of soft labels survive kills, and damage to them is noticed and repaired."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from image_sets import CONFIG, drain, make_images, make_shards
from label_stores import STUDENT, Killed, Watcher, content, digits_request, folder, loader_of, request_of, teacher

from qvit import files
from qvit.data.labels import SoftLabelStore
from qvit.data.labels.store import HEADER, read_header, shard_path
from qvit.data.open import open_data
from qvit.errors import QvitError, UsageError
from qvit.runs import labels as labels_run
from qvit.runs.labels import LabelRequest, write_labels

__all__ = ["folder", "teacher"]


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_interrupted_is_uninterrupted(
    folder: Path, tmp_path: Path, teacher: Watcher, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    """Every write of a file is where one of the attempts ends, before or after the file has its name."""
    write_labels(request_of(folder), tmp_path / "whole")
    store, real = tmp_path / "store", getattr(os, call)
    for attempt in range(60):
        left = [random.Random(attempt).choice((0, 1, 1, 2))]

        def dies(*arguments: Any, left: list[int] = left, after: bool = attempt % 2 == 0) -> None:
            if left[0] == 0:
                if after:
                    real(*arguments)
                raise Killed
            left[0] -= 1
            real(*arguments)

        monkeypatch.setattr(files.os, call, dies)
        try:
            write_labels(request_of(folder), store)
            break
        except Killed:
            if attempt % 3 == 0 and store.is_dir():
                (store / f".{shard_path(store, 1).name}.abcd").write_bytes(b"half of a shard")
        finally:
            monkeypatch.setattr(files.os, call, real)
    assert attempt > 3
    assert content(store) == content(tmp_path / "whole")
    seen = len(teacher.seen)
    assert write_labels(request_of(folder), store)["written"] == 0 and len(teacher.seen) == seen


KILLED = """
import sys
from qvit.runs.labels import LabelRequest, write_labels
import json
write_labels(LabelRequest.create(**json.loads(sys.argv[1])), sys.argv[2])
"""


def test_a_killed_process_goes_on(tmp_path: Path) -> None:
    request = digits_request(tmp_path, images_per_shard=40, crops=3)
    store = tmp_path / "store"
    path = os.pathsep.join(filter(None, [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH")]))
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, json.dumps(request), str(store)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path},
    )
    deadline = time.monotonic() + 120
    while not shard_path(store, 4).exists() and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "it had ended before it could be killed"
    with pytest.raises(QvitError, match="unfinished.*repeat the call"):
        SoftLabelStore(store)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        assert write_labels(LabelRequest.create(**request), store)["written"] < 3 * 1200
        write_labels(LabelRequest.create(**request), tmp_path / "whole")
    finally:
        torch.set_num_threads(threads)
    assert content(store) == content(tmp_path / "whole")


def test_damage_is_noticed_and_repaired(folder: Path, tmp_path: Path, teacher: Watcher) -> None:
    store = tmp_path / "store"
    write_labels(request_of(folder), store)
    whole, shard = content(store), shard_path(store, 1)
    SoftLabelStore(store).verify()
    for change, problem in (
        (lambda data: data[:-1], "bytes instead of .*truncated"),
        (lambda data: b"", "truncated or missing"),
        (lambda data: data + b"0", "bytes instead of"),
    ):
        shard.write_bytes(change(whole[shard.name]))
        with pytest.raises(QvitError, match=problem):
            SoftLabelStore(store)
    shard.unlink()
    with pytest.raises(QvitError, match="0 bytes instead of .*missing"):
        SoftLabelStore(store)
    generator = random.Random(0)
    for _ in range(40):
        data = bytearray(whole[shard.name])
        data[generator.randrange(len(data))] ^= 1 << generator.randrange(8)
        shard.write_bytes(data)
        opened = SoftLabelStore(store)
        with pytest.raises(QvitError, match=f"damaged in .*: {shard.name};"):
            opened.verify()
        with pytest.raises(QvitError, match=f"{shard.name} is damaged at image"):
            for image in range(len(opened)):
                opened.read(image)
    with pytest.raises(QvitError, match="is damaged at image.*repeat the call"):
        drain(loader_of(folder, store, single_from=0, drop_last=False))
    assert write_labels(request_of(folder), store)["written"] == 48
    assert content(store) == whole


def test_mutated_headers_are_refused(folder: Path, tmp_path: Path, teacher: Watcher) -> None:
    store = tmp_path / "store"
    write_labels(request_of(folder), store)
    path, before = store / HEADER, read_header(store)
    whole, generator = path.read_bytes(), random.Random(1)
    refused = 0
    for number in range(200):
        data = bytearray(whole)
        for _ in range(generator.choice((1, 1, 3))):
            place = generator.randrange(len(data))
            match number % 4:
                case 0:
                    data[place] ^= 1 << generator.randrange(8)
                case 1:
                    data[place] = generator.choice(b'0123456789"{}[],')
                case 2:
                    del data[place : place + generator.randrange(1, 40)]
                case _:
                    data[place:place] = whole[place : place + generator.randrange(1, 40)]
        path.write_bytes(data)
        try:
            assert read_header(store) == before, "what is accepted says the same"
        except QvitError as error:
            refused += 1
            assert len(str(error).splitlines()) == 1 and HEADER in str(error)
    assert refused > 180
    for changed, problem in (
        ({"version": 2}, "has version 2; this qvit reads version 1"),
        ({"format": "other"}, "is not the header"),
        ({"origin": {}}, "does not have its checksum"),
    ):
        path.write_text(json.dumps(json.loads(whole) | changed))
        with pytest.raises(QvitError, match=problem):
            SoftLabelStore(store)
    for text in ("", "[]", "null", "[" * 100_000):
        path.write_text(text)
        with pytest.raises(QvitError, match="cannot read|is not the header"):
            SoftLabelStore(store)
    path.unlink()
    with pytest.raises(QvitError, match="no store of soft labels at .*qvit labels"):
        SoftLabelStore(store)


def test_stores_of_other_calls_are_refused(folder: Path, tmp_path: Path, teacher: Watcher) -> None:
    store = tmp_path / "store"
    write_labels(request_of(folder), store)
    whole = content(store)
    other = make_images(tmp_path / "other", {"cat": 8, "dog": 9, "fly": 9})
    for request, problem in (
        (request_of(folder, crops=7), r"crops differ \(crops was 6, and is 7 now\)"),
        (request_of(folder, interpolation="bilinear"), "interpolation differ"),
        (request_of(folder, scale=(0.2, 1.0)), "scale differ"),
        (request_of(folder, seed=1), "seed differ"),
        (request_of(folder, top_k=1), "top_k differ"),
        (request_of(other), "images_digest differ"),
    ):
        with pytest.raises(UsageError, match=f"labels of another call: {problem}.*choose another --out"):
            write_labels(request, store)
    with torch.no_grad():
        teacher.scale.mul_(2)
    with pytest.raises(UsageError, match="teacher_digest differ"):
        write_labels(request_of(folder), store)
    assert content(store) == whole
    with pytest.raises(UsageError, match="is not empty and holds no soft labels"):
        write_labels(request_of(folder), folder)
    with pytest.raises(UsageError, match="other images and classes by name as in"):
        loader_of(other, store)
    grey = CONFIG | {"input_size": (1, 16, 16), "mean": (0.5,), "std": (0.5,)}
    with pytest.raises(UsageError, match="3 channels, not 1"):
        loader_of(folder, store, grey)
    source = open_data(str(folder)).train
    with pytest.raises(UsageError, match="21 images, not 20"):
        SoftLabelStore(store).require_images(source.subset(range(20)), num_classes=3, channels=3)
    with pytest.raises(UsageError, match="3 classes, not 4"):
        SoftLabelStore(store).require_images(source, num_classes=4, channels=3)


def test_requests_that_cannot_be_meant(folder: Path, tmp_path: Path, teacher: Watcher) -> None:
    for changes in ({"crops": 0}, {"top_k": "all"}, {"scale": (0.5, 2)}, {"ratio": (2, 1)}, {"interpolation": "best"}):
        with pytest.raises(UsageError, match=next(iter(changes))):
            request_of(folder, **changes)
    with pytest.raises(UsageError, match="1 to 3, or full, not 5"):
        write_labels(request_of(folder, top_k=5), tmp_path / "a")
    with pytest.raises(UsageError, match="teacher has 3 classes, the student 7"):
        write_labels(request_of(folder, model_kwargs=STUDENT | {"num_classes": 7}), tmp_path / "b")
    with pytest.raises(UsageError, match="teacher takes images of 3 channel.*student of 1"):
        write_labels(request_of(folder, model_kwargs=STUDENT | {"in_chans": 1}), tmp_path / "c")
    make_shards(tmp_path / "shards" / "train", [0, 1, 2, 0], 2)
    make_shards(tmp_path / "shards" / "val", [0, 1, 2], 3)
    with pytest.raises(UsageError, match="read as a stream.*give a folder"):
        write_labels(request_of(f"wds/{tmp_path / 'shards'}"), tmp_path / "d")  # type: ignore[arg-type]
    assert not any((tmp_path / name).exists() for name in "abcd")


def test_a_full_disk_is_reported(
    folder: Path, tmp_path: Path, teacher: Watcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = tmp_path / "store"
    usage = labels_run.StoreWriter.__init__.__globals__["shutil"].disk_usage
    with monkeypatch.context() as patch:
        patch.setattr("shutil.disk_usage", lambda path: usage(path)._replace(free=100))
        with pytest.raises(QvitError, match="the labels need .* GB more, and .* has 0.00 GB free"):
            write_labels(request_of(folder), store)
    with monkeypatch.context() as patch:

        def full(_: int) -> None:
            raise OSError(28, "No space left on device")

        patch.setattr(files.os, "fsync", full)
        with pytest.raises(QvitError, match="cannot write .*No space left"):
            write_labels(request_of(folder), store)
    write_labels(request_of(folder), store)
    SoftLabelStore(store).verify()
