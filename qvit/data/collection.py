"""What the name of a data set stands for: one set of images or several splits, and how its classes are numbered.

Whether images are labelled follows from where they lie, folders around everything left out:

    in two or more folders, none beside them     labelled: a folder is a class
    in a single folder, or beside at most one    without labels: a flat folder, an album, one class folder alone
    in several folders and beside them           ambiguous, an error

Where the classes are known already, from a class map or the training images, every folder must be one of them, also a
single one; only images that lie in no folder at all are without labels. `unlabelled` says that folders are no classes.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from qvit.data.digits import DIGITS, TEST_IMAGES, DigitStore
from qvit.data.images import NO_LABEL, HubStore, ImageSource, ImageStore, hub_splits, missing_path, open_files
from qvit.data.shards import PREFIX, Shards, ShardSource, find_shards, open_shards
from qvit.documents.base import MOST_CLASSES
from qvit.errors import QvitError, UsageError, nearest
from qvit.files import MissingFile, read_text

TRAIN_SPLITS = ("train", "training")
TEST_SPLITS = ("val", "validation", "valid", "test", "testing")
_DIGITS, _LONGEST_NAME = 5, 500
SPLIT_SEED = 0  # never the run's seed: the test images of a data set are the same in every run


def _split_folders(names: Sequence[str]) -> tuple[dict[str, np.ndarray], int]:
    """Rows of each split, and how many folders lie around the images of one, its own included.

    The names read `.../train/class/image` and `.../val/class/image`, or without labels `.../train/image` and
    `.../val/image` and nothing else; for other names there are no splits.
    """
    parts = [name.split("/") for name in names]
    depth = 0
    while all(len(part) > depth + 2 and part[depth] == parts[0][depth] for part in parts):
        depth += 1  # one folder around everything
    groups: dict[str, list[int]] = {}
    for row, part in enumerate(parts):
        if len(part) >= depth + 2 and part[depth].lower() in TRAIN_SPLITS + TEST_SPLITS:
            groups.setdefault(part[depth].lower(), []).append(row)
    if not (groups.keys() & set(TRAIN_SPLITS) and groups.keys() & set(TEST_SPLITS)):
        return {}, 0
    in_classes = any(len(parts[row]) >= depth + 3 for rows in groups.values() for row in rows)
    if not in_classes and sum(map(len, groups.values())) < len(names):
        return {}, 0  # classes of which some are called like splits
    return {split: np.array(rows, dtype=np.int64) for split, rows in groups.items()}, depth + 1


class Collection:
    """What a name stands for: one set of images, or several named splits of it."""

    def __init__(self, data: str | Path) -> None:
        self.name = str(data)
        self._shards: dict[str, Shards] = {}
        self._hub = self.name[len("hfds/") :] if self.name.startswith("hfds/") else None
        self._rows: dict[str, np.ndarray] = {}
        self._depth = 0  # folders around the images of a split
        if self._hub is not None:
            self.splits = hub_splits(self._hub)
        elif self.name.startswith(PREFIX):
            self._shards = find_shards(self.name, (*TRAIN_SPLITS, *TEST_SPLITS))
            self.splits = [split for split in self._shards if split]
        elif self.name == DIGITS:
            self._store: ImageStore = DigitStore()
            kept, aside = stratified_split(self._store.codes, TEST_IMAGES, SPLIT_SEED)
            self._rows = {"train": kept, "test": aside}
            self.splits = list(self._rows)
        else:
            self._store = open_files(Path(data).expanduser(), self.name)
            self._rows, self._depth = _split_folders([self._store.name(row) for row in range(len(self._store.codes))])
            self.splits = list(self._rows)

    def choose(self, wanted: Sequence[str]) -> str | None:
        """The first of the wanted splits that there is."""
        return next((split for split in wanted if split in self.splits), None)

    def open(
        self, split: str | None, classes: Mapping[str, int] | None, described: str, *, unlabelled: bool = False
    ) -> ImageSource | ShardSource:
        """The images of a split (None: all of them), their folders numbered by `classes` (None: in their own order).

        Labels in shards are numbers already: they mean the classes of these numbers. With `unlabelled` the images have
        no labels, whatever their folders are.
        """
        name = self.name if split is None else f"{self.name} ({split})"
        if self._shards:
            if unlabelled:
                raise UsageError(f"{name} has its labels in its shards: leave out --unlabelled")
            return open_shards(self._shards[split or ""], name, None if classes is None else _class_names(classes))
        store = HubStore(self._hub, split or self.splits[0], self.name) if self._hub is not None else self._store
        rows = np.arange(len(store.codes)) if split not in self._rows else self._rows[split]
        if unlabelled or not self._labelled(store, rows, classes, name):
            return ImageSource(name, store, rows, np.full(len(rows), NO_LABEL), ())
        present, codes = np.unique(store.codes[rows], return_inverse=True)
        folders = [store.folders[code] for code in present]
        if classes is None:
            if isinstance(store, (HubStore, DigitStore)):  # their classes are known, with or without images
                folders, codes = store.folders, store.codes[rows]
            return ImageSource(name, store, rows, codes, folders)
        unknown = [folder for folder in folders if folder not in classes]
        if unknown:
            shown = ", ".join(f"'{folder}'" for folder in unknown[:3]) + (", ..." if len(unknown) > 3 else "")
            raise QvitError(
                f"{len(unknown)} of {len(folders)} class folders of {name} are not in {described}: {shown}"
                f"{nearest(unknown[0], classes)}"
            )
        numbers = np.array([classes[folder] for folder in folders])
        return ImageSource(name, store, rows, numbers[codes], _class_names(classes))

    def _labelled(self, store: ImageStore, rows: np.ndarray, classes: Mapping[str, int] | None, name: str) -> bool:
        """Whether the folders of a split are classes, see the module. Raises QvitError where that is ambiguous."""
        if isinstance(store, (HubStore, DigitStore)):
            return True
        places: dict[str, int] = {}
        for row in rows.tolist():
            places.setdefault(store.name(row).rpartition("/")[0], row)
        folders: dict[tuple[str, ...], int] = {
            tuple(place.split("/")[self._depth :]) if place else (): row for place, row in places.items()
        }
        around = 0 if classes is not None else len(os.path.commonprefix(list(folders)))
        outside = next((row for folder, row in folders.items() if len(folder) == around), None)
        inside = {folder[-1] for folder in folders if len(folder) > around}
        if outside is not None and len(inside) > (1 if classes is None else 0):
            raise QvitError(
                f"image {store.name(outside)!r} in {name} lies beside {len(inside)} folders with images, which may be "
                "classes or not: move it into its class folder, or give --unlabelled to use all images without labels"
            )
        return outside is None and len(inside) > (1 if classes is None else 0)


def _class_names(classes: Mapping[str, int]) -> list[str]:
    """The folder of each class, and `class N` where there is none."""
    names = [f"class {index}" for index in range(max(classes.values()) + 1)]
    for folder, index in classes.items():
        names[index] = folder
    return names


def stratified_split(targets: np.ndarray, count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Sets `count` images aside, of each class as near to its share as whole images allow (largest remainders go up).

    The last image of a class is never set aside, so fewer than `count` may be. Both results are in ascending order.

    Args:
        targets: `[images]`, the class of each.
        count: How many to set aside.
        seed: Chooses which. The legacy numpy generator is used because its stream is guaranteed never to change.

    Returns:
        The indices that stay and those set aside.
    """
    classes, sizes = np.unique(targets, return_counts=True)
    quota = sizes * (count / max(len(targets), 1))
    take = np.minimum(np.floor(quota).astype(np.int64), sizes - 1)
    order = np.argsort(take - quota, kind="stable")  # largest remainder first
    for index in order[take[order] < sizes[order] - 1][: max(count - int(take.sum()), 0)]:
        take[index] += 1
    random = np.random.RandomState(seed % 2**32)
    chosen = [random.permutation(np.flatnonzero(targets == label))[:n] for label, n in zip(classes, take, strict=True)]
    aside = np.sort(np.concatenate(chosen)) if chosen else np.arange(0)
    return np.setdiff1d(np.arange(len(targets)), aside), aside


