"""What is installed: packages that some engines and peers need, and the compiler of torch.compile."""

from __future__ import annotations

import functools
import importlib.util
import shutil
from typing import Any

from qvit.errors import UsageError
from qvit.kernels.build import cxx


def missing(*packages: str) -> list[str]:
    """Those of some packages that are not installed."""
    return [package for package in packages if importlib.util.find_spec(package) is None]


def require(*packages: str) -> None:
    """Raises UsageError naming the packages that are missing."""
    if found := missing(*packages):
        extras = "onnx,openvino" if "openvino" in packages else "onnx"
        raise UsageError(f'this needs {", ".join(found)}: pip install "qvit[{extras}]"')


def has_compiler() -> bool:
    """Whether that compiler is there."""
    return shutil.which(cxx()[0]) is not None


@functools.cache
def openvino_core() -> Any:
    """The one `openvino.Core` of this process.

    Each of them replaces the stack on which the process handles signals, and puts the previous one back when it goes:
    where two went in the order in which they came, that is a stack already freed, and the next signal (the end of a
    child process, say) kills the process.
    """
    import openvino

    return openvino.Core()
