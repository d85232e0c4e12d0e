"""A checkpoint of `transformers`, as the same model of timm's class.

    config.json               which model: `model_type` and `architectures` choose the file that knows it
    model.safetensors         its weights; renamed, with q, k and v side by side, they are timm's
    preprocessor_config.json  how images are prepared: it becomes the transform

`transformers` is not needed. Each type of model is a file of this folder: a `Converter` with the arguments of timm's
model and the list of `Pair`s, from which both directions follow. A converted model computes what the original does;
what timm cannot express is refused with its reason. What the model is asked for by name is its evaluation: dropout is
not read, nor are weights that no answer depends on (mask tokens, poolers, the text half of CLIP).

The files are strangers': numbers are bounded by `models/architecture.py` before anything is made from them, every
tensor is either used or named in `unused`, and the shapes are compared with those of timm's model.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from qvit.errors import QvitError, UsageError, first_line, shown
from qvit.files import read_object
from qvit.models.architecture import check_arguments
from qvit.registry import Registry

if TYPE_CHECKING:
    from torch import Tensor

CONFIG, WEIGHTS, PREPARATION = "config.json", "model.safetensors", "preprocessor_config.json"
HALF, IMAGENET_MEAN, IMAGENET_STD = [0.5] * 3, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
CLIP_MEAN, CLIP_STD = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]
#: Names of activation functions, theirs to timm's.
_ACTIVATIONS = {
    "gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh", "quick_gelu": "quick_gelu",
    "relu": "relu", "silu": "silu",
}  # fmt: skip
_INTERPOLATIONS = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic"}
_HUB_NAME = re.compile(r"(?!timm/)[\w-][\w.-]{0,95}/[\w-][\w.-]{0,95}(?<!\.safetensors)(?<!\.json)")


class Pair(NamedTuple):
    """A tensor of timm's model, and the tensors that it consists of, one below the other.

    Attributes:
        ours: Its name in timm.
        theirs: Their names in `transformers`, without the prefix of the class.
        leading: How many dimensions of size 1 timm's has before theirs.
        outside: Whether the names have no prefix: classifiers.
    """

    ours: str
    theirs: tuple[str, ...]
    leading: int = 0
    outside: bool = False


def layer(ours: str, *theirs: str, bias: bool = True, outside: bool = False) -> Iterator[Pair]:
    """Weight and bias of a layer, or of several side by side."""
    for name in ("weight", "bias") if bias else ("weight",):
        yield Pair(f"{ours}.{name}", tuple(f"{each}.{name}" for each in theirs), outside=outside)


class Converter:
    """What a type of model is in timm. A file of this folder defines one and registers it by its `model_type`."""

    #: The classes of `transformers` that are read, with the prefix that their vision model's tensors have.
    classes: Mapping[str, str]
    #: Classes that are refused, with the reason.
    refused: Mapping[str, str] = {}
    #: Tensors that no answer depends on: a regular expression of names without prefix.
    unused: str = r"(?!)"
    #: Whether images may have another size than `image_size`: then it is that of the crop.
    any_size: bool = False
    #: How images are prepared where the folder does not say.
    preparation: Mapping[str, Any] = {}

    def arguments(self, config: Config) -> tuple[str, dict[str, Any]]:
        """timm's name and arguments; `num_classes` is among them only where there is no classifier."""
        raise NotImplementedError

    def pairs(self, config: Config) -> Iterator[Pair]:
        """All tensors of timm's model."""
        raise NotImplementedError

    def adapt(self, config: Config, state: dict[str, Tensor], grid: tuple[int, int]) -> None:
        """Changes of values on the way to timm, in place; `grid` has the rows and columns of patches."""

    def restore(self, config: Config, state: dict[str, Tensor]) -> None:
        """The inverse of `adapt`, in place."""


CONVERTERS: Registry[str, Converter] = Registry("model type of transformers", "qvit.models.transformers")


def register_converter(*types: str) -> Any:
    """Class decorator: makes one instance responsible for these values of `model_type`."""

    def register(cls: type[Converter]) -> type[Converter]:
        CONVERTERS.register(*types)(cls())
        return cls

    return register


