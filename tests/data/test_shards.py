"""Image sets in tar shards: what is opened, which images a pass has, and that it can be repeated from any batch."""

from __future__ import annotations

import gc
import importlib.util
import json
import multiprocessing
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from image_sets import drain, generator_states, make_images, make_shards, same, with_workers, write_info
from timm.data.readers.reader_wds import ReaderWds
from torch import Tensor, nn

from qvit.data.open import (
    AugmentConfig,
    ShardSource,
    calibration_batches,
    eval_loader,
    open_data,
    open_source,
    train_loader,
)
from qvit.errors import QvitError, UsageError
from qvit.training.evaluate import evaluate

pytestmark = pytest.mark.skipif(importlib.util.find_spec("webdataset") is None, reason="webdataset is not installed")

CONFIG: dict[str, Any] = {"input_size": (3, 16, 16), "mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0), "crop_pct": 1.0}
PLAIN = AugmentConfig.preset("none")
LABELS = [number % 3 for number in range(20)]


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """A folder of four shards of five images, of three classes."""
    make_shards(tmp_path / "set", LABELS, per_shard=5)
    return tmp_path / "set"


def opened(folder: Path) -> ShardSource:
    source = open_source(f"wds/{folder}")
    assert isinstance(source, ShardSource)
    return source


def numbers(images: Tensor) -> list[int]:
    """The numbers of images, which are their red."""
    return (images[:, 0, 8, 8] * 255).round().int().tolist()


def same_batches(a: Any, b: Any) -> bool:
    a, b = list(a), list(b)
    return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))


# ------------------------------------------------------------------------------------------------------- what is opened


def test_a_folder_of_shards(shards: Path) -> None:
    source = opened(shards)
    assert (len(source), source.num_classes, source.lengths) == (20, 3, [5, 5, 5, 5])
    images, targets = drain(eval_loader(source, CONFIG, batch_size=8))
    assert numbers(images) == list(range(20)) and targets.tolist() == LABELS


@pytest.mark.parametrize("info", [True, False])
def test_train_and_validation_splits(tmp_path: Path, info: bool) -> None:
    train, test = ("", "") if info else ("train", "validation")
    make_shards(tmp_path / "both" / train, LABELS, per_shard=10)
    if info:
        (tmp_path / "both" / "000000.tar").rename(tmp_path / "both" / "v.tar")
        write_info(tmp_path / "both", train={"000001.tar": 10}, validation={"v.tar": 10})
    else:
        make_shards(tmp_path / "both" / test, LABELS[:10], per_shard=5)
    bundle = open_data(f"wds/{tmp_path / 'both'}")
    assert (len(bundle.train), len(bundle.test), bundle.num_classes) == (10 if info else 20, 10, 3)
    assert "split 'validation'" in bundle.note
    images, targets = drain(eval_loader(bundle.test, CONFIG, batch_size=4))
    assert numbers(images) == list(range(10)) and targets.tolist() == LABELS[:10]
    assert len(open_source(f"wds/{tmp_path / 'both'}", split="train")) == len(bundle.train)
    with pytest.raises(UsageError, match="no split 'tset'; it has train, validation"):
        open_source(f"wds/{tmp_path / 'both'}", split="tset")


@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")  # by timm's reader
def test_info_is_that_of_timm(shards: Path) -> None:
    write_info(shards, train={"000000.tar": 5, "000001.tar": 5}, validation={"000002.tar": 5, "000003.tar": 5})
    for split in ("train", "validation"):
        reader = ReaderWds(str(shards), split=split)
        source = open_source(f"wds/{shards}", split=split)
        assert isinstance(source, ShardSource) and len(source) == reader.split_info.num_samples
        assert [Path(path).name for path in source.shards] == list(reader.split_info.filenames)
        images, targets = drain(eval_loader(source, CONFIG, batch_size=4))
        expected = [(image.getpixel((8, 8))[0], target) for image, target in reader]
        assert list(zip(numbers(images), targets.tolist(), strict=True)) == expected
        del reader
    gc.collect()


