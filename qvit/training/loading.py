"""Batches of images: augmentation, and the loaders for training, evaluation and calibration.

Transforms, augmentation and prefetching are timm's, set by the model's own data configuration, so that a pretrained
model meets the images it was trained for. Digits are in memory and have a loader of their own (`qvit.training.digits`).

Loaders yield `(images [batch, channels, height, width] float32 normalised, targets [batch] int64)` on the device. With
`random`, numpy and torch seeded just before a pass, a training pass is repeatable for a given number of workers: they
start anew for each pass, seeded from torch's generator. Evaluation and calibration leave the global generators alone.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from timm.data.config import resolve_model_data_config
from timm.data.loader import create_loader
from timm.data.transforms_factory import create_transform
from torch import Tensor, nn
from torch.utils.data import Sampler

from qvit.errors import QvitError, UsageError, nearest
from qvit.training.digits import DigitsLoader, DigitStore
from qvit.training.images import ImageSource, one_line

logger = logging.getLogger(__name__)


class LoaderLike(Protocol):
    """Yields `(images, targets)` on the device; every `iter()` is a new pass; `len()` is the number of batches.

    A training loader draws nothing from the global generators: what it yields depends on its seed, the epoch and the
    position in the epoch alone.
    """

    def set_epoch(self, epoch: int, skip: int = 0) -> None:
        """The next pass is that of `epoch`, without its first `skip` batches (which are not read)."""
        ...

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]: ...

    def __len__(self) -> int: ...


@dataclass(frozen=True)
class AugmentConfig:
    """What happens to a training image at random; by default as for DeiT (Touvron et al., ICML 2021), without mixing.

    Attributes:
        auto_augment: timm's policy string, such as "rand-m9-mstd0.5-inc1"; None for none.
        random_erasing: Probability that a rectangle is replaced by noise.
        hflip: Probability of mirroring.
        color_jitter: Strength of brightness, contrast and saturation changes; has no effect beside `auto_augment`.
        scale: Share of the area that a random crop keeps, from and to; None for images as in evaluation.
        ratio: Aspect ratio of a random crop, from and to.
        repeated_augmentation: How often an image is drawn for one epoch, each time augmented anew, while the epoch
            keeps its length (Hoffer et al., CVPR 2020); 0 or 1 for once.
    """

    auto_augment: str | None = "rand-m9-mstd0.5-inc1"
    random_erasing: float = 0.25
    hflip: float = 0.5
    color_jitter: float | None = None
    scale: tuple[float, float] | None = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    repeated_augmentation: int = 0

    def __post_init__(self) -> None:
        for name in ("scale", "ratio"):  # lists, when read from JSON
            value = getattr(self, name)
            if value is not None:
                object.__setattr__(self, name, tuple(value))
                if len(value) != 2 or not 0 < value[0] <= value[1]:
                    raise UsageError(f"{name} is a range (from, to) of positive numbers, not {value!r}")
        for name in ("random_erasing", "hflip"):
            if not 0 <= getattr(self, name) <= 1:
                raise UsageError(f"{name} is a probability between 0 and 1, not {getattr(self, name)!r}")
        if self.repeated_augmentation < 0:
            raise UsageError(f"repeated_augmentation counts draws of an image, not {self.repeated_augmentation!r}")
        if self.scale is None and (self.auto_augment or self.random_erasing or self.hflip or self.color_jitter):
            raise UsageError("scale=None is for no augmentation at all; see AugmentConfig.preset('none')")
        if self.auto_augment is not None:
            try:
                create_transform(32, is_training=True, auto_augment=self.auto_augment)
            except Exception as error:  # timm asserts on some malformed policies and fails to parse others
                raise UsageError(
                    f"timm has no augmentation policy '{self.auto_augment}'; an example is rand-m9-mstd0.5-inc1"
                ) from error

    @classmethod
    def preset(cls, name: str) -> AugmentConfig:
        """Settings by name: "deit" (the defaults), "light" (mild crops and mirroring) or "none" (as in evaluation)."""
        presets: dict[str, dict[str, Any]] = {
            "deit": {},
            "light": {"auto_augment": None, "random_erasing": 0.0, "scale": (0.6, 1.0)},
            "none": {"auto_augment": None, "random_erasing": 0.0, "scale": None, "hflip": 0.0},
        }
        if name not in presets:
            allowed = ", ".join(presets)
            raise UsageError(f"no augmentation is called '{name}'; allowed are {allowed}{nearest(name, presets)}")
        return cls(**presets[name])

    @property
    def is_off(self) -> bool:
        """Whether training images are those of evaluation, merely shuffled."""
        return self.scale is None


def data_config_of(model: nn.Module) -> dict[str, Any]:
    """The data configuration of a model, with the input size and channels that this instance was built for.

    timm resolves the size from the pretrained configuration, which a model made with `img_size=8` still carries.
    """
    config = resolve_model_data_config(model)
    embed: Any = getattr(model, "patch_embed", None)
    size = getattr(embed, "img_size", None) or config["input_size"][1:]
    channels = getattr(getattr(embed, "proj", None), "in_channels", config["input_size"][0])
    config["input_size"] = (channels, *size)
    for name in ("mean", "std"):
        if len(config[name]) != channels:
            config[name] = (sum(config[name]) / len(config[name]),) * channels
    return config


def train_loader(
    source: ImageSource,
    data_config: Mapping[str, Any],
    *,
    batch_size: int,
    augment: AugmentConfig = AugmentConfig(),
    workers: int = 0,
    device: str | torch.device = "cpu",
    drop_last: bool = True,
) -> LoaderLike:
    """Shuffled and augmented batches, for training.

    Digits are augmented by their own small random affine map, unless `augment` is off, whatever else it says.

    Args:
        source: The images.
        data_config: timm's data configuration of the model (`data_config_of`).
        batch_size: Images in a batch; no more than there are.
        augment: What happens to them.
        workers: Processes that decode; 0 to decode in this one.
        device: Where batches go.
        drop_last: Leave out a last batch that would be smaller than the others.

    Raises:
        QvitError: On iteration, an image that cannot be read.
    """
    if batch_size > len(source):
        logger.warning("the batch size %d is lowered to %d, all images of %s", batch_size, len(source), source.name)
        batch_size = len(source)
    if isinstance(source.store, DigitStore):
        options = {"shuffle": True, "augment": not augment.is_off, "drop_last": drop_last}
        return _digits_loader(source, data_config, batch_size, device, **options)
    loader = _timm_loader(
        source,
        data_config,
        batch_size,
        workers,
        device,
        is_training=True,
        re_prob=augment.random_erasing,
        re_mode="pixel",
        scale=augment.scale,
        ratio=augment.ratio,
        hflip=augment.hflip,
        color_jitter=augment.color_jitter,
        auto_augment=augment.auto_augment,
    )
    if augment.is_off:
        loader.dataset.transform = create_transform(**_geometry(data_config), use_prefetcher=True)
    batches = loader.loader.batch_sampler
    batches.drop_last = drop_last
    if augment.repeated_augmentation > 1:
        batches.sampler = _RepeatedDraws(len(source), augment.repeated_augmentation)
    return _NamingLoader(loader)


def eval_loader(
    source: ImageSource,
    data_config: Mapping[str, Any],
    *,
    batch_size: int,
    workers: int = 0,
    device: str | torch.device = "cpu",
) -> LoaderLike:
    """All images in their order, under the model's evaluation transform. Arguments and errors as for `train_loader`."""
    if isinstance(source.store, DigitStore):
        return _digits_loader(source, data_config, batch_size, device)
    loader = _timm_loader(source, data_config, batch_size, workers, device, is_training=False)
    loader.loader.generator = torch.Generator()  # else each pass draws a seed for workers from the global one
    return _NamingLoader(loader)


