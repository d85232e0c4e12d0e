"""Batches of crops: for the teacher that labels them, and for the training that replays them.

Labelling goes through a shard's images in order, M crops each, in batches that end with the shard; an image is decoded
once for those of its crops that are in a batch. Training draws images as `qvit.data.sampling` says for repeated
augmentation (an epoch has as many crops as there are images, hence fewer images), and for each drawn image so many
of its stored crops, without replacement, by (seed, epoch, position). A crop is replayed as the teacher saw it, and
nothing else happens to it. Where an image has become unreadable, `on_bad_image="skip"` takes the next one, with its
labels; an image of another size than when it was labelled is an error.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter
from typing import Any

import numpy as np
import torch

from qvit.data.batches import BatchLoader, RowSamples, Sample
from qvit.data.images import ImageSource
from qvit.data.labels.crops import LARGEST, draw_crops, picture, replay
from qvit.data.labels.store import LabelCall, SoftLabelStore
from qvit.data.reading import Reading
from qvit.data.sampling import CROP_CHOICE, Batches, derived_seed, epoch_order, process_batches
from qvit.errors import QvitError, UsageError


class _DrawnCrops(RowSamples):
    """Crops to be labelled, by `(image, their numbers)`; their target is [image, crop, sizes, box, flip]."""

    def __init__(self, source: ImageSource, call: LabelCall, how: Reading) -> None:
        super().__init__(source, None, call.channels, how, replaces=False)
        self._call = call

    def sample(self, image: Any, index: int, key: Any, bad: tuple[tuple[str, str], ...]) -> Sample:
        call, count, whole = self._call, len(key), picture(image)
        if max(whole.size) > LARGEST:
            name = self._source.filename(index)
            return Sample(None, failure=f"image {name!r} is larger than {LARGEST} pixels: make it smaller")
        size = (whole.height, whole.width)
        options: dict[str, Any] = {"scale": call.scale, "ratio": call.ratio, "flip": call.flip}
        crops = draw_crops(call.seed, index, size, first=key[0], count=count, **options)
        pixels = np.stack([replay(whole, crop, call.teacher_input[0][1:], call.interpolation) for crop in crops])
        places = np.column_stack([np.broadcast_to((index, *size), (count, 3)), key, crops])
        return Sample(pixels, places, bad)


def _by_image(pairs: Iterable[tuple[int, int]]) -> list[tuple[int, tuple[int, ...]]]:
    """Consecutive crops of an image as one: `(image, crops)`."""
    return [(image, tuple(crop for _, crop in own)) for image, own in groupby(pairs, itemgetter(0))]


class _ShardBatches(Batches):
    """Batches of `(image, crops)` of a shard, whose number takes the place of the epoch's."""

    def __init__(self, call: LabelCall, batch_size: int) -> None:
        super().__init__([])
        self._call, self._batch_size = call, batch_size

    def start(self, epoch: int, skip: int) -> None:
        super().start(epoch, skip)
        self._slices = process_batches(self._call.images_in(epoch) * self._call.crops, self._batch_size, False)

    def order(self, epoch: int) -> Callable[[slice], list[tuple[int, tuple[int, ...]]]]:
        crops = self._call.crops
        before = epoch * self._call.images_per_shard * crops
        return lambda batch: _by_image(divmod(before + n, crops) for n in range(batch.start, batch.stop))


def labelling_loader(source: ImageSource, call: LabelCall, how: Reading = Reading()) -> BatchLoader:
    """Crops for the teacher: `set_epoch(shard)`, then a pass yields (images, places [batch, 9] int64).

    A place is the image, its height and width, the crop's number, top, left, height, width and flip.
    """
    size, mean, std = call.teacher_input
    config = {"input_size": size, "mean": mean, "std": std}
    return BatchLoader(_DrawnCrops(source, call, how), source, config, how, batches=_ShardBatches(call, how.batch_size))


