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

from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from timm.data.loader import PrefetchLoader
from timm.data.random_erasing import RandomErasing
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from qvit.data.decoding import IN_A_ROW, UnreadableImage, mode_of, one_line
from qvit.data.images import ImageSource
from qvit.data.reading import Reading
from qvit.data.sampling import ERASING, Batches, Passes, derived_seed, seeded
from qvit.errors import QvitError


class Sample(NamedTuple):
    """What became of a position: an image or several crops of one, or None where it is left out.

    Attributes:
        image: `[crops, channels, height, width]` uint8.
        target: The class of each crop, `[crops]` int64, or soft labels `[crops, ...]`.
        bad: Name and reason of each unreadable image met on the way.
        failure: Message of the error that ends the pass.
    """

    image: Any
    target: Any = None
    bad: tuple[tuple[str, str], ...] = ()
    failure: str | None = None


def collate(samples: list[Sample], channels: int) -> tuple[Tensor, Tensor, list[tuple[str, str]], str | None]:
    """Samples as a batch, which is empty if no image is left, with all unreadable images and the first failure."""
    kept = [sample for sample in samples if sample.image is not None]
    images, targets = torch.zeros(0, channels, 1, 1), torch.zeros(0, dtype=torch.int64)
    if kept:
        images = torch.from_numpy(np.concatenate([sample.image for sample in kept]))
        targets = torch.from_numpy(np.concatenate([sample.target for sample in kept]))
    bad = [found for sample in samples for found in sample.bad]
    return images, targets, bad, next((sample.failure for sample in samples if sample.failure), None)


class RowSamples(Dataset):
    """Samples of an `ImageSource` by `(row, sample seed)`, the seed None where nothing is random.

    Args:
        source: The images.
        transform: Takes a PIL image; None where `sample` is defined anew.
        channels: Of the images.
        how: Whether unreadable images are errors.
        replaces: Take the next readable row of the source in the place of an unreadable one; else leave it out.
    """

    def __init__(
        self,
        source: ImageSource,
        transform: Callable[[Any], np.ndarray] | None,
        channels: int,
        how: Reading,
        *,
        replaces: bool,
    ) -> None:
        self._source, self._transform, self._mode = source, transform, mode_of(channels)
        self._fatal, self.replaces = how.fatal, replaces
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
                if not self.replaces:
                    break
                continue
            self._in_a_row = 0
            return self.sample(image, index, seed, tuple(bad))
        return Sample(None, bad=tuple(bad))

    def sample(self, image: Any, index: int, key: Any, bad: tuple[tuple[str, str], ...]) -> Sample:
        """What becomes of the image with number `index`; `key` is the second part of the position, a sample seed."""
        assert self._transform is not None
        return Sample(transformed(self._transform, image, key), self._source.targets[index : index + 1], bad)


def transformed(transform: Callable[[Any], np.ndarray], image: Any, seed: int | None) -> np.ndarray:
    """`transform(image)[None]` with the generators seeded by `seed`, and restored; as they are if it is None."""
    with nullcontext() if seed is None else seeded(seed):
        return transform(image)[None]


def too_many_in_a_row(name: str, error: UnreadableImage) -> str:
    """The message for a pass that meets nothing but unreadable images."""
    return f"{IN_A_ROW} images in a row of {name} cannot be read, the last of them {error.image!r}: {error.reason}"


class BatchLoader(Passes):
    """Batches of normalised images on the device.

    Args:
        samples: Yields `Sample`: `RowSamples`, or a stream that is told the epoch and first batch of each pass itself,
            and knows its number of batches (`ShardSamples`).
        source: Its name, length and record of bad images are used.
        data_config: `input_size`, `mean` and `std` are used.
        how: Batch size, workers, device; seed and rank for erasing.
        batches: Which rows are in which batch; None for a stream.
        random_erasing: Probability of erasing a rectangle.

    Attributes:
        skipped: Images left out in the latest pass, because they could not be read; in batches that are behind.
    """

    def __init__(
        self,
        samples: Any,
        source: Any,
        data_config: Mapping[str, Any],
        how: Reading,
        *,
        batches: Batches | None = None,
        random_erasing: float = 0.0,
    ) -> None:
        self._schedule: Any = samples if batches is None else batches
        self._length: int = samples.batches if batches is None else len(batches)
        self._source, self._replaces = source, samples.replaces
        self._found, self._bad_ahead, self.skipped = dict[str, None](), deque[int](), 0
        channels, device = data_config["input_size"][0], torch.device(how.device)
        dealt: dict[str, Any] = {"batch_size": how.batch_size} if batches is None else {"batch_sampler": batches}
        loader = DataLoader(
            samples,
            num_workers=how.workers,
            collate_fn=partial(collate, channels=channels),
            pin_memory=device.type == "cuda",
            generator=torch.Generator(),  # else each pass draws a seed for workers from the global one
            **dealt,
        )
        self._prefetcher = PrefetchLoader(
            _Received(loader, self._note),  # type: ignore[arg-type]
            data_config["mean"],
            data_config["std"],
            channels,
            device,
            torch.float32,
        )
        self._erasing = _SeededErasing(random_erasing, device, how.seed, how.rank) if random_erasing else None
        self._prefetcher.random_erasing = self._erasing  # type: ignore[assignment]

    def __len__(self) -> int:
        return self._length

    def bad_images(self) -> list[str]:
        return list(self._found)

    def _pass(self, epoch: int, skip: int) -> Iterator[tuple[Tensor, Tensor]]:
        self._schedule.start(epoch, skip)
        if self._erasing is not None:
            self._erasing.start(epoch, skip)
        self.skipped, self.passed = 0, skip
        self._bad_ahead.clear()
        for images, targets in self._prefetcher:
            self.passed += 1
            self.skipped += self._bad_ahead.popleft()
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
        self._bad_ahead.append(0 if self._replaces else len(bad))
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
