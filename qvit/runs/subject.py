"""What a measurement without training works on: a float model, images to calibrate with, and images to judge by.

`Request` holds the options, `open_subject` the things. Calibration images come from the training images alone, the
judged ones from the test images alone (`training.data.open_data` keeps them apart and refuses one name for both). Where
fewer images are asked for than there are, the seed draws them; the float weights and the drawn images are the same in
every call, which is what makes a measurement resumable.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from qvit.data.open import (
    DataBundle,
    LoaderLike,
    ShardSource,
    Source,
    calibration_batches,
    data_config_of,
    eval_loader,
    open_data,
)
from qvit.errors import UsageError
from qvit.models.create import create_model
from qvit.runs.requests import Request
from qvit.training.checkpoint import seed_everything
from qvit.training.processes import Processes

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Subject:
    """A float model in eval mode and its images."""

    request: Request
    model: nn.Module
    bundle: DataBundle
    judged: Source
    data_config: dict[str, Any]
    device: str

    def calibration(self, *, images: int | None = None, skip: int = 0) -> Iterator[Tensor]:
        """Batches of training images, drawn by the seed; `skip` leaves out the first ones of that draw."""
        count, size = images or self.request.calibration_images, self.request.batch_size
        drawn = calibration_batches(
            self.bundle.train,
            self.data_config,
            images=count + skip,
            batch_size=min(size, count + skip),
            seed=self.request.seed,
            workers=self.request.workers,
            device=self.device,
        )
        if not skip:
            return drawn
        return iter(torch.cat(list(drawn))[skip:].split(size))

    def loader(self) -> LoaderLike:
        """A pass over the judged images."""
        return eval_loader(
            self.judged,
            self.data_config,
            batch_size=self.request.batch_size,
            workers=self.request.workers,
            device=self.device,
        )

    def settings(self) -> dict[str, Any]:
        """What a measurement depends on, as plain data; weights by their content."""
        request = self.request
        return {
            "model": request.model,
            "model_kwargs": dict(request.model_kwargs),
            "weights_sha256": fingerprint(self.model),
            "data": request.data,
            "eval_data": request.eval_data,
            "images": len(self.judged),
            "calibration_images": request.calibration_images,
            "seed": request.seed,
        }


def open_subject(request: Request) -> Subject:
    """Opens model and images.

    Raises:
        UsageError: An option that cannot be meant, or training images that are judged by, too.
        QvitError: Weights or data that cannot be read.
    """
    for name in ("images", "calibration_images", "batch_size"):
        value = getattr(request, name)
        if value is not None and value < 1:
            raise UsageError(f"{name.replace('_', ' ')} must be at least 1, not {value}")
    bundle = open_data(request.data, test_data=request.eval_data, class_map=request.class_map)
    seed_everything(request.seed)
    kwargs = {"num_classes": bundle.num_classes, **request.model_kwargs}
    device = Processes(request.device).device
    model = create_model(request.model, weights=request.weights, pretrained=request.pretrained, **kwargs)
    model = model.to(device).eval()
    judged = _drawn(bundle.test, request.images, request.seed)
    return Subject(request, model, bundle, judged, data_config_of(model), device)


def fingerprint(model: nn.Module) -> str:
    """The first 16 digits of the SHA-256 of all parameters and buffers."""
    digest = hashlib.sha256()
    for key, value in model.state_dict().items():
        digest.update(key.encode())
        digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


@torch.no_grad()
def logits(
    model: nn.Module,
    loader: Iterable[tuple[Tensor, Tensor]],
    progress: Callable[[int], None] | None = None,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Logits and true classes of every batch, on the CPU; `progress` gets the number of images."""
    done = 0
    for images, targets in loader:
        yield model(images).cpu(), targets.cpu()
        done += len(images)
        if progress is not None:
            progress(done)


def answers(
    model: nn.Module,
    loader: Iterable[tuple[Tensor, Tensor]],
    progress: Callable[[int], None] | None = None,
) -> tuple[Tensor, Tensor]:
    """The predicted and the true class of every image, int64 on the CPU; `progress` gets the number of images."""
    predicted, truth = zip(*((own.argmax(-1), true) for own, true in logits(model, loader, progress)), strict=True)
    return torch.cat(predicted), torch.cat(truth)


def percent_equal(first: Tensor, second: Tensor) -> float:
    """How many of the entries agree, in percent."""
    return 100.0 * float((first == second).double().mean())


def standard_error(percent: float, images: int) -> float:
    """Standard error of a share of `images`, all in percent."""
    return math.sqrt(max(percent * (100.0 - percent), 0.0) / images)


def paired_standard_error(first: Tensor, second: Tensor) -> float:
    """Standard error of the difference of two shares of the same images, from two bool tensors, in percent."""
    difference = first.double() - second.double()
    return 100.0 * float(difference.std(correction=0)) / math.sqrt(len(difference))


class Stopwatch:
    """Seconds by stage: `with watch("calibration"): ...`."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._stage, self._since = "", 0.0

    def __call__(self, stage: str) -> Stopwatch:
        self._stage = stage
        return self

    def __enter__(self) -> None:
        self._since = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        spent = time.perf_counter() - self._since
        self.seconds[self._stage] = round(self.seconds.get(self._stage, 0.0) + spent, 3)


def _drawn(source: Source, images: int | None, seed: int) -> Source:
    """`images` of the source, in its order."""
    if images is None or images >= len(source):
        return source
    if isinstance(source, ShardSource):
        raise UsageError(f"{source.name} is read as a stream, of which no images can be drawn: leave out the number")
    chosen = np.random.default_rng(seed).permutation(len(source))[:images]
    return source.subset(np.sort(chosen), f"{Path(source.name).name}, {images} drawn by seed {seed}")
