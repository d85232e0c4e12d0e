"""`cpu.cpp`, compiled on first use for this very processor, and its calls.

The library has no dependency but the C++ compiler that torch.compile needs, too: a second of work, kept in the user's
cache (`$XDG_CACHE_HOME/qvit`) by the hash of source, compiler and processor. Where there is no compiler, or
`QVIT_KERNELS=0` is set, `available` is false and the plain formulas of `functional.py` run.

Tensors are described by four sizes and strides; neighbouring axes that lie together in every tensor become one. What
cannot be described so is copied into order first.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import platform
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

log = logging.getLogger(__name__)

SOURCE = Path(__file__).with_name("cpu.cpp")
FLAGS = ("-std=c++17", "-O3", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-shared", "-fPIC")
#: Tried in this order: threads need OpenMP, and not every compiler knows every processor by `native`.
CHOICES = (("-march=native", "-fopenmp"), ("-march=native",), ())
#: Whether the kernels are used where they can be.
ENABLED = os.environ.get("QVIT_KERNELS") != "0"
_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.int8: 2}
_READ = (torch.float32, torch.bfloat16)
_DIMS = 4
#: Elements beyond which memory is given back at once.
LARGEST_SCRATCH = 2**24
_POINTER, _INT, _LONG = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64
_GRID = (_POINTER,) * 4 + (_INT, _POINTER)
_SIGNATURES = {
    "qvit_forward": (_POINTER, _INT, _POINTER, _INT, *_GRID, ctypes.c_float, _INT),
    "qvit_backward": (_POINTER, _INT, _POINTER, _INT, _POINTER, _POINTER, *_GRID, _POINTER, _LONG, _INT),
    "qvit_scale_sums": (_POINTER, _POINTER, _POINTER, _INT, _POINTER, _POINTER, _LONG, _LONG, _INT),
}


def cxx() -> str:
    """The C++ compiler that torch.compile calls."""
    return os.environ.get("CXX") or ("clang++" if sys.platform == "darwin" else "g++")


def available() -> bool:
    """Whether the kernels can run here; the first call compiles them."""
    return ENABLED and _library() is not None


def would_handle(*tensors: Tensor | None) -> bool:
    """Whether the kernels take tensors like these: on the CPU, in float32 or bfloat16."""
    if not available():
        return False
    for tensor in tensors:
        if tensor is not None and (not tensor.is_cpu or tensor.dtype not in _READ):
            return False
    return True


def handles(*tensors: Tensor | None) -> bool:
    """The same for these very tensors, which may be fake: without numbers."""
    return would_handle(*tensors) and FakeTensor not in map(type, tensors)


def forward(
    x: Tensor, grid: tuple[Tensor | None, ...], dtype: torch.dtype, zero: int = 0, out: Tensor | None = None
) -> Tensor:
    """x̂ in the dtype float32 or bfloat16, or codes less `zero` in int8; contiguous.

    Args:
        x: float32 or bfloat16.
        grid: (scale, offset, quant_min, quant_max), broadcasting against `x`; offset None for zero.
        dtype: Of the result.
        zero: What is subtracted from codes.
        out: Where to write: contiguous, of this dtype.
    """
    pointers, kept, groups = _flat(grid)
    x, numbers, _ = _in_order(x, groups)
    out = torch.empty(x.shape, dtype=dtype) if out is None else out
    _call("qvit_forward", x.data_ptr(), _TYPES[x.dtype], out.data_ptr(), _TYPES[dtype], *pointers, numbers,
          zero, torch.get_num_threads())  # fmt: skip
    del kept
    return out


def backward(
    grad: Tensor, x: Tensor, grid: tuple[Tensor | None, ...], out: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The gradient of `x`, contiguous, and (3, groups) sums: see `fake_quantize.py`.

    Arguments as for `forward`; `out` may be `grad`.
    """
    pointers, kept, groups = _flat(grid)
    x, numbers, strides = _in_order(x, groups, grad)
    if strides is None:
        grad = grad.contiguous()
        x, numbers, strides = _in_order(x.contiguous(), groups, grad)
    count = _numel(groups)
    out = torch.empty(x.shape, dtype=x.dtype) if out is None else out
    sums = torch.empty((3, *(1,) * (x.dim() - len(groups)), *groups), dtype=torch.float32)
    _call("qvit_backward", grad.data_ptr(), _TYPES[grad.dtype], x.data_ptr(), _TYPES[x.dtype], out.data_ptr(),
          sums.data_ptr(), *pointers, numbers, strides, count, torch.get_num_threads())  # fmt: skip
    del kept
    return out, sums