def test_a_brace_pattern(shards: Path) -> None:
    source = open_source(f"wds/{shards}/{{000001..000002}}.tar")
    assert numbers(drain(eval_loader(source, CONFIG, batch_size=4))[0]) == list(range(5, 15))
    names = ["ant", "bee", "cow"]
    known = open_source(f"wds/{shards}/{{000001..000002}}.tar|10", class_names=names)
    assert (len(known), known.class_names) == (10, names)
    bundle = open_data(f"wds/{shards}/{{000001..000003}}.tar", test_data=f"wds/{shards}/000000.tar")
    assert (len(bundle.train), len(bundle.test)) == (15, 5)
    with pytest.raises(UsageError, match=r"should end with the number of images after '\|', not with 'many'"):
        open_source(f"wds/{shards}/{{000001..000002}}.tar|many")
    with pytest.raises(QvitError, match=r"lacks the shard '.*000004\.tar'"):
        open_source(f"wds/{shards}/{{000001..000004}}.tar")


def test_classes_from_a_map_or_the_training_data(shards: Path, tmp_path: Path) -> None:
    mapping = tmp_path / "map.txt"
    mapping.write_text("0\tant\n1\tbee\n2\tcow\n5\tdog\n")
    write_info(shards, train={"000000.tar": 5}, validation={"000002.tar": 5})
    bundle = open_data(f"wds/{shards}", class_map=mapping)
    assert bundle.num_classes == bundle.test.num_classes == 6 and bundle.class_names[3:] == [
        "class 3",
        "class 4",
        "dog",
    ]
    folder = make_images(tmp_path / "pets", {"ant": 4, "bee": 4, "cow": 4})
    mixed = open_data(folder, test_data=f"wds/{shards}")
    assert mixed.test.class_names == ["ant", "bee", "cow"] and len(mixed.test) == 5
    assert open_data(f"wds/{shards}", test_data=folder, class_map=mapping).test.num_classes == 6


def test_what_cannot_be_meant(shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="'wds/' lacks the folder or pattern"):
        open_source("wds/")
    with pytest.raises(UsageError, match="the folder of shards '.*/sat' does not exist; did you mean 'set'"):
        open_source(f"wds/{tmp_path}/sat")
    (tmp_path / "empty").mkdir()
    with pytest.raises(QvitError, match=r"holds no shards; files \*\.tar are expected"):
        open_source(f"wds/{tmp_path}/empty")
    with pytest.raises(UsageError, match="has no test images: name them as test data"):
        open_data(f"wds/{shards}")
    with pytest.raises(UsageError, match="no share can be held out"):
        open_data(f"wds/{shards}", test_data=f"wds/{shards}/000000.tar", monitor_share=0.1)
    with pytest.raises(UsageError, match="repeated augmentation needs images that can be read in any order"):
        train_loader(opened(shards), CONFIG, batch_size=4, augment=AugmentConfig(repeated_augmentation=3))
    with pytest.raises(QvitError, match="has 4 shards, too few for 5 processes"):
        train_loader(opened(shards), CONFIG, batch_size=1, world_size=5)
    (shards / "_info.json").write_text(json.dumps({"splits": {"train": {}}}))
    with pytest.raises(QvitError, match=r"cannot read .*_info\.json of wds/.* should have 'splits'"):
        open_source(f"wds/{shards}")
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "webdataset" else find(name))
    with pytest.raises(
        UsageError, match=r"needs the package 'webdataset'; install it with: pip install 'qvit\[webdataset\]'"
    ):
        open_source(f"wds/{shards}")


# -------------------------------------------------------------------------------------------------------------- passes


