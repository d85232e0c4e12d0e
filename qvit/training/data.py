"""Images for training, calibration and evaluation: where they come from, how they are split.

`open_data` takes a name and returns a `DataBundle` of training and test images:

    FOLDER                    one sub-folder per class, named by the innermost folder and in timm's natural order
    FILE.tar, .tar.gz, .tgz   the same in an archive, read in place (a compressed one is unpacked once, into a cache)
    hfds/NAME                 a Hugging Face data set, through timm's reader
    digits                    scikit-learn's handwritten digits, in memory (`qvit.training.digits`)

A folder or archive with `train/` and `val/`, `validation/` or `test/` inside is used as it is split. Otherwise test
images are named by `test_data`, or a stratified share is set aside. That share depends on the images alone, never on
the run's seed: all runs are judged on the same images. Monitoring and calibration see training images only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from qvit.errors import QvitError, UsageError, nearest
from qvit.training.digits import DIGITS, TEST_IMAGES, DigitStore
from qvit.training.images import (
    HubStore,
    ImageDataset,
    ImageSource,
    ImageStore,
    hub_splits,
    missing_path,
    one_line,
    open_files,
)
from qvit.training.loading import (
    AugmentConfig,
    LoaderLike,
    calibration_batches,
    data_config_of,
    eval_loader,
    train_loader,
)

__all__ = [
    "AugmentConfig",
    "DataBundle",
    "ImageDataset",
    "ImageSource",
    "ImageStore",
    "LoaderLike",
    "calibration_batches",
    "data_config_of",
    "eval_loader",
    "open_data",
    "open_source",
    "read_class_map",
    "stratified_split",
    "train_loader",
]

TRAIN_SPLITS = ("train", "training")
TEST_SPLITS = ("val", "validation", "valid", "test", "testing")
_SPLIT_SEED = 0  # never the run's seed: the test images of a data set are the same in every run


def _split_folders(names: Sequence[str]) -> dict[str, np.ndarray]:
    """Rows of each split, if the names read `.../train/class/image` and `.../val/class/image`; else nothing."""
    parts = [name.split("/") for name in names]
    depth = 0
    while all(len(part) > depth + 3 and part[depth] == parts[0][depth] for part in parts):
        depth += 1  # one folder around everything
    groups: dict[str, list[int]] = {}
    for row, part in enumerate(parts):
        if len(part) >= depth + 3 and part[depth].lower() in TRAIN_SPLITS + TEST_SPLITS:
            groups.setdefault(part[depth].lower(), []).append(row)
    if not (groups.keys() & set(TRAIN_SPLITS) and groups.keys() & set(TEST_SPLITS)):
        return {}
    return {split: np.array(rows, dtype=np.int64) for split, rows in groups.items()}


class _Collection:
    """What a name stands for: one set of images, or several named splits of it."""

    def __init__(self, data: str | Path) -> None:
        self.name = str(data)
        self._hub = self.name[len("hfds/") :] if self.name.startswith("hfds/") else None
        self._rows: dict[str, np.ndarray] = {}
        if self._hub is not None:
            self.splits = hub_splits(self._hub)
        elif self.name == DIGITS:
            self._store: ImageStore = DigitStore()
            kept, aside = stratified_split(self._store.codes, TEST_IMAGES, _SPLIT_SEED)
            self._rows = {"train": kept, "test": aside}
            self.splits = list(self._rows)
        else:
            self._store = open_files(Path(data).expanduser(), self.name)
            self._rows = _split_folders([self._store.name(row) for row in range(len(self._store.codes))])
            self.splits = list(self._rows)

    def choose(self, wanted: Sequence[str]) -> str | None:
        """The first of the wanted splits that there is."""
        return next((split for split in wanted if split in self.splits), None)

    def open(self, split: str | None, classes: Mapping[str, int] | None, described: str) -> ImageSource:
        """The images of a split (None: all of them), their folders numbered by `classes` (None: in their own order)."""
        store = HubStore(self._hub, split or self.splits[0], self.name) if self._hub is not None else self._store
        rows = np.arange(len(store.codes)) if split not in self._rows else self._rows[split]
        name = self.name if split is None else f"{self.name} ({split})"
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
        class_names = [f"class {index}" for index in range(max(classes.values()) + 1)]
        for folder, index in classes.items():
            class_names[index] = folder
        return ImageSource(name, store, rows, np.array([classes[folder] for folder in folders])[codes], class_names)


@dataclass(frozen=True)
class DataBundle:
    """The images of a run.

    Attributes:
        train: For training and calibration.
        test: For the final number alone.
        num_classes: Classes of the labels.
        class_names: Their folders; pass them to `open_source` to number the folders of other images alike.
        held_out: A share of the training images, taken out of `train`, to watch a run by; None if none was asked for.
        note: One sentence that says where training and test images are from.
    """

    train: ImageSource
    test: ImageSource
    num_classes: int
    class_names: list[str]
    held_out: ImageSource | None
    note: str


def open_data(
    data: str | Path,
    *,
    test_data: str | Path | None = None,
    class_map: str | Path | None = None,
    test_share: float = 0.2,
    monitor_share: float = 0.0,
    seed: int = 0,
) -> DataBundle:
    """Opens the images of a training run.

    Args:
        data: A folder or archive of class folders, `hfds/NAME`, or `digits`.
        test_data: Test images, named in the same way; by default the `val` (or `validation`, `test`) split of `data`,
            or a share of it.
        class_map: File with a line `index<TAB>folder` per class, for a head with more classes than there are folders.
        test_share: Share of the images that is set aside if there are no other test images; the same in each run.
        monitor_share: Share of the training images that is held out to watch the run by, chosen by `seed`.
        seed: The run's seed; touches nothing but `held_out`.

    Raises:
        UsageError: A name or option that cannot be meant.
        QvitError: Data that cannot be read, or labels without a class.
    """
    if not 0 < test_share < 1 or not 0 <= monitor_share < 1:
        raise UsageError(f"shares lie between 0 and 1, unlike test_share={test_share}, monitor_share={monitor_share}")
    collection = _Collection(data)
    if collection.name == DIGITS and (test_data is not None or class_map is not None):
        raise UsageError("'digits' has test images and classes of its own; leave out the test data and the class map")
    classes = None if class_map is None else read_class_map(class_map)
    train_split = collection.choose(TRAIN_SPLITS)
    if collection.splits and train_split is None:
        raise UsageError(f"{collection.name} has no split 'train'; it has {', '.join(collection.splits)}")
    train = collection.open(train_split, classes, f"the class map {class_map}")
    if train.num_classes < 2:
        raise QvitError(f"{train.name} has the single class folder '{train.class_names[0]}'; training needs two")
    numbering = classes or {folder: index for index, folder in enumerate(train.class_names)}
    described = f"the class map {class_map}" if classes else f"the training classes of {train.name}"

    test_split = collection.choose(TEST_SPLITS)
    if test_data is not None:
        other = _Collection(test_data)
        if Path(other.name).absolute() == Path(collection.name).absolute() and not other.splits:
            raise UsageError(f"the test data '{test_data}' are the training data; leave them out to set a share aside")
        test = other.open(other.choose(TEST_SPLITS), numbering, described)
        origin = f"test images are {test.name}"
    elif test_split is not None:
        test = collection.open(test_split, numbering, described)
        origin = f"test images are its split '{test_split}'"
        if collection.name == DIGITS:
            origin = "test images are a fixed stratified third of the data set"
    else:
        whole = train
        kept, aside = stratified_split(whole.targets, round(test_share * len(whole)), _SPLIT_SEED)
        if not len(aside):
            raise QvitError(f"{whole.name} has too few images per class to set some aside; name test data instead")
        train, test = whole.subset(kept, f"{whole.name} (train)"), whole.subset(aside, f"{whole.name} (test)")
        origin = f"test images are a stratified share of {test_share:.3g} set aside from it, the same in every run"

    held_out = None
    if monitor_share:
        kept, aside = stratified_split(train.targets, round(monitor_share * len(train)), seed)
        if not len(aside):
            raise QvitError(f"{train.name} has too few images per class to hold out a share of {monitor_share:.3g}")
        train, held_out = train.subset(kept), train.subset(aside, f"{train.name}, held out")
    watched = f", {len(held_out)} more are held out to watch the run by" if held_out else ""
    note = f"{len(train)} training images are from {collection.name}{watched}; {len(test)} {origin}."
    return DataBundle(train, test, train.num_classes, train.class_names, held_out, note)


def open_source(
    data: str | Path,
    *,
    split: str = "validation",
    class_map: str | Path | None = None,
    class_names: Sequence[str] | None = None,
) -> ImageSource:
    """Opens one set of images, for evaluation.

    Args:
        data: As for `open_data`.
        split: "train", "validation" or "test" (names such as "val" are understood), or a Hugging Face split. Images
            that come in one piece are opened whole, whatever is asked for.
        class_map: As for `open_data`.
        class_names: Folder of each class of the model, where there is no class map; the images may be of some of these
            classes only. By default the folders are numbered in their own order.

    Raises:
        UsageError: A name or option that cannot be meant.
        QvitError: Data that cannot be read, or labels without a class.
    """
    collection = _Collection(data)
    chosen = split if split in collection.splits else None
    if collection.splits and chosen is None:
        chosen = collection.choose(next((names for names in (TRAIN_SPLITS, TEST_SPLITS) if split in names), ()))
        if chosen is None:
            raise UsageError(f"{collection.name} has no split '{split}'; it has {', '.join(collection.splits)}")
    if class_map is not None:
        return collection.open(chosen, read_class_map(class_map), f"the class map {class_map}")
    numbering = None if class_names is None else {folder: index for index, folder in enumerate(class_names)}
    return collection.open(chosen, numbering, "the model's classes")


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
    if not path.is_file():
        raise missing_path(path, "the class map")
    classes: dict[str, int] = {}
    taken: set[int] = set()
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise QvitError(f"cannot read the class map {path}: {one_line(error)}") from error
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        index, _, rest = line.partition("\t")
        folder = rest.split("\t")[0].strip()
        if not (index.strip().isdecimal() and folder):
            raise QvitError(f"line {number} of the class map {path} should read 'index<TAB>folder', not {line[:60]!r}")
        if folder in classes or int(index) in taken:
            raise QvitError(f"line {number} of the class map {path} repeats an index or a folder: {line[:60]!r}")
        classes[folder] = int(index)
        taken.add(int(index))
    if not classes:
        raise QvitError(f"the class map {path} is empty; it should have lines 'index<TAB>folder'")
    return classes
