"""Data: what is opened, how it is split, what loaders yield, and what is said about data that cannot be used."""

from __future__ import annotations

import errno
import gzip
import importlib.util
import io
import os
import pickle
import shutil
import sys
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from hypothesis import given
from hypothesis import strategies as st
from image_sets import CONFIG, GREY, drain, make_images, make_tar, names, same, with_workers
from PIL import Image
from timm.data import create_transform
from timm.data.readers.reader_image_folder import ReaderImageFolder

from qvit.data.open import (
    AugmentConfig,
    calibration_batches,
    data_config_of,
    eval_loader,
    open_data,
    open_source,
    read_class_map,
    stratified_split,
    train_loader,
)
from qvit.errors import QvitError, UsageError


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "qvit"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_images(tmp_path / "pets", {"cat": 6, "dog": 6, "eel": 6})


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    return make_images(tmp_path / "many", {"ant": 23, "bee": 11, "cow": 7})


# ------------------------------------------------------------------------------------------------------- what is opened


def test_folder_is_listed_as_timm_lists_it(folder: Path) -> None:
    source = open_source(folder)
    reader = ReaderImageFolder(str(folder))
    assert names(source) == reader.filenames()
    assert source.targets.tolist() == [target for _, target in reader.samples]
    assert source.class_names == ["cat", "dog", "eel"] and source.num_classes == 3 and len(source) == 18
    image, target = source.dataset(np.asarray)[7]
    assert target == 1 and np.array_equal(image, np.asarray(Image.open(folder / "dog/dog_1.jpg")))


def test_classes_are_in_natural_order_and_ties_in_a_fixed_one(tmp_path: Path) -> None:
    source = open_source(make_images(tmp_path / "data", {"c10": 1, "c9": 1, "C9": 1, "c09": 1}))
    assert source.class_names == ["C9", "c09", "c9", "c10"]


@pytest.mark.parametrize("arcname", [".", "", "pets", "a/b/pets"])
def test_tar_has_what_the_folder_has(folder: Path, tmp_path: Path, arcname: str) -> None:
    archive = make_tar(folder, tmp_path / "pets.tar", arcname)
    before = set(tmp_path.iterdir())
    source, expected = open_source(archive), open_source(folder)
    prefix = f"{arcname}/" if arcname not in (".", "") else ""
    assert names(source) == [prefix + name for name in names(expected)]
    assert source.targets.tolist() == expected.targets.tolist() and source.class_names == expected.class_names
    for (image, target), (other, wanted) in zip(source.dataset(np.asarray), expected.dataset(np.asarray), strict=True):
        assert target == wanted and np.array_equal(image, other)
    assert set(tmp_path.iterdir()) == before, "an index was written next to the data"


def test_an_index_lying_next_to_a_tar_is_not_read(folder: Path, tmp_path: Path) -> None:
    archive = make_tar(folder, tmp_path / "pets.tar")
    (tmp_path / "_pets_tarinfos.pickle").write_bytes(b"not a pickle")
    assert len(open_source(archive)) == 18


def test_tar_of_one_tar_per_class(folder: Path, tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "nested.tar", "w") as outer:
        for kind in ("dog", "cat"):
            with tarfile.open(tmp_path / f"{kind}.tar", "w") as inner:
                for path in sorted((folder / kind).iterdir()):
                    inner.add(path, path.name)
            outer.add(tmp_path / f"{kind}.tar", f"{kind}.tar")
    source = open_source(tmp_path / "nested.tar")
    assert source.class_names == ["cat", "dog"] and source.filename(6) == "dog/dog_0.jpg"
    assert np.array_equal(source.dataset(np.asarray)[6][0], np.asarray(Image.open(folder / "dog/dog_0.jpg")))


@pytest.mark.parametrize("suffix", [".tar.gz", ".tgz", ".tar"])
def test_compressed_tar_is_unpacked_once(folder: Path, tmp_path: Path, cache: Path, suffix: str) -> None:
    archive = make_tar(folder, tmp_path / f"pets{suffix}", mode="w:gz")  # also one whose name does not say so
    assert names(open_source(archive)) == names(open_source(folder))
    [unpacked] = cache.iterdir()
    assert unpacked.name.startswith("pets-") and unpacked.suffix == ".tar"
    written = unpacked.stat().st_mtime_ns
    open_source(archive)
    assert [path.stat().st_mtime_ns for path in cache.iterdir()] == [written]
    os.utime(archive, ns=(0, 10**18))
    open_source(archive)
    assert len(list(cache.iterdir())) == 2, "a changed archive is unpacked again"


