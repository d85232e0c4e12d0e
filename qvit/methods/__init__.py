"""Methods: one paper, one file. A new method is one file with a class decorated by `register_method`."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qvit.methods.base import METHODS, Method, create_method, register_method

__all__ = ["METHODS", "Method", "create_method", "register_method"]


def __getattr__(name: str) -> Any:
    """Names of `base.py` on first use: `qvit ptq --help` reads options from here and does without torch."""
    if name not in __all__:
        raise AttributeError(f"module 'qvit.methods' has no attribute '{name}'")
    return getattr(importlib.import_module("qvit.methods.base"), name)
