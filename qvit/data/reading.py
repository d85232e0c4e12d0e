"""How images are read: in which batches, by whom, and where they go. Every loader takes one `Reading`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import get_args

import torch

from qvit.data.decoding import BadImagePolicy
from qvit.errors import UsageError


@dataclass(frozen=True)
class Reading:
    """How one process reads its part of some images.

    Attributes:
        batch_size: Images in a batch of this process.
        workers: Processes that decode; 0 to decode in this one. They change nothing but the time it takes.
        device: Where batches go.
        on_bad_image: "fatal": an unreadable image is an error that names it. "skip": in training the next readable
            image takes its place, otherwise it is left out.
        seed: Chooses order and augmentation, together with the epoch.
        rank: Number of this process.
        world_size: How many processes read together, each its part.

    Raises:
        UsageError: Numbers that cannot describe a loader of a process.
    """

    batch_size: int = 64
    workers: int = 0
    device: str | torch.device = "cpu"
    on_bad_image: BadImagePolicy = "fatal"
    seed: int = 0
    rank: int = 0
    world_size: int = 1

    def __post_init__(self) -> None:
        if self.batch_size < 1 or self.workers < 0:
            raise UsageError(
                f"a loader needs batch_size >= 1 and workers >= 0, not {self.batch_size} and {self.workers}"
            )
        if not 0 <= self.rank < self.world_size:
            raise UsageError(f"a loader needs 0 <= rank < world_size, not rank {self.rank} of {self.world_size}")
        if self.on_bad_image not in get_args(BadImagePolicy):
            allowed = " or ".join(f"'{name}'" for name in get_args(BadImagePolicy))
            raise UsageError(f"on_bad_image is {allowed}, not {self.on_bad_image!r}")

    @property
    def fatal(self) -> bool:
        """Whether an unreadable image is an error."""
        return self.on_bad_image == "fatal"