_SCRATCH = threading.local()


def scratch(name: str, shape: tuple[int, ...], dtype: torch.dtype, like: Tensor) -> Tensor:
    """Memory for a result that is used up before the next call with the same name, in the same thread; beside `like`.

    New memory costs more than what these loops write into it: the system clears it page by page.
    """
    count = _numel(shape)
    if count > LARGEST_SCRATCH or not handles(like):
        return torch.empty(shape, dtype=dtype, device=like.device)
    kept: dict[Any, Tensor] = _SCRATCH.__dict__.setdefault("kept", {})
    found = kept.get((name, dtype))
    if found is None or found.numel() < count:
        found = kept[name, dtype] = torch.empty(count, dtype=dtype)
    return found[:count].view(shape)


def scale_sums(sums: Tensor, more: Tensor, factor: Tensor, bias: Tensor, dtype: torch.dtype) -> Tensor:
    """(sums + more)·factor + bias in `dtype`: int32 sums (rows, columns) and vector, float32 vectors (columns)."""
    out = torch.empty(sums.shape, dtype=dtype)
    sums, more, factor, bias = (part.contiguous() for part in (sums, more, factor, bias))
    rows, columns = sums.shape
    _call("qvit_scale_sums", sums.data_ptr(), more.data_ptr(), out.data_ptr(), _TYPES[dtype], factor.data_ptr(),
          bias.data_ptr(), rows, columns, torch.get_num_threads())  # fmt: skip
    return out


def _call(name: str, *arguments: object) -> None:
    getattr(_library(), name)(*arguments)


def _flat(grid: tuple[Tensor | None, ...]) -> tuple[list[int | None], list[Tensor], tuple[int, ...]]:
    """Pointers to the numbers, which of them are one for all groups; the tensors that hold them; the groups' shape."""
    groups = _together(*(part.shape for part in grid if part is not None))
    kept, pointers, single = [], [], 0
    for i, part in enumerate(grid):
        if part is None:
            pointers.append(None)
            continue
        if part.numel() == 1:
            single |= 1 << i
        elif part.shape != groups:
            part = part.expand(groups)
        if part.dtype is not torch.float32 or not part.is_contiguous():
            part = part.detach().float().contiguous()
        kept.append(part)
        pointers.append(part.data_ptr())
    return [*pointers, single], kept, groups


def _in_order(x: Tensor, groups: tuple[int, ...], grad: Tensor | None = None):  # type: ignore[no-untyped-def]
    """`x` (a copy where its strides are too many), the numbers of `Shape` in cpu.cpp, and the strides of `grad`."""
    strides = (x.stride(),) if grad is None else (x.stride(), grad.stride())
    found = _shape_numbers(tuple(x.shape), strides, groups)
    if found is None and grad is not None:
        return x, None, None
    if found is None:
        x = x.contiguous()
        found = _shape_numbers(tuple(x.shape), (x.stride(),), groups)
    assert found is not None, "a contiguous tensor of more than four separate axes"
    return x, *found


