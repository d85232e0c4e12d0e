"""qvit: Vision Transformers at 2 to 8 bits.

The public API is listed in `__init__.pyi` and nowhere else. A name is loaded on first use, so that `qvit --help` need
not import torch. Names of the previous version still work, with a warning; see `qvit.moved`.
"""

from __future__ import annotations

import functools
import importlib
import re
from pathlib import Path
from typing import Any

from qvit.version import __version__ as __version__

_IMPORT = re.compile(r"^from ([\w.]+) import (\w+) as \2$", re.MULTILINE)


@functools.cache
def _homes() -> dict[str, str]:
    """The module of each public name, as the stub says it."""
    stub = Path(__file__).with_suffix(".pyi").read_text(encoding="utf-8")
    return {name: module for module, name in _IMPORT.findall(stub)}


def __getattr__(name: str) -> Any:
    if name == "__all__":
        return __dir__()
    if name.startswith("_") or name not in _homes():
        from qvit.moved import find

        return find(name)
    value = getattr(importlib.import_module(_homes()[name]), name)
    if name == "ptq":
        from qvit.moved import accepting_a_config

        value = accepting_a_config(value)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(_homes())
