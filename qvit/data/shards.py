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
import json
import logging
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qvit.data.decoding import BadImages, one_line
from qvit.data.images import missing_path
from qvit.errors import QvitError, UsageError

logger = logging.getLogger(__name__)

PREFIX = "wds/"
IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")
_INFO = ("_info.json", "info.json")


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
    try:
        splits: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))["splits"]
        return {
            name: Shards(
                tuple(str(path.parent / file) for file in split["filenames"]),
                tuple(int(length) for length in split["shard_lengths"]),
                int(split["num_samples"]),
            )
            for name, split in splits.items()
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise QvitError(
            f"cannot read {path} of {data} ({type(error).__name__}: {one_line(error)}); it should have 'splits', each "
            "with 'filenames', 'shard_lengths' and 'num_samples'"
        ) from error


def _survey(path: str, name: str) -> tuple[int, int]:
    """Number of images in a shard, and the largest label (-1 without any)."""
    from webdataset.tariterators import base_plus_ext

    images, largest = 0, -1
    try:
        with tarfile.open(path) as tar:
            for member in tar:
                extension = (base_plus_ext(member.name)[1] or "").lower()
                images += extension in IMAGE_EXTENSIONS
                file = tar.extractfile(member) if extension == "cls" else None
                if file is not None:
                    largest = max(largest, int(file.read()))
                tar.members = []  # type: ignore[assignment]  # else it remembers a million of them
    except (tarfile.TarError, OSError, EOFError, ValueError) as error:
        raise QvitError(f"cannot read the shard '{path}' of {name}: {one_line(error)}") from error
    return images, largest
