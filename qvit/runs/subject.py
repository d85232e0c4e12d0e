"""Model, weights, images, transform and classes, opened in one place: what every run and measurement works on.

`open_images` opens the images alone, `float_model` makes the model for their classes, `open_subject` does both.
Calibration images come from the training images alone, the judged ones from the test images alone (`data.open` keeps
them apart and refuses one name for both). Where fewer images are asked for than there are, the seed draws them; the
float weights and the drawn images are the same in every call, which is what makes a measurement resumable.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from qvit.data.open import (
    CalibrationImages,
    DataBundle,
    LoaderLike,
    Reading,
    ShardSource,
    Source,
    beside_calibration,
    data_config_of,
    eval_loader,
    open_data,
    require_labels,
)
from qvit.errors import QvitError, UsageError
from qvit.models.create import create_model
from qvit.models.features import answers_with_features
from qvit.models.sizes import Size, check_size
from qvit.models.transformers import is_checkpoint, open_checkpoint
from qvit.runs.requests import Request
from qvit.training.checkpoint import seed_everything
from qvit.training.config import ImageOptions, SubjectOptions
from qvit.training.processes import Processes

Progress = Callable[[str, int, int], None]
#: The fewest images that an accuracy gate decides by.
FEWEST_DECIDE = 16


@dataclass(frozen=True)
class Subject:
    """A float model in eval mode on its device, and its images.

    Attributes:
        options: What was asked for.
        model: The model.
        bundle: All its images.
        judged: Those to judge by.
        data_config: timm's data configuration of the model.
        processes: Those that work together.
    """

    options: SubjectOptions
    model: nn.Module
    bundle: DataBundle
    judged: Source
    data_config: dict[str, Any]
    processes: Processes

    @property
    def device(self) -> str:
        return self.processes.device

    def reading(self, batch_size: int | None = None) -> Reading:
        """How this process reads its part of the images."""
        options = self.options
        return Reading(
            batch_size or options.batch_size,
            options.workers,
            self.device,
            options.on_bad_image,
            options.seed,
            self.processes.rank,
            self.processes.world_size,
        )

    def calibration_images(
        self, images: int, batch_size: int | None = None, sizes: tuple[Size, ...] = ()
    ) -> CalibrationImages:
        """Training images, drawn by the seed, in batches that can be iterated any number of times.

        Args:
            images: How many.
            batch_size: Of the batches.
            sizes: Heights and widths, which the images have in turn; by default that of the model.

        Raises:
            UsageError: The model does not take images of such a size.
        """
        for size in sizes:
            check_size(self.model, size)
        return CalibrationImages(self.bundle.train, self.data_config, self.reading(batch_size), images, sizes)

    def deciding_images(self, images: int, calibration: int) -> tuple[LoaderLike, LoaderLike]:
        """Two halves of at most `images` training images beside the `calibration` first ones of the seed's draw.

        Raises:
            QvitError: Fewer than `FEWEST_DECIDE` images are left.
        """
        source = beside_calibration(self.bundle.train, self.options.seed, calibration, images)
        if len(source) < FEWEST_DECIDE:
            raise QvitError(
                f"{len(source)} of the {len(self.bundle.train)} training images are left to decide by, beside "
                f"{calibration} that calibrate; at least {FEWEST_DECIDE} are needed, better 500: give more images, or "
                "fewer --calibration-images"
            )
        first, second = (self.loader(source.subset(range(start, len(source), 2))) for start in (0, 1))
        return first, second

    def calibration(self, *, images: int | None = None, skip: int = 0) -> Iterator[Tensor]:
        """Batches of the training images that a `Request` asks for; `skip` leaves out the first ones of that draw."""
        count = (images or self.request.calibration_images) + skip
        drawn = iter(self.calibration_images(count))
        return drawn if not skip else iter(torch.cat(list(drawn))[skip:].split(self.options.batch_size))

    def loader(self, source: Source | None = None, batch_size: int | None = None) -> LoaderLike:
        """Passes over the judged images, or others."""
        return eval_loader(self.judged if source is None else source, self.data_config, self.reading(batch_size))

    @property
    def request(self) -> Request:
        """The options of a measurement."""
        assert isinstance(self.options, Request)
        return self.options

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


def open_images(options: ImageOptions) -> DataBundle:
    """The images. Raises UsageError or QvitError, see `open_data`."""
    return open_data(
        options.data,
        test_data=options.eval_data,
        class_map=options.class_map,
        unlabelled=options.unlabelled,
        test_share=options.test_share,
        monitor_share=options.monitor_share,
        seed=options.seed,
    )


def float_model(
    options: SubjectOptions, num_classes: int | None, *, load: bool = True, new_classifier: bool = True
) -> nn.Module:
    """The float model for images of so many classes (None: as many as timm's has), with its weights if they are loaded.

    Args:
        options: Which model and weights.
        num_classes: Classes of the images.
        load: Whether the weights are loaded.
        new_classifier: Whether a classifier of another size than that of the weights may start untrained.

    Raises:
        UsageError: A model that there is not, or one with too few classes.
        QvitError: Weights that cannot be read, or a classifier that they do not fit.
    """
    kwargs = ({} if num_classes is None else {"num_classes": num_classes}) | options.model_kwargs
    features_alone = kwargs.get("num_classes") == 0  # whatever the images show
    if num_classes is not None and not features_alone and kwargs["num_classes"] < num_classes:
        raise UsageError(f"the data have {num_classes} classes, the model is asked for {kwargs['num_classes']}")
    if "num_classes" not in kwargs and options.weights and is_checkpoint(options.weights):
        kwargs["num_classes"] = open_checkpoint(options.weights).num_classes
    weights = options.weights if load else None
    pretrained = options.pretrained and load
    return create_model(options.model, weights=weights, pretrained=pretrained, new_classifier=new_classifier, **kwargs)


def open_subject(
    options: SubjectOptions,
    processes: Processes | None = None,
    notify: Callable[[str], None] = lambda _: None,
    *,
    new_classifier: bool = True,
) -> Subject:
    """Opens images and model; the global generators are seeded in between.

    Args:
        options: Which.
        processes: Those that work together; None: this one alone.
        notify: Is told what the images are.
        new_classifier: See `float_model`.

    Raises:
        UsageError: An option that cannot be meant, or a measurement of accuracy on images without labels.
        QvitError: Weights or data that cannot be read.
    """
    processes = processes or Processes(options.device)
    bundle = open_images(options)
    notify(bundle.note)
    seed_everything(options.seed)
    if isinstance(options, Request):
        require_labels(bundle.test, "to judge by")
    model = float_model(options, bundle.num_classes, new_classifier=new_classifier).to(processes.device).eval()
    if isinstance(options, Request) and answers_with_features(model):
        raise UsageError(
            f"{options.model} answers with features, not with classes: `qvit ptq` and `qvit evaluate` judge those, "
            "this measures accuracy"
        )
    judged = _drawn(bundle.test, options.images, options.seed) if isinstance(options, Request) else bundle.test
    return Subject(options, model, bundle, judged, data_config_of(model), processes)


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


def _drawn(source: Source, images: int | None, seed: int) -> Source:
    """`images` of the source, in its order."""
    if images is None or images >= len(source):
        return source
    if isinstance(source, ShardSource):
        raise UsageError(f"{source.name} is read as a stream, of which no images can be drawn: leave out the number")
    chosen = np.random.default_rng(seed).permutation(len(source))[:images]
    return source.subset(np.sort(chosen), f"{Path(source.name).name}, {images} drawn by seed {seed}")
