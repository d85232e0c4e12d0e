"""Which images an epoch consists of, in which order and with which random numbers: a function of (seed, epoch) alone.

    order of an epoch    (row, sample seed) for each position, drawn from a generator seeded by (seed, epoch)
    global batch g       positions g·B·W to (g+1)·B·W of the order, for W processes with B images per batch each
    process r            the r-th B positions of each global batch

Hence one process with batches of 2B images and two processes with batches of B see the same images, augmented alike, in
the same steps; a pass can start at any batch without reading those before it; and nothing depends on, or changes, the
global generators or the number of workers. With repeated augmentation (Hoffer et al., CVPR 2020) an image has several
consecutive positions, each with a sample seed of its own. The DeiT code deals these repeats out to the processes; here
their place in the order decides, so that the training does not depend on the number of processes.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Sampler

from qvit.data.reading import Reading
from qvit.errors import UsageError

# The first word of a key says what the numbers are for, so that no two streams of a run are the same.
ORDER, AFFINE, ERASING, SHARDS, CALIBRATION, CROPS, CROP_CHOICE = 1, 2, 3, 4, 5, 6, 7


def derived_seed(*key: int) -> int:
    """A seed of 63 bits from a key of whole numbers, by numpy's `SeedSequence`, whose hash is fixed for good."""
    return int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> np.uint64(1))


@contextmanager
def seeded(seed: int, device: torch.device | None = None) -> Iterator[None]:
    """Seeds `random`, numpy and torch (its CPU generator, and that of a CUDA `device`), and restores them afterwards.

    torch's own `manual_seed` would seed all devices, and no longer know the state they had.
    """
    generators = [torch.default_generator]
    if device is not None and device.type == "cuda":
        index = torch.cuda.current_device() if device.index is None else device.index
        generators.append(torch.cuda.default_generators[index])
    states = [generator.get_state() for generator in generators]
    python, legacy = random.getstate(), np.random.get_state()
    try:
        random.seed(seed)
        np.random.seed(seed % 2**32)
        for generator in generators:
            generator.manual_seed(seed)
        yield
    finally:
        random.setstate(python)
        np.random.set_state(legacy)
        for generator, state in zip(generators, states, strict=True):
            generator.set_state(state)


def epoch_order(count: int, seed: int, epoch: int, repeats: int = 1) -> tuple[Tensor, Tensor]:
    """The order of an epoch.

    Args:
        count: Images there are, which is also the length of the order.
        seed: The run's seed.
        epoch: The epoch's number.
        repeats: How often an image is drawn; the epoch has so many times fewer of them.

    Returns:
        `rows [count]` and `seeds [count]`, int64: the image at each position, and the seed of its augmentation.
    """
    generator = torch.Generator().manual_seed(derived_seed(ORDER, seed, epoch))
    rows = torch.randperm(count, generator=generator)
    if repeats > 1:
        rows = rows[: -(-count // repeats)].repeat_interleave(repeats)[:count]
    return rows, torch.randint(2**62, (count,), generator=generator)


def process_batches(count: int, batch_size: int, drop_last: bool, rank: int = 0, world_size: int = 1) -> list[slice]:
    """Positions of the batches of one process in an order of `count` positions; as many as each other process has.

    Without `drop_last` the images that fill no global batch are dealt out in parts of nearly equal size, if there is
    one for each process.
    """
    whole = batch_size * world_size
    batches, rest = divmod(count, whole)
    starts = (batch * whole + rank * batch_size for batch in range(batches))
    found = [slice(start, start + batch_size) for start in starts]
    if not drop_last and rest >= world_size:
        first, last = (batches * whole + rest * part // world_size for part in (rank, rank + 1))
        found.append(slice(first, last))
    return found


class Batches(Sampler[list[Any]]):
    """Batches of the positions of one process; subclasses say what is at a position of an epoch.

    Args:
        slices: The positions of each batch, see `process_batches`.
    """

    def __init__(self, slices: list[slice]) -> None:
        self._slices, self._epoch, self._skip = slices, 0, 0

    def start(self, epoch: int, skip: int) -> None:
        """The next iteration is that of `epoch`, from batch `skip`."""
        self._epoch, self._skip = epoch, skip

    def order(self, epoch: int) -> Callable[[slice], list[Any]]:
        """What is at given positions of an epoch."""
        raise NotImplementedError

    def __len__(self) -> int:
        return len(self._slices)

    def __iter__(self) -> Iterator[list[Any]]:
        return map(self.order(self._epoch), self._slices[self._skip :])


class EpochBatches(Batches):
    """Batches of `(row, sample seed)`, in the order of an epoch of `count` images; see `epoch_order`."""

    def __init__(self, count: int, how: Reading, *, repeats: int = 1, drop_last: bool = True) -> None:
        super().__init__(process_batches(count, how.batch_size, drop_last, how.rank, how.world_size))
        self._count, self._seed, self._repeats = count, how.seed, repeats

    def order(self, epoch: int) -> Callable[[slice], list[tuple[int, int]]]:
        rows, seeds = epoch_order(self._count, self._seed, epoch, self._repeats)
        return lambda batch: list(zip(rows[batch].tolist(), seeds[batch].tolist(), strict=True))


class RowBatches(Batches):
    """Batches of `(row, None)`: all rows in their order, the same in each epoch."""

    def __init__(self, count: int, batch_size: int) -> None:
        super().__init__(process_batches(count, batch_size, drop_last=False))

    def order(self, epoch: int) -> Callable[[slice], list[tuple[int, None]]]:
        return lambda batch: [(row, None) for row in range(batch.start, batch.stop)]


class Passes:
    """Base of loaders: yields `(images, targets)` on the device; every `iter()` is a new pass.

    `len()` is the batches of an epoch. A training loader draws nothing from the global generators: what it yields
    depends on its seed, the epoch and the position in the epoch alone. Without `set_epoch` the first pass is that of
    epoch 0, the next that of epoch 1, ...

    Attributes:
        passed: Batches of the latest pass that are behind: those it began after, and those that had no image left.
    """

    _next = (0, 0)
    passed = 0

    def set_epoch(self, epoch: int, skip: int = 0) -> None:
        """The next pass is that of `epoch`, without its first `skip` batches.

        These are not read; only a stream of shards has to pass over them.
        """
        if epoch < 0 or skip < 0:
            raise UsageError(f"a pass needs epoch >= 0 and skip >= 0, not {epoch} and {skip}")
        self._next = (epoch, skip)

    def bad_images(self) -> list[str]:
        """Names of the images that could not be read, of those the loader has met so far."""
        return []

    def __len__(self) -> int:
        raise NotImplementedError

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        epoch, skip = self._next
        self._next = (epoch + 1, 0)
        return self._pass(epoch, skip)

    def _pass(self, epoch: int, skip: int) -> Iterator[tuple[Tensor, Tensor]]:
        raise NotImplementedError
