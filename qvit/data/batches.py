"""A pass over images: samples are read in worker processes, and become normalised batches on the device.

    dataset    yields a `Sample` per position: an image, or what kept it from being one
    collate    a worker's samples as (images uint8, targets, unreadable images, failure)
    loader     notes the unreadable ones in the main process, or raises; the rest goes through timm's `PrefetchLoader`,
               which normalises on the device, one batch ahead of the model

What a worker finds out travels with its batch and not as an exception: torch would bury that in a traceback, which also
keeps the other workers alive. Random erasing works on whole batches on the device. It is drawn from (seed, epoch, batch
number, rank), so unlike the other augmentation it depends on how images are dealt out to processes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple, Protocol

import torch
from timm.data.loader import PrefetchLoader, fast_collate
from timm.data.random_erasing import RandomErasing
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from qvit.data.decoding import IN_A_ROW, BadImagePolicy, UnreadableImage, is_fatal, one_line
from qvit.data.images import ImageSource
from qvit.data.sampling import ERASING, EpochCounter, derived_seed, seeded
from qvit.errors import QvitError


class Sample(NamedTuple):
    """What became of a position: an image, or None where it is left out.

    Attributes:
        image: `[channels, height, width]` uint8, as timm's transforms make it for its prefetching loader; with a
            leading dimension where a position has several crops.
        target: The class; an array with an entry per crop where there are several.
        bad: Name and reason of each unreadable image met on the way.
        failure: Message of the error that ends the pass.
    """

    image: Any
    target: Any = -1
    bad: tuple[tuple[str, str], ...] = ()
    failure: str | None = None


def collate(samples: list[Sample], channels: int) -> tuple[Tensor, Tensor, list[tuple[str, str]], str | None]:
    """Samples as a batch, which is empty if no image is left, with all unreadable images and the first failure."""
    kept = [(sample.image, sample.target) for sample in samples if sample.image is not None]
    images, targets = torch.zeros(0, channels, 1, 1), torch.zeros(0, dtype=torch.int64)
    if kept:
        images, targets = fast_collate(kept)
    bad = [found for sample in samples for found in sample.bad]
    return images, targets, bad, next((sample.failure for sample in samples if sample.failure), None)


class RowSamples(Dataset):
    """Samples of an `ImageSource` by `(row, sample seed)`, the seed None where nothing is random.

    Args:
        source: The images.
        transform: Takes a PIL image.
        mode: "RGB" or "L".
        on_bad_image: "fatal" or "skip".
        replace: Take the next readable row of the source in the place of an unreadable one; else leave it out.
    """

    def __init__(
        self,
        source: ImageSource,
        transform: Callable[[Any], Any],
        mode: str,
        on_bad_image: BadImagePolicy,
        *,
        replace: bool,
    ) -> None:
        self._source, self._transform, self._mode = source, transform, mode
        self._fatal, self._replace = is_fatal(on_bad_image), replace
        self._in_a_row, self._last_bad = 0, -1

    def __getitem__(self, position: tuple[int, Any]) -> Sample:
        row, seed = position
        bad: list[tuple[str, str]] = []
        for candidate in range(row, row + len(self._source)):
            index = candidate % len(self._source)
            try:
                image = self._source.store.load(int(self._source.rows[index]), self._mode)
            except UnreadableImage as error:
                if self._fatal:
                    return Sample(None, failure=str(error))
                bad.append((error.image, error.reason))
                self._in_a_row += index != self._last_bad  # crops of an image that are asked for one by one are one
                self._last_bad = index
                if self._in_a_row >= IN_A_ROW:
                    return Sample(None, bad=tuple(bad), failure=too_many_in_a_row(self._source.name, error))
                if not self._replace:
                    break
                continue
            self._in_a_row = 0
            return self.sample(image, index, seed, tuple(bad))
        return Sample(None, bad=tuple(bad))

    def sample(self, image: Any, index: int, key: Any, bad: tuple[tuple[str, str], ...]) -> Sample:
        """What becomes of the image with number `index`; `key` is the second part of the position, a sample seed."""
        return Sample(transformed(self._transform, image, key), int(self._source.targets[index]), bad)


def transformed(transform: Callable[[Any], Any], image: Any, seed: int | None) -> Any:
    """`transform(image)` with the generators seeded by `seed`, and restored; as they are if it is None."""
    if seed is None:
        return transform(image)
    with seeded(seed):
        return transform(image)


def too_many_in_a_row(name: str, error: UnreadableImage) -> str:
    """The message for a pass that meets nothing but unreadable images."""
    return f"{IN_A_ROW} images in a row of {name} cannot be read, the last of them {error.image!r}: {error.reason}"


class Schedule(Protocol):
    """What decides the samples of a pass: a batch sampler, or an iterable data set."""

    def start(self, epoch: int, skip: int) -> None: ...


class BatchLoader:
    """Batches of normalised images on the device; see `LoaderLike`.

    Args:
        dataset: Yields `Sample`.
        schedule: Is told the epoch and the first batch of each pass.
        length: Batches in an epoch.
        source: Its name, length and record of bad images are used.
        data_config: `input_size`, `mean` and `std` are used.
        workers: Processes that decode; 0 to decode in this one. They end with the pass.
        device: Where batches go.
        replaces: Unreadable images are replaced, not left out.
        random_erasing: Probability of erasing a rectangle.
        seed: The run's seed, for erasing.
        rank: Number of this process, for erasing.
        collate_samples: Makes a batch of samples, as `collate` does.
        options: Further arguments of `DataLoader`: the batch sampler or the batch size.

    Attributes:
        skipped: Images left out in the latest pass, because they could not be read.
    """

    def __init__(
        self,
        dataset: Any,
        schedule: Schedule,
        length: int,
        source: Any,
        data_config: Any,
        *,
        workers: int,
        device: torch.device,
        replaces: bool,
        random_erasing: float = 0.0,
        seed: int = 0,
        rank: int = 0,
        collate_samples: Callable[..., Any] = collate,
        **options: Any,
    ) -> None:
        self._schedule, self._length, self._source, self._replaces = schedule, length, source, replaces
        self._epochs, self._found, self.skipped = EpochCounter(), dict[str, None](), 0
        channels = data_config["input_size"][0]
        loader = DataLoader(
            dataset,
            num_workers=workers,
            collate_fn=partial(collate_samples, channels=channels),
            pin_memory=device.type == "cuda",
            generator=torch.Generator(),  # else each pass draws a seed for workers from the global one
            **options,
        )
        self._prefetcher = PrefetchLoader(
            _Received(loader, self._note),  # type: ignore[arg-type]
            data_config["mean"],
            data_config["std"],
            channels,
            device,
            torch.float32,
        )
        self._erasing = _SeededErasing(random_erasing, device, seed, rank) if random_erasing else None
        self._prefetcher.random_erasing = self._erasing  # type: ignore[assignment]

    def set_epoch(self, epoch: int, skip: int = 0) -> None:
        """The next pass is that of `epoch`, without its first `skip` batches."""
        self._epochs.set_epoch(epoch, skip)

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return self._pass(*self._epochs.begin())

    def bad_images(self) -> list[str]:
        """Names of the images that could not be read, of those this loader has met so far."""
        return list(self._found)

    def _pass(self, epoch: int, skip: int) -> Iterator[tuple[Tensor, Tensor]]:
        self._schedule.start(epoch, skip)
        if self._erasing is not None:
            self._erasing.start(epoch, skip)
        self.skipped = 0
        for images, targets in self._prefetcher:
            if images.is_cuda:
                # Written on a stream of the prefetcher's. Where steps are only queued, as without a question to the
                # device, timm up to 1.0.29 would write a later batch into memory that a queued step has yet to read.
                images.record_stream(torch.cuda.current_stream(images.device))
                targets.record_stream(torch.cuda.current_stream(targets.device))
            if len(images):  # not a batch of which nothing could be read
                yield images, targets

    def _note(self, bad: list[tuple[str, str]]) -> str | None:
        """Records unreadable images; returns the message of an error if there are too many."""
        for image, reason in bad:
            self._source.bad.note(image, reason, self._source.name)
            self._found[image] = None
        self.skipped += 0 if self._replaces else len(bad)
        if not bad or 2 * len(self._found) <= len(self._source):
            return None
        image, reason = bad[-1]
        return (
            f"more than half of the {len(self._source)} images of {self._source.name} cannot be read, "
            f"such as {image!r}: {reason}"
        )


class _Received:
    """The batches of torch's loader, less what workers found out, which is noted or raised here."""

    def __init__(self, loader: DataLoader, note: Callable[[list[tuple[str, str]]], str | None]) -> None:
        self._loader, self._note = loader, note

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        failure = None
        batches: Any = iter(self._loader)
        try:
            for images, targets, bad, failed in batches:
                failure = failed or self._note(bad)
                if failure:
                    break
                yield images, targets
        except RuntimeError as error:
            if not str(error).startswith("DataLoader worker"):
                raise
            raise QvitError(
                f"a process that reads images ended unexpectedly ({one_line(error)}); "
                "it may have lacked memory: use fewer workers, or 0"
            ) from error
        finally:
            batches = None  # ends the workers now, also while a traceback keeps this frame
        if failure:
            raise QvitError(failure)


class _SeededErasing:
    """timm's random erasing, drawn from (seed, epoch, batch number, rank)."""

    def __init__(self, probability: float, device: torch.device, seed: int, rank: int) -> None:
        self._erase = RandomErasing(probability=probability, mode="pixel", device=str(device))
        self._device, self._seed, self._rank = device, seed, rank
        self.start(0, 0)

    def start(self, epoch: int, skip: int) -> None:
        self._epoch, self._batch = epoch, skip

    def __call__(self, images: Tensor) -> Tensor:
        with seeded(derived_seed(ERASING, self._seed, self._epoch, self._batch, self._rank), self._device):
            images = self._erase(images)
        self._batch += 1
        return images