def read_class_map(path: str | Path) -> dict[str, int]:
    """Reads `index<TAB>folder` lines (further columns are ignored) into folder -> index.

    Raises:
        QvitError: A malformed or contradictory line, by its number.
    """
    path = Path(path).expanduser()
    try:
        lines = read_text(path, "class map").splitlines()
    except MissingFile:
        raise missing_path(path, "the class map") from None
    classes: dict[str, int] = {}
    taken: set[int] = set()
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        index, _, rest = line.partition("\t")
        folder = rest.split("\t")[0].strip()
        if not (index.strip().isdecimal() and folder):
            raise QvitError(f"line {number} of the class map {path} should read 'index<TAB>folder', not {line[:60]!r}")
        if len(index.strip()) > _DIGITS or int(index) >= MOST_CLASSES or len(folder) > _LONGEST_NAME:
            raise QvitError(
                f"line {number} of the class map {path} is out of range: there are at most {MOST_CLASSES:,} classes, "
                f"with names of at most {_LONGEST_NAME} characters, not {line[:60]!r}"
            )
        if folder in classes or int(index) in taken:
            raise QvitError(f"line {number} of the class map {path} repeats an index or a folder: {line[:60]!r}")
        classes[folder] = int(index)
        taken.add(int(index))
    if not classes:
        raise QvitError(f"the class map {path} is empty; it should have lines 'index<TAB>folder'")
    return classes
