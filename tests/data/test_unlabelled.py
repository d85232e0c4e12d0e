"""Images without labels: what counts as such, how it goes together with labelled images, and what is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from image_sets import CONFIG, drain, make_images, make_tar, names

from qvit.data.images import NO_LABEL
from qvit.data.open import DataBundle, calibration_batches, eval_loader, open_data, open_source
from qvit.errors import QvitError, UsageError


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def flat(tmp_path: Path) -> Path:
    return make_images(tmp_path / "set", {"photos": 10}) / "photos"


@pytest.fixture
def pets(tmp_path: Path) -> Path:
    return make_images(tmp_path / "pets", {"cat": 6, "dog": 6, "eel": 6})


@pytest.fixture
def class_map(tmp_path: Path) -> Path:
    (tmp_path / "map.txt").write_text("0\teel\n1\tcat\n2\tdog\n3\towl\n")
    return tmp_path / "map.txt"


def is_unlabelled(bundle: DataBundle) -> bool:
    sources = (bundle.train, bundle.test)
    assert [source.labelled for source in sources] in ([False, False], [True, True])
    if bundle.train.labelled:
        return False
    assert all((source.targets == NO_LABEL).all() for source in sources)  # type: ignore[union-attr]
    assert bundle.num_classes is None and not bundle.class_names and "without labels" in bundle.note
    return True


def test_a_flat_folder_and_its_archives(flat: Path, tmp_path: Path) -> None:
    for data in (
        flat,
        make_tar(flat, tmp_path / "flat.tar"),
        make_tar(flat, tmp_path / "inside.tar", "photos"),
        make_tar(flat, tmp_path / "flat.tar.gz", mode="w:gz"),
    ):
        bundle = open_data(data)
        assert is_unlabelled(bundle) and (len(bundle.train), len(bundle.test)) == (8, 2)
        assert not set(names(bundle.train)) & set(names(bundle.test))  # type: ignore[arg-type]
        images, targets = drain(eval_loader(bundle.test, CONFIG))
        assert images.shape == (2, 3, 16, 16) and targets.tolist() == [NO_LABEL] * 2
        assert sum(map(len, calibration_batches(bundle.train, CONFIG, images=5))) == 5


def test_one_class_folder_alone_is_unlabelled_and_two_are_classes(tmp_path: Path) -> None:
    assert is_unlabelled(open_data(make_images(tmp_path / "one", {"cat": 6})))
    two = open_data(make_images(tmp_path / "two", {"cat": 6, "dog": 6}))
    assert not is_unlabelled(two) and two.num_classes == 2
    assert is_unlabelled(open_data(tmp_path / "two", unlabelled=True)), "two albums"


def test_an_album_has_images_beside_a_folder(flat: Path) -> None:
    make_images(flat, {"holiday": 5})
    source = open_source(flat)
    assert len(source) == 15 and not source.labelled


def test_folders_of_one_name_are_no_classes(tmp_path: Path) -> None:
    for album in ("first", "second"):
        make_images(tmp_path / "albums" / album, {"jpg": 3})
    assert is_unlabelled(open_data(tmp_path / "albums"))


def test_images_beside_class_folders_are_ambiguous(pets: Path, flat: Path) -> None:
    stray = pets / "photos_0.jpg"
    stray.write_bytes((flat / "photos_0.jpg").read_bytes())
    with pytest.raises(QvitError, match=r"'photos_0\.jpg' in .*pets lies beside 3 folders .* or give --unlabelled"):
        open_data(pets)
    assert is_unlabelled(open_data(pets, unlabelled=True))
    with pytest.raises(QvitError, match=r"'photos_0\.jpg' .* lies beside 3 folders"):
        open_source(pets, class_names=["cat", "dog", "eel"])


def test_splits_without_labels(tmp_path: Path) -> None:
    for folder in (tmp_path / "plain", tmp_path / "around" / "all"):
        make_images(folder, {"train": 5, "val": 3})
    for data in (tmp_path / "plain", tmp_path / "around"):
        bundle = open_data(data)
        assert is_unlabelled(bundle) and (len(bundle.train), len(bundle.test)) == (5, 3)
        assert all("/val_" in f"/{name}" for name in names(bundle.test))  # type: ignore[arg-type]
    make_images(tmp_path / "plain", {"bus": 3})
    vehicles = open_data(tmp_path / "plain")
    assert vehicles.class_names == ["bus", "train", "val"], "three folders, of which two are called like splits"


def test_classes_of_one_split_alone(tmp_path: Path, pets: Path) -> None:
    pets.rename(tmp_path / "val")
    (tmp_path / "both").mkdir()
    (tmp_path / "val").rename(tmp_path / "both" / "val")
    make_images(tmp_path / "both", {"train": 5})
    bundle = open_data(tmp_path / "both")
    assert not bundle.train.labelled and bundle.test.labelled
    assert bundle.num_classes == 3 and bundle.class_names == ["cat", "dog", "eel"]


def test_photos_calibrate_and_labelled_images_judge(flat: Path, pets: Path, class_map: Path) -> None:
    own = open_data(flat, test_data=pets)
    assert not own.train.labelled and own.test.labelled and own.num_classes == 3
    mapped = open_data(flat, test_data=pets, class_map=class_map)
    assert mapped.num_classes == 4 and mapped.class_names == ["eel", "cat", "dog", "owl"]
    assert np.unique(mapped.test.targets).tolist() == [0, 1, 2]  # type: ignore[union-attr]
    album = open_data(make_images(flat.parent / "album", {"may": 3, "june": 3}), test_data=pets, class_map=class_map,
                      unlabelled=True)  # fmt: skip
    assert not album.train.labelled and album.test.labelled, "the class map names the classes of the test images"
    assert "training images without labels" in album.note and "test images are" in album.note


def test_labelled_images_calibrate_and_photos_judge(flat: Path, pets: Path) -> None:
    bundle = open_data(pets, test_data=flat)
    assert bundle.train.labelled and not bundle.test.labelled and bundle.num_classes == 3
    assert "test images without labels are" in bundle.note


def test_a_class_map_needs_class_folders(flat: Path, pets: Path, class_map: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"the class map .* is for class folders, and .*photos has images without"):
        open_data(flat, class_map=class_map)
    with pytest.raises(UsageError, match="is for class folders"):
        open_data(pets, class_map=class_map, unlabelled=True)
    one = make_images(tmp_path / "one", {"cat": 6})
    assert open_data(one, class_map=class_map).num_classes == 4, "the map says that a single folder is a class"
    wrong = tmp_path / "wrong.txt"
    wrong.write_text("0\tcats\n1\tdog\n")
    with pytest.raises(QvitError, match=r"2 of 3 class folders .* are not in the class map .*'cat', 'eel'"):
        open_data(pets, class_map=wrong)
    with pytest.raises(QvitError, match=r"1 of 1 class folders .* are not in the class map"):
        open_data(one, class_map=wrong)


def test_what_needs_labels_or_has_them(flat: Path) -> None:
    with pytest.raises(UsageError, match=r"photos .*has no labels to watch the run by: leave out the monitor share"):
        open_data(flat, monitor_share=0.2)
    with pytest.raises(QvitError, match="has too few images to set some aside; name test data instead"):
        open_data(make_images(flat.parent / "single", {"one": 1}))
    assert is_unlabelled(open_data("digits", unlabelled=True))


def test_broken_images_and_links(flat: Path, tmp_path: Path) -> None:
    (flat / "cut.jpg").write_bytes((flat / "photos_0.jpg").read_bytes()[:200])
    (flat / "gone.jpg").symlink_to(tmp_path / "nowhere.jpg")
    (flat / "link.jpg").symlink_to(flat / "photos_1.jpg")
    (flat / "round").symlink_to(flat, target_is_directory=True)
    (flat / "notes.txt").write_text("no image")
    source = open_source(flat)
    assert len(source) == 13 and not source.labelled
    with pytest.raises(QvitError, match=r"cannot read image '(cut|gone)\.jpg' in .*photos"):
        drain(eval_loader(source, CONFIG))
    images, _ = drain(eval_loader(source, CONFIG, on_bad_image="skip"))
    assert len(images) == 11 and sorted(source.bad_images()) == ["cut.jpg", "gone.jpg"]
