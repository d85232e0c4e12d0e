"""Archives that were damaged or made to do harm: refused by name, in no time, and what tarfile writes is read."""

from __future__ import annotations

import gzip
import io
import json
import os
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from image_sets import CONFIG, drain, make_images, make_shards, make_tar
from PIL import Image

from qvit.data import archives
from qvit.data.archives import DamagedArchive, Member, content_of, members
from qvit.data.open import eval_loader, open_source
from qvit.errors import QvitError

FORMATS = [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]


def listed(content: bytes) -> list[Member]:
    return list(members(io.BytesIO(content), len(content)))


def written(format: int = tarfile.GNU_FORMAT, *names: str) -> bytearray:
    """An archive of files whose content is their name."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=format) as tar:
        for name in names or ("cat/a.jpg", "dog/b.jpg"):
            member = tarfile.TarInfo(name)
            member.size = len(os.fsencode(name))
            tar.addfile(member, io.BytesIO(os.fsencode(name)))
    return bytearray(buffer.getvalue())


def changed(archive: bytearray, begin: int, content: bytes, header: int = 0) -> bytes:
    """The archive with other bytes in a header, whose checksum is right."""
    archive = bytearray(archive)
    archive[header + begin : header + begin + len(content)] = content
    archive[header + 148 : header + 156] = b" " * 8
    archive[header + 148 : header + 156] = b"%06o\0 " % sum(archive[header : header + 512])
    return bytes(archive)


@pytest.mark.parametrize("format", FORMATS)
def test_what_tarfile_writes_is_read(format: int) -> None:
    names = ["a.jpg", "x" * 90 + "/" + "y" * 60 + "/b.jpg", "é/c.jpg"]
    names += [] if format == tarfile.USTAR_FORMAT else ["z/" * 300 + "d.jpg", "bytes\udcff/e.jpg"]
    content = written(format, *names)
    found = listed(bytes(content))
    assert [member.name for member in found] == names
    for member in found:
        assert content_of(io.BytesIO(content), member) == os.fsencode(member.name)


def test_links_and_folders_are_passed_over() -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.DIRTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE):
            member = tarfile.TarInfo(f"other{kind.decode()}.jpg")
            member.type, member.linkname = kind, "../" * 50 + "etc/passwd"
            tar.addfile(member)
        tar.addfile(tarfile.TarInfo("last.jpg"))
    assert [member.name for member in listed(buffer.getvalue())] == ["last.jpg"]


SIZE, KIND = 124, 156
DAMAGES: dict[str, tuple[Callable[[bytearray], bytes], str]] = {
    "longer than the archive": (lambda a: changed(a, SIZE, b"%011o\0" % (1 << 30)), "should have 1073741824 bytes"),
    "huge": (lambda a: changed(a, SIZE, b"\x80" + b"\xff" * 11), "should have 3094850098213450687"),
    "negative": (lambda a: changed(a, SIZE, b"\xff" * 12), "a number in it is none"),
    "no number": (lambda a: changed(a, SIZE, b"12x45678901\0"), "a number in it is none"),
    "sparse": (lambda a: changed(a, KIND, b"S"), "is sparse"),
    "a part": (lambda a: changed(a, KIND, b"M"), "is sparse, or a part of one"),
    "a long name": (lambda a: changed(changed_size(a, 5000), KIND, b"L"), "5000 bytes, too many for a name"),
    "a long header": (lambda a: changed(changed_size(a, 2 << 20), KIND, b"x"), "2097152 bytes, too many for a name"),
    "a record": (lambda a: changed(a, KIND, b"x"), "a record that is none"),
    "checksum": (lambda a: bytes(a[:10] + b"?" + a[11:]), "there is no header at byte 0"),
    "cut": (lambda a: bytes(a[:700]), "it is cut off"),
    "cut in a header": (lambda a: bytes(a[:1100]), "it is cut off"),
    "empty": (lambda _: b"", "it is empty"),
    "no archive": (lambda _: b"something else" * 99, "."),
}


def changed_size(archive: bytearray, size: int) -> bytearray:
    longer = bytearray(archive) + bytes(4 << 20)
    return bytearray(changed(longer, SIZE, b"%011o\0" % size))


@pytest.mark.parametrize("kind", DAMAGES)
def test_damaged_archives_are_refused_with_the_reason(tmp_path: Path, kind: str) -> None:
    damage, reason = DAMAGES[kind]
    content = damage(written())
    with pytest.raises(DamagedArchive, match=reason):
        listed(content)
    (tmp_path / "pets.tar").write_bytes(content)
    with pytest.raises(QvitError, match=f"pets.tar is not a tar archive, or it is damaged: .*{reason}"):
        open_source(tmp_path / "pets.tar")


@pytest.mark.parametrize(
    ("records", "reason"),
    [
        (b"22 GNU.sparse.major=1\n", "sparse"),
        (b"99999 path=a\n", "record that is none"),
        (b"0 path=a\n", "record that is none"),
        (b"12 size=-22\n", "no whole number"),
        (b"32 size=99999999999999999999999\n", "no whole number"),
        (b"22 size=9999999999999\n", "9999999999999 bytes"),
        (b"12 path=a\0b\n", "a zero byte"),
    ],
)
def test_extended_headers_are_not_trusted(records: bytes, reason: str) -> None:
    archive = bytearray(bytes(1024)) + written()
    archive[:1024] = changed(written(tarfile.GNU_FORMAT, "a" * 20)[:1024], KIND, b"x")
    archive = bytearray(changed(archive, SIZE, b"%011o\0" % len(records)))
    archive[512 : 512 + len(records)] = records
    with pytest.raises(DamagedArchive, match=reason):
        listed(bytes(archive))


def test_what_is_packed_too_well_is_not_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(archives, "_MOST_UNPACKED", 1 << 20)
    archive = written(tarfile.GNU_FORMAT, "cat/a.jpg") + bytes(64 << 20)
    (tmp_path / "pets.tar.gz").write_bytes(gzip.compress(archive))
    with pytest.raises(QvitError, match=r"pets\.tar\.gz unpacks to more than .* bytes: unpack it, and name the folder"):
        open_source(tmp_path / "pets.tar.gz")
    assert not list((tmp_path / "cache").rglob("*.*"))


def test_folders_that_lead_in_circles_are_read_once(tmp_path: Path) -> None:
    make_images(tmp_path / "pets", {"cat": 2, "dog": 2})
    for name in ("one", "two", "three"):
        (tmp_path / "pets" / "cat" / name).symlink_to(tmp_path / "pets", target_is_directory=True)
        (tmp_path / "pets" / name).symlink_to(name)
    assert len(open_source(tmp_path / "pets")) == 4


def test_an_image_that_is_no_regular_file_is_named(tmp_path: Path) -> None:
    make_images(tmp_path / "pets", {"cat": 2, "dog": 2})
    os.mkfifo(tmp_path / "pets" / "dog" / "pipe.jpg")
    source = open_source(tmp_path / "pets")
    with pytest.raises(QvitError, match=r"cannot read image 'dog/pipe\.jpg' in .*: .*no regular file"):
        drain(eval_loader(source, CONFIG, batch_size=4))
    assert len(drain(eval_loader(source, CONFIG, batch_size=4, on_bad_image="skip"))[0]) == 4


def test_only_known_formats_are_decoded(tmp_path: Path) -> None:
    make_images(tmp_path / "pets", {"cat": 1, "dog": 1})
    Image.new("RGB", (8, 8)).save(tmp_path / "pets" / "dog" / "a.jpg", "EPS")
    Image.new("RGB", (8, 8)).save(tmp_path / "pets" / "dog" / "b.jpg", "BMP")
    source = open_source(tmp_path / "pets")
    with pytest.raises(QvitError, match=r"cannot read image 'dog/a\.jpg' in .*: not an image, or damaged"):
        drain(eval_loader(source, CONFIG, batch_size=4))
    assert len(drain(eval_loader(source, CONFIG, batch_size=4, on_bad_image="skip"))[0]) == 3


def test_names_with_odd_digits_are_sorted(tmp_path: Path) -> None:
    images = make_images(tmp_path / "pets", {"cat": 1, "1²3": 1, "x٣y": 1, "9" * 200: 1})
    source = open_source(make_tar(images, tmp_path / "pets.tar"))
    assert sorted(source.class_names) == sorted(["cat", "1²3", "x٣y", "9" * 200])


@pytest.mark.parametrize("label", [b"99999999999", b"65536", b"-1", b"1e5", b"1_0", b"9" * 30, b"", b"\xff"])
def test_labels_of_shards_are_bounded_before_classes_are_made(tmp_path: Path, label: bytes) -> None:
    pytest.importorskip("webdataset")
    (path,) = make_shards(tmp_path / "set", [0, 1], 2)
    archive = bytearray(path.read_bytes())
    header = next(place for place in range(0, len(archive), 512) if archive[place:].startswith(b"img0000.cls"))
    archive[header + 512 : header + 512 + len(label)] = label
    path.write_bytes(changed(archive, SIZE, b"%011o\0" % len(label), header))
    with pytest.raises(QvitError, match=r"the label in 'img0000\.cls' is no class from 0 to 65535"):
        open_source(f"wds/{tmp_path / 'set'}")


SPLIT: dict[str, Any] = {"filenames": ["000000.tar"], "shard_lengths": [2], "num_samples": 2}


@pytest.mark.parametrize(
    ("splits", "message"),
    [
        ({}, "there are no splits"),
        ([SPLIT], "there are no splits"),
        ({"train": 3}, "'splits.train.filenames'"),
        ({"train": SPLIT | {"filenames": ["a\0b"]}}, "'splits.train.filenames'"),
        ({"train": SPLIT | {"shard_lengths": [10**9]}}, "has 1000000000 images, too many for it"),
        ({"train": SPLIT | {"shard_lengths": [-1]}}, "'splits.train.shard_lengths'"),
        ({"train": SPLIT | {"shard_lengths": [2, 2]}}, "'splits.train.shard_lengths'"),
        ({"train": SPLIT | {"num_samples": 10**12}}, "'splits.train.num_samples' is 1000000000000"),
        ({"train": SPLIT | {"num_samples": True}}, "'splits.train.num_samples'"),
    ],
)
def test_indices_of_shards_say_what_can_be_true(tmp_path: Path, splits: Any, message: str) -> None:
    pytest.importorskip("webdataset")
    make_shards(tmp_path / "set", [0, 1], 2)
    (tmp_path / "set" / "_info.json").write_text(json.dumps({"splits": {"train": SPLIT}}))
    open_source(f"wds/{tmp_path / 'set'}", split="train")
    (tmp_path / "set" / "_info.json").write_text(json.dumps({"splits": splits}))
    with pytest.raises(QvitError, match=message) as caught:
        open_source(f"wds/{tmp_path / 'set'}", split="train")
    assert "_info.json" in str(caught.value)
