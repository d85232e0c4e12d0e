"""The compiled library of the native engine and the types of its functions.

An installation that found a compiler has put it beside the sources; otherwise, or where the sources have changed since,
it is compiled on first use and kept in the user's cache (`kernels/build.py`). One binary serves all processors of an
architecture: instruction sets are chosen when a model is loaded.
"""

from __future__ import annotations

import ctypes
import functools
from ctypes import c_char_p, c_int, c_size_t, c_void_p
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qvit.deploy.native import sources
from qvit.errors import QvitError
from qvit.kernels.build import library as compiled

_FLOATS, _INTS, _BYTES = (np.ctypeslib.ndpointer(kind, flags="C") for kind in (np.float32, np.int32, np.int8))
_CODES, _DOUBLES = (np.ctypeslib.ndpointer(kind, flags="C") for kind in (np.uint8, np.float64))
_SIGNATURES: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "qvit_load": (c_void_p, (c_char_p, c_int)),
    "qvit_load_bytes": (c_void_p, (c_char_p, c_size_t, c_int, c_char_p)),
    "qvit_shape": (None, (c_void_p, _INTS)),
    "qvit_answer": (c_int, (c_void_p, _INTS)),
    "qvit_run": (c_int, (c_void_p, _FLOATS, c_int, _FLOATS)),
    "qvit_free": (None, (c_void_p,)),
    "qvit_error": (c_char_p, ()),
    "qvit_text": (c_char_p, (c_void_p, c_char_p)),
    "qvit_form": (c_char_p, (c_int,)),
    "qvit_form_of": (c_char_p, (c_void_p,)),
    "qvit_profile": (c_int, (c_void_p, _FLOATS, c_int, _FLOATS, _DOUBLES)),
    "qvit_kind": (c_char_p, (c_int,)),
    "qvit_probe": (c_int, ()),
    "qvit_multiply": (c_int, (c_char_p, c_int, c_int, c_int, _CODES, c_int, c_int, _BYTES, _INTS)),
    "qvit_function": (c_int, (c_char_p, c_char_p, c_char_p, c_int, c_int, _INTS, _INTS)),
    "qvit_sources": (c_char_p, ()),
}
#: Seconds after which the compiler is given up. All forms take half a minute on a quiet processor.
_PATIENCE = 300.0


@functools.cache
def library() -> ctypes.CDLL:
    """The library. Raises QvitError, with the reason, where there is no compiler, or products are not exact here."""
    found = _installed() or _typed(
        compiled(
            sources.SOURCE,
            *sources.headers(),
            choices=[["-fvisibility=hidden", f"-DQVIT_SOURCES={sources.digest()}"]],
            time_limit=_PATIENCE,
        )
    )
    if found.qvit_probe():
        raise QvitError(f"the native engine does not work here: {found.qvit_error().decode()}")
    return found


def _installed() -> ctypes.CDLL | None:
    """The library of the installation, where it is of these sources."""
    if not sources.BUILT.is_file():
        return None
    try:
        found = _typed(ctypes.CDLL(str(sources.BUILT)))
    except (OSError, AttributeError):  # of another machine, or of an older qvit
        return None
    return found if found.qvit_sources().decode() == sources.digest() else None


def _typed(found: ctypes.CDLL) -> ctypes.CDLL:
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
    return QvitError(library().qvit_error().decode(errors="replace"))


def forms() -> list[str]:
    """The forms of the products that this processor has, the fastest first: `AVX-512 VNNI`, `AVX2`, `portable`."""
    return list(_texts("qvit_form"))


def kinds() -> list[str]:
    """The kinds of kernels that a profile tells apart."""
    return list(_texts("qvit_kind"))


def _texts(function: str) -> Any:
    index = 0
    while (text := getattr(library(), function)(index)) is not None:
        yield text.decode()
        index += 1


def multiply(
    codes: NDArray[np.uint8], low: int, high: int, weight: NDArray[np.int8], *, form: str | None = None
) -> NDArray[np.int32]:
    """The exact product (m, n) of integers `codes + low` (m, k), in [low, high], and a weight (n, k)."""
    out = np.empty((len(codes), len(weight)), dtype=np.int32)
    shape = (len(codes), len(weight), codes.shape[1])
    call("qvit_multiply", form and form.encode(), *shape, codes, low, high - low, weight, out)
    return out


def function(operation: str, name: str, x: NDArray[np.int32], *, form: str | None = None) -> NDArray[np.int32]:
    """`layernorm` without its affine part, `softmax` or `gelu` of rows in fixed point by an integer form.

    Args:
        operation, name: As in `qvit.nonlinear`.
        x: (rows, n), within the range that `qvit/nonlinear/base.py` gives; at most 4,096 channels, 32,768 scores.
        form: How the engine computes, as in `forms`; None for the fastest.
    """
    out = np.empty_like(x)
    call("qvit_function", form and form.encode(), operation.encode(), name.encode(), *x.shape, x, out)
    return out