def choose_crops(count: int, stored: int, per_image: int, seed: int, epoch: int) -> np.ndarray:
    """The crop at each position of an epoch, `[count]`: of each image `per_image` different ones of `stored`.

    Every set of crops is equally likely (Floyd's sampling: the j-th draw is among the first `stored − per_image + j`,
    and one that was drawn already gives way to the last of these).
    """
    images = -(-count // per_image)
    generator = torch.Generator().manual_seed(derived_seed(CROP_CHOICE, seed, epoch))
    draws = torch.rand(images, per_image, generator=generator, dtype=torch.float64).numpy()
    chosen = np.full((images, per_image), -1)
    for index, last in enumerate(range(stored - per_image, stored)):
        drawn = (draws[:, index] * (last + 1)).astype(np.int64)
        chosen[:, index] = np.where((chosen == drawn[:, None]).any(1), last, drawn)
    return chosen.reshape(-1)[:count]


class _CropBatches(Batches):
    """Batches of `(image, crops)` of one process; `batch_size` counts crops."""

    def __init__(self, count: int, slices: list[slice], labels: StoredLabels, seed: int) -> None:
        super().__init__(slices)
        self._count, self._labels, self._seed = count, labels, seed

    def order(self, epoch: int) -> Callable[[slice], list[tuple[int, tuple[int, ...]]]]:
        repeats = self._labels.crops_in(epoch)
        rows, _ = epoch_order(self._count, self._seed, epoch, repeats)
        crops = choose_crops(self._count, self._labels.store.call.crops, repeats, self._seed, epoch)
        return lambda batch: _by_image(zip(rows[batch].tolist(), crops[batch].tolist(), strict=True))


class _StoredCrops(RowSamples):
    """Crops as the teacher saw them, by `(row, crops)`, with targets `[crops, 2, k]`."""

    def __init__(self, source: ImageSource, labels: StoredLabels, size: tuple[int, int], how: Reading) -> None:
        super().__init__(source, None, labels.store.call.channels, how, replaces=True)
        self._store, self._numbers, self._size = labels.store, labels.store.labelled(), size
        self._interpolation = labels.interpolation or labels.store.call.interpolation

    def sample(self, image: Any, index: int, key: Any, bad: tuple[tuple[str, str], ...]) -> Sample:
        whole = picture(image)
        try:
            size, chosen = self._store.read(int(self._numbers[index]), key)
        except QvitError as error:
            return Sample(None, bad=bad, failure=str(error))
        if size != (whole.height, whole.width):
            return Sample(
                None,
                bad=bad,
                failure=f"image {self._source.filename(index)!r} has {whole.height}x{whole.width} pixels (height x "
                f"width) and had {size[0]}x{size[1]} when it was labelled: make the labels again",
            )
        boxes = (record.item()[:5] for record in chosen)
        pixels = np.stack([replay(whole, box, self._size, self._interpolation) for box in boxes])
        return Sample(pixels, self._store.targets(chosen), bad)


@dataclass(frozen=True)
class StoredLabels:
    """How a training uses a store.

    Attributes:
        store: The labels.
        num_classes: Classes of the student.
        crops_per_image: Crops of each drawn image.
        single_from: The first epoch that draws one crop of each image; None for none.
        interpolation: Name of PIL's filter; None for the teacher's.
    """

    store: SoftLabelStore
    num_classes: int
    crops_per_image: int = 4
    single_from: int | None = None
    interpolation: str | None = None

    def __post_init__(self) -> None:
        if not 1 <= self.crops_per_image <= self.store.call.crops:
            raise UsageError(
                f"crops_per_image lies between 1 and the {self.store.call.crops} that {self.store.folder} has of each "
                f"image, unlike {self.crops_per_image}"
            )

    def crops_in(self, epoch: int) -> int:
        """Crops of each drawn image in an epoch."""
        return 1 if self.single_from is not None and epoch >= self.single_from else self.crops_per_image

    def select(self, source: Any, channels: int) -> ImageSource:
        """The images that have labels. Raises UsageError if the labels are of other images."""
        self.store.require_images(require_rows(source), num_classes=self.num_classes, channels=channels)
        return source if not self.store.unlabelled else source.subset(self.store.labelled())

    def loader(
        self, source: ImageSource, data_config: Mapping[str, Any], how: Reading, *, drop_last: bool
    ) -> BatchLoader:
        """Batches of `(images, targets [batch, 2, k])` of what `select` returned; see `train_loader`."""
        slices = process_batches(len(source), how.batch_size, drop_last, how.rank, how.world_size)
        batches = _CropBatches(len(source), slices, self, how.seed)
        height, width = data_config["input_size"][1:]
        return BatchLoader(_StoredCrops(source, self, (height, width), how), source, data_config, how, batches=batches)


def require_rows(source: Any) -> ImageSource:
    """The source, unless it is a stream. Raises UsageError for shards."""
    if not isinstance(source, ImageSource):
        raise UsageError(
            f"{source.name} is read as a stream, and soft labels belong to images by their number: give a folder, an "
            "archive or a Hugging Face data set"
        )
    return source
