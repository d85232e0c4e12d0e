"""Images for training, calibration and evaluation: where they come from, how they are split.

`open_data` takes a name and returns a `DataBundle` of training and test images:

    FOLDER                    one sub-folder per class, named by the innermost folder and in timm's natural order; or
                              images without labels, see `qvit.data.collection`
    FILE.tar, .tar.gz, .tgz   the same in an archive, read in place (a compressed one is unpacked once, into a cache)
    wds/FOLDER, wds/PATTERN   tar shards in webdataset form (`qvit.data.shards`), read as a stream
    hfds/NAME                 a Hugging Face data set, through timm's reader
    digits                    scikit-learn's handwritten digits, in memory (`qvit.data.digits`)

A folder or archive with `train/` and `val/`, `validation/` or `test/` inside is used as it is split. Otherwise test
images are named by `test_data`, or a stratified share is set aside. That share depends on the images alone, never on
the run's seed: all runs are judged on the same images. Monitoring and calibration see training images only.

Training and test images may be without labels, together or one of them: photos calibrate, a labelled set judges.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qvit.data.augment import AugmentConfig, data_config_of
from qvit.data.collection import (
    SPLIT_SEED,
    TEST_SPLITS,
    TRAIN_SPLITS,
    Collection,
    read_class_map,
    stratified_split,
)
from qvit.data.digits import DIGITS
from qvit.data.images import ImageDataset, ImageSource, ImageStore
from qvit.data.loading import (
    CalibrationImages,
    LoaderLike,
    Source,
    beside_calibration,
    calibration_batches,
    eval_loader,
    train_loader,
)
from qvit.data.reading import Reading
from qvit.data.shards import ShardSource
from qvit.errors import QvitError, UsageError

__all__ = [
    "AugmentConfig",
    "CalibrationImages",
    "DataBundle",
    "ImageDataset",
    "ImageSource",
    "ImageStore",
    "LoaderLike",
    "Reading",
    "ShardSource",
    "Source",
    "beside_calibration",
    "calibration_batches",
    "data_config_of",
    "eval_loader",
    "open_data",
    "open_source",
    "read_class_map",
    "require_labels",
    "stratified_split",
    "train_loader",
]


@dataclass(frozen=True)
class DataBundle:
    """The images of a run.

    Attributes:
        train: For training and calibration.
        test: For the final number alone.
        num_classes: Classes of the labels; None if neither training nor test images have labels.
        class_names: Their folders; pass them to `open_source` to number the folders of other images alike.
        held_out: A share of the training images, taken out of `train`, to watch a run by; None if none was asked for.
        note: One sentence that says where training and test images are from.
    """

    train: Source
    test: Source
    num_classes: int | None
    class_names: list[str]
    held_out: ImageSource | None
    note: str


def open_data(
    data: str | Path,
    *,
    test_data: str | Path | None = None,
    class_map: str | Path | None = None,
    unlabelled: bool = False,
    test_share: float = 0.2,
    monitor_share: float = 0.0,
    seed: int = 0,
) -> DataBundle:
    """Opens the images of a training run.

    Args:
        data: A folder or archive of class folders, `wds/...`, `hfds/NAME`, or `digits`.
        test_data: Test images, named in the same way; by default the `val` (or `validation`, `test`) split of `data`,
            or a share of it.
        class_map: File with a line `index<TAB>folder` per class, for a head with more classes than there are folders.
        unlabelled: The folders are no classes. With a class map this is said of the training images alone.
        test_share: Share of the images that is set aside if there are no other test images; the same in each run.
        monitor_share: Share of the training images that is held out to watch the run by, chosen by `seed`.
        seed: The run's seed; touches nothing but `held_out`.

    Raises:
        UsageError: A name or option that cannot be meant.
        QvitError: Data that cannot be read, or labels without a class.
    """
    if not 0 < test_share < 1 or not 0 <= monitor_share < 1:
        raise UsageError(f"shares lie between 0 and 1, unlike test_share={test_share}, monitor_share={monitor_share}")
    collection = Collection(data)
    if collection.name == DIGITS and (test_data is not None or class_map is not None):
        raise UsageError("'digits' has test images and classes of its own; leave out the test data and the class map")
    classes = None if class_map is None else read_class_map(class_map)
    train_split = collection.choose(TRAIN_SPLITS)
    if collection.splits and train_split is None:
        raise UsageError(f"{collection.name} has no split 'train'; it has {', '.join(collection.splits)}")
    train = collection.open(train_split, classes, f"the class map {class_map}", unlabelled=unlabelled)
    numbering, described = classes, f"the class map {class_map}"
    if classes is None and train.labelled:
        numbering = {folder: index for index, folder in enumerate(train.class_names)}
        described = f"the training classes of {train.name}"
    open_test: dict[str, Any] = {
        "classes": numbering, "described": described, "unlabelled": unlabelled and classes is None,
    }  # fmt: skip

    test_split = collection.choose(TEST_SPLITS)
    if test_data is not None:
        other = Collection(test_data)
        if Path(other.name).absolute() == Path(collection.name).absolute() and not other.splits:
            raise UsageError(f"the test data '{test_data}' are the training data; leave them out to set a share aside")
        test = other.open(other.choose(TEST_SPLITS), **open_test)
        origin = f"test images{_without_labels(test)} are {test.name}"
    elif test_split is not None:
        test = collection.open(test_split, **open_test)
        origin = f"test images{_without_labels(test)} are its split '{test_split}'"
        if collection.name == DIGITS:
            origin = "test images are a fixed stratified third of the data set"
    else:
        whole = _in_any_order(
            train, "has no test images: name them as test data, or put the shards into train and test"
        )
        kept, aside = stratified_split(whole.targets, round(test_share * len(whole)), SPLIT_SEED)
        if not len(aside):
            per_class = " per class" if whole.labelled else ""
            raise QvitError(f"{whole.name} has too few images{per_class} to set some aside; name test data instead")
        train, test = whole.subset(kept, f"{whole.name} (train)"), whole.subset(aside, f"{whole.name} (test)")
        share = "a stratified share" if whole.labelled else "a share"
        origin = f"test images are {share} of {test_share:.3g} set aside from it, the same in every run"

    judged_by = train if train.labelled else test
    if class_map is not None and not judged_by.labelled:
        raise UsageError(
            f"the class map {class_map} is for class folders, and {collection.name} has images without labels: leave "
            "it out, or name test images in class folders"
        )
    held_out = None
    if monitor_share:
        require_labels(train, "to watch the run by: leave out the monitor share")
        train = _in_any_order(train, "is read as a stream, of which no share can be held out: set monitor_share to 0")
        kept, aside = stratified_split(train.targets, round(monitor_share * len(train)), seed)
        if not len(aside):
            raise QvitError(f"{train.name} has too few images per class to hold out a share of {monitor_share:.3g}")
        train, held_out = train.subset(kept), train.subset(aside, f"{train.name}, held out")
    watched = f", {len(held_out)} more are held out to watch the run by" if held_out else ""
    note = (
        f"{len(train)} training images{_without_labels(train)} are from {collection.name}{watched}; "
        f"{len(test)} {origin}."
    )
    return DataBundle(train, test, judged_by.num_classes or None, judged_by.class_names, held_out, note)


def require_labels(source: Source, purpose: str) -> None:
    """Raises UsageError unless images have labels; `purpose` goes on after "has no labels"."""
    if not source.labelled:
        raise UsageError(f"{source.name} has no labels {purpose}")


def _without_labels(source: Source) -> str:
    return "" if source.labelled else " without labels"


def open_source(
    data: str | Path,
    *,
    split: str = "validation",
    class_map: str | Path | None = None,
    class_names: Sequence[str] | None = None,
    unlabelled: bool = False,
) -> Source:
    """Opens one set of images, for evaluation.

    Args:
        data: As for `open_data`.
        split: "train", "validation" or "test" (names such as "val" are understood), or a Hugging Face split. Images
            that come in one piece are opened whole, whatever is asked for.
        class_map: As for `open_data`.
        class_names: Folder of each class of the model, where there is no class map; the images may be of some of these
            classes only. By default the folders are numbered in their own order.
        unlabelled: The folders are no classes.

    Raises:
        UsageError: A name or option that cannot be meant.
        QvitError: Data that cannot be read, or labels without a class.
    """
    collection = Collection(data)
    chosen = split if split in collection.splits else None
    if collection.splits and chosen is None:
        chosen = collection.choose(next((names for names in (TRAIN_SPLITS, TEST_SPLITS) if split in names), ()))
        if chosen is None:
            raise UsageError(f"{collection.name} has no split '{split}'; it has {', '.join(collection.splits)}")
    if class_map is not None:
        return collection.open(chosen, read_class_map(class_map), f"the class map {class_map}", unlabelled=unlabelled)
    numbering = None if class_names is None else {folder: index for index, folder in enumerate(class_names)}
    return collection.open(chosen, numbering, "the model's classes", unlabelled=unlabelled)


def _in_any_order(source: Source, problem: str) -> ImageSource:
    """The source, if a share of it can be set aside. Raises UsageError for shards."""
    if isinstance(source, ShardSource):
        raise UsageError(f"{source.name} {problem}")
    return source


def require_apart(calibration: Source, evaluation: Source) -> None:
    """Raises QvitError if images are in both sources: the same name in the same folder or archive."""
    if not isinstance(calibration, ImageSource) or not isinstance(evaluation, ImageSource):
        if calibration.name == evaluation.name:
            raise QvitError(f"calibration and evaluation images are the same, {evaluation.name}: give others to one")
        return
    if common := _places(calibration) & _places(evaluation):
        raise QvitError(
            f"{len(common)} of {len(evaluation)} evaluation images are calibration images too, first "
            f"'{min(common)}': calibrate on images that are not evaluated"
        )


def _places(source: ImageSource) -> set[str]:
    """The place of every image: its name below its folder or archive."""
    origin = Path(source.store.origin).expanduser()
    root = str(origin.resolve()) if origin.exists() else str(origin)
    return {f"{root}/{source.filename(index)}" for index in range(len(source))}
