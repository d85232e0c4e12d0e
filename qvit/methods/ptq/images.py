"""The images that post-training quantization looks at, of one size or of several.

Batches are of one size each. Ranges, channels, scales of probabilities and sensitivities are fitted to images of all
sizes. What keeps the tensors of all images as one, or weights tokens by their position (rounding with feedback,
reconstruction, bias correction, the worth of tokens), looks at those of the first size alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import cached_property
from typing import Any

from torch import Tensor

from qvit.errors import UsageError
from qvit.models.sizes import Size, shown_size

#: Gets a text, what is done, how much there is, and figures as text.
Progress = Callable[[str, int, int, str], None]


def sizes_of(batches: Iterable[Tensor]) -> tuple[Size, ...]:
    """The sizes of some batches (B, channels, height, width), each once, in their order; passes over them."""
    known: Any = getattr(batches, "sizes", None)
    return tuple(dict.fromkeys(_size(batch) for batch in batches)) if known is None else known


class FirstImages:
    """The first images of some batches, to be iterated any number of times; of several sizes as many of each.

    Args:
        batches: Tensors (B, channels, height, width).
        images: How many.
        text, progress: Whoever iterates is at work on `text`; `progress` is told so after each batch.
    """

    def __init__(
        self, batches: Iterable[Tensor], images: int, text: str = "", progress: Progress | None = None
    ) -> None:
        self.batches, self.images, self.text, self.progress = batches, images, text, progress

    def told(self, text: str, progress: Progress | None) -> FirstImages:
        """The same images, for another part of the work."""
        return FirstImages(self.batches, self.images, text, progress)

    @cached_property
    def sizes(self) -> tuple[Size, ...]:
        return sizes_of(self.batches)

    def __iter__(self) -> Iterator[Tensor]:
        each, more = divmod(self.images, len(self.sizes) or 1)
        left = {size: each + (place < more) for place, size in enumerate(self.sizes)}
        tell = self.progress or (lambda *_: None)
        for batch in self.batches:
            size = _size(batch)
            taken = batch[: left[size]]
            if len(taken):
                yield taken
                left[size] -= len(taken)
                tell(self.text, self.images - sum(left.values()), self.images, "")
            if not any(left.values()):
                return
        done = self.images - sum(left.values())
        tell(self.text, done, done, "")


class OfFirstSize:
    """Those of some batches that have the size of the first one, to be iterated any number of times."""

    def __init__(self, batches: Iterable[Tensor]) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[Tensor]:
        first: Size | None = None
        for batch in self.batches:
            first = first or _size(batch)
            if _size(batch) == first:
                yield batch


class OneSize:
    """Batches to be iterated any number of times, which raise UsageError unless all have one size."""

    def __init__(self, batches: Iterable[Tensor], what: str) -> None:
        self.batches, self.what = batches, what

    def __iter__(self) -> Iterator[Tensor]:
        first: Size | None = None
        for batch in self.batches:
            first = first or _size(batch)
            if _size(batch) != first:
                raise UsageError(
                    f"{self.what} takes images of one size, not of {shown_size(first)} and {shown_size(_size(batch))}: "
                    "give the batches of one of them"
                )
            yield batch


def _size(batch: Tensor) -> Size:
    return int(batch.shape[-2]), int(batch.shape[-1])
