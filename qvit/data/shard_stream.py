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
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from timm.data.readers.reader_wds import SAMPLE_INITIAL_SIZE, SAMPLE_SHUFFLE_SIZE
from torch.utils.data import IterableDataset, get_worker_info

from qvit.data.batches import BatchLoader, Sample, too_many_in_a_row, transformed
from qvit.data.decoding import IN_A_ROW, BadImagePolicy, UnreadableImage, decode, is_fatal, mode_of, one_line
from qvit.data.sampling import CALIBRATION, SHARDS, derived_seed
from qvit.data.shards import IMAGE_EXTENSIONS, ShardSource
from qvit.errors import QvitError, UsageError


class ShardSamples(IterableDataset):
    """The samples of one process, a lane per worker.

    Args:
        source: The shards.
        transform: Takes a PIL image.
        mode: "RGB" or "L".
        on_bad_image: "fatal" or "skip"; then training takes the next image of the stream, evaluation goes without.
        batch_size: Images in a batch.
        lanes: Workers, 1 if images are read in the main process.
        per_lane: Images that each lane yields, repeating its shards; None for each image once, in order.
        shuffle: Mix shards and images, by `seed` and epoch.
        seed: A key of whole numbers.
        rank: Number of this process.
        world_size: How many processes there are.
    """

    def __init__(
        self,
        source: ShardSource,
        transform: Callable[[Any], Any],
        mode: str,
        on_bad_image: BadImagePolicy,
        *,
        batch_size: int,
        lanes: int,
        per_lane: int | None,
        shuffle: bool,
        seed: tuple[int, ...] = (),
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self._source, self._transform, self._mode = source, transform, mode
        self._fatal, self._batch_size = is_fatal(on_bad_image), batch_size
        self._lanes, self._per_lane, self._shuffle, self._seed = lanes, per_lane, shuffle, seed
        self._rank, self._world_size = rank, world_size
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
        before = len(range(lane, self._skip, self._lanes)) * self._batch_size
        self._bad, self._in_a_row = [], 0
        try:
            yield from self._samples(self._rank * self._lanes + lane, before)
            if self._bad:
                yield Sample(None, bad=self._met())
        except QvitError as error:
            yield Sample(None, bad=tuple(self._bad), failure=str(error.args[0]))

    def _samples(self, lane: int, before: int) -> Iterator[Sample]:
        """The samples of a lane, numbered over all processes, after the first `before`."""
        count, image, target = 0, None, -1
        for raw in self._stream(lane):
            if count >= before or not self._fatal:  # else nothing of it matters
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
                seed = derived_seed(*self._seed, self._epoch, 1 + lane, count) if self._shuffle else None
                yield Sample(transformed(self._transform, image, seed), target, self._met())
            if count == self._per_lane:
                return

    def _met(self) -> tuple[tuple[str, str], ...]:
        bad, self._bad = tuple(self._bad), []
        return bad

    def _note(self, error: UnreadableImage) -> None:
        if self._fatal:
            raise error
        self._bad.append((error.image, error.reason))
        self._in_a_row += 1
        if self._in_a_row >= IN_A_ROW:
            raise QvitError(too_many_in_a_row(self._source.name, error))

    def _stream(self, lane: int) -> Iterator[dict[str, Any]]:
        """The encoded samples of a lane; again and again if it has a number to reach."""
        from webdataset.filters import shuffle

        shards = list(self._source.shards)
        if self._shuffle:
            random.Random(derived_seed(*self._seed, self._epoch)).shuffle(shards)
        shards = shards[lane :: self._world_size * self._lanes]
        if not self._shuffle:
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
        from webdataset.tariterators import group_by_keys, tar_file_expander

        for path in shards:

            def damaged(error: Exception, path: str = path) -> bool:
                if isinstance(error, QvitError):  # raised here, at an inner level
                    raise error
                reason = f"the shard is damaged: {one_line(Exception(*error.args[:1]))}"
                self._note(UnreadableImage(Path(path).name, self._source.name, reason))
                return True

            try:
                stream = open(path, "rb")
            except OSError as error:
                damaged(error)
                continue
            with stream:
                files = tar_file_expander([{"url": path, "stream": stream}], handler=damaged)
                yield from group_by_keys(files, handler=damaged)

    def _decode(self, raw: dict[str, Any]) -> tuple[Any, int]:
        name = f"{Path(raw['__url__']).name}/{raw['__key__']}"
        encoded = next((raw[extension] for extension in IMAGE_EXTENSIONS if extension in raw), None)
        if encoded is None or "cls" not in raw:
            lacking = "no label (KEY.cls)" if encoded else f"no image (KEY.{', KEY.'.join(IMAGE_EXTENSIONS)})"
            raise UnreadableImage(name, self._source.name, f"it has {lacking}")
        try:
            target = int(raw["cls"])
        except ValueError:
            target = -1
        if not 0 <= target < self._source.num_classes:
            raise QvitError(
                f"sample {name!r} in {self._source.name} has the label {raw['cls'][:20]!r}; "
                f"classes are numbered 0 to {self._source.num_classes - 1}"
            )
        return decode(lambda: encoded, self._mode, lambda: name, self._source.name), target


def shard_loader(
    source: ShardSource,
    data_config: Mapping[str, Any],
    transform: Callable[[Any], Any],
    *,
    batch_size: int,
    workers: int,
    device: str | torch.device,
    on_bad_image: BadImagePolicy,
    training: bool,
    random_erasing: float = 0.0,
    seed: int = 0,
    rank: int = 0,
    world_size: int = 1,
) -> BatchLoader:
    """A loader for training or evaluation; arguments as for `qvit.data.loading.train_loader`.

    Raises:
        QvitError: Training with fewer shards than processes.
    """
    count = len(source.shards)
    if training and count < world_size:
        raise QvitError(f"{source.name} has {count} shards, too few for {world_size} processes; each needs one")
    workers = min(workers, -(-count // world_size) if not training else count // world_size)
    lanes = max(workers, 1)
    if training:
        per_lane = -(-len(source) // (world_size * lanes))
        length = lanes * -(-per_lane // batch_size)
        per_lane = length // lanes * batch_size
    else:
        per_lane = None
        parts = [slice(rank * lanes + lane, None, world_size * lanes) for lane in range(lanes)]
        sizes = [sum(source.lengths[part]) for part in parts] if source.lengths else [len(source) // world_size]
        length = sum(-(-size // batch_size) for size in sizes)
    samples = ShardSamples(
        source,
        transform,
        mode_of(data_config["input_size"][0]),
        on_bad_image,
        batch_size=batch_size,
        lanes=lanes,
        per_lane=per_lane,
        shuffle=training,
        seed=(SHARDS, seed),
        rank=rank,
        world_size=world_size,
    )
    return BatchLoader(
        samples,
        samples,
        length,
        source,
        data_config,
        workers=workers,
        device=torch.device(device),
        replaces=training,
        random_erasing=random_erasing,
        seed=seed,
        rank=rank,
        batch_size=batch_size,
    )


def shard_calibration_loader(
    source: ShardSource,
    data_config: Mapping[str, Any],
    transform: Callable[[Any], Any],
    *,
    images: int,
    batch_size: int,
    seed: int,
    workers: int,
    device: str | torch.device,
    on_bad_image: BadImagePolicy,
) -> BatchLoader:
    """The first `images` images after shuffling by `seed`, from a single stream, whatever the number of workers."""
    samples = ShardSamples(
        source,
        transform,
        mode_of(data_config["input_size"][0]),
        on_bad_image,
        batch_size=batch_size,
        lanes=1,
        per_lane=images,
        shuffle=True,
        seed=(CALIBRATION, seed),
    )
    return BatchLoader(
        samples,
        samples,
        -(-images // batch_size),
        source,
        data_config,
        workers=min(workers, 1),
        device=torch.device(device),
        replaces=True,
        batch_size=batch_size,
    )
