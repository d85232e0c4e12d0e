"""What is installed: packages that some engines and peers need, and the compiler of torch.compile."""

from __future__ import annotations

import functools
import importlib.util
import shutil
from pathlib import Path
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


def onnxruntime_session(model: bytes | str | Path, threads: int | None = None, *, batch: int | None = None) -> Any:
    """A session of ONNX Runtime on CPU.

    Args:
        model: The bytes of a graph, or its file.
        threads: How many it may use; None leaves that to the library.
        batch: The number of images in a call, if it is always the same. Then threads do not spin between calls, where
            they would take the processor from the engine that is timed next.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    if threads is not None:
        options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    if batch is not None:
        options.add_session_config_entry("session.force_spinning_stop", "1")
        options.add_free_dimension_override_by_name("batch", batch)
    return onnxruntime.InferenceSession(model, options, ["CPUExecutionProvider"])
