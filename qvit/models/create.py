"""From a name to a float model with weights: timm's registry, models of `transformers`, the demo's small one.

`vit_digits` is a VisionTransformer for 8×8 grey images: patches of 2, width 32, 4 blocks of 4 heads, 16 patches and a
class token. Registered with timm, so that `timm.create_model("vit_digits")` works once qvit is imported.

Name and arguments may be a stranger's (`architecture.py`). A model is first made without storage and refused beyond
`MOST_PARAMETERS`, beyond the memory of the machine, or with more patches than attention can be computed over.
"""

from __future__ import annotations

import logging
import math
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import timm
import torch
from timm.layers import RmsNorm
from timm.models import VisionTransformer, clean_state_dict, generate_default_cfgs, register_model
from torch import Tensor, nn

from qvit.errors import QvitError, UsageError, first_line, nearest
from qvit.files import read_bytes
from qvit.models.architecture import MOST_PARAMETERS, OWN, PREPARATION, check_arguments, check_name
from qvit.models.pickles import read_pickled, weights_in
from qvit.models.transformers import is_checkpoint, open_checkpoint, resolved
from qvit.tensors import decode, not_finite, total_bytes

_log = logging.getLogger(__name__)
WEIGHTS_FILE = "model.safetensors"
MOST_PATCHES = 1 << 16
# The largest file of weights: that of a training holds model, average and what an optimizer remembers in one file.
_LARGEST_FILE, _MOST_TIMES = 1 << 30, 16
#: Sides of the largest patch kernel that is resampled: the work grows with their fourth power.
_LARGEST_KERNEL = 64

default_cfgs = generate_default_cfgs(
    {
        "vit_digits.untrained": {
            "url": "",
            "num_classes": 10,
            "input_size": (1, 8, 8),
            "pool_size": None,
            "crop_pct": 1.0,
            "interpolation": "bilinear",
            "mean": (0.3053,),
            "std": (0.3760,),
            "fixed_input_size": True,
            "first_conv": "patch_embed.proj",
            "classifier": "head",
        }
    }
)


@register_model
def vit_digits(pretrained: bool = False, **kwargs: Any) -> VisionTransformer:
    """The demo's model: 8×8 images of one channel, patch 2, width 32, depth 4, 4 heads, 52 thousand parameters.

    There are no pretrained weights.
    """
    if pretrained:
        raise UsageError(
            "vit_digits has no pretrained weights: train it with `qvit train vit_digits --method float --data digits`"
        )
    settings: dict[str, Any] = {
        "img_size": 8,
        "patch_size": 2,
        "in_chans": 1,
        "num_classes": 10,
        "embed_dim": 32,
        "depth": 4,
        "num_heads": 4,
    }
    for key in ("pretrained_cfg", "pretrained_cfg_overlay", "cache_dir"):
        kwargs.pop(key, None)
    model = VisionTransformer(**(settings | kwargs))
    cfg = default_cfgs["vit_digits"].default.to_dict()
    model.pretrained_cfg = model.default_cfg = cfg  # type: ignore[assignment]
    return model


def create_model(
    name: str,
    *,
    weights: str | Path | None = None,
    pretrained: bool = False,
    new_classifier: bool = True,
    **kwargs: Any,
) -> nn.Module:
    """A float timm model.

    Args:
        name: timm's name, with or without a pretrained tag; or a folder, or a repository of the Hugging Face hub, with
            a model of `transformers` (`models/transformers/base.py`), which brings its weights along.
        weights: A `.safetensors`, `.pth` or `.pt` file with timm's keys, the run directory of a float model, or such a
            folder.
        pretrained: Takes the weights from timm's hub (needs a network).
        new_classifier: `num_classes` other than that of the weights leaves the classifier untrained, with a warning;
            False makes that an error.
        kwargs: Arguments of the architecture (`architecture.Architecture`; in Python also modules and functions).

    Raises:
        UsageError: Unknown model (the nearest names are shown), arguments it does not take, or too large a model.
        QvitError: Weights that cannot be read or do not fit.
    """
    name, kwargs, folder = resolved(name, kwargs)
    if folder is not None:
        pretrained, weights = False, weights or folder
        kwargs.setdefault("num_classes", open_checkpoint(folder).num_classes)
    own = {key: kwargs.pop(key) for key in OWN if key in kwargs}
    check_name(name)
    check_arguments(
        own | {key: value for key, value in kwargs.items() if not callable(value)}
    )  # no file holds a function
    base = name.split(".")[0].removeprefix("timm/")
    if not timm.is_model(base):
        raise UsageError(
            f"unknown model '{name}'{nearest(base, timm.list_models())} (`timm.list_models('*vit*')` lists all)"
        )
    try:
        if torch.get_default_device().type != "meta":
            _check_size(name, without_storage(lambda: timm.create_model(name.removeprefix("timm/"), **kwargs)))
        model = timm.create_model(name.removeprefix("timm/"), pretrained=pretrained, **kwargs)
    except UsageError:
        raise
    except Exception as error:  # of timm, for any arguments that it did not expect together
        where = "cannot fetch the pretrained weights of" if pretrained else "cannot make"
        hint = "; without a network, give a file with --weights" if pretrained else ""
        raise (QvitError if pretrained else UsageError)(f"{where} '{name}': {first_line(error)}{hint}") from error
    known = (getattr(model, "pretrained_cfg", None) or {}).get("num_classes")
    if pretrained and kwargs.get("num_classes", known) != known:
        if not new_classifier:
            raise _untrained("the weights", known, kwargs["num_classes"])
        _log.warning(
            "the weights have %s classes, the model %s: its classifier starts untrained", known, kwargs["num_classes"]
        )
    _apply(model, own)
    if weights is not None and (folder is None or torch.get_default_device().type != "meta"):
        load_weights(model, weights, new_classifier=new_classifier)
    return model


