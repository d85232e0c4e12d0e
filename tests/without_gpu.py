"""What can be known of Triton kernels without a GPU: their values, by its interpreter, and whether they compile."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

TESTS = Path(__file__).parent


def interpreted(script: str, *arguments: str) -> str:
    """What a script prints with `TRITON_INTERPRET=1`; it finds the helpers of the tests.

    It has a process of its own: Triton decides when it is imported whether it interprets.
    """
    pytest.importorskip("triton")
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([str(TESTS), str(TESTS / "deploy"), *filter(None, sys.path)])
    command = [sys.executable, "-W", "ignore", "-c", script, *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def compiled(
    kernel: Any, types: Mapping[str, str], constants: Mapping[str, Any], folder: Path, *, warps: int = 4
) -> str:
    """The PTX of a kernel for compute capability 9.0; fails where registers or shared memory do not suffice.

    Args:
        kernel: A `triton.jit` function.
        types: Triton's type of each argument that is no constant; pointers and integers are multiples of 16.
        constants: The others.
        folder: For files.
        warps: Of a program.
    """
    triton = pytest.importorskip("triton")
    compiler, backends = pytest.importorskip("triton.compiler"), pytest.importorskip("triton.backends.compiler")
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    signature = {name: "constexpr" if name in constants else types[name] for name in kernel.arg_names}
    even = [i for i, kind in enumerate(signature.values()) if kind == "i32" or kind.startswith("*")]
    attributes = {(i,): [["tt.divisibility", 16]] for i in even}
    values = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    source = compiler.ASTSource(kernel, signature, values, attributes)
    options = {"enable_fp_fusion": False, "num_warps": warps}
    made = triton.compile(source, target=backends.GPUTarget("cuda", 90, 32), options=options)
    assert made.metadata.shared <= 227 * 1024
    if tool.is_file():
        (folder / "kernel").write_bytes(made.asm["cubin"])
        command = [tool, "-res-usage", folder / "kernel"]
        used = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        assert "STACK:0 " in used, f"registers do not suffice: {used}"
    return made.asm["ptx"]