def test_a_full_disk_leaves_nothing_behind(
    folder: Path, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    archive = make_tar(folder, tmp_path / "pets.tar.gz", mode="w:gz")
    cache.mkdir(parents=True)
    (cache / "killed.part").write_bytes(b"half of an archive")
    os.utime(cache / "killed.part", (0, 0))

    def full(source: Any, out: Any, length: int) -> None:
        out.write(source.read(100))
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(shutil, "copyfileobj", full)
    with pytest.raises(QvitError, match=r"cannot unpack .*pets\.tar\.gz into .*: No space left.*XDG_CACHE_HOME"):
        open_source(archive)
    assert not list(cache.iterdir())


def test_sources_travel_to_spawned_workers(folder: Path, tmp_path: Path) -> None:
    for data in (folder, make_tar(folder, tmp_path / "pets.tar"), "digits"):
        source = open_source(data)
        copy = pickle.loads(pickle.dumps(source))
        assert names(copy) == names(source)
        assert np.array_equal(np.asarray(copy.dataset()[3][0]), np.asarray(source.dataset()[3][0]))


def test_subset_keeps_order_and_classes(folder: Path) -> None:
    source = open_source(folder)
    subset = source.subset([17, 2, 2]).subset(torch.tensor([1, 0]))
    assert names(subset) == ["cat/cat_2.jpg", "eel/eel_5.jpg"]
    assert subset.targets.tolist() == [0, 2] and subset.class_names == source.class_names


# --------------------------------------------------------------------------------------------------------------- splits


@given(st.lists(st.integers(0, 4), min_size=1, max_size=60), st.floats(0, 1), st.integers(0, 9))
def test_stratified_split(labels: list[int], share: float, seed: int) -> None:
    targets = np.array(labels)
    count = round(share * len(targets))
    kept, aside = stratified_split(targets, count, seed)
    assert sorted([*kept, *aside]) == list(range(len(targets)))
    assert all(np.array_equal(a, b) for a, b in zip((kept, aside), stratified_split(targets, count, seed), strict=True))
    for label in set(labels):
        size, taken = (targets == label).sum(), (targets[aside] == label).sum()
        assert taken < size and abs(taken - size * count / len(targets)) <= 1
    assert len(aside) <= count and (len(aside) == count or share > 0.5 or min(np.bincount(targets)[targets]) < 3)


def test_the_split_never_changes() -> None:
    """Results of different versions are comparable only while this holds."""
    assert stratified_split(np.arange(20) % 3, 6, 0)[1].tolist() == [1, 4, 6, 11, 17, 18]


def test_a_share_is_set_aside_once_and_for_all(mixed: Path) -> None:
    bundle = open_data(mixed)
    train, test = names(bundle.train), names(bundle.test)
    assert len(test) == 8 and len(train) == 33 and not set(train) & set(test)
    assert np.bincount(bundle.test.targets).tolist() == [5, 2, 1]
    assert (bundle.num_classes, bundle.class_names, bundle.held_out) == (3, ["ant", "bee", "cow"], None)
    assert bundle.note.startswith("33 training images are from") and "set aside from it" in bundle.note
    for seed in (1, 2):
        again = open_data(mixed, seed=seed, monitor_share=0.25)
        assert again.held_out is not None and names(again.test) == test
        assert len(again.held_out) == 8 and sorted(names(again.train) + names(again.held_out)) == sorted(train)
    assert names(open_data(mixed, seed=1, monitor_share=0.25).train) != names(again.train)


def test_tar_and_folder_are_split_alike(mixed: Path, tmp_path: Path) -> None:
    archive = make_tar(mixed, tmp_path / "many.tgz", mode="w:gz")
    assert names(open_data(archive).test) == names(open_data(mixed).test)


@pytest.mark.parametrize("form", ["folder", "tar", "wrapped tar"])
@pytest.mark.parametrize("test_split", ["val", "validation", "test"])
def test_train_and_val_folders(tmp_path: Path, form: str, test_split: str) -> None:
    root = tmp_path / "split"
    make_images(root / "train", {"cat": 5, "dog": 4})
    make_images(root / test_split, {"dog": 3}, seed=1)
    data = root if form == "folder" else make_tar(root, tmp_path / "s.tar", "." if form == "tar" else "split-v2")
    bundle = open_data(data)
    assert len(bundle.train) == 9 and bundle.class_names == ["cat", "dog"]
    assert bundle.test.targets.tolist() == [1, 1, 1], "numbered by the classes of the training images"
    assert all(f"{test_split}/dog/" in name for name in names(bundle.test)) and f"split '{test_split}'" in bundle.note
    for asked, count in (("train", 9), ("validation", 3), (test_split, 3)):
        assert len(open_source(data, split=asked)) == count
    with pytest.raises(UsageError, match="no split 'tset'; it has "):
        open_source(data, split="tset")
    make_images(root / test_split, {"cog": 1})
    with pytest.raises(
        QvitError, match=r"1 of 2 class folders .* not in the training classes.*'cog'; did you mean 'dog'"
    ):
        open_data(root)


def test_class_folders_may_be_called_train_and_test(tmp_path: Path) -> None:
    bundle = open_data(make_images(tmp_path / "vehicles", {"train": 5, "bus": 5, "test": 5}))
    assert bundle.class_names == ["bus", "test", "train"] and len(bundle.train) == 12


def test_test_data_of_some_of_the_classes(folder: Path, tmp_path: Path) -> None:
    other = make_tar(make_images(tmp_path / "o", {"eel": 2, "dog": 1}, seed=1), tmp_path / "other.tar")
    bundle = open_data(folder, test_data=other)
    assert len(bundle.train) == 18 and bundle.test.targets.tolist() == [1, 2, 2] and bundle.test.num_classes == 3
    assert str(other) in bundle.note
    assert open_source(other, class_names=bundle.class_names).targets.tolist() == [1, 2, 2]
    assert open_source(other).targets.tolist() == [0, 1, 1]
    with pytest.raises(UsageError, match="are the training data"):
        open_data(folder, test_data=folder)


# ------------------------------------------------------------------------------------------------------------ class map


def write_map(path: Path, *lines: str) -> Path:
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def test_class_map_numbers_the_folders(folder: Path, tmp_path: Path) -> None:
    mapping = write_map(tmp_path / "map.txt", "0\tant\tan insect", "7\tcat\tname\tmore", "", "3\tdog", "4\teel\t")
    assert read_class_map(mapping) == {"ant": 0, "cat": 7, "dog": 3, "eel": 4}
    bundle = open_data(folder, class_map=mapping)
    assert bundle.num_classes == 8 and bundle.class_names[:5] == ["ant", "class 1", "class 2", "dog", "eel"]
    assert set(bundle.train.targets) == set(bundle.test.targets) == {7, 3, 4}
    source = open_source(folder, class_map=mapping)
    assert [source.class_names[target] for target in source.targets] == [n.split("/")[0] for n in names(source)]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["0\tcat", "1 dog"], r"line 2 of the class map .* should read 'index<TAB>folder', not '1 dog'"),
        (["n01\tcat"], "line 1 of the class map"),
        (["0\t"], "line 1 of the class map"),
        (["-1\tcat"], "line 1 of the class map"),
        (["0\tcat", "1\tcat"], "line 2 of the class map .* repeats"),
        (["0\tcat", "", "0\tdog"], "line 3 of the class map .* repeats"),
        ([""], "is empty"),
    ],
)
def test_class_map_that_cannot_be_meant(tmp_path: Path, lines: list[str], message: str) -> None:
    with pytest.raises(QvitError, match=message):
        read_class_map(write_map(tmp_path / "map.txt", *lines))


