"""Nested states (of a model, an optimizer, a method) as tensors by name and JSON, and back, exactly.

    {"model": {"head.bias": T}, "optimizer": {"state": {0: {"step": 3, "exp_avg": U}}, "param_groups": [...]}}

    tensors      "model/head.bias": T, "optimizer/state/0/exp_avg": U
    structure    {"object": {"model": {"object": {"head.bias": {"tensor": "model/head.bias"}}}, ...}}

Numbers, texts, true, false and null are JSON's own, lists are lists; everything else is an object with a single key
that says what it is: `object` (a dictionary with texts as keys), `numbered` (with whole numbers), `tuple`, `tensor`,
`dtype`, and `float` for the values that JSON has no numbers for.

`require_alike` compares a state that was read with one that is known to be right: only then is it given to code that
trusts it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from qvit.errors import QvitError, UsageError
from qvit.files import MAX_DEPTH

_FLOATS = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}
_TYPES = {str(dtype).removeprefix("torch."): dtype for dtype in vars(torch).values() if isinstance(dtype, torch.dtype)}
_LARGEST = 2**63 - 1


def flatten(tree: Any) -> tuple[Any, dict[str, Tensor]]:
    """The structure of a state as plain data, and its tensors. Raises UsageError for what is not in the list above."""
    tensors: dict[str, Tensor] = {}
    return _flatten(tree, "", tensors), tensors


def _flatten(value: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, Tensor):
        while path in tensors:  # {"a/b": T, "a": {"b": U}}
            path += "'"
        tensors[path] = value
        return {"tensor": path}
    if isinstance(value, float) and not math.isfinite(value):
        return {"float": str(float(value))}
    if value is None or isinstance(value, (str, bool, float)):
        return value
    if isinstance(value, int) and abs(value) <= _LARGEST:
        return value
    if isinstance(value, torch.dtype):
        return {"dtype": str(value).removeprefix("torch.")}
    if isinstance(value, (list, tuple)):
        items = [_flatten(item, _below(path, index), tensors) for index, item in enumerate(value)]
        return items if isinstance(value, list) else {"tuple": items}
    if isinstance(value, Mapping):
        kinds = {type(key) for key in value}
        if kinds <= {str} or kinds == {int}:
            items = {str(key): _flatten(item, _below(path, key), tensors) for key, item in value.items()}
            return {"numbered" if kinds == {int} else "object": items}
    raise UsageError(f"a state cannot be saved: '{path}' is {value!r:.60} ({type(value).__name__})")


def _below(path: str, key: Any) -> str:
    return f"{path}/{key}" if path else str(key)


def unflatten(structure: Any, tensors: Mapping[str, Tensor]) -> Any:
    """The inverse of `flatten`, for plain data that may come from anywhere. Raises QvitError."""
    used: set[str] = set()
    tree = _unflatten(structure, "", tensors, used, 0)
    if unused := sorted(set(tensors) - used):
        raise QvitError(f"the tensor '{unused[0]}' belongs to nothing")
    return tree


def _unflatten(value: Any, path: str, tensors: Mapping[str, Tensor], used: set[str], depth: int) -> Any:
    if depth > MAX_DEPTH:
        raise QvitError(f"'{path}' is nested more than {MAX_DEPTH} levels deep")
    if isinstance(value, list):
        return [_unflatten(v, _below(path, i), tensors, used, depth + 1) for i, v in enumerate(value)]
    if not isinstance(value, dict):
        return value
    kind, content = next(iter(value.items())) if len(value) == 1 else ("", None)
    if kind == "tensor" and isinstance(content, str) and content in tensors and content not in used:
        used.add(content)
        return tensors[content]
    if kind == "tuple" and isinstance(content, list):
        return tuple(_unflatten(v, _below(path, i), tensors, used, depth + 1) for i, v in enumerate(content))
    if kind == "float" and isinstance(content, str) and content in _FLOATS:
        return _FLOATS[content]
    if kind == "dtype" and isinstance(content, str) and content in _TYPES:
        return _TYPES[content]
    if kind in ("object", "numbered") and isinstance(content, dict):
        if kind == "numbered" and not all(key.isascii() and key.isdecimal() and len(key) < 10 for key in content):
            raise QvitError(f"'{path}' has keys that are no numbers")
        keys = {key: int(key) if kind == "numbered" else key for key in content}
        return {keys[k]: _unflatten(v, _below(path, k), tensors, used, depth + 1) for k, v in content.items()}
    raise QvitError(f"'{path}' holds something that is none of a state: {str(value)[:60]}")


def require_alike(found: Any, like: Any, path: str, *, equal: bool = False) -> None:
    """Compares a state with one that is known to be right, down to shapes and types.

    Texts, truth values and null must be the same; numbers of the same kind may differ unless they are to be `equal`,
    but not below zero where they are not there. Tensors may hold any finite values.

    Raises QvitError naming the key.
    """
    if isinstance(like, Tensor):
        if not isinstance(found, Tensor):
            raise QvitError(f"'{path}' is {_said(found)}, not a tensor")
        if found.shape != like.shape or found.dtype != like.dtype:
            raise QvitError(
                f"'{path}' is {tuple(found.shape)} of {found.dtype}, not {tuple(like.shape)} of {like.dtype}"
            )
        if found.is_floating_point() and not bool(torch.isfinite(found).all()):
            raise QvitError(f"'{path}' has NaN or infinite values")
        return
    if isinstance(like, Mapping):
        if not isinstance(found, Mapping):
            raise QvitError(f"'{path}' is {_said(found)}, not an object")
        for key in like:
            if key not in found:
                raise QvitError(f"'{_below(path, key)}' is missing")
        for key, item in found.items():
            if key not in like:
                raise QvitError(f"'{_below(path, key)}' is unknown")
            require_alike(item, like[key], _below(path, key), equal=equal)
        return
    if type(found) is not type(like):
        raise QvitError(f"'{path}' is {_said(found)}, not {_said(like)}")
    if isinstance(like, (list, tuple)):
        if len(found) != len(like):
            raise QvitError(f"'{path}' has {len(found)} entries, not {len(like)}")
        for index, (item, other) in enumerate(zip(found, like, strict=True)):
            require_alike(item, other, _below(path, index), equal=equal)
    elif isinstance(like, (int, float)) and not isinstance(like, bool) and not equal:
        if not math.isfinite(found) or (found < 0 <= like):
            raise QvitError(f"'{path}' is {found!r}")
    elif found != like:
        raise QvitError(f"'{path}' is {_said(found)}, not {_said(like)}")


def _said(value: Any) -> str:
    if isinstance(value, Tensor):
        return "a tensor"
    if isinstance(value, Mapping):
        return "an object"
    return f"{value!r:.40} ({type(value).__name__})"