def _apply(model: Any, own: Mapping[str, Any]) -> None:
    """The arguments that timm's models do not take: the ε of all norms, and how images are prepared."""
    if (eps := own.get("norm_eps")) is not None:
        for module in model.modules():
            if isinstance(module, (nn.LayerNorm, RmsNorm)):
                module.eps = eps
    found = {key: tuple(own[key]) if isinstance(own[key], list) else own[key] for key in PREPARATION if key in own}
    if found:
        model.pretrained_cfg = dict(getattr(model, "pretrained_cfg", None) or {}) | found


def without_storage(make: Callable[[], nn.Module]) -> nn.Module:
    """The model that `make` makes, on torch's meta device: shapes, no memory; random numbers stay as they are."""
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        return make()


def bytes_of(model: nn.Module) -> int:
    """Bytes of all parameters and buffers."""
    return total_bytes((*model.parameters(), *model.buffers()))


def _check_size(name: str, model: nn.Module) -> None:
    """Raises UsageError if a model, given without storage, is larger than this machine can take."""
    parameters = sum(parameter.numel() for parameter in model.parameters())
    if parameters > MOST_PARAMETERS:
        raise UsageError(f"'{name}' would have {parameters:,} parameters; at most {MOST_PARAMETERS:,} are made")
    size, memory = bytes_of(model), _memory()
    if size > memory:
        raise UsageError(f"'{name}' would take {size / 1e9:.1f} GB; this machine has {memory / 1e9:.1f} GB of memory")
    patches = getattr(getattr(model, "patch_embed", None), "num_patches", None) or 0
    if patches > MOST_PATCHES:
        raise UsageError(f"'{name}' would cut an image into {patches:,} patches; at most {MOST_PATCHES:,} are computed")


