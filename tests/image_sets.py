"""Sets of small images in every form that is read, and what tests do with loaders of them."""

from __future__ import annotations

import io
import json
import random
import tarfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from qvit.data.open import AugmentConfig, ImageSource, LoaderLike

CONFIG: dict[str, Any] = {
    "input_size": (3, 16, 16),
    "interpolation": "bicubic",
    "mean": (0.5, 0.4, 0.3),
    "std": (0.2, 0.25, 0.3),
    "crop_pct": 0.9,
    "crop_mode": "center",
}
LIGHT = AugmentConfig.preset("light")
GREY = {**CONFIG, "input_size": (1, 8, 8), "mean": (0.25,), "std": (0.5,)}

# Two workers on a machine with one core are asked for on purpose.
with_workers = pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")


def make_images(root: Path, classes: dict[str, int], seed: int = 0) -> Path:
    """Smooth random JPEGs of 24x20 pixels, `root/class/class_number.jpg`."""
    generator = np.random.default_rng(seed)
    for folder, count in classes.items():
        (root / folder).mkdir(parents=True, exist_ok=True)
        for number in range(count):
            coarse = Image.fromarray(generator.integers(0, 256, (3, 3, 3), dtype=np.uint8))
            coarse.resize((24, 20), Image.Resampling.BICUBIC).save(root / folder / f"{folder}_{number}.jpg", quality=95)
    return root


def make_tar(folder: Path, archive: Path, arcname: str = ".", mode: str = "w") -> Path:
    with tarfile.open(archive, mode) as tar:  # type: ignore[call-overload]
        tar.add(folder, arcname)
    return archive


def make_shards(
    folder: Path, labels: Sequence[int], per_shard: int, damaged: Mapping[int, bytes] | None = None
) -> list[Path]:
    """Shards `000000.tar`, ... of `per_shard` images each, keys `img0000`, ...; some with other bytes than an image's.

    The red channel of an image is its number, so that it is known by its mean.
    """
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for first in range(0, len(labels), per_shard):
        paths.append(folder / f"{first // per_shard:06d}.tar")
        with tarfile.open(paths[-1], "w") as tar:
            for number in range(first, min(first + per_shard, len(labels))):
                buffer = io.BytesIO()
                Image.new("RGB", (16, 16), (number, 0, 255)).save(buffer, "png")
                image = (damaged or {}).get(number, buffer.getvalue())
                for name, data in ((f"img{number:04d}.png", image), (f"img{number:04d}.cls", b"%d" % labels[number])):
                    member = tarfile.TarInfo(name)
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
    return paths


def write_info(folder: Path, **splits: Mapping[str, int]) -> None:
    """`_info.json` as timm reads it, from the length of each shard by split."""
    info = {
        name: {
            "name": name,
            "filenames": list(shards),
            "shard_lengths": list(shards.values()),
            "num_samples": sum(shards.values()),
        }
        for name, shards in splits.items()
    }
    (folder / "_info.json").write_text(json.dumps({"splits": info}))


def generator_states() -> list[Any]:
    """The states of all global generators, to be compared by ==."""
    return [random.getstate(), np.random.get_state()[1].tolist(), torch.random.get_rng_state().tolist()]  # type: ignore[index,union-attr]


def names(source: ImageSource) -> list[str]:
    return [source.filename(i) for i in range(len(source))]


def drain(loader: LoaderLike) -> tuple[torch.Tensor, torch.Tensor]:
    """All images and targets of one pass."""
    images, targets = zip(*loader, strict=True)
    return torch.cat(images), torch.cat(targets)


def same(a: Iterable[torch.Tensor], b: Iterable[torch.Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
