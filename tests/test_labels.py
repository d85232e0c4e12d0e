"""Stored soft labels: recovery by hand, crops pixel by pixel, stores that survive kills and notice damage, training."""

from __future__ import annotations

import itertools
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from command_line import QUICK, SMALL_DIGITS, Qvit, qvit
from image_sets import CONFIG, drain, generator_states, make_images, make_shards, make_tar, same, with_workers
from PIL import Image
from safetensors.torch import save_file
from tiny_models import SMALL, digits_model, events, small_config
from torch import Tensor, nn
from torch.nn import functional as F

from qvit import files, labels_run
from qvit.errors import QvitError, UsageError
from qvit.labels_run import LabelRequest, write_labels
from qvit.run import resume, train
from qvit.training.data import open_data, train_loader
from qvit.training.labels import SoftLabelStore
from qvit.training.labels.crops import draw_crops, replay
from qvit.training.labels.loading import StoredLabels, choose_crops
from qvit.training.labels.recovery import SoftLabelLoss, first_classes, recover
from qvit.training.labels.store import HEADER, read_header, shard_path

__all__ = ["qvit"]
RANGES: dict[str, Any] = {"scale": (0.3, 1.0), "ratio": (3 / 4, 4 / 3)}


# --------------------------------------------------------------------------------------------- recovery and loss


TARGETS = torch.tensor([[[3.0, 0.0], [0.5, 0.25]], [[1.0, 4.0], [0.9, 0.05]]])


