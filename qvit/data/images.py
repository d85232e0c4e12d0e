"""Images on disk: folders, archives and Hugging Face data sets as rows of encoded images, most with a class folder.

Listing is as in timm. What differs from its `ImageDataset`: an unreadable image is an error that names it, where timm
warns and returns the next; names that tie in natural order ("a1", "a01") get a fixed order; archives are read by
`archives.py`, their members by offset through a file opened per image, so that forked workers share no handle, and no
index is written or unpickled; links that lead back to a folder above are not followed. A compressed archive is
unpacked once, into the user's cache.

A store has rows; an `ImageSource` is a selection of rows with their targets; its `dataset` decodes and transforms them.
Whether the folders are classes is for `collection.py` to decide: a source without labels has no classes, and the target
of each of its images is `NO_LABEL`.
"""

from __future__ import annotations

import gzip
import hashlib
import importlib.util
import logging
import os
import re
import shutil
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image
from timm.data.readers.img_extensions import get_img_extensions
from torch import Tensor
from torch.utils.data import Dataset

from qvit.data.archives import LARGEST_IMAGE, DamagedArchive, Member, Unpacking, content_of, members
from qvit.data.decoding import BadImages, decode, one_line
from qvit.data.digits import DIGITS
from qvit.errors import QvitError, UsageError, nearest
from qvit.files import cache_folder, make_private, read_bytes

logger = logging.getLogger(__name__)

_ARCHIVES = (".tar", ".tar.gz", ".tgz")
_MOST_FOLDERS = 1 << 20
#: The target of an image without a label.
NO_LABEL = -1


class ImageStore(Protocol):
    """Images by row number, each with the code of its folder; what an `ImageSource` selects from."""

    origin: str  # what the user named, for messages
    folders: list[str]  # names of the innermost folders, sorted; empty for images that lie in none
    codes: np.ndarray  # [rows] index into `folders`

    def name(self, row: int) -> str: ...

    def load(self, row: int, mode: str = "RGB") -> Any: ...


class _FileStore:
    """Encoded images with names such as `.../class/image.ext`; subclasses say how the bytes of a row are read.

    Names are kept as one string of file-system bytes and where each ends, and not as Python strings, so that forked
    workers do not copy a list of a million objects as they touch its reference counts.
    """

    def __init__(self, origin: str, names: Sequence[str]) -> None:
        self.origin = origin
        encoded = [os.fsencode(name) for name in names]
        self._names, self._ends = b"".join(encoded), np.cumsum([0, *map(len, encoded)])
        labels = [name.rpartition("/")[0].rpartition("/")[2] for name in names]
        self.folders = _in_order(set(labels))
        index = {label: code for code, label in enumerate(self.folders)}
        self.codes = np.array([index[label] for label in labels], dtype=np.int64)

    def name(self, row: int) -> str:
        begin, end = self._ends[row : row + 2].tolist()
        return os.fsdecode(self._names[begin:end])

    def read(self, row: int) -> bytes:
        raise NotImplementedError

    def load(self, row: int, mode: str = "RGB") -> Image.Image:
        """Decodes an image. Raises UnreadableImage, which names it."""
        return decode(lambda: self.read(row), mode, lambda: self.name(row), self.origin)


class _FolderStore(_FileStore):
    def __init__(self, root: Path, origin: str) -> None:
        names = _images_below(root)
        if not names:
            raise _no_images(origin)
        self._root = root
        super().__init__(origin, _in_order(names))

    def read(self, row: int) -> bytes:
        return read_bytes(self._root / self.name(row), "image", limit=LARGEST_IMAGE)


class _TarStore(_FileStore):
    """Members of an uncompressed archive, or of archives inside it (one per class, as ImageNet is distributed)."""

    def __init__(self, path: Path, origin: str) -> None:
        try:
            found = {os.path.normpath(member.name).lstrip("/"): member for member in _images_in(path)}
        except DamagedArchive as error:
            raise QvitError(f"{origin} is not a tar archive, or it is damaged: {error}") from None
        if not found:
            raise _no_images(origin)
        names = _in_order(found)
        self._path = path
        self._extents = np.array([(found[name].offset, found[name].size) for name in names], dtype=np.int64)
        super().__init__(origin, names)

    def read(self, row: int) -> bytes:
        with self._path.open("rb") as file:
            return content_of(file, Member(self.name(row), *self._extents[row].tolist()))