def _memory() -> float:
    """Bytes of memory of this machine; infinite where the system does not tell."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return math.inf


def create_shapes(name: str, **kwargs: Any) -> nn.Module:
    """The model of `create_model` without storage, on torch's meta device: enough to inspect it and to count its costs.

    A model that cannot be made there is made with storage. Raises UsageError as `create_model`.
    """
    try:
        return without_storage(lambda: create_model(name, **kwargs))
    except (QvitError, NotImplementedError):
        return create_model(name, **kwargs)


def _untrained(weights: str, theirs: Any, ours: Any) -> QvitError:
    """The error for a classifier that the weights do not fit, where nothing would train it."""
    return QvitError(
        f"{weights} have {theirs} classes, the model {ours}, and nothing trains its classifier: name the classes of "
        "the weights by a class map (--class-map) or their number (-m num_classes=N), or give --unlabelled if folders "
        "are no classes"
    )


def load_weights(model: nn.Module, source: str | Path, *, new_classifier: bool = True) -> None:
    """Loads weights into a float model, in place.

    Weights of a model for images or patches of another size are resampled as timm does it for its own, with a notice; a
    classifier of another size is left as it is, with a warning, or is an error without `new_classifier`; one that the
    model does not have is left out. Raises QvitError if they do not fit.
    """
    path = Path(source)
    checkpoint = open_checkpoint(path) if path.is_dir() and is_checkpoint(path) else None
    if path.is_dir():
        path = path / WEIGHTS_FILE
    state = _read_weights(path, model)
    if checkpoint is not None:
        embed: Any = model.get_submodule("patch_embed")
        head = bool(getattr(model, "num_classes", 0))
        state = checkpoint.to_timm(state, embed.grid_size, head=head)
    if any(key.endswith("_quantizer.scale") for key in state):
        raise QvitError(f"{path} holds a quantized model; give the weights of the float model")
    own = model.state_dict()
    classifiers = _classifiers(model)
    heads = [
        key
        for key in own
        if key.rpartition(".")[0] in classifiers and key in state and state[key].shape != own[key].shape
    ]
    if heads:
        theirs, ours = (next(iter(values[heads[0]].shape), 0) for values in (state, own))
        if not new_classifier:
            raise _untrained(f"the weights {path}", theirs, ours)
        _log.warning(
            "the weights have another number of classes: the classifier (%s) starts untrained", ", ".join(heads)
        )
    for key in heads:
        state[key] = own[key]
    if getattr(model, "num_classes", None) == 0:  # the weights may be those of a model with classes
        state = {key: value for key, value in state.items() if key.rpartition(".")[0] not in classifiers}
    if _wrong_shapes(state, own):
        state = _resampled(state, model)
    wrong = _wrong_shapes(state, own)
    missing, unknown = [key for key in own if key not in state], [key for key in state if key not in own]
    for what, keys in (("wrong shape", wrong), ("missing", missing), ("unknown", unknown)):
        if keys:
            raise QvitError(f"the weights {path} do not fit this model: {len(keys)} {what}, first {keys[0]}")
    for key, value in state.items():
        if (value.is_floating_point(), value.dtype == torch.bool) != (
            own[key].is_floating_point(),
            own[key].dtype == torch.bool,
        ):
            raise QvitError(f"the weights {path} do not fit this model: '{key}' is {value.dtype}, not {own[key].dtype}")
    if (key := not_finite({key: value.to(own[key].dtype) for key, value in state.items()})) is not None:
        raise QvitError(f"the weights {path} hold NaN or infinite values, first in '{key}'")
    model.load_state_dict(state)


def _read_weights(path: Path, model: nn.Module) -> dict[str, Tensor]:
    """The tensors of a file by the names that they have without the wrappers of training."""
    own = total_bytes(model.state_dict().values())
    content = read_bytes(path, "weights", limit=_LARGEST_FILE + _MOST_TIMES * own)
    try:
        if path.suffix == ".safetensors":
            return clean_state_dict(decode(content).tensors)
        return clean_state_dict(weights_in(read_pickled(content)))
    except QvitError as error:
        raise QvitError(f"cannot read the weights {path}: {error}; save them as safetensors, by timm's names") from None


def _wrong_shapes(state: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> list[str]:
    return [
        f"{key} {tuple(state[key].shape)} instead of {tuple(own[key].shape)}"
        for key in state
        if key in own and state[key].shape != own[key].shape
    ]


def _resampled(state: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Position embeddings and patch kernels at the sizes of `model`, by the function that timm's model file has for it.

    `state` itself where there is none, or where it cannot help.
    """
    resample: Any = next(
        (
            function
            for cls in type(model).__mro__
            if (function := getattr(sys.modules.get(cls.__module__), "checkpoint_filter_fn", None)) is not None
        ),
        None,
    )
    kernels = [value for value in state.values() if value.dim() == 4]
    if resample is None or any(max(kernel.shape[-2:]) > _LARGEST_KERNEL for kernel in kernels):
        return state
    try:
        found = dict(resample(dict(state), model))
    except Exception:  # written for the weights that timm publishes, it may stumble over any others
        return state
    own = model.state_dict()
    changed = [key for key in found if key in state and key in own and found[key].shape != state[key].shape]
    if _wrong_shapes(found, own) or found.keys() != state.keys():
        return state
    _log.info("resampled for images or patches of another size: %s", ", ".join(changed))
    return found


def _classifiers(model: nn.Module) -> set[str]:
    """Paths of the layers that answer with classes: `head`, `head.fc`, or two for a distilled model."""
    get: Any = getattr(model, "get_classifier", None)
    found = get() if callable(get) else getattr(model, "head", None)
    layers = found if isinstance(found, tuple) else (found,)
    return {path for path, module in model.named_modules() if any(module is layer for layer in layers)}