def test_class_map_without_the_folders(folder: Path, tmp_path: Path) -> None:
    mapping = write_map(tmp_path / "map.txt", "0\tcats", "1\tdog")
    with pytest.raises(QvitError, match=r"2 of 3 class folders .* the class map .*: 'cat', 'eel'; did you mean 'cats'"):
        open_source(folder, class_map=mapping)
    with pytest.raises(UsageError, match=r"the class map .*mop\.txt' does not exist; did you mean 'map\.txt'"):
        open_source(folder, class_map=tmp_path / "mop.txt")
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe0\x00")
    with pytest.raises(QvitError, match="the class map .* is not UTF-8"):
        read_class_map(tmp_path / "binary.txt")


# --------------------------------------------------------------------------------------------- data that cannot be used


def test_missing_path_names_what_is_near(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"the data '.*/pet' does not exist; did you mean 'pets'\?"):
        open_data(tmp_path / "pet")
    with pytest.raises(UsageError, match="did you mean 'digits'"):
        open_data("digit")
    with pytest.raises(UsageError, match="nor does the folder"):
        open_data(tmp_path / "nowhere" / "pets")


def test_nothing_to_read(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "empty" / "cat").mkdir(parents=True)
    (tmp_path / "empty" / "cat" / "notes.txt").write_text("no image")
    for data in (tmp_path / "empty", make_tar(tmp_path / "empty", tmp_path / "empty.tar")):
        with pytest.raises(
            QvitError, match=r"holds no images; images \(.*\.jpg.*\) are expected in it, or in a folder for each class"
        ):
            open_source(data)
    with pytest.raises(QvitError, match="too few images per class to set some aside"):
        open_data(make_images(tmp_path / "few", {"cat": 1, "dog": 1}))
    with pytest.raises(QvitError, match="too few images per class to hold out"):
        open_data(make_images(tmp_path / "few2", {"cat": 2, "dog": 2}), test_share=0.5, monitor_share=0.5)


