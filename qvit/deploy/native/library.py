"""The compiled library of the native engine and the types of its functions; compiled once per source and processor."""

from __future__ import annotations

import ctypes
import functools
from ctypes import c_char_p, c_float, c_int, c_void_p
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qvit.errors import QvitError
from qvit.kernels.build import library as compiled

_HERE = Path(__file__).parent
_FLOATS, _INTS, _BYTES = (np.ctypeslib.ndpointer(kind, flags="C") for kind in (np.float32, np.int32, np.int8))
_CODES = np.ctypeslib.ndpointer(np.uint8, flags="C")
_SIGNATURES: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "qvit_error": (c_char_p, ()),
    "qvit_form_count": (c_int, ()),
    "qvit_form_name": (c_char_p, (c_int,)),
    "qvit_create": (c_void_p, (_INTS, _FLOATS, c_int, c_int)),
    "qvit_set_linear": (c_int, (c_void_p, c_int, c_int, c_int, c_int, c_int, _BYTES, _FLOATS, _FLOATS, _FLOATS)),
    "qvit_set_norm": (c_int, (c_void_p, c_int, c_int, c_int, _FLOATS, _FLOATS, c_float, c_int)),
    "qvit_set_heads": (c_int, (c_void_p, c_int, _FLOATS, c_int, c_float)),
    "qvit_run": (c_int, (c_void_p, _FLOATS, c_int, _FLOATS)),
    "qvit_free": (None, (c_void_p,)),
    "qvit_multiply": (c_int, (c_int, c_int, c_int, c_int, _CODES, c_int, c_int, _BYTES, _INTS)),
}


@functools.cache
def library() -> ctypes.CDLL:
    """The library. Raises CannotBuild, with the reason, where there is no compiler."""
    found = compiled(_HERE / "vit.cpp", _HERE / "kernels.h")
    for name, (result, arguments) in _SIGNATURES.items():
        function = getattr(found, name)
        function.restype, function.argtypes = result, arguments
    return found


def call(name: str, *arguments: Any) -> None:
    """Calls a function that returns 0 or 1. Raises QvitError with what went wrong."""
    if getattr(library(), name)(*arguments):
        raise failure()


def failure() -> QvitError:
    """What this thread's last call to fail says."""
    return QvitError(f"the native engine failed: {library().qvit_error().decode()}")


def forms() -> list[str]:
    """The forms of the products that this processor has, the fastest first: `AVX-512 VNNI`, `AVX2`, `portable`."""
    return [library().qvit_form_name(index).decode() for index in range(library().qvit_form_count())]


def form_index(name: str | None) -> int:
    """The place of a form in `forms`; None for the fastest. Raises QvitError for one that is not there."""
    if name is None:
        return 0
    if name not in forms():
        raise QvitError(f"this processor has no form '{name}' of the native engine: {', '.join(forms())}")
    return forms().index(name)


def multiply(
    codes: NDArray[np.uint8], low: int, high: int, weight: NDArray[np.int8], *, form: str | None = None
) -> NDArray[np.int32]:
    """The exact product (m, n) of integers `codes + low` (m, k), in [low, high], and a weight (n, k)."""
    out = np.empty((len(codes), len(weight)), dtype=np.int32)
    shape = (len(codes), len(weight), codes.shape[1])
    call("qvit_multiply", form_index(form), *shape, codes, low, high - low, weight, out)
    return out
