"""Loaders of tar shards: a stream per worker, through the package webdataset.

    shards of an epoch   permuted by (seed, epoch); worker w of n in process r of W takes every (W·n)-th from r·n+w
    images of a worker   its shards one after the other, mixed in a buffer (timm's WDS_SHUFFLE_SIZE, WDS_INITIAL_SIZE)
    batches              from the workers in turn

This is how timm deals out shards (`timm.data.readers.reader_wds`), with three differences. Everything is drawn from the
seed, the epoch and the numbers above, so a pass is exactly repeatable, and one that starts in the middle is the tail of
the whole one; the images before are read, but not decoded as long as `on_bad_image` is "fatal". In evaluation each
image counts once, over any number of processes, where timm repeats some and misses others. And an unreadable image is
named. As in timm, all workers yield the same number of full batches, so a few images of an epoch may be missing or come
twice; and other than for images that can be read in any order, order and augmentation depend on the number of workers
and processes.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from timm.data.readers.reader_wds import SAMPLE_INITIAL_SIZE, SAMPLE_SHUFFLE_SIZE
from torch.utils.data import IterableDataset, get_worker_info

from qvit.data.archives import DamagedArchive, content_of, members, open_archive
from qvit.data.batches import BatchLoader, Sample, too_many_in_a_row, transformed
from qvit.data.decoding import IN_A_ROW, UnreadableImage, decode, mode_of, one_line
from qvit.data.reading import Reading
from qvit.data.sampling import CALIBRATION, SHARDS, derived_seed
from qvit.data.shards import IMAGE_EXTENSIONS, SHARD_ERRORS, ShardSource, label_of
from qvit.errors import QvitError, UsageError

_META = re.compile(r"__[^/]*__($|/)")
"""Names of files that belong to no image."""


class ShardSamples(IterableDataset):
    """The samples of one process, a lane per worker.

    Args:
        source: The shards.
        transform: Takes a PIL image.
        channels: Of the images.
        how: Batch size, part and seed; in training an unreadable image gives way to the next of the stream, otherwise
            it is left out.
        lanes: Workers, 1 if images are read in the main process.
        batches: Batches of an epoch, over all lanes.
        per_lane: Images that each lane yields, repeating its shards, mixed; None for each image once, in order.
        purpose: The first word of the seeds, see `qvit.data.sampling`.
    """

    def __init__(
        self,
        source: ShardSource,
        transform: Callable[[Any], Any],
        channels: int,
        how: Reading,
        *,
        lanes: int,
        batches: int,
        per_lane: int | None,
        purpose: int = SHARDS,
    ) -> None:
        self._source, self._transform, self._mode, self._how = source, transform, mode_of(channels), how
        self._lanes, self._per_lane, self.batches = lanes, per_lane, batches
        self.replaces, self._seed = per_lane is not None, (purpose, how.seed)
        self._epoch, self._skip = 0, 0
        self._bad: list[tuple[str, str]] = []  # met since the last image that was yielded
        self._in_a_row = 0

    def start(self, epoch: int, skip: int) -> None:
        """The next iteration is that of `epoch`, from batch `skip`."""
        if skip and self._per_lane is None:
            raise UsageError(f"an evaluation of {self._source.name} starts at the first batch, not at number {skip}")
        self._epoch, self._skip = epoch, skip

    def __iter__(self) -> Iterator[Sample]:
        worker = get_worker_info()
        number = worker.id if worker is not None else 0
        # Torch asks the workers for batches in turn, always beginning with the first, so the first now takes the lane
        # whose turn it would be. That lane and the others have yielded these batches of the ones that are left out:
        lane = (number + self._skip) % self._lanes
        before = len(range(lane, self._skip, self._lanes)) * self._how.batch_size
        self._bad, self._in_a_row = [], 0
        try:
            yield from self._samples(self._how.rank * self._lanes + lane, before)
            if self._bad:
                yield Sample(None, bad=self._met())
        except QvitError as error:
            yield Sample(None, bad=tuple(self._bad), failure=str(error.args[0]))

    def _samples(self, lane: int, before: int) -> Iterator[Sample]:
        """The samples of a lane, numbered over all processes, after the first `before`."""
        count, image, target = 0, None, 0
        for raw in self._stream(lane):
            if count >= before or not self._how.fatal:  # else nothing of it matters
                try:
                    image, target = self._decode(raw)
                except UnreadableImage as error:
                    self._note(error)
                    if self._per_lane is None:
                        yield Sample(None, bad=self._met())
                    continue
                self._in_a_row = 0
            count += 1
            if count > before:
                seed = derived_seed(*self._seed, self._epoch, 1 + lane, count) if self.replaces else None
                yield Sample(transformed(self._transform, image, seed), np.array([target]), self._met())
            if count == self._per_lane:
                return

    def _met(self) -> tuple[tuple[str, str], ...]:
        bad, self._bad = tuple(self._bad), []
        return bad

    def _note(self, error: UnreadableImage) -> None:
        if self._how.fatal:
            raise error
        self._bad.append((error.image, error.reason))
        self._in_a_row += 1
        if self._in_a_row >= IN_A_ROW:
            raise QvitError(too_many_in_a_row(self._source.name, error))

    def _stream(self, lane: int) -> Iterator[dict[str, Any]]:
        """The encoded samples of a lane; again and again if it has a number to reach."""
        from webdataset.filters import shuffle

        shards = list(self._source.shards)
        if self.replaces:
            random.Random(derived_seed(*self._seed, self._epoch)).shuffle(shards)
        shards = shards[lane :: self._how.world_size * self._lanes]
        if not self.replaces:
            yield from self._read(shards)
            return
        draw = random.Random(derived_seed(*self._seed, self._epoch, 1 + lane))
        mix = shuffle(SAMPLE_SHUFFLE_SIZE, initial=SAMPLE_INITIAL_SIZE, rng=draw)
        while True:
            empty = True
            for raw in mix(self._read(shards)):
                empty = False
                yield raw
            if empty:
                raise QvitError(f"no image can be read from {len(shards)} shards of {self._source.name}")
            draw.shuffle(shards)

    def _read(self, shards: list[str]) -> Iterator[dict[str, Any]]:
        from webdataset.tariterators import group_by_keys

        for path in shards:

            def damaged(error: Exception, path: str = path) -> bool:
                if isinstance(error, QvitError) and not isinstance(error, DamagedArchive):
                    raise error  # raised here, at an inner level
                reason = f"the shard is damaged: {one_line(Exception(*error.args[:1]))}"
                self._note(UnreadableImage(Path(path).name, self._source.name, reason))
                return True

            yield from group_by_keys(_files_of(path, damaged), handler=damaged)

    def _decode(self, raw: dict[str, Any]) -> tuple[Any, int]:
        name = f"{Path(raw['__url__']).name}/{raw['__key__']}"
        encoded = next((raw[extension] for extension in IMAGE_EXTENSIONS if extension in raw), None)
        if encoded is None or "cls" not in raw:
            lacking = "no label (KEY.cls)" if encoded else f"no image (KEY.{', KEY.'.join(IMAGE_EXTENSIONS)})"
            raise UnreadableImage(name, self._source.name, f"it has {lacking}")
        target = label_of(raw["cls"])
        if target is None or target >= self._source.num_classes:
            raise QvitError(
                f"sample {name!r} in {self._source.name} has the label {raw['cls'][:20]!r}; "
                f"classes are numbered 0 to {self._source.num_classes - 1}"
            )
        return decode(lambda: encoded, self._mode, lambda: name, self._source.name), target


def _files_of(path: str, damaged: Callable[[Exception], bool]) -> Iterator[dict[str, Any]]:
    """The files of a shard, as `group_by_keys` takes them; of those that are neither image nor label only the names."""
    from webdataset.tariterators import base_plus_ext

    try:
        file, end = open_archive(Path(path))
        with file:
            for member in members(file, end):
                name = member.name
                if _META.match(name):
                    continue
                extension = (base_plus_ext(name)[1] or "").lower()
                wanted = extension in (*IMAGE_EXTENSIONS, "cls")
                yield {"fname": name, "data": content_of(file, member) if wanted else b"", "__url__": path}
    except SHARD_ERRORS as error:
        damaged(error)


def shard_loader(
    source: ShardSource,
    data_config: Mapping[str, Any],
    transform: Callable[[Any], Any],
    how: Reading,
    *,
    training: bool = False,
    calibration: int | None = None,
    random_erasing: float = 0.0,
) -> BatchLoader:
    """A loader for training, for evaluation, or of the first `calibration` images after shuffling.

    The latter are of a single stream, whatever the number of workers.

    Raises:
        QvitError: Training with fewer shards than processes.
    """
    count, world_size, size = len(source.shards), how.world_size, how.batch_size
    if training and count < world_size:
        raise QvitError(f"{source.name} has {count} shards, too few for {world_size} processes; each needs one")
    most = 1 if calibration is not None else count // world_size if training else -(-count // world_size)
    workers = min(how.workers, most)
    lanes, per_lane = max(workers, 1), calibration
    if calibration is not None:
        batches = -(-calibration // size)
    elif training:
        batches = lanes * -(-len(source) // (world_size * lanes * size))
        per_lane = batches // lanes * size
    else:
        parts = [slice(how.rank * lanes + lane, None, world_size * lanes) for lane in range(lanes)]
        sizes = [sum(source.lengths[part]) for part in parts] if source.lengths else [len(source) // world_size]
        batches = sum(-(-part // size) for part in sizes)
    samples = ShardSamples(
        source,
        transform,
        data_config["input_size"][0],
        how,
        lanes=lanes,
        batches=batches,
        per_lane=per_lane,
        purpose=SHARDS if calibration is None else CALIBRATION,
    )
    return BatchLoader(samples, source, data_config, replace(how, workers=workers), random_erasing=random_erasing)
