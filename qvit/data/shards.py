"""Image sets in tar shards, as the webdataset package writes them: `KEY.jpg` and `KEY.cls` one after the other.

    wds/FOLDER                       with `_info.json`, as timm reads it: the splits, their shards and numbers of images
    wds/FOLDER                       with folders `train` and `validation` (or `val`, `test`) of shards
    wds/FOLDER                       shards of a single set
    wds/FOLDER/s-{0000..0099}.tar    shards by a brace pattern; with `|50000` at its end, that many images

`KEY.cls` holds the class index as text. Shards are read from front to end, which suits network file systems and disks
where a million small files do not; but an image cannot be asked for by its number, so there is no stratified share, no
subset and no repeated augmentation. Where the number of images or of classes is not given (by `_info.json`, and by a
class map or the training data), the headers and labels of all shards are read once, when they are opened.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qvit.data.archives import BLOCK, DamagedArchive, members, open_archive, read_exactly
from qvit.data.decoding import BadImages, one_line
from qvit.data.images import missing_path
from qvit.errors import QvitError, UsageError
from qvit.files import read_object

logger = logging.getLogger(__name__)

PREFIX = "wds/"
IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")
_INFO = ("_info.json", "info.json")
MOST_CLASSES = 2**16
_LONGEST_LABEL = 20
#: What reading a shard may end with.
SHARD_ERRORS = (DamagedArchive, OSError, EOFError, zlib.error)


@dataclass(frozen=True)
class Shards:
    """The shards of one split.

    Attributes:
        paths: The files.
        lengths: Images in each; None if nobody has said so.
        images: Images in all; None if nobody has said so.
    """

    paths: tuple[str, ...]
    lengths: tuple[int, ...] | None = None
    images: int | None = None


class ShardSource:
    """Labelled images in shards; takes the place of an `ImageSource` where images are read one after the other.

    Attributes:
        name: What they are, for people.
        shards: Paths of the shards.
        lengths: Images in each shard; None if only their sum is known.
        num_classes: How many classes the labels are from.
        class_names: A name for each class.
        bad: Which images turned out to be unreadable.
    """

    def __init__(
        self, name: str, shards: Sequence[str], lengths: Sequence[int] | None, images: int, class_names: Sequence[str]
    ) -> None:
        self.name = name
        self.shards = list(shards)
        self.lengths = None if lengths is None else list(lengths)
        self.class_names = list(class_names)
        self.bad = BadImages()
        self._images = images

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    @property
    def labelled(self) -> bool:
        """Whether each image has a label: in shards all have."""
        return True

    def __len__(self) -> int:
        return self._images

    def __repr__(self) -> str:
        return f"ShardSource({self.name!r}, images={len(self)}, classes={self.num_classes}, shards={len(self.shards)})"

    def bad_images(self) -> list[str]:
        """Names of images that loaders found unreadable and went without, as `SHARD/KEY`."""
        return self.bad.names()


def find_shards(data: str, splits: Sequence[str]) -> dict[str, Shards]:
    """The shards that a name stands for, by split; under the empty name if they are a single set.

    Args:
        data: `wds/...`, see the module.
        splits: Names that folders of splits may have.

    Raises:
        UsageError: The package webdataset is missing, or the name cannot be meant.
        QvitError: There are no shards, or a listed one is missing.
    """
    require_webdataset(data)
    place = data[len(PREFIX) :]
    if not place:
        raise UsageError("'wds/' lacks the folder or pattern of the shards: wds/FOLDER or wds/FOLDER/{000..099}.tar")
    if "{" in place or place.partition("|")[0].endswith((".tar", ".tar.gz", ".tgz")):
        return {"": _by_pattern(place, data)}
    folder = Path(place).expanduser()
    if not folder.is_dir():
        raise missing_path(folder, "the folder of shards")
    for name in _INFO:
        if (folder / name).is_file():
            return _by_info(folder / name, data)
    found = {split: tuple(sorted(map(str, (folder / split).glob("*.tar")))) for split in splits}
    found = {split: paths for split, paths in found.items() if paths} or {
        "": tuple(sorted(map(str, folder.glob("*.tar"))))
    }
    if "" in found and not found[""]:
        raise QvitError(
            f"{data} holds no shards; files *.tar are expected, in it or in its folders train and validation"
        )
    return {split: Shards(paths) for split, paths in found.items()}


def require_webdataset(data: str) -> None:
    """Raises UsageError, with the command that helps, if the package webdataset is missing."""
    if importlib.util.find_spec("webdataset") is None:
        raise UsageError(f"'{data}' needs the package 'webdataset'; install it with: pip install 'qvit[webdataset]'")


def open_shards(shards: Shards, name: str, class_names: Sequence[str] | None) -> ShardSource:
    """Opens a split; `class_names` None takes the labels as they are.

    Raises:
        QvitError: A shard is missing or damaged, or there are no images.
    """
    missing = next((path for path in shards.paths if not Path(path).is_file()), None)
    if missing is not None:
        raise QvitError(f"{name} lacks the shard '{missing}'")
    lengths, images = shards.lengths, shards.images
    if images is None or class_names is None:
        logger.info("counting the images of %s, in %d shards", name, len(shards.paths))
        surveys = [_survey(path, name) for path in shards.paths]
        lengths = tuple(count for count, _ in surveys)
        images = sum(lengths)
        if class_names is None:
            class_names = [f"class {index}" for index in range(1 + max((label for _, label in surveys), default=-1))]
    if not images:
        raise QvitError(f"{name} holds no images; {', '.join(IMAGE_EXTENSIONS)} with a label KEY.cls each are expected")
    return ShardSource(name, shards.paths, lengths, images, class_names)


def _by_pattern(place: str, data: str) -> Shards:
    from webdataset.shardlists import expand_urls

    pattern, _, count = place.partition("|")
    if count and not count.isdecimal():
        raise UsageError(f"'{data}' should end with the number of images after '|', not with '{count}'")
    paths = tuple(str(Path(path).expanduser()) for path in expand_urls(pattern))
    return Shards(paths, None, int(count) if count else None)


def _by_info(path: Path, data: str) -> dict[str, Shards]:
    splits = read_object(path, f"index of {data}").get("splits")
    try:
        if not isinstance(splits, dict) or not splits:
            raise ValueError("there are no splits")
        return {name: _split(path.parent, name, split) for name, split in splits.items()}
    except ValueError as error:
        raise QvitError(
            f"cannot read {path} of {data}: {error}; it should have 'splits', each with 'filenames', 'shard_lengths' "
            "and 'num_samples'"
        ) from None


def _split(folder: Path, name: str, split: Any) -> Shards:
    """A split of an index. Raises ValueError, with the key, for what is none or cannot be true."""
    files, lengths, images = (
        split.get(key) if isinstance(split, dict) else None for key in ("filenames", "shard_lengths", "num_samples")
    )
    if not isinstance(files, list) or not all(map(_is_name, files)):
        raise ValueError(f"'splits.{name}.filenames' is no list of names")
    if not isinstance(lengths, list) or len(lengths) != len(files) or not all(map(_is_count, lengths)):
        raise ValueError(f"'splits.{name}.shard_lengths' is no list of a number for each file")
    if not isinstance(images, int) or not _is_count(images):
        raise ValueError(f"'splits.{name}.num_samples' is no number of images")
    paths = tuple(str(folder / file) for file in files)
    for path, length in zip(paths, lengths, strict=True):
        if path.endswith(".tar") and os.path.isfile(path) and length * 2 * BLOCK > os.path.getsize(path):
            raise ValueError(f"'splits.{name}.shard_lengths' says that '{path}' has {length} images, too many for it")
    if images > sum(lengths):
        raise ValueError(f"'splits.{name}.num_samples' is {images}, more than the sum of its shards")
    return Shards(paths, tuple(lengths), images)


def _is_name(value: Any) -> bool:
    return (
        isinstance(value, str)
        and "\0" not in value
        and not any("\ud800" <= character <= "\udfff" for character in value)
    )


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**48


def _survey(path: str, name: str) -> tuple[int, int]:
    """Number of images in a shard, and the largest label (-1 without any)."""
    from webdataset.tariterators import base_plus_ext

    images, largest = 0, -1
    try:
        file, end = open_archive(Path(path))
        with file:
            for member in members(file, end):
                extension = (base_plus_ext(member.name)[1] or "").lower()
                images += extension in IMAGE_EXTENSIONS
                if extension == "cls":
                    label = label_of(read_exactly(file, member.offset, min(member.size, _LONGEST_LABEL + 1)))
                    if label is None:
                        raise DamagedArchive(f"the label in '{member.name}' is no class from 0 to {MOST_CLASSES - 1}")
                    largest = max(largest, label)
    except SHARD_ERRORS as error:
        raise QvitError(f"cannot read the shard '{path}' of {name}: {one_line(error)}") from error
    return images, largest


def label_of(text: bytes) -> int | None:
    """The class in a file `KEY.cls`; None if it is none."""
    digits = text.strip()
    label = int(digits) if len(text) <= _LONGEST_LABEL and digits.isdigit() else -1
    return label if 0 <= label < MOST_CLASSES else None