class HubStore(_FileStore):
    """One split of a Hugging Face data set: its first image column and its first class-label column."""

    def __init__(self, dataset: str, split: str, origin: str) -> None:
        import datasets
        from timm.data.readers.reader_hfds import ReaderHfds

        try:
            features = datasets.load_dataset(dataset, split=split).features
            image = next((key for key, feature in features.items() if isinstance(feature, datasets.Image)), None)
            label = next((key for key, feature in features.items() if isinstance(feature, datasets.ClassLabel)), None)
            if image is None or label is None:
                columns = ", ".join(features)
                raise QvitError(f"{origin} needs a column of images and one of class labels; it has {columns}")
            self._reader = ReaderHfds(dataset, split=split, input_key=image, target_key=label)
        except QvitError:
            raise
        except Exception as error:  # network, hub and file errors of many libraries
            raise QvitError(f"cannot open {origin}, split '{split}': {one_line(error)}") from error
        self.origin = origin
        self.folders = list(self._reader.class_to_idx)
        self.codes = np.asarray(self._reader.dataset.select_columns(label)[:][label], dtype=np.int64)
        if len(self.codes) == 0 or self.codes.min() < 0:
            raise QvitError(f"{origin}, split '{split}' has images without a label; choose a split with labels")

    def name(self, row: int) -> str:
        return self._reader.filename(row) or f"row {row}"

    def read(self, row: int) -> bytes:
        with self._reader[row][0] as file:
            return file.read()


def _in_order(names: Any) -> list[str]:
    """Names in natural order: numbers in them by their value."""
    return sorted(names, key=lambda name: (_natural(name), name))


def _natural(name: str) -> list[int | str]:
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", name.lower())]


def _is_image(name: str) -> bool:
    return os.path.splitext(name)[1].lower() in get_img_extensions(as_set=True)


def _images_below(root: Path) -> list[str]:
    """Paths of the images below a folder, relative to it; folders that cannot be opened are passed over."""
    found: list[str] = []
    status = root.stat()
    waiting: list[tuple[str, tuple[tuple[int, int], ...]]] = [("", ((status.st_dev, status.st_ino),))]
    folders = 0
    while waiting:
        folder, above = waiting.pop()
        folders += 1
        if folders > _MOST_FOLDERS:
            raise QvitError(f"{root} has more than {_MOST_FOLDERS:,} folders, or links that lead in circles")
        try:
            entries = sorted(os.scandir(root / folder), key=lambda entry: entry.name)
        except OSError:
            continue
        for entry in entries:
            path = f"{folder}/{entry.name}" if folder else entry.name
            try:
                status = entry.stat() if entry.is_dir() else None
            except OSError:
                continue
            if status is None:
                found += [path] * _is_image(entry.name)
            elif (own := (status.st_dev, status.st_ino)) not in above:
                waiting.append((path, (*above, own)))
    return found


def _images_in(path: Path) -> Iterator[Member]:
    """The images of an archive and of archives in it, which count as folders."""
    with path.open("rb") as file:
        for member in members(file, path.stat().st_size):
            stem, extension = os.path.splitext(member.name)
            if extension.lower() == ".tar":
                for inner in members(file, member.offset + member.size, member.offset):
                    if _is_image(inner.name):
                        yield Member(f"{stem}/{inner.name}", inner.offset, inner.size)
            elif _is_image(member.name):
                yield member


def _no_images(origin: str) -> QvitError:
    return QvitError(
        f"{origin} holds no images; images ({', '.join(get_img_extensions())}) are expected in it, or in a folder for "
        "each class"
    )


def missing_path(path: Path, what: str, *more: str) -> UsageError:
    """The error for a path that does not exist, with the names next to it that look alike."""
    parent = path.parent
    if not parent.is_dir():
        return UsageError(f"{what} '{path}' does not exist, nor does the folder '{parent}'")
    return UsageError(f"{what} '{path}' does not exist{nearest(path.name, [*sorted(os.listdir(parent)), *more])}")


def _unpacked(path: Path) -> Path:
    """The uncompressed copy of a `.tar.gz` in the user's cache, made on first use and when the file has changed."""
    status = path.stat()
    key = f"{path.absolute()}\0{status.st_size}\0{status.st_mtime_ns}"
    cache = cache_folder()
    target = cache / f"{path.name.split('.')[0]}-{hashlib.sha256(os.fsencode(key)).hexdigest()[:16]}.tar"
    if target.exists():
        return target
    logger.info("unpacking %s once, to %s", path, target)
    partial: str | None = None
    try:
        make_private(cache)
        for left_over in cache.glob("*.part"):  # of processes that were killed
            if time.time() - left_over.stat().st_mtime > 24 * 3600:
                left_over.unlink(missing_ok=True)
        handle, partial = tempfile.mkstemp(suffix=".part", dir=cache)
        with os.fdopen(handle, "wb") as out, gzip.open(path) as source:
            shutil.copyfileobj(Unpacking(source, path), out, 1 << 20)  # type: ignore[arg-type]
        os.replace(partial, target)
        partial = None
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise QvitError(f"{path} is not a gzip archive, or it is damaged: {one_line(error)}") from error
    except OSError as error:
        raise QvitError(
            f"cannot unpack {path} into {cache}: {error.strerror or error}; free some space, set XDG_CACHE_HOME to "
            "another folder, or unpack the archive and name the folder it becomes"
        ) from error
    finally:
        if partial is not None:
            Path(partial).unlink(missing_ok=True)
    return target