@pytest.mark.parametrize("share", [{"test_share": 0.0}, {"test_share": 1.0}, {"monitor_share": -0.1}])
def test_shares_out_of_range(folder: Path, share: dict[str, float]) -> None:
    with pytest.raises(UsageError, match="shares lie between 0 and 1"):
        open_data(folder, **share)  # type: ignore[arg-type]


def test_archives_that_are_none(folder: Path, tmp_path: Path, cache: Path) -> None:
    (tmp_path / "text.tar").write_text("text " * 1000)
    (tmp_path / "text.tar.gz").write_text("text " * 1000)
    whole = make_tar(folder, tmp_path / "whole.tar").read_bytes()
    (tmp_path / "cut.tar").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "cut.tar.gz").write_bytes(gzip.compress(whole)[:-2000])
    for name, kind in (("text.tar", "tar"), ("cut.tar", "tar"), ("text.tar.gz", "gzip"), ("cut.tar.gz", "gzip")):
        with pytest.raises(QvitError, match=rf"{name} is not a {kind} archive, or it is damaged"):
            open_source(tmp_path / name)
    assert not list(cache.glob("*")), "nothing of a damaged archive is kept"
    (tmp_path / "pets.zip").write_bytes(b"PK")
    with pytest.raises(UsageError, match=r"is neither a folder nor an archive \(\.tar, \.tar\.gz, \.tgz\)"):
        open_source(tmp_path / "pets.zip")


def test_an_image_that_vanished_is_named(folder: Path) -> None:
    source = open_source(folder)
    (folder / "eel" / "eel_0.jpg").unlink()
    with pytest.raises(QvitError, match=r"cannot read image 'eel/eel_0\.jpg' in .*no image at"):
        drain(eval_loader(source, CONFIG, batch_size=4))


# -------------------------------------------------------------------------------------------------------------- loaders


@with_workers
@pytest.mark.parametrize("workers", [0, 2])
def test_eval_loader_is_timms_evaluation(folder: Path, tmp_path: Path, workers: int) -> None:
    transform = create_transform(**CONFIG)
    source = open_source(make_tar(folder, tmp_path / "pets.tar"))
    expected = torch.stack([transform(Image.open(folder / name).convert("RGB")) for name in names(source)])
    loader = eval_loader(source, CONFIG, batch_size=4, workers=workers)
    images, targets = drain(loader)
    assert len(loader) == 5 and images.shape == (18, 3, 16, 16) and images.dtype == torch.float32
    torch.testing.assert_close(images, expected)
    assert targets.dtype == torch.int64 and targets.tolist() == source.targets.tolist()


