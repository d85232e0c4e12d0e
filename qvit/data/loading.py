"""Loaders of images for training, evaluation and calibration.

They yield `(images [batch, channels, height, width] float32 normalised, targets [batch] int64)` on the device. No
loader draws from the global generators or changes them. Digits are in memory and have a loader of their own
(`qvit.data.digits`); so have shards, which are read as a stream (`qvit.data.shards`).
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from qvit.data.augment import AugmentConfig, eval_config, eval_transform, train_transform
from qvit.data.batches import BatchLoader, RowSamples
from qvit.data.decoding import BadImagePolicy, mode_of
from qvit.data.digits import DigitsLoader, DigitStore
from qvit.data.images import ImageSource
from qvit.data.labels.loading import StoredLabels
from qvit.data.sampling import EpochBatches, RowBatches, require_process
from qvit.data.shard_stream import shard_calibration_loader, shard_loader
from qvit.data.shards import ShardSource
from qvit.errors import QvitError, UsageError

logger = logging.getLogger(__name__)

Source = ImageSource | ShardSource


class LoaderLike(Protocol):
    """Yields `(images, targets)` on the device; every `iter()` is a new pass; `len()` is the batches of an epoch.

    A training loader draws nothing from the global generators: what it yields depends on its seed, the epoch and the
    position in the epoch alone. Without `set_epoch` the first pass is that of epoch 0, the next that of epoch 1, ...
    """

    def set_epoch(self, epoch: int, skip: int = 0) -> None:
        """The next pass is that of `epoch`, without its first `skip` batches.

        These are not read; only a stream of shards has to pass over them.
        """
        ...

    def bad_images(self) -> list[str]:
        """Names of the images that could not be read, of those the loader has met so far."""
        ...

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]: ...

    def __len__(self) -> int: ...


def train_loader(
    source: Source,
    data_config: Mapping[str, Any],
    *,
    batch_size: int,
    augment: AugmentConfig = AugmentConfig(),
    workers: int = 0,
    device: str | torch.device = "cpu",
    drop_last: bool = True,
    seed: int = 0,
    rank: int = 0,
    world_size: int = 1,
    on_bad_image: BadImagePolicy = "fatal",
    labels: StoredLabels | None = None,
) -> LoaderLike:
    """Shuffled and augmented batches, for training; `qvit.data.sampling` says in which order.

    Digits are augmented by their own small random affine map, unless `augment` is off, whatever else it says (but for
    repeated augmentation).

    Args:
        source: The images.
        data_config: timm's data configuration of the model (`data_config_of`).
        batch_size: Images in a batch of this process; no more than its part of the images.
        augment: What happens to them.
        workers: Processes that decode; 0 to decode in this one. They change nothing but the time it takes.
        device: Where batches go.
        drop_last: Leave out a last batch that would be smaller than the others.
        seed: Chooses order and augmentation, together with the epoch.
        rank: Number of this process.
        world_size: How many processes train together, each on its part of every batch.
        on_bad_image: "fatal": an unreadable image is an error that names it. "skip": the next readable image of the
            source takes its place.
        labels: Replay crops that a teacher has labelled, in the place of augmentation; targets are
            `[batch, 2, k]` then, see `qvit.data.labels`.

    Raises:
        QvitError: Fewer images than processes; on iteration, an image that cannot be read, or too many of them.
    """
    require_process(batch_size, workers, rank, world_size)
    if labels is not None:
        source = labels.select(source, data_config["input_size"][0])
    if len(source) < world_size:
        raise QvitError(f"{source.name} has {len(source)} images, too few for {world_size} processes")
    if batch_size * world_size > len(source):
        lowered = len(source) // world_size
        logger.warning("the batch size %d is lowered to %d, all images of %s", batch_size, lowered, source.name)
        batch_size = lowered
    place = {"seed": seed, "rank": rank, "world_size": world_size}
    if labels is not None and isinstance(source, ImageSource):
        options: dict[str, Any] = {"workers": workers, "device": device, "on_bad_image": on_bad_image, **place}
        return labels.loader(source, data_config, batch_size=batch_size, drop_last=drop_last, **options)
    if isinstance(source, ShardSource):
        if augment.repeated_augmentation > 1:
            raise UsageError("repeated augmentation needs images that can be read in any order, unlike those of shards")
        return shard_loader(
            source,
            data_config,
            train_transform(data_config, augment),
            batch_size=batch_size,
            workers=workers,
            device=device,
            on_bad_image=on_bad_image,
            training=True,
            random_erasing=augment.random_erasing,
            **place,
        )
    order = {"repeats": augment.repeated_augmentation, "drop_last": drop_last, **place}
    if isinstance(source.store, DigitStore):
        return _digits_loader(
            source, data_config, batch_size, device, shuffle=True, augment=not augment.is_off, **order
        )
    batches = EpochBatches(len(source), batch_size, **order)
    mode = mode_of(data_config["input_size"][0])
    samples = RowSamples(source, train_transform(data_config, augment), mode, on_bad_image, replace=True)
    return BatchLoader(
        samples,
        batches,
        len(batches),
        source,
        data_config,
        workers=workers,
        device=torch.device(device),
        replaces=True,
        random_erasing=augment.random_erasing,
        seed=seed,
        rank=rank,
        batch_sampler=batches,
    )


def eval_loader(
    source: Source,
    data_config: Mapping[str, Any],
    *,
    batch_size: int,
    workers: int = 0,
    device: str | torch.device = "cpu",
    rank: int = 0,
    world_size: int = 1,
    on_bad_image: BadImagePolicy = "fatal",
) -> LoaderLike:
    """Images in their order, under the model's evaluation transform: each is with one process, the r-th, (r+W)-th, ...

    Other arguments and errors as for `train_loader`; with `on_bad_image="skip"` unreadable images are left out.
    """
    require_process(batch_size, workers, rank, world_size)
    if isinstance(source, ShardSource):
        return shard_loader(
            source,
            eval_config(data_config),
            eval_transform(data_config),
            batch_size=batch_size,
            workers=workers,
            device=device,
            on_bad_image=on_bad_image,
            training=False,
            rank=rank,
            world_size=world_size,
        )
    part = source.subset(range(rank, len(source), world_size)) if world_size > 1 else source
    if isinstance(source.store, DigitStore):
        return _digits_loader(part, data_config, batch_size, device, drop_last=False)
    batches, mode = RowBatches(len(part), batch_size), mode_of(data_config["input_size"][0])
    return BatchLoader(
        RowSamples(part, eval_transform(data_config), mode, on_bad_image, replace=False),
        batches,
        len(batches),
        source,
        eval_config(data_config),
        workers=workers,
        device=torch.device(device),
        replaces=False,
        batch_sampler=batches,
    )


def calibration_batches(
    source: Source,
    data_config: Mapping[str, Any],
    *,
    images: int,
    batch_size: int,
    seed: int = 0,
    workers: int = 0,
    device: str | torch.device = "cpu",
    on_bad_image: BadImagePolicy = "fatal",
) -> Iterator[Tensor]:
    """Batches of `images` different training images, drawn by `seed`, under the evaluation transform.

    Args:
        source: The training images.
        data_config: timm's data configuration of the model.
        images: How many in all.
        batch_size: How many in a batch; the last has what remains.
        seed: Chooses images and order.
        workers: Processes that decode.
        device: Where batches go.
        on_bad_image: As for `eval_loader`; with "skip" there are fewer images if some cannot be read.

    Raises:
        QvitError: The source has fewer images, or (on iteration) one of them cannot be read.
    """
    if images < 1:
        raise UsageError(f"calibration takes at least one image, not {images}")
    if images > len(source):
        raise QvitError(
            f"too few images to calibrate: {source.name} has {len(source)}, calibration needs {images}; "
            "ask for fewer calibration images or give more training images"
        )
    if isinstance(source, ShardSource):
        loader: LoaderLike = shard_calibration_loader(
            source,
            eval_config(data_config),
            eval_transform(data_config),
            images=images,
            batch_size=batch_size,
            seed=seed,
            workers=workers,
            device=device,
            on_bad_image=on_bad_image,
        )
        return (batch for batch, _ in loader)
    order = torch.randperm(len(source), generator=torch.Generator().manual_seed(seed))
    chosen = source.subset(order[:images], f"{source.name}, for calibration")
    options: dict[str, Any] = {"workers": workers, "device": device, "on_bad_image": on_bad_image}
    return (batch for batch, _ in eval_loader(chosen, data_config, batch_size=batch_size, **options))


def _digits_loader(
    source: ImageSource, data_config: Mapping[str, Any], batch_size: int, device: str | torch.device, **options: Any
) -> DigitsLoader:
    store: Any = source.store
    images, targets = store.images[source.rows], torch.from_numpy(source.targets)
    return DigitsLoader(images, targets, data_config, batch_size=batch_size, device=torch.device(device), **options)
