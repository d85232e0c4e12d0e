"""Images that cannot be read: named in an error, or replaced in training and left out elsewhere, logged and listed."""

from __future__ import annotations

import logging
import multiprocessing
import struct
import warnings
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch
from image_sets import CONFIG, LIGHT, drain, make_images, make_tar, same, with_workers
from PIL import Image
from torch import Tensor, nn

from qvit.data.open import AugmentConfig, ImageSource, calibration_batches, eval_loader, open_source, train_loader
from qvit.errors import QvitError, UsageError
from qvit.training.evaluate import evaluate

PLAIN = AugmentConfig.preset("none")


def huge_png(side: int) -> bytes:
    """The header of a PNG with `side`² pixels: a few bytes that would become gigabytes."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


DAMAGE = {
    "text": lambda whole: b"<html>404</html>",
    "truncated": lambda whole: whole[: len(whole) // 2],
    "empty": lambda whole: b"",
    "bomb": lambda whole: huge_png(40_000),
    "large": lambda whole: huge_png(11_000),  # PIL merely warns
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_images(tmp_path / "pets", {"cat": 6, "dog": 6, "eel": 6})


def ruin(folder: Path, *numbers: int, damage: str = "text") -> None:
    """Damages images by their row in the folder."""
    files = sorted(folder.rglob("*.jpg"))
    for number in numbers:
        files[number].write_bytes(DAMAGE[damage](files[number].read_bytes()))


class Mean(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        return images.mean(dim=(2, 3))


@with_workers
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("form", ["folder", "tar"])
def test_every_form_of_damage(folder: Path, tmp_path: Path, workers: int, damage: str, form: str) -> None:
    ruin(folder, 9, damage=damage)
    data = folder if form == "folder" else make_tar(folder, tmp_path / "pets.tar")
    options: dict[str, Any] = {"batch_size": 4, "workers": workers}
    source = open_source(data)
    for loader in (
        eval_loader(source, CONFIG, **options),
        train_loader(source, CONFIG, augment=LIGHT, drop_last=False, **options),
    ):
        with pytest.raises(QvitError) as caught:
            drain(loader)
        message = str(caught.value)
        assert message.startswith(f"cannot read image 'dog/dog_3.jpg' in {data}: ") and "\n" not in message
        assert message.endswith("; remove or repair it")
        assert not multiprocessing.active_children(), "workers end with the pass, not when the garbage is collected"
    for make in (eval_loader, train_loader):
        source = open_source(data)
        loader = make(source, CONFIG, on_bad_image="skip", **options)
        while not loader.bad_images():
            images, targets = drain(loader)
            assert len(images) == len(targets) == (17 if make is eval_loader else 16)
        assert loader.bad_images() == source.bad_images() == ["dog/dog_3.jpg"]


@with_workers
def test_training_takes_the_next_readable_image(folder: Path) -> None:
    options: dict[str, Any] = {"batch_size": 6, "augment": LIGHT, "seed": 2}
    whole = list(train_loader(open_source(folder), CONFIG, **options))
    ruin(folder, 3, 8, 9, 17)
    source = open_source(folder)
    loader = train_loader(source, CONFIG, on_bad_image="skip", **options)
    batches = list(loader)
    assert [len(targets) for _, targets in batches] == [6, 6, 6]
    plain = train_loader(open_source(folder), CONFIG, on_bad_image="skip", batch_size=18, augment=PLAIN, seed=2)
    [(images, _)] = plain
    readable, _ = drain(eval_loader(source, CONFIG, batch_size=18, on_bad_image="skip"))
    counts = [sum(torch.equal(image, other) for other in images) for image in readable]
    expected = dict.fromkeys([row for row in range(18) if row not in (3, 8, 9, 17)], 1)
    expected |= {4: 2, 10: 3, 0: 2}  # 3 → 4; 8 and 9 → 10; 17 → the first
    assert counts == list(expected.values())
    unchanged = sum(
        torch.equal(a, b) for x, y in zip(whole, batches, strict=True) for a, b in zip(x[0], y[0], strict=True)
    )
    assert unchanged == 14, "the others are augmented as before"
    for again in (
        train_loader(open_source(folder), CONFIG, on_bad_image="skip", workers=2, **options),
        train_loader(source, CONFIG, on_bad_image="skip", **options),
    ):
        assert all(same(a, b) for a, b in zip(again, batches, strict=True))
    loader.set_epoch(0, skip=1)
    assert all(same(a, b) for a, b in zip(loader, batches[1:], strict=True))
    assert sorted(source.bad_images()) == ["cat/cat_3.jpg", "dog/dog_2.jpg", "dog/dog_3.jpg", "eel/eel_5.jpg"]


def test_each_is_logged_once(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    ruin(folder, 3, 9)
    source = open_source(folder)
    options: dict[str, Any] = {"batch_size": 6, "on_bad_image": "skip"}
    for loader in (train_loader(source, CONFIG, **options), eval_loader(source.subset(range(12)), CONFIG, **options)):
        drain(loader)
        drain(loader)
    warned = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert sorted(warned) == [
        f"left out image 'cat/cat_3.jpg' in {folder}: not an image, or damaged",
        f"left out image 'dog/dog_3.jpg' in {folder}: not an image, or damaged",
    ]


@with_workers
@pytest.mark.parametrize("workers", [0, 2])
def test_evaluation_goes_without(folder: Path, workers: int) -> None:
    clean, targets = drain(eval_loader(open_source(folder), CONFIG, batch_size=18))
    ruin(folder, 4, 5, 6, 7, 17)
    source = open_source(folder)
    loader = eval_loader(source, CONFIG, batch_size=2, workers=workers, on_bad_image="skip")
    kept = [row for row in range(18) if row not in (4, 5, 6, 7, 17)]
    assert same(drain(loader), (clean[kept], targets[kept])), "two batches of which nothing is left are no batches"
    scores = evaluate(Mean(), loader)
    assert (scores["images"], scores["skipped"]) == (13, 5)
    parts = [eval_loader(source, CONFIG, batch_size=2, rank=r, world_size=3, on_bad_image="skip") for r in range(3)]
    counts: list[Tensor] = []
    for part in parts:
        evaluate(Mean(), part, reduce=lambda count: counts.append(count) or count)
    total = torch.stack(counts).sum(0)
    assert evaluate(Mean(), parts[0], reduce=lambda _: total) == scores
    assert "skipped" not in evaluate(Mean(), eval_loader(source.subset([0]), CONFIG, batch_size=2))


def test_calibration_goes_without(folder: Path) -> None:
    ruin(folder, 4, 9)
    source = open_source(folder)
    batches = calibration_batches(source, CONFIG, images=18, batch_size=5, on_bad_image="skip")
    assert sum(len(batch) for batch in batches) == 16
    assert source.bad_images() == sorted(source.bad_images(), key=lambda name: name != source.bad_images()[0])
    assert set(source.bad_images()) == {"cat/cat_4.jpg", "dog/dog_3.jpg"}
    with pytest.raises(QvitError, match="cannot read image"):
        list(calibration_batches(source, CONFIG, images=18, batch_size=5))


@with_workers
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("make", [train_loader, eval_loader])
def test_too_many_are_an_error(folder: Path, workers: int, make: Any) -> None:
    ruin(folder, *range(4, 14))
    loader = make(open_source(folder), CONFIG, batch_size=6, workers=workers, on_bad_image="skip")
    with pytest.raises(QvitError, match=r"more than half of the 18 images of .*pets cannot be read, such as '.*\.jpg'"):
        drain(loader)
    assert not multiprocessing.active_children()


def test_a_hundred_in_a_row_are_an_error(tmp_path: Path) -> None:
    root = make_images(tmp_path / "many", {"ant": 160, "bee": 160})
    for number in range(30, 135):
        (root / "ant" / f"ant_{number}.jpg").write_bytes(b"")
    for make in (train_loader, eval_loader):
        loader = make(open_source(root), CONFIG, batch_size=16, on_bad_image="skip")
        with pytest.raises(QvitError, match=r"100 images in a row of .*many cannot be read, the last of them 'ant/"):
            drain(loader)


def test_odd_metadata_is_no_damage(tmp_path: Path) -> None:
    """PIL warns about transparency in a palette, and tests turn warnings into errors."""
    root = make_images(tmp_path / "odd", {"cat": 1, "dog": 1})
    image = Image.new("P", (20, 20))
    image.putpalette([200, 100, 50] * 256)
    image.save(root / "cat" / "odd.png", transparency=bytes([0, 255]))
    with warnings.catch_warnings(record=True) as caught:
        images, _ = drain(eval_loader(open_source(root), CONFIG, batch_size=4))
    assert len(images) == 3 and not caught


def test_subsets_share_the_record(folder: Path) -> None:
    ruin(folder, 0)
    source = open_source(folder)
    assert isinstance(source, ImageSource)
    drain(eval_loader(source.subset([0, 1, 2]), CONFIG, batch_size=4, on_bad_image="skip"))
    assert source.bad_images() == ["cat/cat_0.jpg"]


def test_a_policy_that_there_is_not(folder: Path) -> None:
    for make in (train_loader, eval_loader):
        with pytest.raises(UsageError, match="on_bad_image is 'fatal' or 'skip', not 'ignore'"):
            make(open_source(folder), CONFIG, batch_size=4, on_bad_image="ignore")  # type: ignore[arg-type]