@pytest.mark.parametrize(
    ("how", "first", "second"),
    [
        ("smoothing", [0.25, 1 / 12, 1 / 12, 0.5, 1 / 12], [0.05 / 3, 0.9, 0.05 / 3, 0.05 / 3, 0.05]),
        ("renormalise", [1 / 3, 0, 0, 2 / 3, 0], [0, 18 / 19, 0, 0, 1 / 19]),
        ("hard", [0, 0, 0, 1, 0], [0, 1, 0, 0, 0]),
        ("label-smoothing", [0.125, 0.125, 0.125, 0.5, 0.125], [0.025, 0.9, 0.025, 0.025, 0.025]),
    ],
)
def test_recovery_by_hand(how: Any, first: list[float], second: list[float]) -> None:
    expected = torch.tensor([first, second], dtype=torch.float32)
    torch.testing.assert_close(recover(TARGETS, 5, how), expected)
    student = torch.randn(2, 5, dtype=torch.float64, requires_grad=True)
    loss = SoftLabelLoss(how)(student, TARGETS)
    by_hand = -(expected.double() * (student - student.logsumexp(1, keepdim=True))).sum() / 2
    torch.testing.assert_close(loss, by_hand, rtol=1e-6, atol=1e-7)
    loss.backward()
    torch.testing.assert_close(student.grad, (student.softmax(1) - expected).detach() / 2, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("how", ["smoothing", "renormalise", "hard", "label-smoothing"])
@pytest.mark.parametrize("kept", [1, 5, 7])
def test_what_is_recovered_is_a_distribution(how: Any, kept: int) -> None:
    probs, ids = torch.randn(40, 7).mul(4).softmax(1).topk(kept)
    targets = torch.stack([ids.float(), probs.half().float()], 1)
    found = recover(targets, 7, how)
    assert found.shape == (40, 7) and (found >= 0).all()
    torch.testing.assert_close(found.sum(1), torch.ones(40))
    assert torch.equal(found.argmax(1), ids[:, 0]) or how in ("smoothing", "label-smoothing")
    assert torch.equal(first_classes(targets), ids[:, 0])


def test_all_classes_are_recovered_as_they_are() -> None:
    probs = torch.randn(3, 6).softmax(1)
    targets = torch.stack([torch.arange(6.0).expand(3, 6), probs], 1)
    torch.testing.assert_close(recover(targets, 6), probs)
    assert torch.equal(first_classes(targets), probs.argmax(1))
    with pytest.raises(UsageError, match="smoothing, renormalise, hard, label-smoothing, not 'soft'"):
        recover(targets, 6, "soft")  # type: ignore[arg-type]


# --------------------------------------------------------------------------------------------------------- crops


def crops_of(size: tuple[int, int] = (37, 51), first: int = 0, count: int = 50, **changes: Any) -> np.ndarray:
    return draw_crops(3, 8, size, first=first, count=count, **(RANGES | {"flip": 0.5} | changes))


def test_crops_lie_in_the_image_and_the_ranges() -> None:
    found = crops_of((200, 300), count=4000, scale=(0.1, 0.5))
    top, left, height, width, flip = found.T
    assert (top >= 0).all() and (left >= 0).all() and (top + height <= 200).all() and (left + width <= 300).all()
    share, ratio = height * width / 60000, width / height
    assert share.min() > 0.095 and share.max() < 0.505 and ratio.min() > 0.73 and ratio.max() < 1.37
    assert share.mean() == pytest.approx(0.3, abs=0.01) and np.log(ratio).mean() == pytest.approx(0, abs=0.01)
    assert flip.mean() == pytest.approx(0.5, abs=0.03)
    assert (top / (200 - height).clip(1)).mean() == pytest.approx(0.5, abs=0.03)
    assert not crops_of(flip=0.0)[:, 4].any() and crops_of(flip=1.0)[:, 4].all()


def test_each_crop_depends_on_seed_image_and_number_alone() -> None:
    before = generator_states()
    whole = crops_of()
    assert generator_states() == before
    np.testing.assert_array_equal(np.concatenate([crops_of(first=0, count=7), crops_of(first=7, count=43)]), whole)
    np.testing.assert_array_equal(crops_of(first=0, count=20), whole[:20])
    others = [draw_crops(4, 8, (37, 51), first=0, count=50, flip=0.5, **RANGES)]
    others.append(draw_crops(3, 9, (37, 51), first=0, count=50, flip=0.5, **RANGES))
    assert not any((other == whole).all() for other in others)
    assert whole[:3].tolist() == crops_of(first=0, count=3).tolist()


def test_crops_never_change() -> None:
    """A store that was begun is continued by a later version."""
    assert crops_of(count=3).tolist() == [[10, 9, 27, 22, 0], [2, 13, 27, 31, 0], [0, 3, 37, 39, 1]]


def test_an_image_that_no_crop_fits_gives_its_middle() -> None:
    assert crops_of((10, 100), scale=(1.0, 1.0), flip=0.0, count=2).tolist() == [[0, 43, 10, 13, 0]] * 2
    assert crops_of((100, 10), scale=(1.0, 1.0), flip=0.0, count=2).tolist() == [[43, 0, 13, 10, 0]] * 2
    assert crops_of((1, 1), count=1)[0, :4].tolist() == [0, 0, 1, 1]


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("name", ["bilinear", "bicubic"])
def test_replay_is_cut_resize_mirror(mode: str, name: str) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8)
    image = Image.fromarray(pixels).convert(mode)
    part = Image.fromarray(np.asarray(image)[5:25, 8:20])  # nothing of the image around it is there to be looked at
    filters = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}
    expected = np.atleast_3d(np.asarray(part.resize((16, 14), filters[name])))
    for flip in (0, 1):
        found = replay(image, (5, 8, 20, 12, flip), (14, 16), name)
        np.testing.assert_array_equal(found.transpose(1, 2, 0), expected[:, ::-1] if flip else expected)


def test_crops_of_an_epoch_are_drawn_without_replacement() -> None:
    chosen = choose_crops(4001, 6, 4, seed=1, epoch=2)
    assert len(chosen) == 4001
    sets = [tuple(sorted(own)) for own in chosen[:4000].reshape(-1, 4)]
    assert all(len(set(own)) == 4 and min(own) >= 0 and max(own) < 6 for own in sets)
    counts = [sets.count(own) for own in itertools.combinations(range(6), 4)]
    assert sum(counts) == 1000 and min(counts) > 40 and max(counts) < 100, "all sets are equally likely"
    np.testing.assert_array_equal(chosen, choose_crops(4001, 6, 4, seed=1, epoch=2))
    assert (chosen != choose_crops(4001, 6, 4, seed=1, epoch=3)).any()
    assert sorted(choose_crops(6, 6, 6, seed=0, epoch=0)) == list(range(6))