@with_workers
@pytest.mark.parametrize("workers", [0, 1, 2, 3])
@pytest.mark.parametrize("policy", ["fatal", "skip"])
def test_a_training_pass_repeats_from_any_batch(shards: Path, workers: int, policy: Any) -> None:
    options: dict[str, Any] = {"batch_size": 2, "workers": workers, "seed": 3, "on_bad_image": policy}
    loader = train_loader(opened(shards), CONFIG, **options)
    first, second = list(loader), list(loader)
    assert len(first) == len(loader) and not same_batches(first, second)
    torch.manual_seed(9)
    again = train_loader(opened(shards), CONFIG, **options)
    assert same_batches(again, first) and same_batches(again, second)
    for skip in (1, 2, 3, 7, len(first)):
        again.set_epoch(1, skip)
        assert same_batches(again, second[skip:])
    assert not same_batches(train_loader(opened(shards), CONFIG, **options | {"seed": 4}), first)


@with_workers
@pytest.mark.parametrize(("workers", "world"), [(0, 1), (2, 1), (4, 1), (0, 2), (2, 2), (9, 1), (1, 4)])
def test_training_sees_all_images_in_equal_parts(shards: Path, workers: int, world: int) -> None:
    source = opened(shards)
    seen: Counter[int] = Counter()
    for rank in range(world):
        loader = train_loader(source, CONFIG, batch_size=5, augment=PLAIN, workers=workers, rank=rank, world_size=world)
        batches = list(loader)
        assert len(batches) == len(loader) == 4 // world
        assert all(len(targets) == 5 for _, targets in batches)
        seen.update(number for images, _ in batches for number in numbers(images))
    assert seen == Counter(range(20)), "here the shards divide evenly"


