"""From the words of a packed file to a model, without trusting them.

A file says which timm model it holds and with which arguments. Before that model is made, one without storage is (on
torch's meta device: shapes, no memory), converted by the file's plan, and every tensor of the file is compared with it.
So a file cannot ask for more memory than it has bytes for, and whatever it asks for is refused by name.

What could cost time or memory even without storage is bounded first: only arguments that the classes of supported
models take, only plain values, names of timm's registry without a path or a hub; as many blocks at most as the file has
tensors, and 256; numbers up to 2^24. What a model computes for itself and does not store (masks and position indices of
windows) may take 16 MiB and 16 times the file.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from qvit.deploy.file.grids import grid_values
from qvit.errors import QvitError, UsageError, nearest
from qvit.models.architecture import OWN
from qvit.models.convert import quantize
from qvit.models.create import create_model
from qvit.models.families import constructor_arguments, inspect_model
from qvit.models.layers import QKV, weight_of
from qvit.plan.quant_plan import QuantPlan
from qvit.quantizers import Quantizer, quantizers_of

_NAME = re.compile(r"\w{1,80}(\.\w{1,80})?")
_NOT_IN_FILES = {"args", "device", "dtype"}
_LARGEST_NUMBER, _LONGEST_LIST, _LONGEST_TEXT, _MOST_BLOCKS = 1 << 24, 64, 80, 256
_COMPUTED_BYTES, _COMPUTED_SHARE = 16 << 20, 16


def skeleton(name: str, kwargs: Mapping[str, Any], plan: QuantPlan, *, tensors: int, file_bytes: int) -> nn.Module:
    """The quantized model of a file, without storage.

    Args:
        name: timm's name.
        kwargs: For `timm.create_model`.
        plan: A plan of the model's sites.
        tensors: How many tensors the file has.
        file_bytes: How many bytes it has.

    Raises:
        QvitError: There is no such model, it is none that qvit knows, or the plan does not fit it.
    """
    check_model(name, kwargs, tensors)
    try:
        with torch.device("meta"):
            model = quantize(create_model(name, **kwargs), plan, in_place=True)
    except UsageError as error:
        raise QvitError(str(error)) from None
    except Exception as error:
        raise QvitError(f"'{name}' cannot be made with {dict(kwargs)}: {type(error).__name__}: {error}") from None
    stored = set(model.state_dict())
    computed = sum(b.numel() * b.element_size() for key, b in model.named_buffers() if key not in stored)
    if computed > _COMPUTED_BYTES + _COMPUTED_SHARE * file_bytes:
        raise QvitError(f"'{name}' with {dict(kwargs)} computes {computed} bytes of indices, too many for this file")
    return model


def check_model(name: str, kwargs: Mapping[str, Any], tensors: int) -> None:
    """Raises QvitError for names and arguments that are not made into a model, not even one without storage."""
    if not _NAME.fullmatch(name):
        raise QvitError(f"{name!r} is no name of a timm model")
    known = (constructor_arguments() - _NOT_IN_FILES).union(OWN)
    for key, value in kwargs.items():
        if key not in known:
            raise QvitError(f"a packed model takes no argument '{key}'{nearest(key, known)}")
        _check_value(key, value, _LARGEST_NUMBER)
        blocks = sum(v for v in (value if isinstance(value, (list, tuple)) else [value]) if isinstance(v, (int, float)))
        if "depth" in key and blocks > min(tensors, _MOST_BLOCKS):
            raise QvitError(f"argument '{key}' asks for {blocks} blocks, and the file has {tensors} tensors")


def _check_value(key: str, value: Any, largest: int) -> None:
    if isinstance(value, (list, tuple)):
        if len(value) > _LONGEST_LIST:
            raise QvitError(f"argument '{key}' has {len(value)} entries")
        for item in value:
            if isinstance(item, (list, tuple)):
                raise QvitError(f"argument '{key}' is a list of lists")
            _check_value(key, item, largest)
    elif isinstance(value, str):
        if len(value) > _LONGEST_TEXT:
            raise QvitError(f"argument '{key}' is a text of {len(value)} characters")
    elif isinstance(value, (int, float)):
        if abs(value) > largest:
            raise QvitError(f"argument '{key}' = {value} is larger than {largest}")
        if isinstance(value, int) and value < 0:
            raise QvitError(f"argument '{key}' = {value} is negative")
    elif value is not None:
        raise QvitError(f"argument '{key}' = {value!r} is neither a number nor a text")


def weight_sites(model: nn.Module) -> dict[str, Quantizer]:
    """The quantizers of a model's weights by site, in the order of the plan."""
    found = dict(quantizers_of(model))
    return {
        name: found[name]
        for name, site in inspect_model(model).sites.items()
        if site.role == "weight" and name in found
    }


def float_tensors(model: nn.Module) -> dict[str, Tensor]:
    """What stays as it is: state-dict entries of no quantizer and no packed weight, sharing the model's memory.

    Of a fused q|k|v weight that is packed in part, the others are here under the names of their sites.
    """
    own = [f"{path}." for path, module in model.named_modules() if isinstance(module, Quantizer)]
    packed = weight_sites(model)
    state = {key: value for key, value in model.state_dict().items() if not key.startswith(tuple(own))}
    for site in packed:
        path, _, leaf = site.rpartition(".")
        state.pop(f"{path}.weight", None)
        if leaf != "weight":
            parts = (f"{path}.{part}_weight" for part in QKV)
            state.update({part: weight_of(model, part).detach() for part in parts if part not in packed})
    return state


def grids_of(model: nn.Module) -> dict[str, dict[str, Tensor]]:
    """The numbers of all quantizers' grids by site, sorted by site: the order in which a file has them."""
    return {name: grid_values(quantizer) for name, quantizer in sorted(quantizers_of(model))}


def compare(what: str, expected: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> None:
    """Raises QvitError where names, types or shapes differ."""
    for key, tensor in expected.items():
        if key not in found:
            raise QvitError(f"it lacks the {what} '{key}'")
        own = found[key]
        if own.shape != tensor.shape or own.dtype != tensor.dtype:
            raise QvitError(
                f"{what} '{key}' is {tuple(own.shape)} of {own.dtype}, not {tuple(tensor.shape)} of {tensor.dtype}"
            )
    unknown = sorted(set(found) - set(expected))
    if unknown:
        raise QvitError(f"it has the unknown {what} '{unknown[0]}'")