class Config:
    """A config.json, or a part of it: its values, each with its type checked."""

    def __init__(self, values: Mapping[str, Any], where: str, architecture: str) -> None:
        self.values, self.where, self.architecture = values, where, architecture

    def part(self, key: str) -> Config:
        """The config below a key; the whole one where there is none."""
        found = self.values.get(key)
        return (
            self if found is None else Config(_object(found, f"{self.where}: '{key}'"), self.where, self.architecture)
        )

    def whole(self, key: str, default: int | None = None, *, least: int = 1) -> int:
        """A whole number."""
        value = self.values.get(key, default)
        if type(value) is not int or not least <= value <= 1 << 20:
            raise QvitError(f"{self.where}: '{key}' is {shown(value)}, not a whole number from {least} to {1 << 20}")
        return value

    def number(self, key: str, default: float) -> float:
        """A number."""
        value = self.values.get(key, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) <= 1e6:
            raise QvitError(f"{self.where}: '{key}' is {shown(value)}, not a number up to a million")
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        """True or false."""
        value = self.values.get(key, default)
        if not isinstance(value, bool):
            raise QvitError(f"{self.where}: '{key}' is {shown(value)}, neither true nor false")
        return value

    def sides(self, key: str, default: int) -> tuple[int, int]:
        """One or two whole numbers: height and width."""
        value = self.values.get(key, default)
        found = value if isinstance(value, list) else [value, value]
        if len(found) != 2 or not all(type(side) is int and 1 <= side <= 4096 for side in found):
            raise QvitError(f"{self.where}: '{key}' is {shown(value)}, not one or two sides from 1 to 4096")
        return found[0], found[1]

    def wholes(self, key: str) -> list[int]:
        """A list of whole numbers."""
        value = self.values.get(key)
        if not isinstance(value, list) or not 1 <= len(value) <= 8 or not all(type(v) is int for v in value):
            raise QvitError(f"{self.where}: '{key}' is {shown(value)}, not a list of up to 8 whole numbers")
        return value

    def activation(self) -> str:
        """timm's name of the activation function."""
        value = self.values.get("hidden_act", "gelu")
        if value not in list(_ACTIVATIONS):
            raise QvitError(f"{self.where}: the activation {shown(value)} is none of {', '.join(_ACTIVATIONS)}")
        return _ACTIVATIONS[value]

    def require(self, key: str, default: Any, wanted: Any, reason: str) -> None:
        """Raises QvitError where a value is another than the one that timm's class can express."""
        if self.values.get(key, default) != wanted:
            raise QvitError(f"{self.where}: '{key}' is {shown(self.values.get(key, default))}: {reason}")

    @property
    def labels(self) -> int:
        """The number of classes; `transformers` leaves out two."""
        labels = self.values.get("id2label")
        if labels is None:
            return self.whole("num_labels", 2)
        return len(_object(labels, f"{self.where}: 'id2label'"))

    @property
    def classifies(self) -> bool:
        """Whether the class has a classifier."""
        return "ForImageClassification" in self.architecture

    def common(self) -> dict[str, Any]:
        """The arguments that all models without stages have."""
        width = self.whole("hidden_size", 768)
        return {
            "img_size": list(self.sides("image_size", 224)),
            "patch_size": self.whole("patch_size", 16),
            "in_chans": self.whole("num_channels", 3),
            "embed_dim": width,
            "depth": self.whole("num_hidden_layers", 12),
            "num_heads": self.whole("num_attention_heads", 12),
            "mlp_ratio": ratio(self.whole("intermediate_size", 4 * width), width),
        }


def ratio(hidden: int, width: int) -> float:
    """The ratio by which timm's `int(width * ratio)` is exactly `hidden`."""
    return hidden / width if int(width * (hidden / width)) == hidden else (hidden + 0.5) / width