def test_a_pass_is_mixed_and_full(shards: Path) -> None:
    loader = train_loader(opened(shards), CONFIG, batch_size=8, augment=PLAIN)
    images, targets = drain(loader)
    order = numbers(images)
    assert len(order) == 24 and set(order) == set(range(20)) and order[:20] != list(range(20))
    assert len({number // 5 for number in order[:5]}) > 1, "shards are mixed with each other"
    assert targets.tolist() == [LABELS[number] for number in order]


@with_workers
@pytest.mark.parametrize("workers", [0, 2, 7])
@pytest.mark.parametrize("world", [1, 3, 5])
def test_every_image_is_evaluated_once(shards: Path, workers: int, world: int) -> None:
    found = []
    for rank in range(world):
        loader = eval_loader(opened(shards), CONFIG, batch_size=2, workers=workers, rank=rank, world_size=world)
        batches = list(loader)
        assert len(batches) == len(loader)
        found += [number for images, _ in batches for number in numbers(images)]
    assert sorted(found) == list(range(20))
    loader.set_epoch(0, skip=1)
    with pytest.raises(UsageError, match="starts at the first batch"):
        drain(loader)


@with_workers
def test_calibration_images(shards: Path) -> None:
    before = generator_states()
    batches = list(calibration_batches(opened(shards), CONFIG, images=20, batch_size=8, seed=1))
    assert [len(batch) for batch in batches] == [8, 8, 4]
    order = numbers(torch.cat(batches))
    assert sorted(order) == list(range(20)) and order != list(range(20)), "different images, mixed"
    again = calibration_batches(opened(shards), CONFIG, images=20, batch_size=8, seed=1, workers=2)
    assert same(batches, again)
    assert not same(batches, calibration_batches(opened(shards), CONFIG, images=20, batch_size=8, seed=2))
    few = torch.cat(list(calibration_batches(opened(shards), CONFIG, images=3, batch_size=8, seed=1)))
    assert numbers(few) == order[:3]
    with pytest.raises(QvitError, match="too few images to calibrate"):
        calibration_batches(opened(shards), CONFIG, images=21, batch_size=8)
    for workers in (0, 2):
        drain(train_loader(opened(shards), CONFIG, batch_size=2, workers=workers))
        drain(eval_loader(opened(shards), CONFIG, batch_size=2, workers=workers))
    assert generator_states() == before


# ---------------------------------------------------------------------------------------------------------- bad images


class Mean(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        return images.mean(dim=(2, 3))


@with_workers
@pytest.mark.parametrize("workers", [0, 2])
def test_unreadable_images(tmp_path: Path, workers: int) -> None:
    make_shards(tmp_path / "bad", LABELS, per_shard=5, damaged={3: b"", 7: b"text", 19: b"\x89PNG\r\n\x1a\n"})
    options: dict[str, Any] = {"batch_size": 4, "workers": workers}
    for make in (train_loader, eval_loader):
        with pytest.raises(
            QvitError, match=r"cannot read image '00000\d\.tar/img\d+' in .*bad: .*; remove or repair it"
        ):
            drain(make(opened(tmp_path / "bad"), CONFIG, **options))
        assert not multiprocessing.active_children()
    source = opened(tmp_path / "bad")
    loader = eval_loader(source, CONFIG, on_bad_image="skip", **options)
    assert sorted(numbers(drain(loader)[0])) == [number for number in range(20) if number not in (3, 7, 19)]
    assert sorted(source.bad_images()) == ["000000.tar/img0003", "000001.tar/img0007", "000003.tar/img0019"]
    scores = evaluate(Mean(), loader)
    assert (scores["images"], scores["skipped"]) == (17, 3)
    loader = train_loader(source, CONFIG, augment=PLAIN, on_bad_image="skip", **options)
    batches = list(loader)
    assert all(len(targets) == 4 for _, targets in batches) and len(batches) == len(loader)
    assert {number for images, _ in batches for number in numbers(images)}.isdisjoint({3, 7, 19})
    for skip in (1, 3):
        loader.set_epoch(0, skip)
        assert same_batches(loader, batches[skip:])
    calibration = calibration_batches(source, CONFIG, images=8, batch_size=4, on_bad_image="skip", workers=workers)
    assert {number for batch in calibration for number in numbers(batch)}.isdisjoint({3, 7, 19})


@with_workers
@pytest.mark.parametrize("workers", [0, 2])
def test_a_shard_that_is_cut_off(shards: Path, workers: int) -> None:
    source = opened(shards)
    whole = (shards / "000001.tar").read_bytes()
    (shards / "000001.tar").write_bytes(whole[:3000])  # after two images
    for make in (train_loader, eval_loader):
        with pytest.raises(QvitError, match=r"cannot read image '000001\.tar' in .*: the shard is damaged: .*"):
            drain(make(source, CONFIG, batch_size=4, workers=workers))
    loader = eval_loader(source, CONFIG, batch_size=4, workers=workers, on_bad_image="skip")
    kept = numbers(drain(loader)[0])
    assert set(range(5)) | set(range(10, 20)) <= set(kept) and len(kept) < 20
    assert "000001.tar" in source.bad_images()
    with pytest.raises(QvitError, match=r"cannot read the shard '.*000001\.tar'"):
        opened(shards)


def test_too_many_unreadable_images(tmp_path: Path) -> None:
    make_shards(tmp_path / "half", LABELS, per_shard=5, damaged=dict.fromkeys(range(9, 20), b""))
    make_shards(tmp_path / "row", [0] * 240, per_shard=120, damaged=dict.fromkeys(range(5, 110), b""))
    for make in (train_loader, eval_loader):
        with pytest.raises(QvitError, match="more than half of the 20 images of .*half cannot be read"):
            list(make(opened(tmp_path / "half"), CONFIG, batch_size=4, on_bad_image="skip"))
    with pytest.raises(QvitError, match="100 images in a row of .*row cannot be read, the last of them '000000.tar/"):
        drain(eval_loader(opened(tmp_path / "row"), CONFIG, batch_size=4, on_bad_image="skip"))


def test_labels_that_are_none(tmp_path: Path) -> None:
    make_shards(tmp_path / "set", [0, 1, 5], per_shard=3)
    for policy in ("fatal", "skip"):
        source = open_source(f"wds/{tmp_path}/set", class_names=["ant", "bee"])
        with pytest.raises(QvitError, match=r"'000000.tar/img0002' .* has the label b'5'; classes are numbered 0 to 1"):
            drain(eval_loader(source, CONFIG, batch_size=4, on_bad_image=policy))  # type: ignore[arg-type]