# ----------------------------------------------------------------------------------------------- making of a store


class Watcher(nn.Module):
    """A teacher that keeps what it saw and answers with averages over parts of the image."""

    num_classes = 3
    pretrained_cfg = {key: CONFIG[key] for key in ("input_size", "mean", "std", "interpolation")}

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Tensor] = []
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, images: Tensor) -> Tensor:
        self.seen.append(images.clone())
        return self.scale * 3 * images[:, :, :8].mean((2, 3))


@pytest.fixture
def teacher(monkeypatch: pytest.MonkeyPatch) -> Watcher:
    watcher = Watcher()
    monkeypatch.setattr(labels_run, "teacher_model", lambda *_: watcher)
    return watcher


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_images(tmp_path / "pets", {"cat": 8, "dog": 9, "eel": 9})


STUDENT = {"img_size": 16, "patch_size": 8, "depth": 1, "embed_dim": 16, "num_heads": 2}


def request_of(folder: Path, **changes: Any) -> LabelRequest:
    values: dict[str, Any] = {
        "model": "vit_tiny_patch16_224",
        "model_kwargs": STUDENT,
        "teacher": "watcher",
        "data": str(folder),
        "crops": 6,
        "top_k": 2,
        "scale": (0.3, 1.0),
        "images_per_shard": 8,
        "batch_size": 7,
        "device": "cpu",
    }
    return LabelRequest.create(**(values | changes))


def content(store: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in store.iterdir()}


def loader_of(folder: Path, store: Path, config: Any = CONFIG, **options: Any) -> Any:
    source = open_data(str(folder)).train
    plan = {key: options.pop(key) for key in ("crops_per_image", "single_from", "interpolation") if key in options}
    labels = StoredLabels(SoftLabelStore(store), 3, **({"crops_per_image": 4} | plan))
    return train_loader(source, config, **({"batch_size": 6, "labels": labels} | options))