@functools.lru_cache(maxsize=4096)
def _shape_numbers(
    shape: tuple[int, ...], strides: tuple[tuple[int, ...], ...], groups: tuple[int, ...]
) -> tuple[ctypes.Array[ctypes.c_int64], ctypes.Array[ctypes.c_int64] | None] | None:
    """Sizes and strides of x, groups and output in four axes; None where four do not do, or the last one has gaps."""
    group_strides, step = [], 1
    for count in (*reversed(groups), *(1,) * (len(shape) - len(groups))):
        group_strides.append(step if count > 1 else 0)
        step *= count if count > 1 else 1
    out_strides, step = [], 1
    for size in reversed(shape):
        out_strides.append(step)
        step *= size
    table = [tuple(reversed(group_strides)), tuple(reversed(out_strides)), *strides]
    axes: list[list[int]] = []  # size, group, out, x[, grad]; the innermost first
    for axis in reversed(range(len(shape))):
        own = [shape[axis], *(row[axis] for row in table)]
        if own[0] == 1:
            continue
        if axes and all(own[i] == axes[-1][i] * axes[-1][0] for i in range(1, len(own))):
            axes[-1][0] *= own[0]
        else:
            axes.append(own)
    if not axes:
        axes.append([1, 0, 1, *(1 for _ in strides)])
    if len(axes) > _DIMS or any(stride != 1 for stride in axes[0][2:]):
        return None
    axes += [[1, *(0 for _ in table)]] * (_DIMS - len(axes))
    columns = list(zip(*reversed(axes), strict=True))
    size, group, out, x, *rest = columns
    numbers = (ctypes.c_int64 * (4 * _DIMS))(*size, *x, *group, *out)
    return numbers, (ctypes.c_int64 * _DIMS)(*rest[0]) if rest else None


@functools.lru_cache(maxsize=4096)
def _together(*shapes: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(torch.broadcast_shapes(*shapes))


def _numel(shape: tuple[int, ...]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count


@functools.lru_cache(maxsize=1)
def _library() -> ctypes.CDLL | None:
    """The compiled kernels; None, and one line in the log, where they cannot be made."""
    try:
        source = SOURCE.read_bytes()
        about = f"{source!r} {FLAGS} {CHOICES} {cxx()} {platform.machine()} {_processor()}"
        path = _folder() / f"cpu-{hashlib.sha256(about.encode()).hexdigest()[:20]}.so"
        if not path.is_file():
            _compile(path)
        library = ctypes.CDLL(str(path))
        for name, types in _SIGNATURES.items():
            getattr(library, name).argtypes = types
        return library
    except (OSError, subprocess.SubprocessError) as error:
        log.warning("no compiled kernels, so quantization is slower: %s", error)
        return None


def _compile(path: Path) -> None:
    """Writes the library to `path`, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    for choice in CHOICES:
        with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".so", delete=False) as file:
            made = Path(file.name)
        try:
            done = subprocess.run(
                [cxx(), *FLAGS, *choice, str(SOURCE), "-o", str(made)], capture_output=True, text=True, timeout=120
            )
            if done.returncode == 0:
                ctypes.CDLL(str(made))
                os.replace(made, path)
                return
        except OSError as error:
            reason = str(error)
        else:
            reason = done.stderr.strip().splitlines()[-1] if done.stderr.strip() else f"exit code {done.returncode}"
        finally:
            made.unlink(missing_ok=True)
    raise OSError(f"{cxx()} cannot compile {SOURCE.name}: {reason}")


def _folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "qvit"


def _processor() -> str:
    """What `-march=native` depends on, as far as the system tells."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return platform.processor()
    lines = (line for line in text.splitlines() if line.startswith(("model name", "flags", "Features", "CPU part")))
    return " ".join(sorted(set(lines)))


@functools.cache
def has_int8_dot_products() -> bool:
    """Whether 8-bit products are both fast and exact on this processor: VNNI on x86.

    Without VNNI an 8-bit product is no faster than one in float32, and some libraries saturate. Where the processor
    says nothing, 8-bit kernels are not used.
    """
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()
    return any(capabilities.get(name) for name in ("avx512_vnni", "avx_vnni", "amx_int8"))
