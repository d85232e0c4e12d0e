"""Files of strangers: what is no plain, finite, bounded data is refused with the file's name."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from qvit.errors import QvitError
from qvit.files import MissingFile, parse_json, read_bytes, read_object, read_text


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('{"a": 1, "a": 2}', "the key 'a' is there twice"),
        ("[NaN]", "NaN is no number"),
        ("[-Infinity]", "-Infinity is no number"),
        ("[1e999]", "beyond the range"),
        (f"[{'9' * 5000}]", "is beyond 64 bits"),
        (f"[{2**63}]", "is beyond 64 bits"),
        ("[" * 66 + "]" * 66, "more than 64 levels"),
        ("[" * 200_000 + "]" * 200_000, "more than 64 levels"),
        ("{", "property name"),
        (b'"\xff"', "not UTF-8"),
    ],
)
def test_what_is_no_plain_data_is_refused(text: str | bytes, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        parse_json(text)


def test_what_is_plain_data_is_read() -> None:
    assert parse_json('{"a": [1, -2.5, true, null, "x", 9223372036854775807]}') == {
        "a": [1, -2.5, True, None, "x", 2**63 - 1]
    }
    assert parse_json("[" * 64 + "]" * 64) is not None


def test_only_regular_files_of_bounded_size_are_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "large").write_bytes(b"x" * 101)
    for path, reason in (
        (tmp_path, "directory"),
        (tmp_path / "pipe", "no regular file"),
        (Path("/dev/zero"), "no regular file"),
        (tmp_path / "large", "101 bytes; at most 100"),
    ):
        with pytest.raises(QvitError, match=reason) as caught:
            read_bytes(path, "plan", limit=100)
        assert str(path) in str(caught.value)
    with pytest.raises(MissingFile, match="no plan at"):
        read_bytes(tmp_path / "none", "plan", limit=100)
    with pytest.raises(QvitError, match="null byte"):
        read_bytes("a\0b", "plan", limit=100)


def test_text_is_utf8_and_an_object_is_one(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"\xef\xbb\xbf{}")
    assert read_object(tmp_path / "a", "plan") == {}
    (tmp_path / "b").write_bytes(b"ab\xff")
    with pytest.raises(QvitError, match=r"is not UTF-8 \(byte 2\)"):
        read_text(tmp_path / "b", "plan")
    (tmp_path / "c").write_text("[]")
    with pytest.raises(QvitError, match="must hold a JSON object, not a list"):
        read_object(tmp_path / "c", "plan")