@with_workers
@pytest.mark.parametrize("form", ["folder", "tar"])
@pytest.mark.parametrize("workers", [0, 2])
def test_training_sees_the_pixels_that_the_teacher_saw(
    folder: Path, tmp_path: Path, teacher: Watcher, form: str, workers: int
) -> None:
    data = folder if form == "folder" else make_tar(folder, tmp_path / "pets.tar")
    result = write_labels(request_of(data, workers=workers), tmp_path / "store")
    seen, store = torch.cat(teacher.seen), SoftLabelStore(tmp_path / "store")
    images = len(open_data(str(data)).train)
    assert result["crops"] == result["written"] == len(seen) == 6 * images and result["unlabelled"] == 0
    records = np.concatenate([store.read(image)[1] for image in range(images)])
    assert 0.3 < records["flip"].mean() < 0.7, "mirrored crops are among them"
    assert len(np.unique(records["top"])) > 3
    probs, ids = (3 * seen[:, :, :8].mean((2, 3))).softmax(1).topk(2)
    np.testing.assert_array_equal(records["ids"], ids.numpy())
    np.testing.assert_array_equal(records["probs"], probs.half().numpy())
    found, targets = drain(loader_of(data, tmp_path / "store", workers=workers, drop_last=False))
    assert len(found) == images and targets.shape == (images, 2, 2)
    numbers = [next(i for i, other in enumerate(seen) if torch.equal(image, other)) for image in found]
    assert len(set(numbers)) == images, "no crop twice"
    assert len({number // 6 for number in numbers}) == -(-images // 4), "four crops of each drawn image"
    expected = torch.stack([ids[numbers].float(), probs[numbers].half().float()], 1)
    assert torch.equal(targets, expected)
    assert records["flip"][numbers].any() and not records["flip"][numbers].all()


def test_other_sizes_and_filters_are_of_the_same_boxes(folder: Path, tmp_path: Path, teacher: Watcher) -> None:
    write_labels(request_of(folder), tmp_path / "store")
    larger = CONFIG | {"input_size": (3, 32, 24)}
    [(images, targets)] = itertools.islice(loader_of(folder, tmp_path / "store", larger, interpolation="bilinear"), 1)
    assert images.shape == (6, 3, 32, 24) and targets.shape == (6, 2, 2)
    store, source = SoftLabelStore(tmp_path / "store"), open_data(str(folder)).train
    mean, std = (torch.tensor(CONFIG[name]).view(3, 1, 1) for name in ("mean", "std"))
    for image in images:
        own = (image * std + mean).mul(255).round().byte().numpy()
        candidates = (
            replay(source.store.load(int(source.rows[index])), crop.item()[:5], (32, 24), "bilinear")
            for index in range(len(source))
            for crop in store.read(index)[1]
        )
        assert sum(bool((own == other).all()) for other in candidates) == 1
    with pytest.raises(UsageError, match="crops_per_image lies between 1 and the 6"):
        loader_of(folder, tmp_path / "store", crops_per_image=7)


def test_a_store_is_as_large_as_documented(folder: Path, tmp_path: Path, teacher: Watcher) -> None:
    sizes: dict[Any, int] = {1: 13, 2: 17, "full": 15}
    for top_k, size in sizes.items():
        store = tmp_path / f"{top_k}"
        write_labels(request_of(folder, top_k=top_k), store)
        call = SoftLabelStore(store).call
        assert call.crop_dtype.itemsize == size
        assert sum(shard_path(store, n).stat().st_size for n in range(call.shards)) == call.images * (8 + 6 * size)
    layout = json.loads((tmp_path / "2" / HEADER).read_text())["layout"]
    assert layout["bytes_per_crop"] == 17 and layout["crop"][5:] == [["ids", "<u2", [2]], ["probs", "<f2", [2]]]
    [(images, targets)] = itertools.islice(loader_of(folder, tmp_path / "full"), 1)
    assert targets.shape == (6, 2, 3) and targets[:, 0].tolist() == [[0, 1, 2]] * 6
    torch.testing.assert_close(recover(targets, 3), (3 * images[:, :, :8].mean((2, 3))).softmax(1), rtol=0, atol=1e-3)


@with_workers
def test_batches_depend_on_seed_epoch_and_position_alone(folder: Path, tmp_path: Path, teacher: Watcher) -> None:
    write_labels(request_of(folder), tmp_path / "store")
    options: dict[str, Any] = {"seed": 5, "drop_last": False}
    loader = loader_of(folder, tmp_path / "store", **options)
    before = generator_states()
    passes = [list(loader) for _ in range(3)]
    assert generator_states() == before
    assert not torch.equal(passes[0][0][0], passes[1][0][0])
    others = loader_of(folder, tmp_path / "store", workers=2, **options)
    for epoch in (0, 1):
        assert all(same(a, b) for a, b in zip(others, passes[epoch], strict=True))
    loader.set_epoch(2, skip=2)
    assert all(same(a, b) for a, b in zip(loader, passes[2][2:], strict=True))
    parts = [loader_of(folder, tmp_path / "store", seed=5, batch_size=3, rank=r, world_size=2) for r in (0, 1)]
    for pair, (images, targets) in zip(zip(*parts, strict=True), passes[0], strict=False):
        assert torch.equal(torch.cat([own for own, _ in pair]), images)
        assert torch.equal(torch.cat([own for _, own in pair]), targets)
    single = loader_of(folder, tmp_path / "store", single_from=1, **options)
    counts = []
    for epoch in (0, 1):
        single.set_epoch(epoch)
        seen = torch.cat(teacher.seen)
        images, _ = drain(single)
        counts.append(len({next(i for i, o in enumerate(seen) if torch.equal(o, image)) // 6 for image in images}))
    assert counts == [6, 21], "one epoch of 21 crops: of six images, then of all of them"


def test_unreadable_images(folder: Path, tmp_path: Path, teacher: Watcher) -> None:
    source = open_data(str(folder)).train
    for index in (2, 11):
        (folder / source.filename(index)).write_bytes(b"nothing")
    with pytest.raises(QvitError, match="cannot read image"):
        write_labels(request_of(folder), tmp_path / "fatal")
    result = write_labels(request_of(folder, on_bad_image="skip"), tmp_path / "store")
    assert result["unlabelled"] == 2
    store = SoftLabelStore(tmp_path / "store")
    assert store.read(2)[0] == (0, 0) and not store.read(11)[1]["height"].any()
    assert set(range(21)) - set(store.labelled().tolist()) == {2, 11}
    images, _ = drain(loader_of(folder, tmp_path / "store", single_from=0, drop_last=False))
    seen = torch.cat(teacher.seen[-100:])
    assert len(images) == 19 and all(any(torch.equal(image, other) for other in seen) for image in images)
    lost, size = folder / source.filename(5), (20, 24)
    lost.write_bytes(b"nothing")
    with pytest.raises(QvitError, match="cannot read image"):
        drain(loader_of(folder, tmp_path / "store", single_from=0))
    options: dict[str, Any] = {"single_from": 0, "drop_last": False, "on_bad_image": "skip"}
    loader = loader_of(folder, tmp_path / "store", **options)
    assert len(drain(loader)[0]) == 19 and loader.bad_images() == [source.filename(5)]
    Image.new("RGB", (size[1] + 1, size[0])).save(lost)
    with pytest.raises(QvitError, match=r"has 20x25 pixels \(height x width\) and had 20x24 when it was labelled"):
        drain(loader_of(folder, tmp_path / "store", **options))


# ------------------------------------------------------------------------------------------------ kills and damage


class Killed(BaseException):
    pass


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
from qvit.labels_run import LabelRequest, write_labels
import json
write_labels(LabelRequest.create(**json.loads(sys.argv[1])), sys.argv[2])
"""


def digits_request(tmp_path: Path, **changes: Any) -> dict[str, Any]:
    weights = tmp_path / "teacher.safetensors"
    if not weights.is_file():
        save_file(digits_model(seed=5).state_dict(), weights)
    values: dict[str, Any] = {"model": "vit_digits", "model_kwargs": SMALL, "teacher": "vit_digits"}
    values |= {"teacher_kwargs": SMALL, "teacher_weights": str(weights), "data": "digits", "device": "cpu"}
    return values | {"crops": 6, "scale": (0.5, 1.0), "images_per_shard": 100, "batch_size": 200} | changes


def test_a_killed_process_goes_on(tmp_path: Path) -> None:
    request = digits_request(tmp_path, images_per_shard=40, crops=3)
    store = tmp_path / "store"
    path = os.pathsep.join(filter(None, [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH")]))
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


# --------------------------------------------------------------------------------------------------------- training


@pytest.fixture
def digits_store(tmp_path: Path) -> Path:
    write_labels(LabelRequest.create(**digits_request(tmp_path)), tmp_path / "labels")
    return tmp_path / "labels"


def test_a_run_from_labels_resumes_bit_for_bit(
    tmp_path: Path, digits_store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from qvit.training.loop import Trainer

    config = small_config(
        method="lsq", budget="4bit", labels=str(digits_store), epochs=3, single_crop_epochs=1, checkpoint_steps=2,
        label_recovery="renormalise", accumulate=2,
    )  # fmt: skip
    train(config, tmp_path / "whole", quiet=True)
    record = json.loads((tmp_path / "whole" / "config.json").read_text())
    assert record["labels"] == str(digits_store) and record["single_crop_epochs"] == 1
    step = Trainer._step

    def stopping(self: Trainer, batches: Any, number: int) -> Tensor:
        if number in (5, 16) and not stopped.count(number):
            stopped.append(number)
            raise Killed
        return step(self, batches, number)

    stopped: list[int] = []
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_step", stopping)
        for attempt in (train, resume):
            with pytest.raises(Killed):
                attempt(*([config] if attempt is train else []), tmp_path / "run", quiet=True)  # type: ignore[operator]
    resume(tmp_path / "run", quiet=True)
    weights = [(tmp_path / run / "model.safetensors").read_bytes() for run in ("run", "whole")]
    assert stopped == [5, 16] and weights[0] == weights[1]
    assert (
        events(tmp_path / "run", "epoch")[-1]["train_accuracy"]
        == (events(tmp_path / "whole", "epoch")[-1]["train_accuracy"])
    )


def test_the_loss_of_a_step_is_that_of_the_labels(tmp_path: Path, digits_store: Path) -> None:
    config = small_config(method="float", labels=str(digits_store), epochs=1, log_every=1, lr=1e-9, weight_decay=0)
    train(config, tmp_path / "run", quiet=True)
    torch.manual_seed(0)
    labels = StoredLabels(SoftLabelStore(digits_store), 10, 4, single_from=1)
    from qvit.run import load_run
    from qvit.training.data import data_config_of

    model = load_run(tmp_path / "run")
    loader = train_loader(open_data("digits").train, data_config_of(model), batch_size=200, labels=labels)
    for event, (images, targets) in zip(events(tmp_path / "run", "step"), loader, strict=True):
        with torch.no_grad():
            expected = F.cross_entropy(model(images), recover(targets, 10))
        assert event["loss"] == pytest.approx(float(expected), abs=1e-4)


def test_options_that_contradict_labels(tmp_path: Path, digits_store: Path) -> None:
    for name, value in (("mixup", 0.8), ("cutmix", 1.0), ("distill", 0.5), ("repeated_augmentation", 3),
                        ("label_smoothing", 0.1)):  # fmt: skip
        config = small_config(method="lsq", budget="4bit", labels=str(digits_store), **{name: value})
        with pytest.raises(UsageError, match=f"are learned from alone.*leave out {name}={value}"):
            train(config, tmp_path / "run", quiet=True)
    with pytest.raises(UsageError, match="crops_per_image lies between 1 and the 6"):
        train(small_config(labels=str(digits_store), method="float", crops_per_image=7), tmp_path / "run", quiet=True)
    with pytest.raises(QvitError, match="no store of soft labels"):
        train(small_config(labels=str(tmp_path / "nothing"), method="float"), tmp_path / "other", quiet=True)


def test_command_line(tmp_path: Path, qvit: Qvit) -> None:
    request, store = digits_request(tmp_path), tmp_path / "labels"
    arguments = [*SMALL_DIGITS, "--teacher", "vit_digits", "--teacher-weights", request["teacher_weights"]]
    for key, value in SMALL.items():
        arguments += ["--teacher-arg", f"{key}={value}"]
    arguments += ["--crops", 4, "--scale", 0.5, 1, "--device", "cpu", "--batch-size", 200, "--out", store]
    result = qvit("labels", *arguments, "--json").json
    assert result["crops"] == result["written"] == 4800 and 29 < result["bytes_per_crop"] < 32
    assert "0 written" in qvit("labels", *arguments).out
    assert qvit("labels", "--verify", store, "--json").json["call"]["crops"] == 4
    assert "is whole: 1200 images with 4 crops" in qvit("labels", "--verify", store).out
    options = [*SMALL_DIGITS, "--method", "float", *QUICK, "--set", f"labels={store}"]
    plan = qvit("train", *options, "--dry-run", "--json").json
    assert plan["config"]["labels"] == str(store) and plan["steps_per_epoch"] == 6
    assert qvit("train", *options, "--out", tmp_path / "run", "--json").json["images"] == 597
    assert "leave out distill=1" in qvit("train", *options, "--distill", "1", "--dry-run").failed(2)
    assert "give a MODEL" in qvit("labels", "vit_digits").failed(2)
    assert "--verify takes everything" in qvit("labels", "vit_digits", "--verify", store).failed(2)
    assert "top_k" in qvit("labels", *arguments, "--top-k", "most").failed(2)
    assert "unknown model" in qvit("labels", *SMALL_DIGITS, "--teacher", "vit_digit", *arguments[-11:]).failed(2)
    assert "Examples" in qvit("labels", "--help").out
    shard_path(store, 0).write_bytes(b"0" * shard_path(store, 0).stat().st_size)
    assert "damaged in" in qvit("labels", "--verify", store).failed(1)
