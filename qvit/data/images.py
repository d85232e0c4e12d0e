"""Images on disk: folders, archives and Hugging Face data sets as rows of encoded images with a class folder each.

Listing is timm's. Three things differ from its `ImageDataset`: an unreadable image is an error that names it,
where timm warns and returns the next; names that tie in natural order ("a1", "a01") get a fixed order; and members of
archives are read by offset through a file opened per image, so that forked workers share no handle, and no index is
written or unpickled. A compressed archive is unpacked once, into the user's cache.

A store has rows; an `ImageSource` is a selection of rows with their targets; its `dataset` decodes and transforms them.
"""

from __future__ import annotations

import gzip
import hashlib
import importlib.util
import logging
import os
import shutil
import tarfile
import tempfile
import time
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image
from timm.data.readers.img_extensions import get_img_extensions
from timm.data.readers.reader_image_folder import ReaderImageFolder
from timm.data.readers.reader_image_in_tar import ReaderImageInTar
from timm.utils.misc import natural_key
from torch import Tensor
from torch.utils.data import Dataset

from qvit.data.decoding import BadImages, decode, one_line
from qvit.data.digits import DIGITS
from qvit.errors import QvitError, UsageError, nearest

logger = logging.getLogger(__name__)

_ARCHIVES = (".tar", ".tar.gz", ".tgz")


class ImageStore(Protocol):
    """Images by row number, each with the code of its class folder; what an `ImageSource` selects from."""

    origin: str  # what the user named, for messages
    folders: list[str]  # names of the class folders, sorted
    codes: np.ndarray  # [rows] index into `folders`

    def name(self, row: int) -> str: ...

    def load(self, row: int, mode: str = "RGB") -> Any: ...


class _FileStore:
    """Encoded images with names `.../class/image.ext`; subclasses say how the bytes of a row are read.

    Names are kept as one array of file-system bytes and not as Python strings, so that forked workers do not copy a
    list of a million objects as they touch its reference counts.
    """

    def __init__(self, origin: str, names: Sequence[str]) -> None:
        self.origin = origin
        homeless = next((name for name in names if "/" not in name), None)
        if homeless is not None:
            raise QvitError(f"image {homeless!r} in {origin} lies in no class folder; each class needs a folder")
        self._names = np.array([os.fsencode(name) for name in names])
        labels = [name.rsplit("/", 2)[-2] for name in names]
        self.folders = sorted(set(labels), key=lambda label: (natural_key(label), label))
        index = {label: code for code, label in enumerate(self.folders)}
        self.codes = np.array([index[label] for label in labels], dtype=np.int64)

    def name(self, row: int) -> str:
        return os.fsdecode(self._names[row])

    def read(self, row: int) -> bytes:
        raise NotImplementedError

    def load(self, row: int, mode: str = "RGB") -> Image.Image:
        """Decodes an image. Raises UnreadableImage, which names it."""
        return decode(lambda: self.read(row), mode, lambda: self.name(row), self.origin)


class _FolderStore(_FileStore):
    def __init__(self, root: Path, origin: str) -> None:
        try:
            samples = ReaderImageFolder(str(root)).samples
        except RuntimeError:
            raise _no_images(origin) from None
        self._root = root
        super().__init__(origin, _in_order([os.path.relpath(path, root).replace(os.sep, "/") for path, _ in samples]))

    def read(self, row: int) -> bytes:
        return (self._root / self.name(row)).read_bytes()


class _TarStore(_FileStore):
    """Members of an uncompressed archive, or of archives inside it (one per class, as ImageNet is distributed)."""

    def __init__(self, path: Path, origin: str) -> None:
        try:
            samples = ReaderImageInTar(str(path), cache_tarfiles=False, cache_tarinfo=False).samples
        except tarfile.TarError as error:
            raise QvitError(f"{origin} is not a tar archive, or it is damaged: {one_line(error)}") from error
        except ValueError:  # timm unpacks an empty list of samples
            raise _no_images(origin) from None
        members = {}
        for member, _, archive in samples:
            prefix, start = (f"{archive.name[: -len('.tar')]}/", archive.offset_data) if archive else ("", 0)
            members[os.path.normpath(prefix + member.path).lstrip("/")] = (start + member.offset_data, member.size)
        names = _in_order(members)
        self._path = path
        self._extents = np.array([members[name] for name in names], dtype=np.int64)
        super().__init__(origin, names)

    def read(self, row: int) -> bytes:
        offset, size = self._extents[row].tolist()
        with self._path.open("rb") as file:
            file.seek(offset)
            return file.read(size)


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
    return sorted(names, key=lambda name: (natural_key(name), name))


def _no_images(origin: str) -> QvitError:
    return QvitError(
        f"{origin} holds no images; images ({', '.join(get_img_extensions())}) are expected in one folder per class"
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
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "qvit"
    target = cache / f"{path.name.split('.')[0]}-{hashlib.sha256(os.fsencode(key)).hexdigest()[:16]}.tar"
    if target.exists():
        return target
    logger.info("unpacking %s once, to %s", path, target)
    partial: str | None = None
    try:
        cache.mkdir(parents=True, exist_ok=True)
        for left_over in cache.glob("*.part"):  # of processes that were killed
            if time.time() - left_over.stat().st_mtime > 24 * 3600:
                left_over.unlink(missing_ok=True)
        handle, partial = tempfile.mkstemp(suffix=".part", dir=cache)
        with os.fdopen(handle, "wb") as out, gzip.open(path) as source:
            shutil.copyfileobj(source, out, 1 << 20)
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
    if not path.name.lower().endswith(_ARCHIVES):
        raise UsageError(f"{origin} is neither a folder nor an archive ({', '.join(_ARCHIVES)}) of class folders")
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
    """Labelled images in a fixed order, opened and ready to be read.

    Attributes:
        name: What they are, for people.
        num_classes: How many classes the labels are from; with a class map more than have images.
        class_names: The folder of each class.
        targets: `[images]` int64, the class of each image.
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
