"""scikit-learn's handwritten digits as an in-memory image source: 1,797 grey images of 8x8 pixels in ten classes.

The data set needs no download, so demos, tests and a first try of any option run on it. The images are the test set of
"Optical Recognition of Handwritten Digits" (Alpaydin & Kaynak, UCI, 1998); pixel values 0..16 are scaled to 0..1.

    store    images [1797, 1, 8, 8] float32 in 0..1, targets [1797] int64
    loader   (images [batch, channels, height, width] float32 normalised, targets [batch] int64), on the device

An epoch of training is one gather, one `grid_sample` over all images and a slice per batch, about 3 ms for 1,200 images
on one CPU core: the model sets the pace, not the data. Each image is turned by up to 10 degrees, shifted by up to 0.7
pixel along each axis and zoomed by 0.9 to 1.1; digits are never mirrored. Order and augmentation are drawn for the
whole epoch from (seed, epoch), as `qvit.data.sampling` says, on the CPU, whatever the device; a process takes its
part. Images are then brought to the input size of the model by bilinear interpolation (8x8 stays as it is), the grey
channel is repeated for colour models, and `mean` and `std` of the model's data configuration are applied last.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from qvit.data.reading import Reading
from qvit.data.sampling import AFFINE, Passes, derived_seed, epoch_order, process_batches
from qvit.errors import UsageError

DIGITS = "digits"
"""The name under which the data set is asked for."""

TEST_IMAGES = 597
"""How many of the 1,797 images are for testing; 1,200 remain for training."""


class DigitStore:
    """All digits, row by row; the stored form behind an image source.

    Attributes:
        images: `[1797, 1, 8, 8]` float32 in 0..1.
        targets: `[1797]` int64, the digit that was written.
        folders: The class names "0" to "9".
        codes: `targets` as an array, the form in which every store holds its labels.
    """

    origin = DIGITS

    def __init__(self) -> None:
        images, targets = _load()
        self.images = images
        self.targets = targets
        self.folders = [str(digit) for digit in range(10)]
        self.codes: np.ndarray = targets.numpy()

    def __len__(self) -> int:
        return len(self.images)

    def name(self, row: int) -> str:
        """What the image in `row` is called in listings and messages."""
        return f"digit-{row:04d}"

    def load(self, row: int, mode: str = "RGB") -> Tensor:
        """One image: `[3, 8, 8]` for mode "RGB", `[1, 8, 8]` for mode "L", float32 in 0..1."""
        return self.images[row].expand(1 if mode == "L" else 3, -1, -1)


@lru_cache(maxsize=1)
def _load() -> tuple[Tensor, Tensor]:
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise UsageError("the data 'digits' need scikit-learn; install it with: pip install 'qvit[demo]'") from error
    pixels, targets = load_digits(return_X_y=True)
    images = torch.as_tensor(pixels, dtype=torch.float32).div_(16.0).view(-1, 1, 8, 8)
    return images, torch.as_tensor(targets, dtype=torch.int64)


def random_affine(
    images: Tensor,
    rotation: float = 10.0,
    shift: float = 0.7,
    zoom: tuple[float, float] = (0.9, 1.1),
    generator: torch.Generator | None = None,
) -> Tensor:
    """Rotates, shifts and zooms every image by its own random amount, in one bilinear resampling; outside is black.

    Args:
        images: `[batch, channels, height, width]`, on any device.
        rotation: Largest angle, in degrees, either way.
        shift: Largest displacement along each axis, in pixels, either way.
        zoom: Smallest and largest magnification.
        generator: A CPU generator, so that the amounts are the same on every device; None for torch's global one.
    """
    count, _, height, width = images.shape
    draws = torch.rand(4, count, generator=generator)
    angle, right, down, magnify = draws.to(images.device)
    angle = (2 * angle - 1) * math.radians(rotation)
    right = (2 * right - 1) * (2 * shift / width)  # in grid units: the image spans -1..1
    down = (2 * down - 1) * (2 * shift / height)
    inverse = 1 / (zoom[0] + magnify * (zoom[1] - zoom[0]))
    cosine, sine = angle.cos() * inverse, angle.sin() * inverse
    theta = torch.stack([cosine, -sine, right, sine, cosine, down], dim=1).view(count, 2, 3)
    grid = functional.affine_grid(theta, list(images.shape), align_corners=False)
    return functional.grid_sample(images, grid, mode="bilinear", padding_mode="zeros", align_corners=False)


class DigitsLoader(Passes):
    """Iterates over batches of digits that were put on the device once, when the loader was made.

    Args:
        images: `[count, 1, 8, 8]` float32 in 0..1.
        targets: `[count]` int64.
        data_config: timm's data configuration; `input_size`, `mean` and `std` are used.
        how: Batch size, device, seed, and which part of every batch.
        shuffle: Draw a new order each epoch.
        augment: Apply `random_affine`.
        drop_last: Leave out a last batch that would be smaller than the others.
        repeats: How often an image is drawn for an epoch, which keeps its length.
    """

    def __init__(
        self,
        images: Tensor,
        targets: Tensor,
        data_config: Mapping[str, Any],
        how: Reading,
        *,
        shuffle: bool = False,
        augment: bool = False,
        drop_last: bool = False,
        repeats: int = 1,
    ) -> None:
        device = how.device
        self._images, self._targets = images.to(device), targets.to(device)
        self._shuffle, self._augment, self._repeats, self._seed = shuffle, augment, repeats, how.seed
        self._batches = process_batches(len(images), how.batch_size, drop_last, how.rank, how.world_size)
        self._channels, *self._size = data_config["input_size"]
        self._mean = _per_channel(data_config["mean"], self._channels).to(device)
        self._std = _per_channel(data_config["std"], self._channels).to(device)

    def __len__(self) -> int:
        return len(self._batches)

    def _pass(self, epoch: int, skip: int) -> Iterator[tuple[Tensor, Tensor]]:
        images, targets = self._images, self._targets
        if self._shuffle:
            order = epoch_order(len(images), self._seed, epoch, self._repeats)[0].to(images.device)
            images, targets = images[order], targets[order]
        if self._augment:  # all of them in one go, so that no digit depends on which others are taken
            generator = torch.Generator().manual_seed(derived_seed(AFFINE, self._seed, epoch))
            images = random_affine(images, generator=generator)
        for number, batch in enumerate(self._batches[skip:], skip + 1):
            self.passed = number
            yield self._fit(images[batch]), targets[batch]

    def _fit(self, images: Tensor) -> Tensor:
        if list(images.shape[2:]) != self._size:
            images = functional.interpolate(images, self._size, mode="bilinear", align_corners=False, antialias=True)
        return (images.expand(-1, self._channels, -1, -1) - self._mean) / self._std


def _per_channel(values: tuple[float, ...], channels: int) -> Tensor:
    """Constants as `[1, channels, 1, 1]`; their average where a grey model carries those of a colour model."""
    constants = list(values) if len(values) == channels else [sum(values) / len(values)] * channels
    return torch.tensor(constants, dtype=torch.float32).view(1, channels, 1, 1)
