"""`cpu.cpp`, compiled on first use for this very processor, and its calls.

The library has no dependency but the C++ compiler that torch.compile needs, too: some seconds of work, kept in the
user's cache (`build.py`). Where there is no compiler, or `QVIT_KERNELS=0` is set, `available` is false and the plain
formulas of `functional.py` run. `QVIT_KERNELS=avx2` compiles for processors with AVX2 alone, and so for every name in
`INSTRUCTION_SETS`; results are equal bit for bit.

Tensors are described by four sizes and strides (`shapes.py`); what cannot be described so is copied into order first.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import math
import os
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from qvit.errors import UsageError, shown
from qvit.kernels.build import CHOICES, CannotBuild, library
from qvit.kernels.shapes import DIMS, axes_of, groups_of

log = logging.getLogger(__name__)

SOURCE = Path(__file__).with_name("cpu.cpp")
#: Whether the kernels are used where they can be.
ENABLED = os.environ.get("QVIT_KERNELS") != "0"
#: What `QVIT_KERNELS` may name: a processor, for the compiler, and an instruction it has, as PyTorch calls it.
INSTRUCTION_SETS = {"avx2": ("haswell", "avx2"), "avx512": ("skylake-avx512", "avx512_f")}
_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.int8: 2}
_READ = (torch.float32, torch.bfloat16)
#: Elements beyond which memory is given back at once.
LARGEST_SCRATCH = 2**24
_POINTER, _INT, _LONG = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64
_SIGNATURES = {
    "qvit_forward": (*(_POINTER, _INT) * 3, _POINTER, ctypes.c_float, _INT),
    "qvit_backward": (*(_POINTER, _INT) * 2, _POINTER, *(_POINTER, _INT) * 2, _POINTER, _POINTER, _LONG, _INT),
    "qvit_scale_sums": (_POINTER, _POINTER, _POINTER, _INT, _POINTER, _POINTER, _LONG, _LONG, _INT),
}
_MOST_NUMBERS = 9
#: (scale, offset, quant_min, quant_max), all of which broadcast against the tensor, the offset None for zero; of two
#: grids, those of both, and the share of the second one.
Numbers = Sequence[Tensor | None]


def available() -> bool:
    """Whether the kernels can run here; the first call compiles them."""
    return ENABLED and _library() is not None


def library_file() -> Path:
    """Where the compiled kernels were loaded from; only if they are available."""
    found = _library()
    assert found is not None
    return Path(found._name)


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


def forward(x: Tensor, numbers: Numbers, dtype: torch.dtype, zero: int = 0, out: Tensor | None = None) -> Tensor:
    """x̂ in the dtype float32 or bfloat16, or codes less `zero` in int8; contiguous unless `out` is not.

    Args:
        x: float32 or bfloat16.
        numbers: Of its grid, or of two.
        dtype: Of the result.
        zero: What is subtracted from codes.
        out: Where to write: of this dtype, and with strides for which four axes do.
    """
    pointers, single, kept, groups = _flat(numbers)
    x, _, shape, _ = _in_order(x, groups, None, out)
    out = torch.empty(x.shape, dtype=dtype) if out is None else out
    _call("qvit_forward", x.data_ptr(), _TYPES[x.dtype], out.data_ptr(), _TYPES[dtype], pointers, single, shape, zero)
    del kept
    return out


def backward(grad: Tensor, x: Tensor, numbers: Numbers, out: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The gradient of `x` and (3, groups) sums, or (7, groups) on two grids: see `fake_quantize.backward_on`.

    Arguments as for `forward`; `out` may be `grad`.
    """
    return _summed(grad, x, numbers, 3 if len(numbers) == 4 else 7, out)


def difference(grad: Tensor, x: Tensor, above: Numbers, below: Numbers) -> Tensor:
    """(groups) sums of grad times x̂ on one grid less x̂ on another, whose groups are the same."""
    return _summed(grad, x, (*below, *above, below[0]), 1)[1][0]


