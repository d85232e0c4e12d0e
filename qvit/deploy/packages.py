"""What is installed: packages that some engines and peers need, and the compiler of torch.compile."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys

from qvit.errors import UsageError


def missing(*packages: str) -> list[str]:
    """Those of some packages that are not installed."""
    return [package for package in packages if importlib.util.find_spec(package) is None]


def require(*packages: str) -> None:
    """Raises UsageError naming the packages that are missing."""
    if found := missing(*packages):
        extras = "onnx,openvino" if "openvino" in packages else "onnx"
        raise UsageError(f'this needs {", ".join(found)}: pip install "qvit[{extras}]"')


def cxx() -> str:
    """The C++ compiler that torch.compile calls."""
    return os.environ.get("CXX") or ("clang++" if sys.platform == "darwin" else "g++")


def has_compiler() -> bool:
    """Whether that compiler is there."""
    return shutil.which(cxx()) is not None