def calibration_batches(
    source: ImageSource,
    data_config: Mapping[str, Any],
    *,
    images: int,
    batch_size: int,
    seed: int = 0,
    workers: int = 0,
    device: str | torch.device = "cpu",
) -> Iterator[Tensor]:
    """Batches of `images` different training images, drawn by `seed`, under the evaluation transform.

    Args:
        source: The training images.
        data_config: timm's data configuration of the model.
        images: How many in all.
        batch_size: How many in a batch; the last has what remains.
        seed: Chooses images and order.
        workers: Processes that decode.
        device: Where batches go.

    Raises:
        QvitError: The source has fewer images, or (on iteration) one of them cannot be read.
    """
    if images < 1:
        raise UsageError(f"calibration takes at least one image, not {images}")
    if images > len(source):
        raise QvitError(
            f"too few images to calibrate: {source.name} has {len(source)}, calibration needs {images}; "
            "ask for fewer calibration images or give more training images"
        )
    order = torch.randperm(len(source), generator=torch.Generator().manual_seed(seed))
    chosen = source.subset(order[:images], f"{source.name}, for calibration")
    loader = eval_loader(chosen, data_config, batch_size=batch_size, workers=workers, device=device)
    return (batch for batch, _ in loader)


def _geometry(data_config: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a data configuration that timm's transforms and loaders take."""
    names = ("input_size", "interpolation", "mean", "std", "crop_pct", "crop_mode")
    return {name: data_config[name] for name in names if name in data_config}


def _timm_loader(
    source: ImageSource,
    data_config: Mapping[str, Any],
    batch_size: int,
    workers: int,
    device: str | torch.device,
    **options: Any,
) -> Any:
    """Makes timm's prefetching loader; its workers end with each pass."""
    if batch_size < 1 or workers < 0:
        raise UsageError(f"a loader needs batch_size >= 1 and workers >= 0, not {batch_size} and {workers}")
    device = torch.device(device)
    return create_loader(
        source.dataset(mode="L" if data_config["input_size"][0] == 1 else "RGB"),  # type: ignore[arg-type]
        batch_size=batch_size,
        num_workers=workers,
        device=device,
        pin_memory=device.type == "cuda",
        persistent_workers=False,
        **_geometry(data_config),
        **options,
    )


def _digits_loader(
    source: ImageSource, data_config: Mapping[str, Any], batch_size: int, device: str | torch.device, **options: Any
) -> DigitsLoader:
    if batch_size < 1:
        raise UsageError(f"a loader needs batch_size >= 1, not {batch_size}")
    store: Any = source.store
    images, targets = store.images[source.rows], torch.from_numpy(source.targets)
    return DigitsLoader(images, targets, data_config, batch_size=batch_size, device=torch.device(device), **options)


class _RepeatedDraws(Sampler[int]):
    """Draws an image `repeats` times in a row, and fewer images, so that the epoch keeps its length."""

    def __init__(self, count: int, repeats: int) -> None:
        self._count = count
        self._repeats = repeats

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[int]:
        drawn = torch.randperm(self._count)[: -(-self._count // self._repeats)]
        return iter(drawn.repeat_interleave(self._repeats)[: self._count].tolist())


class _NamingLoader:
    """A loader whose errors are ours, also those from a worker, which torch buries in a traceback."""

    def __init__(self, loader: Any) -> None:
        self._loader = loader

    def set_epoch(self, epoch: int, skip: int = 0) -> None: ...

    def __len__(self) -> int:
        return len(self._loader)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        try:
            yield from self._loader
        except QvitError as error:
            _, _, message = str(error).rpartition(f"{QvitError.__module__}.{QvitError.__qualname__}: ")
            # torch's frame refers to the exception and the exception to the frame. Left to the garbage collector, the
            # queues go before the workers, which then take 5 s each to end; without the circle they end at once.
            error.__traceback__ = None
            raise QvitError(message.strip()) from None
        except RuntimeError as error:
            if not str(error).startswith("DataLoader worker"):
                raise
            raise QvitError(
                f"a process that reads images ended unexpectedly ({one_line(error)}); "
                "it may have lacked memory: use fewer workers, or 0"
            ) from error