def _summed(grad: Tensor, x: Tensor, numbers: Numbers, rows: int, out: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The gradient of `x`, which is empty for a difference, and `rows` sums for each group."""
    pointers, single, kept, groups = _flat(numbers)
    x, ordered, shape, strides = _in_order(x, groups, grad, out)
    assert ordered is not None
    out = torch.empty(x.shape if rows > 1 else 0, dtype=x.dtype) if out is None else out
    sums = torch.empty((rows, *(1,) * (x.dim() - len(groups)), *groups), dtype=torch.float32)
    _call("qvit_backward", ordered.data_ptr(), _TYPES[ordered.dtype], x.data_ptr(), _TYPES[x.dtype], out.data_ptr(),
          sums.data_ptr(), rows, pointers, single, shape, strides, math.prod(groups))  # fmt: skip
    del kept
    return out, sums


_SCRATCH = threading.local()


def scratch(name: str, shape: tuple[int, ...], dtype: torch.dtype, like: Tensor) -> Tensor:
    """Memory for a result that is used up before the next call with the same name, in the same thread; beside `like`.

    New memory costs more than what these loops write into it: the system clears it page by page.
    """
    count = math.prod(shape)
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
          bias.data_ptr(), rows, columns)  # fmt: skip
    return out


def _call(name: str, *arguments: object) -> None:
    getattr(_library(), name)(*arguments, torch.get_num_threads())


def _flat(numbers: Numbers) -> tuple[Any, int, list[Tensor], tuple[int, ...]]:
    """Pointers to the numbers, a bit for each that all groups share, the tensors that hold them, the groups' shape."""
    groups = groups_of(*(part.shape for part in numbers if part is not None))
    pointers, single, kept = (_POINTER * _MOST_NUMBERS)(), 0, []
    for i, part in enumerate(numbers):
        if part is None:
            continue
        if part.numel() == 1:
            single |= 1 << i
        elif part.shape != groups:
            part = part.expand(groups)
        if part.dtype is not torch.float32 or not part.is_contiguous():
            part = part.detach().float().contiguous()
        kept.append(part)
        pointers[i] = part.data_ptr()
    return pointers, single, kept, groups


def _in_order(
    x: Tensor, groups: tuple[int, ...], grad: Tensor | None, out: Tensor | None
) -> tuple[Tensor, Tensor | None, Any, Any]:
    """`x` and `grad`, copied where their axes are too many, the numbers of `Shape` in cpu.cpp, and grad's strides."""
    for copied in (False, True):
        if copied:
            x, grad = x.contiguous(), None if grad is None else grad.contiguous()
        strides = (x.stride(),) if grad is None else (x.stride(), grad.stride())
        found = _shape_numbers(tuple(x.shape), strides, groups, None if out is None else out.stride())
        if found is not None:
            return x, grad, *found
    raise ValueError(f"a tensor of shape {tuple(x.shape)} with groups {groups} has more than four separate axes")


@functools.lru_cache(maxsize=4096)
def _shape_numbers(
    shape: tuple[int, ...],
    strides: tuple[tuple[int, ...], ...],
    groups: tuple[int, ...],
    out: tuple[int, ...] | None,
) -> Any:
    """`axes_of` as C arrays: all but the strides of a gradient, and these."""
    axes = axes_of(shape, strides, groups, out)
    if axes is None:
        return None
    numbers = (ctypes.c_int64 * (4 * DIMS))(*axes.size, *axes.strides[0], *axes.group, *axes.out)
    return numbers, (ctypes.c_int64 * DIMS)(*axes.strides[1]) if len(strides) > 1 else None


@functools.lru_cache(maxsize=1)
def _library() -> ctypes.CDLL | None:
    """The compiled kernels; None, and one line in the log, where they cannot be made."""
    try:
        return compiled(os.environ.get("QVIT_KERNELS"))
    except CannotBuild as error:
        log.warning("no compiled kernels, so quantization is slower: %s", error)
        return None


def compiled(instructions: str | None = None) -> ctypes.CDLL:
    """The kernels for some instructions, a name in `INSTRUCTION_SETS`, or by default for those of this processor.

    Raises UsageError for an unknown name and for instructions that this processor lacks, CannotBuild where there is no
    compiler.
    """
    choices = CHOICES
    if instructions not in (None, "", "1"):
        if instructions not in INSTRUCTION_SETS:
            names = ", ".join(INSTRUCTION_SETS)
            raise UsageError(f"QVIT_KERNELS={shown(instructions)}: set it to 0 (no kernels), or to one of {names}")
        if not has_instructions(instructions):
            raise UsageError(f"QVIT_KERNELS={instructions}, but this processor has no such instructions: unset it")
        march = f"-march={INSTRUCTION_SETS[instructions][0]}"
        choices = ((march, "-fopenmp"), (march,))
    found = library(SOURCE, choices=choices)
    for name, types in _SIGNATURES.items():
        getattr(found, name).argtypes = types
    return found


def has_instructions(name: str) -> bool:
    """Whether this processor has those of a name in `INSTRUCTION_SETS`."""
    return bool(_capabilities().get(INSTRUCTION_SETS[name][1]))


def _capabilities() -> dict[str, Any]:
    return getattr(torch.cpu, "get_capabilities", dict)()


@functools.cache
def has_int8_dot_products() -> bool:
    """Whether 8-bit products are both fast and exact on this processor: VNNI on x86.

    Without VNNI an 8-bit product is no faster than one in float32, and some libraries saturate. Where the processor
    says nothing, 8-bit kernels are not used.
    """
    capabilities = _capabilities()
    return any(capabilities.get(name) for name in ("avx512_vnni", "avx_vnni", "amx_int8"))