@dataclass(frozen=True)
class Checkpoint:
    """A folder that `save_pretrained` of `transformers` wrote.

    Attributes:
        folder: Where it is.
        converter: What knows its type.
        config: Its config.
        name: timm's name of the model.
        kwargs: Arguments of `qvit.create_model`.
        num_classes: Classes of its classifier; 0 where it has none.
    """

    folder: Path
    converter: Converter
    config: Config
    name: str
    kwargs: dict[str, Any]
    num_classes: int

    def to_timm(self, tensors: Mapping[str, Tensor], grid: tuple[int, int], *, head: bool = True) -> dict[str, Tensor]:
        """The weights by timm's names.

        Args:
            tensors: Those of the file.
            grid: Rows and columns of the patches of timm's model.
            head: Whether timm's model has a classifier.

        Raises:
            QvitError: Tensors that are missing, unknown, or do not fit side by side.
        """
        import torch

        names = {pair: self._theirs(pair, tensors) for pair in self.converter.pairs(self.config)}
        used = {name for theirs in names.values() for name in theirs}
        missing = sorted(used - set(tensors))
        unused = re.compile(self.converter.unused)
        unknown = sorted(
            name for name in set(tensors) - used if not unused.fullmatch(name.removeprefix(self._prefix(tensors)))
        )
        for what, found in (("lack", missing), ("have the unknown", unknown)):
            if found:
                more = f" and {len(found) - 1} more" if len(found) > 1 else ""
                raise QvitError(
                    f"the weights {self.folder / WEIGHTS} {what} '{found[0]}'{more}: not those of its config"
                )
        state = {}
        for pair, theirs in names.items():
            parts = [tensors[name] for name in theirs]
            if len({part.shape[1:] for part in parts}) > 1 or any(not part.dim() for part in parts):
                raise QvitError(f"the weights {self.folder / WEIGHTS} do not fit together: '{theirs[0]}' and the like")
            value = parts[0] if len(parts) == 1 else torch.cat(parts)
            state[pair.ours] = value[(None,) * pair.leading]
        try:
            self.converter.adapt(self.config, state, grid)
        except RuntimeError as error:  # of torch, for shapes that do not fit the config
            raise QvitError(f"the weights {self.folder / WEIGHTS} do not fit its config: {first_line(error)}") from None
        if not head:
            state = {key: value for key, value in state.items() if not re.match(r"head(_dist|\.fc)?\.", key)}
        return state

    def to_transformers(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The weights of timm's model by the names of `transformers`; the inverse of `to_timm`.

        Tensors that no answer depends on are not there: load them with `strict=False`.
        """
        own = dict(state)
        self.converter.restore(self.config, own)
        found = {}
        for pair in self.converter.pairs(self.config):
            value = own.pop(pair.ours)
            value = value.reshape(value.shape[pair.leading :])
            prefix = "" if pair.outside else self.converter.classes[self.config.architecture]
            found.update(zip((prefix + name for name in pair.theirs), value.chunk(len(pair.theirs)), strict=True))
        if own:
            raise UsageError(f"'{min(own)}' has no place in a {self.config.architecture}")
        return found

    def _prefix(self, tensors: Iterable[str]) -> str:
        """The prefix of the vision model's tensors; a file of the bare model has none."""
        prefix = self.converter.classes[self.config.architecture]
        return prefix if any(name.startswith(prefix) for name in tensors) else ""

    def _theirs(self, pair: Pair, tensors: Iterable[str]) -> list[str]:
        prefix = "" if pair.outside else self._prefix(tensors)
        return [prefix + name for name in pair.theirs]


def is_checkpoint(folder: str | Path) -> bool:
    """Whether a folder holds a model of `transformers`: its config.json names a `model_type`."""
    path = Path(folder) / CONFIG
    try:
        return os.path.isfile(path) and "model_type" in read_object(path, "config")
    except QvitError:
        return False


def open_checkpoint(folder: str | Path) -> Checkpoint:
    """Reads config and preparation of a folder; the weights stay where they are.

    Raises:
        UsageError: A type or class of model that is not read, with the reason.
        QvitError: Files that are missing, damaged, or describe no model.
    """
    path = Path(folder)
    values = read_object(path / CONFIG, "config")
    kind, classes = values.get("model_type"), values.get("architectures")
    if not isinstance(kind, str) or kind not in CONVERTERS:
        raise UsageError(
            f"{path / CONFIG}: models of type {shown(kind)} are not read (types that are: {', '.join(CONVERTERS)})"
        )
    converter = CONVERTERS[kind]
    name = classes[0] if isinstance(classes, list) and classes else next(iter(converter.classes))
    if not isinstance(name, str) or name not in converter.classes:
        known = converter.refused.get(name) if isinstance(name, str) else None
        reason = known or f"of type '{kind}', {', '.join(converter.classes)} are"
        raise UsageError(f"{path / CONFIG}: the class {shown(name)} is not read: {reason}")
    config = Config(values, str(path / CONFIG), name)
    timm_name, kwargs = converter.arguments(config)
    kwargs |= preparation(path, converter, kwargs)
    classes = kwargs.get("num_classes", config.labels if config.classifies else 0)
    try:
        check_arguments(kwargs | {"num_classes": classes})
    except UsageError as error:
        raise QvitError(f"{path / CONFIG} describes no model that is made: {error}") from None
    if not (path / WEIGHTS).is_file():
        raise QvitError(f"{path} has no {WEIGHTS}: save the model by `save_pretrained`, in one file of safetensors")
    return Checkpoint(path, converter, config, timm_name, kwargs, classes)


def preparation(folder: Path, converter: Converter, kwargs: dict[str, Any]) -> dict[str, Any]:
    """How images are prepared, as arguments of `qvit.create_model`; may set another `img_size` where a model has any.

    Raises QvitError for a preparation that timm's transform cannot do.
    """
    found = dict(converter.preparation)
    path = folder / PREPARATION
    values = read_object(path, "config") if path.exists() else {}
    for key in ("mean", "std"):
        if f"image_{key}" in values:
            found[key] = values[f"image_{key}"]
    if values.get("do_normalize") is False:
        found |= {"mean": [0.0], "std": [1.0]}
    for key in ("mean", "std"):  # one number stands for all channels
        single = not isinstance(found[key], list) or len(found[key]) == 1
        number = found[key][0] if isinstance(found[key], list) and found[key] else found[key]
        if single or len(found[key]) != kwargs["in_chans"]:
            found[key] = [number] * kwargs["in_chans"]
    if "resample" in values:
        if values["resample"] not in list(_INTERPOLATIONS):
            raise QvitError(f"{path}: 'resample' is {shown(values['resample'])}, none of {_INTERPOLATIONS}")
        found["interpolation"] = _INTERPOLATIONS[values["resample"]]
    if not math.isclose(_number(values.get("rescale_factor", 1 / 255)), 1 / 255, rel_tol=1e-6):
        raise QvitError(f"{path}: 'rescale_factor' is {shown(values['rescale_factor'])}; images are divided by 255")
    if isinstance(values.get("size"), (dict, int)):
        kept, geometry = _geometry(values, path)
        found |= geometry | ({"img_size": [kept, kept]} if converter.any_size else {})
    return found


def _geometry(values: Mapping[str, Any], path: Path) -> tuple[int, dict[str, Any]]:
    """The side of the crop, and resizing and cropping in timm's words."""
    size, crop = values["size"], values.get("crop_size")
    sides = size if isinstance(size, dict) else {"height": size, "width": size}
    squash = "height" in sides
    if "shortest_edge" not in sides and (not squash or sides["height"] != sides.get("width")):
        raise QvitError(f"{path}: 'size' is {shown(size)}; 'shortest_edge', or 'height' and 'width' alike, are known")
    resized = sides["height"] if squash else sides["shortest_edge"]
    crops = values.get("do_center_crop") is True and crop is not None
    kept = (crop.get("height") if isinstance(crop, dict) else crop) if crops else resized
    if type(resized) is not int or type(kept) is not int or not 1 <= kept <= resized <= 4096:
        raise QvitError(f"{path}: 'size' {shown(size)} and 'crop_size' {shown(crop)} are no sizes that can be cropped")
    share = kept / resized
    if math.floor(kept / share) != resized:
        share = kept / (resized + 0.5)
    return kept, {"crop_pct": share, "crop_mode": "squash" if squash else "center"}


def resolved(name: str, kwargs: Mapping[str, Any]) -> tuple[str, dict[str, Any], Path | None]:
    """What a name of a model stands for: timm's name, its arguments, and the folder of a checkpoint, if it is one.

    Args:
        name: timm's name; a folder; or a repository of the hub, `google/vit-base-patch16-224`, which is fetched.
        kwargs: Arguments that override those of the checkpoint.

    Raises:
        UsageError, QvitError: See `open_checkpoint`.
    """
    folder = Path(name)
    if not os.path.exists(name) and _HUB_NAME.fullmatch(name):
        folder = _fetched(name)
    elif not is_checkpoint(folder):
        return name, dict(kwargs), None
    found = open_checkpoint(folder)
    return found.name, found.kwargs | dict(kwargs), folder.resolve()


def _fetched(name: str) -> Path:
    """The folder in the hub's cache that holds a repository's files."""
    import huggingface_hub

    try:
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=[CONFIG, WEIGHTS, PREPARATION]))
    except Exception as error:  # network, hub and file errors of many libraries
        raise QvitError(f"cannot get '{name}': no such folder, and from the hub: {first_line(error)}") from error


def _object(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise QvitError(f"{where} is {shown(value)}, no object")
    return value


def _number(value: Any) -> float:
    return float(value) if isinstance(value, (int, float)) else math.nan
