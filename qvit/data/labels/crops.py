"""Crops of an image: drawn as for Inception (a share of the area, an aspect ratio), and replayed exactly.

Crop c of image i depends on (seed, i, c) alone: Philox, keyed by (seed, i), is a stream that can be entered anywhere,
and every crop takes the same number of draws from it. Hence crops can be drawn in parts, in any order, and a store of
500 crops per image begins with those of one of 20.

    area      uniform share of H·W, from `scale`
    ratio     log-uniform, from `ratio`
    h, w      round(√(area / ratio)), round(√(area · ratio)); of ten draws the first that fits counts, else the largest
              centred box whose ratio is allowed
    pixels    the box, cut out and then resized (what lies outside has no influence), then mirrored
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from qvit.data.sampling import CROPS, derived_seed

ATTEMPTS = 10
_BLOCKS = 6  # of four numbers, that a crop takes from Philox: area and ratio for each attempt, place, flip, one unused
LARGEST = 2**16 - 1
"""Height and width of an image must fit into 16 bits."""


def draw_crops(
    seed: int,
    image: int,
    size: tuple[int, int],
    *,
    first: int,
    count: int,
    scale: tuple[float, float],
    ratio: tuple[float, float],
    flip: float,
) -> np.ndarray:
    """Crops `first` to `first + count` of an image.

    Args:
        seed: Chooses the crops.
        image: The image's number.
        size: Its height and width.
        first: Number of the first crop.
        count: How many.
        scale: Share of the area, from and to.
        ratio: Width over height, from and to.
        flip: Probability of mirroring.

    Returns:
        `[count, 5]` int64: top, left, height, width, flip.
    """
    height, width = size
    draws = _uniform(derived_seed(CROPS, seed, image), first, count)
    areas = height * width * (scale[0] + draws[:, 0:ATTEMPTS] * (scale[1] - scale[0]))
    low, high = math.log(ratio[0]), math.log(ratio[1])
    ratios = np.exp(low + draws[:, ATTEMPTS : 2 * ATTEMPTS] * (high - low))
    heights, widths = np.rint(np.sqrt(areas / ratios)), np.rint(np.sqrt(areas * ratios))
    fits = (heights > 0) & (heights <= height) & (widths > 0) & (widths <= width)
    attempt = (np.arange(count), fits.argmax(1))
    whole_height, whole_width = _largest_box(height, width, ratio)
    found = fits.any(1)
    h = np.where(found, heights[attempt], whole_height)
    w = np.where(found, widths[attempt], whole_width)
    down, right, mirrored = draws[:, 2 * ATTEMPTS : 2 * ATTEMPTS + 3].T
    top = np.where(found, np.floor(down * (height - h + 1)), (height - h) // 2)
    left = np.where(found, np.floor(right * (width - w + 1)), (width - w) // 2)
    return np.stack([top, left, h, w, mirrored < flip], axis=1).astype(np.int64)


def _uniform(key: int, first: int, count: int) -> np.ndarray:
    """`[count, 24]` numbers in 0..1 of 53 bits, from the raw bits of Philox, which no version of numpy may change."""
    bits = np.random.Philox(key=key)
    bits.advance(first * _BLOCKS)
    return ((bits.random_raw(count * _BLOCKS * 4) >> np.uint64(11)) * 2.0**-53).reshape(count, _BLOCKS * 4)


def _largest_box(height: int, width: int, ratio: tuple[float, float]) -> tuple[int, int]:
    """Height and width of the largest box with an allowed ratio."""
    if width < ratio[0] * height:
        return max(1, min(height, round(width / ratio[0]))), width
    if width > ratio[1] * height:
        return height, max(1, min(width, round(height * ratio[1])))
    return height, width


def picture(image: Any) -> Image.Image:
    """An image as a store of images returns it, as a PIL image; digits, `[channels, 8, 8]` in 0..1, in 8 bits."""
    if not isinstance(image, Tensor):
        return image
    pixels = (image * 255).round().byte().permute(1, 2, 0).numpy()
    return Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels)


def replay(image: Image.Image, crop: Any, size: tuple[int, int], interpolation: str) -> np.ndarray:
    """The pixels of a crop, `[channels, height, width]` uint8.

    Args:
        image: The whole image.
        crop: Top, left, height, width and flip.
        size: Height and width of the result.
        interpolation: Name of one of PIL's filters, such as "bicubic".
    """
    top, left, height, width, flip = (int(value) for value in crop)
    part = image.crop((left, top, left + width, top + height))
    part = part.resize((size[1], size[0]), Image.Resampling[interpolation.upper()])
    if flip:
        part = part.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    pixels = np.asarray(part)
    return pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)
