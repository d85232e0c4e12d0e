"""Stored soft labels: recovery by hand, crops pixel by pixel, making of a store, training from it."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from command_line import QUICK, SMALL_DIGITS, Qvit, qvit
from image_sets import CONFIG, drain, generator_states, make_tar, same, with_workers
from label_stores import Killed, Watcher, digits_request, folder, loader_of, request_of, teacher
from PIL import Image
from tiny_models import SMALL, events, small_config
from torch import Tensor
from torch.nn import functional as F

from qvit.data.labels import SoftLabelStore
from qvit.data.labels.crops import draw_crops, replay
from qvit.data.labels.loading import StoredLabels, choose_crops
from qvit.data.labels.recovery import SoftLabelLoss, first_classes, recover
from qvit.data.labels.store import HEADER, shard_path
from qvit.data.open import open_data, train_loader
from qvit.errors import QvitError, UsageError
from qvit.runs.labels import LabelRequest, write_labels
from qvit.runs.run import resume, train

__all__ = ["folder", "qvit", "teacher"]
RANGES: dict[str, Any] = {"scale": (0.3, 1.0), "ratio": (3 / 4, 4 / 3)}


# ---------------------------------------------------------------------------------------------------- recovery and loss


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


# ---------------------------------------------------------------------------------------------------------------- crops


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


# ---------------------------------------------------------------------------------------------------- making of a store


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


# ------------------------------------------------------------------------------------------------------------- training


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
    own = digits_store.rename(tmp_path / "own")
    write_labels(LabelRequest.create(**digits_request(tmp_path, seed=8)), digits_store)
    with pytest.raises(QvitError, match="other soft labels than those that"):
        resume(tmp_path / "run", quiet=True)
    digits_store.rename(tmp_path / "other")
    own.rename(digits_store)
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
    from qvit.data.open import data_config_of
    from qvit.runs.finished import load_run

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