def test_augmentation_none_only_shuffles(folder: Path) -> None:
    source = open_source(folder)
    evaluated, _ = drain(eval_loader(source, CONFIG, batch_size=18))
    images, targets = drain(train_loader(source, CONFIG, batch_size=18, augment=AugmentConfig.preset("none")))
    order = [int(((evaluated - image).abs().amax(dim=(1, 2, 3))).argmin()) for image in images]
    assert sorted(order) == list(range(18)) and order != list(range(18))
    assert torch.equal(images, evaluated[order]) and targets.tolist() == source.targets[order].tolist()


def test_last_batches(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = open_source(folder)
    augment = AugmentConfig.preset("light")
    for drop_last, sizes in ((True, [5, 5, 5]), (False, [5, 5, 5, 3])):
        loader = train_loader(source, CONFIG, batch_size=5, augment=augment, drop_last=drop_last)
        assert [len(targets) for _, targets in loader] == sizes and len(loader) == len(sizes)
    loader = train_loader(source, CONFIG, batch_size=64, augment=augment)
    assert [len(targets) for _, targets in loader] == [18] and "lowered to 18" in caplog.text
    for wrong in ({"batch_size": 0}, {"batch_size": 4, "workers": -1}):
        with pytest.raises(UsageError, match="batch_size >= 1"):
            eval_loader(source, CONFIG, **wrong)


def test_random_erasing_probability(folder: Path) -> None:
    def passes(probability: float) -> torch.Tensor:
        augment = AugmentConfig(auto_augment=None, random_erasing=probability, hflip=0, scale=(1, 1), ratio=(1, 1))
        return drain(train_loader(open_source(folder), CONFIG, batch_size=18, augment=augment))[0]

    changed = (passes(1.0) != passes(0.0)).any(dim=1).float().mean(dim=(1, 2))
    assert 0.02 < changed.min() and changed.max() < 0.5, "a rectangle of every image, and not the rest"


def test_models_of_one_channel_see_grey(folder: Path) -> None:
    images, _ = drain(eval_loader(open_source(folder), {**GREY, "input_size": (1, 16, 16)}, batch_size=4))
    assert images.shape == (18, 1, 16, 16)


def test_augment_config() -> None:
    assert AugmentConfig.preset("deit") == AugmentConfig()
    assert AugmentConfig.preset("none").is_off and not AugmentConfig.preset("light").is_off
    assert AugmentConfig(scale=[0.5, 1.0]) == AugmentConfig(scale=(0.5, 1.0))  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="no augmentation is called 'diet'.*did you mean 'deit'"):
        AugmentConfig.preset("diet")
    for field, value, message in (
        ("auto_augment", "rant-m9", "no augmentation policy 'rant-m9'"),
        ("auto_augment", "rand-zz5", "no augmentation policy 'rand-zz5'"),
        ("random_erasing", 1.5, "random_erasing is a probability"),
        ("hflip", -0.5, "hflip is a probability"),
        ("scale", (1.0, 0.5), "scale is a range"),
        ("ratio", (1.0,), "ratio is a range"),
        ("scale", None, "scale=None is for no augmentation at all"),
        ("repeated_augmentation", -1, "repeated_augmentation counts"),
    ):
        with pytest.raises(UsageError, match=message):
            AugmentConfig(**{field: value})


def test_data_config_is_that_of_the_model_made() -> None:
    small = {"embed_dim": 12, "depth": 1, "num_heads": 3, "num_classes": 10, "patch_size": 2}
    config = data_config_of(timm.create_model("deit_tiny_patch16_224", img_size=8, in_chans=1, **small))
    assert config["input_size"] == (1, 8, 8) and len(config["mean"]) == len(config["std"]) == 1
    config = data_config_of(timm.create_model("deit_tiny_patch16_224", embed_dim=12, depth=1))
    assert config["input_size"] == (3, 224, 224) and config["crop_pct"] == 0.9


# ---------------------------------------------------------------------------------------------------------- calibration


def test_calibration_images_are_training_images(mixed: Path) -> None:
    bundle = open_data(mixed, monitor_share=0.2)
    every, _ = drain(eval_loader(bundle.train, CONFIG, batch_size=64))
    batches = list(calibration_batches(bundle.train, CONFIG, images=10, batch_size=4, seed=3))
    assert [len(batch) for batch in batches] == [4, 4, 2]
    images = torch.cat(batches)
    found = [(every - image).abs().amax(dim=(1, 2, 3)).argmin().item() for image in images]
    assert len(set(found)) == 10 and torch.equal(every[found], images)
    torch.manual_seed(99)
    assert same(calibration_batches(bundle.train, CONFIG, images=10, batch_size=4, seed=3), batches)
    assert not same(calibration_batches(bundle.train, CONFIG, images=10, batch_size=4, seed=4), batches)