def open_files(path: Path, origin: str) -> _FileStore:
    """Lists a folder or archive; `origin` is the path as it was given, for messages."""
    if path.is_dir():
        return _FolderStore(path, origin)
    if not path.exists():
        raise missing_path(path, "the data", DIGITS)
    if not path.is_file() or not path.name.lower().endswith(_ARCHIVES):
        raise UsageError(f"{origin} is neither a folder nor an archive ({', '.join(_ARCHIVES)}) of images")
    try:
        with path.open("rb") as file:
            compressed = file.read(2) == b"\x1f\x8b" or not path.name.lower().endswith(".tar")
        return _TarStore(_unpacked(path) if compressed else path, origin)
    except OSError as error:
        raise QvitError(f"cannot read {origin}: {error.strerror or error}") from error


def hub_splits(dataset: str) -> list[str]:
    """Names of the splits of a Hugging Face data set."""
    if not dataset:
        raise UsageError("'hfds/' lacks the name of the data set: hfds/OWNER/NAME")
    if importlib.util.find_spec("datasets") is None:
        raise UsageError(f"'hfds/{dataset}' needs the package 'datasets'; install it with: pip install datasets")
    import datasets

    try:
        return [str(split) for split in datasets.get_dataset_split_names(dataset)]
    except Exception as error:  # network, hub and file errors of many libraries
        raise QvitError(f"cannot open the Hugging Face data set {dataset!r}: {one_line(error)}") from error


class ImageSource:
    """Images in a fixed order, opened and ready to be read.

    Attributes:
        name: What they are, for people.
        num_classes: How many classes the labels are from; with a class map more than have images. 0 without labels.
        class_names: The folder of each class; none without labels.
        targets: `[images]` int64, the class of each image, or `NO_LABEL`.
        bad: Which of them turned out to be unreadable; one record for the images and all subsets of them.
    """

    def __init__(
        self,
        name: str,
        store: ImageStore,
        rows: np.ndarray,
        targets: np.ndarray,
        class_names: Sequence[str],
        bad: BadImages | None = None,
    ) -> None:
        self.name = name
        self.store = store
        self.rows = rows
        self.targets = targets.astype(np.int64)
        self.class_names = list(class_names)
        self.bad = bad or BadImages()

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    @property
    def labelled(self) -> bool:
        """Whether each image has a label."""
        return bool(self.class_names)

    def __len__(self) -> int:
        return len(self.rows)

    def __repr__(self) -> str:
        return f"ImageSource({self.name!r}, images={len(self)}, classes={self.num_classes})"

    def filename(self, index: int) -> str:
        """The name of an image inside the folder, archive or data set."""
        return self.store.name(int(self.rows[index]))

    def dataset(self, transform: Callable[[Any], Any] | None = None, mode: str = "RGB") -> ImageDataset:
        """A map-style dataset of `(transform(image), target)`.

        Args:
            transform: Takes a PIL image (for digits a `[channels, 8, 8]` tensor).
            mode: "RGB", or "L" for models of one channel.
        """
        return ImageDataset(self, transform, mode)

    def subset(self, indices: Sequence[int] | np.ndarray | Tensor, name: str | None = None) -> ImageSource:
        """The chosen images, in the order given, with the same classes."""
        chosen = np.asarray(indices, dtype=np.int64)
        rows, targets = self.rows[chosen], self.targets[chosen]
        return ImageSource(name or self.name, self.store, rows, targets, self.class_names, self.bad)

    def bad_images(self) -> list[str]:
        """Names of images that loaders of these images, or of subsets of them, found unreadable and went without."""
        return self.bad.names()


class ImageDataset(Dataset):
    """`(transform(image), target)` by index. See `ImageSource.dataset`."""

    def __init__(self, source: ImageSource, transform: Callable[[Any], Any] | None, mode: str) -> None:
        self._source = source
        self._mode = mode
        self.transform = transform

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        image = self._source.store.load(int(self._source.rows[index]), self._mode)
        return image if self.transform is None else self.transform(image), int(self._source.targets[index])
