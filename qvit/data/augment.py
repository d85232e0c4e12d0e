"""What is done to an image before a model sees it, in training and in evaluation.

The transforms are timm's, set by the model's own data configuration, so that a pretrained model meets the images it was
trained for. Evaluation follows the protocol of the weights: the crop share, crop mode and interpolation of their timm
configuration, and its test size and test crop where it has them and the model takes images of any size. Transforms end
with uint8 pixels; normalisation and random erasing follow on the device (`qvit.data.batches`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image
from timm.data.auto_augment import AugmentOp, posterize
from timm.data.config import resolve_model_data_config
from timm.data.transforms_factory import create_transform
from torch import nn

from qvit.errors import UsageError, nearest


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

    timm resolves the size from the pretrained configuration, which a model made with `img_size=8` still carries. Where
    that asks for a larger size in evaluation, and the model takes any size, `test_input_size` and `test_crop_pct` are
    there as well.
    """
    config = resolve_model_data_config(model)
    trained_for = tuple(config["input_size"][1:])
    embed: Any = getattr(model, "patch_embed", None)
    size = getattr(embed, "img_size", None) or trained_for
    channels = getattr(getattr(embed, "proj", None), "in_channels", config["input_size"][0])
    config["input_size"] = (channels, *size)
    for name in ("mean", "std"):
        if len(config[name]) != channels:
            config[name] = (sum(config[name]) / len(config[name]),) * channels
    pretrained: Any = getattr(model, "pretrained_cfg", None) or {}
    takes_any_size = not pretrained.get("fixed_input_size") and getattr(embed, "img_size", None) is None
    if takes_any_size and pretrained.get("test_input_size"):
        test = resolve_model_data_config(model, use_test_size=True)
        config["test_input_size"] = (channels, *test["input_size"][1:])
        config["test_crop_pct"] = test["crop_pct"]
    return config


def config_at(data_config: Mapping[str, Any], size: Sequence[int]) -> dict[str, Any]:
    """A data configuration for images of another height and width, in training and in evaluation."""
    kept = {key: value for key, value in data_config.items() if key != "test_input_size"}
    return kept | {"input_size": (data_config["input_size"][0], *size)}


def eval_config(data_config: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a data configuration that timm's transforms take, for evaluation: with the test size and crop."""
    config = _geometry(data_config)
    for name in ("input_size", "crop_pct"):
        config[name] = data_config.get(f"test_{name}") or data_config.get(name)
    return config


def eval_transform(data_config: Mapping[str, Any]) -> Callable[[Any], Any]:
    """The model's evaluation transform, from a PIL image to uint8 pixels."""
    return create_transform(**eval_config(data_config), use_prefetcher=True)  # type: ignore[return-value]


def train_transform(data_config: Mapping[str, Any], augment: AugmentConfig) -> Callable[[Any], Any]:
    """The training transform, from a PIL image to uint8 pixels; that of evaluation, at the size of training, if off."""
    if augment.is_off:
        return create_transform(**_geometry(data_config), use_prefetcher=True)  # type: ignore[return-value]
    transform: Any = create_transform(
        **_geometry(data_config),
        is_training=True,
        use_prefetcher=True,
        scale=augment.scale,
        ratio=augment.ratio,
        hflip=augment.hflip,
        color_jitter=augment.color_jitter,  # type: ignore[arg-type]
        auto_augment=augment.auto_augment,
    )
    for op in _augment_ops(transform):
        if op.aug_fn is posterize:
            op.aug_fn = posterize_to_black
    return transform


def posterize_to_black(image: Any, bits: int, **options: Any) -> Any:
    """timm's `posterize`, which its policies ask for no bits at all at their highest level: a black image.

    Pillow makes one up to version 12 and raises ValueError from 13 on.
    """
    return posterize(image, bits, **options) if bits > 0 else Image.new(image.mode, image.size)


def _augment_ops(transform: Any) -> Iterator[AugmentOp]:
    """The operations of the policies in a transform of timm."""
    for step in getattr(transform, "transforms", []):
        for listed in getattr(step, "ops", None) or getattr(step, "policy", None) or []:
            yield from listed if isinstance(listed, list) else [listed]


def _geometry(data_config: Mapping[str, Any]) -> dict[str, Any]:
    names = ("input_size", "interpolation", "mean", "std", "crop_pct", "crop_mode")
    return {name: data_config[name] for name in names if name in data_config}