def test_too_few_images_to_calibrate(folder: Path) -> None:
    with pytest.raises(
        QvitError, match=r"too few images to calibrate: .*pets has 18, calibration needs 19; ask for fewer"
    ):
        calibration_batches(open_source(folder), CONFIG, images=19, batch_size=4)
    with pytest.raises(UsageError, match="at least one image"):
        calibration_batches(open_source(folder), CONFIG, images=0, batch_size=4)


# --------------------------------------------------------------------------------------------------------- Hugging Face


def test_hugging_face_without_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(
        UsageError, match="'hfds/owner/name' needs the package 'datasets'; install it with: pip install"
    ):
        open_data("hfds/owner/name")
    with pytest.raises(UsageError, match="lacks the name"):
        open_source("hfds/")


@pytest.mark.skipif(importlib.util.find_spec("datasets") is None, reason="datasets is not installed")
def test_hugging_face_dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hub")
    make_images(tmp_path / "data" / "train", {"cat": 5, "dog": 4})
    make_images(tmp_path / "data" / "test", {"cat": 2, "dog": 3}, seed=1)
    bundle = open_data(f"hfds/{tmp_path}/data")
    assert (len(bundle.train), len(bundle.test), bundle.class_names) == (9, 5, ["cat", "dog"])
    assert bundle.test.targets.tolist() == [0, 0, 1, 1, 1]
    expected = np.asarray(Image.open(tmp_path / "data" / "test" / "dog" / "dog_0.jpg"))
    assert np.array_equal(bundle.test.dataset(np.asarray)[2][0], expected)
    assert len(open_source(f"hfds/{tmp_path}/data", split="validation")) == 5
    with pytest.raises(QvitError, match=r"cannot open the Hugging Face data set '.*/nothing'"):
        open_data(f"hfds/{tmp_path}/nothing")


# ------------------------------------------------------------------------------------------------------------ real data


def test_imagenet_folders_by_class_map(real_data: Path) -> None:
    mapping = real_data / "imagenet-classes.txt"
    source = open_source(real_data / "imagenet-sample.tar", class_map=mapping)
    assert (len(source), source.num_classes, len(set(source.targets))) == (500, 1000, 500)
    lines = [line.split("\t") for line in mapping.read_text().splitlines()]
    assert all(lines[target][1] == source.filename(i).split("/")[0] for i, target in enumerate(source.targets))
    image, _ = source.dataset(np.asarray)[499]
    with tarfile.open(real_data / "imagenet-sample.tar") as tar:
        member = tar.extractfile(source.filename(499))
        assert member is not None
        assert np.array_equal(image, np.asarray(Image.open(io.BytesIO(member.read())).convert("RGB")))


@with_workers
def test_cifar_from_a_compressed_tar(real_data: Path) -> None:
    bundle = open_data(real_data / "cifar10-test.tar.gz")
    assert (len(bundle.train), len(bundle.test), bundle.num_classes) == (8000, 2000, 10)
    assert np.bincount(bundle.test.targets).tolist() == [200] * 10
    few = bundle.train.subset(range(0, 8000, 40))
    config = {**CONFIG, "input_size": (3, 32, 32)}
    loader = train_loader(few, config, batch_size=50, workers=2)
    first = drain(loader)
    loader.set_epoch(0)
    assert same(drain(loader), first) and first[0].shape == (200, 3, 32, 32)


@pytest.mark.slow
@with_workers
def test_float_model_reproduces_its_accuracy(real_data: Path) -> None:
    from safetensors.torch import load_file

    model = timm.create_model("deit_tiny_patch16_224").eval()
    model.load_state_dict(load_file(real_data / "deit_tiny_patch16_224.safetensors"))
    source = open_source(real_data / "imagenet-sample.tar", class_map=real_data / "imagenet-classes.txt")
    loader = eval_loader(source, data_config_of(model), batch_size=50, workers=2)
    with torch.inference_mode():
        correct = sum(int((model(images).argmax(1) == targets).sum()) for images, targets in loader)
    assert correct == 383
