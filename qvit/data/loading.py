"""Loaders of images for training, evaluation and calibration.

They yield `(images [batch, channels, height, width] float32 normalised, targets [batch] int64)` on the device. No
loader draws from the global generators or changes them. Digits are in memory and have a loader of their own
(`qvit.data.digits`); so have shards, which are read as a stream (`qvit.data.shards`).
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor

from qvit.data.augment import AugmentConfig, config_at, eval_config, eval_transform, train_transform
from qvit.data.batches import BatchLoader, RowSamples
from qvit.data.digits import DigitsLoader, DigitStore
from qvit.data.images import ImageSource
from qvit.data.labels.loading import StoredLabels
from qvit.data.reading import Reading
from qvit.data.sampling import EpochBatches, Passes, RowBatches
from qvit.data.shard_stream import shard_loader
from qvit.data.shards import ShardSource
from qvit.errors import QvitError, UsageError

logger = logging.getLogger(__name__)

Source = ImageSource | ShardSource
#: What the loaders are.
LoaderLike = Passes


def train_loader(
    source: Source,
    data_config: Mapping[str, Any],
    how: Reading = Reading(),
    *,
    augment: AugmentConfig = AugmentConfig(),
    drop_last: bool = True,
    labels: StoredLabels | None = None,
    **changes: Any,
) -> LoaderLike:
    """Shuffled and augmented batches, for training; `qvit.data.sampling` says in which order.

    Digits are augmented by their own small random affine map, unless `augment` is off, whatever else it says (but for
    repeated augmentation).

    Args:
        source: The images.
        data_config: timm's data configuration of the model (`data_config_of`).
        how: How they are read; a batch has no more images than the process has.
        augment: What happens to them.
        drop_last: Leave out a last batch that would be smaller than the others.
        labels: Replay crops that a teacher has labelled, in the place of augmentation; targets are
            `[batch, 2, k]` then, see `qvit.data.labels`.
        changes: Fields of `how` by name, such as `batch_size=100`.

    Raises:
        QvitError: Fewer images than processes; on iteration, an image that cannot be read, or too many of them.
    """
    how = replace(how, **changes)
    channels = data_config["input_size"][0]
    if labels is not None:
        source = labels.select(source, channels)
    if len(source) < how.world_size:
        raise QvitError(f"{source.name} has {len(source)} images, too few for {how.world_size} processes")
    if how.batch_size * how.world_size > len(source):
        lowered = len(source) // how.world_size
        logger.warning("the batch size %d is lowered to %d, all images of %s", how.batch_size, lowered, source.name)
        how = replace(how, batch_size=lowered)
    erased = augment.random_erasing
    if isinstance(source, ShardSource):
        if augment.repeated_augmentation > 1:
            raise UsageError("repeated augmentation needs images that can be read in any order, unlike those of shards")
        transform = train_transform(data_config, augment)
        return shard_loader(source, data_config, transform, how, training=True, random_erasing=erased)
    if labels is not None:
        return labels.loader(source, data_config, how, drop_last=drop_last)
    repeats = max(augment.repeated_augmentation, 1)
    if isinstance(source.store, DigitStore):
        own = {"augment": not augment.is_off, "drop_last": drop_last, "repeats": repeats}
        return DigitsLoader(*_digits(source), data_config, how, shuffle=True, **own)
    batches = EpochBatches(len(source), how, repeats=repeats, drop_last=drop_last)
    samples = RowSamples(source, train_transform(data_config, augment), channels, how, replaces=True)
    return BatchLoader(samples, source, data_config, how, batches=batches, random_erasing=erased)


def eval_loader(source: Source, data_config: Mapping[str, Any], how: Reading = Reading(), **changes: Any) -> LoaderLike:
    """Images in their order, under the model's evaluation transform: each is with one process, the r-th, (r+W)-th, ...

    Arguments and errors as for `train_loader`; with `on_bad_image="skip"` unreadable images are left out.
    """
    how = replace(how, **changes)
    config, transform = eval_config(data_config), eval_transform(data_config)
    if isinstance(source, ShardSource):
        return shard_loader(source, config, transform, how)
    part = source.subset(range(how.rank, len(source), how.world_size)) if how.world_size > 1 else source
    if isinstance(source.store, DigitStore):
        return DigitsLoader(*_digits(part), data_config, replace(how, rank=0, world_size=1))
    samples = RowSamples(part, transform, data_config["input_size"][0], how, replaces=False)
    return BatchLoader(samples, source, config, how, batches=RowBatches(len(part), how.batch_size))


def calibration_batches(
    source: Source,
    data_config: Mapping[str, Any],
    how: Reading = Reading(),
    *,
    images: int,
    part: slice = slice(None),
    **changes: Any,
) -> Iterator[Tensor]:
    """Batches of `images` different training images, drawn by the seed, under the evaluation transform.

    Args:
        source: The training images.
        data_config: timm's data configuration of the model.
        how: How they are read, all of them by each process; with `on_bad_image="skip"` there are fewer if some cannot
            be read.
        images: How many in all; the last batch has what remains.
        part: Which of them these batches are made of; of shards all.
        changes: Fields of `how` by name, such as `batch_size=32`.

    Raises:
        QvitError: The source has fewer images, or (on iteration) one of them cannot be read.
    """
    how = replace(how, rank=0, world_size=1, **changes)
    require_enough(source, images)
    if isinstance(source, ShardSource):
        config, transform = eval_config(data_config), eval_transform(data_config)
        loader: LoaderLike = shard_loader(source, config, transform, how, calibration=images)
    else:
        chosen = source.subset(_calibration_order(source, how.seed)[:images][part], f"{source.name}, for calibration")
        loader = eval_loader(chosen, data_config, how)
    return (batch for batch, _ in loader)


def beside_calibration(source: Source, seed: int, calibration: int, images: int) -> ImageSource:
    """At most `images` of the training images, none of those that the first `calibration` of a calibration are.

    Raises:
        UsageError: Shards, whose images cannot be read in any order.
    """
    if isinstance(source, ShardSource):
        raise UsageError(f"{source.name} is read as a stream, of which no images can be kept apart from calibration")
    chosen = _calibration_order(source, seed)[calibration : calibration + images]
    return source.subset(chosen, f"{source.name}, beside calibration")


def _calibration_order(source: ImageSource, seed: int) -> Tensor:
    """The order in which a seed draws images for calibration."""
    return torch.randperm(len(source), generator=torch.Generator().manual_seed(seed))


def require_enough(source: Source, images: int) -> None:
    """Raises UsageError or QvitError unless `images` calibration images can be drawn."""
    if images < 1:
        raise UsageError(f"calibration takes at least one image, not {images}")
    if images > len(source):
        raise QvitError(
            f"too few images to calibrate: {source.name} has {len(source)}, calibration needs {images}; "
            "ask for fewer calibration images or give more training images"
        )


@dataclass(frozen=True)
class CalibrationImages:
    """`calibration_batches` that can be iterated any number of times: they are read again, the same ones.

    Attributes:
        source, data_config, how, images: See there.
        sizes: Heights and widths; each image has one of them, in turn, and a batch has one. By default that of the
            model's evaluation alone.
    """

    source: Source
    data_config: Mapping[str, Any]
    how: Reading
    images: int
    sizes: tuple[tuple[int, int], ...] = ()

    def __post_init__(self) -> None:
        require_enough(self.source, self.images)  # before anything is computed
        if len(self.sizes) > 1 and isinstance(self.source, ShardSource):
            raise UsageError(f"{self.source.name} is read as a stream, whose images have one size: give one")
        if not self.sizes:
            _, height, width = eval_config(self.data_config)["input_size"]
            object.__setattr__(self, "sizes", ((height, width),))

    def __iter__(self) -> Iterator[Tensor]:
        parts = []
        for place, size in enumerate(self.sizes):
            config, part = config_at(self.data_config, size), slice(place, None, len(self.sizes))
            parts.append(calibration_batches(self.source, config, self.how, images=self.images, part=part))
        for batches in zip_longest(*parts):
            yield from (batch for batch in batches if batch is not None)


def _digits(source: ImageSource) -> tuple[Tensor, Tensor]:
    """The images of a selection of digits, and their classes."""
    store: Any = source.store
    return store.images[source.rows], torch.from_numpy(source.targets)
