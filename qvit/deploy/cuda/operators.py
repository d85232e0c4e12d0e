"""What the kernels of `kernels.py` compute, as functions of tensors.

    linear        y = Σ x·w in int32, scaled, with bias; then activation → codes, or LayerScale and residual in float32
    normalize     LayerNorm or RmsNorm → codes
    attention     softmax(q·kᵀ·factor + bias)·v per head: scores and weighted values in int32, softmax in float32

Codes are int8. A grid whose codes pass 127 is stored less 128, its *zero*. Weights of at most 4 bits have two codes in
a byte, those of the first half of a row (of a *segment*, where heads have scales of their own) in the low halves, and
are unpacked in registers.

Sums are exact up to 2^31, more than 131,072 products of 8 bits. Logarithmic probabilities of at most 4 bits are sums of
two tensors of powers of two, so that their products with v are of int8 as well.
"""

from __future__ import annotations

import functools
import importlib.util
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

if importlib.util.find_spec("triton") is not None:
    from qvit.deploy.cuda import kernels

#: Products of 8 bits that a sum in 32 bits holds.
LONGEST = 2**17
#: Bits of logarithmic probabilities that the kernel of attention takes.
LOG_BITS = 4
#: Programs that keep a GPU busy: the number of multiprocessors of an H100.
PROCESSORS = 132
#: Columns of the table that `attention` reads: see `attention_numbers` in `form.py`.
NUMBERS = 14
ACTIVATIONS = ("gelu", "gelu-tanh", "quick-gelu", "silu", "relu")


@dataclass(frozen=True)
class Codes:
    """Integers on their way between kernels: int8, less `zero`; (..., K), the last axis in one piece."""

    stored: Tensor
    zero: int


@dataclass(frozen=True)
class Target:
    """The grid on which a kernel lays its result: float32 numbers, one for all channels or one for each."""

    scale: Tensor
    offset: Tensor | None
    low: Tensor
    high: Tensor
    zero: int

    def for_channels(self, count: int) -> Target:
        """The same with a number for each of `count` channels; groups of them follow one another."""

        def each(x: Tensor) -> Tensor:
            return x.float().flatten().repeat_interleave(count // x.numel()).contiguous()

        return Target(each(self.scale), None if self.offset is None else each(self.offset), each(self.low),
                      each(self.high), self.zero)  # fmt: skip

    def numbers(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """All four, as kernels take them; an offset that is not there is not read."""
        return self.scale, self.scale if self.offset is None else self.offset, self.low, self.high


def pack(weight: Tensor) -> Tensor:
    """Codes (out, S, L) of -8 to 7 as bytes (out, S, ⌈L/2⌉), int8; element j holds those of j and j + ⌈L/2⌉."""
    half = math.ceil(weight.shape[2] / 2)
    low, high = weight[..., :half].to(torch.int32), F.pad(weight[..., half:], (0, 2 * half - weight.shape[2]))
    return ((low & 15) | (high.to(torch.int32) << 4)).to(torch.int8)


def linear(
    x: Codes,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor,
    *,
    correction: Tensor | None = None,
    packed: bool = False,
    activation: str | None = None,
    target: Target | None = None,
    gain: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """A linear layer: codes (..., out) on `target` as int8, or float32.

    Args:
        x: (..., K), contiguous.
        weight: (out, S, K/S), or packed.
        scale: (S, out), of the sums of each segment.
        bias: (out,).
        correction: (S, out), int32: added to the sums, zero of x times the weight's sums.
        packed: Whether `weight` is what `pack` returned.
        activation: One of `ACTIVATIONS`, before `target`.
        target: With a number for each channel.
        gain: (out,), multiplies a result in float32.
        residual: (..., out), added after that.
    """
    outputs, segments, stored = weight.shape
    length = x.stored.shape[-1] // segments
    rows = x.stored.numel() // x.stored.shape[-1]
    shape = (*x.stored.shape[:-1], outputs)
    out = torch.empty(shape, dtype=torch.float32 if target is None else torch.int8, device=x.stored.device)
    numbers = (scale, scale, scale, scale) if target is None else target.numbers()
    depth, of_rows, of_outputs, warps = _tile(rows, outputs, stored)
    launch: Any = kernels.linear_kernel
    launch[(math.ceil(rows / of_rows), math.ceil(outputs / of_outputs))](
        x.stored, weight, scale, bias, scale if correction is None else correction,
        scale if residual is None else residual, scale if gain is None else gain, *numbers, out,
        rows, outputs, length, stored, 0 if target is None else target.zero,
        SEGMENTS=segments, PACKED=packed, CORRECTED=correction is not None, ACTIVATION=activation or "",
        RESIDUAL=residual is not None, GAIN=gain is not None, CODES=target is not None,
        OFFSET=target is not None and target.offset is not None,
        ROWS=of_rows, OUTPUTS=of_outputs, DEPTH=depth, num_warps=warps, enable_fp_fusion=False,
    )  # fmt: skip
    return out


def _tile(rows: int, outputs: int, stored: int) -> tuple[int, int, int, int]:
    """Depth, rows, outputs and warps of a program; small tiles where large ones would leave processors without work.

    None of them needs more registers than there are.
    """
    depth = 32 if stored <= 32 else 64
    if math.ceil(rows / 128) * math.ceil(outputs / 128) >= PROCESSORS:
        return depth, 128, 128, 8
    return depth, 16 if rows <= 16 else 32 if rows <= 64 else 64, 64, 4


def normalize(x: Tensor, gain: Tensor, shift: Tensor | None, epsilon: float, target: Target, *, rms: bool) -> Codes:
    """Rows (..., C) of float32, normalised, times `gain`, plus `shift`: codes on a grid of one scale."""
    columns = x.shape[-1]
    out = torch.empty(x.shape, dtype=torch.int8, device=x.device)
    launch: Any = kernels.norm_kernel
    launch[(x.numel() // columns,)](
        x.contiguous(), gain, gain if shift is None else shift, *target.numbers(), out, columns, epsilon, target.zero,
        RMS=rms, SHIFT=shift is not None, OFFSET=target.offset is not None, BLOCK=max(16, _power_of_two(columns)),
        enable_fp_fusion=False,
    )  # fmt: skip
    return Codes(out, target.zero)


def attention(
    q: Codes,
    k: Codes,
    v: Codes,
    numbers: Tensor,
    bias: Tensor | None,
    *,
    probs_zero: int,
    log: int,
    offsets: Sequence[bool],
    zero: int | None,
    has_offset: bool = False,
) -> Tensor:
    """The heads' outputs side by side, (B, N, H·d): codes as int8 where there is a `zero` for them, or float32.

    Args:
        q: (B, H, N, d); like k and v a view whose last axis is in one piece.
        k, v: (B, H, M, d).
        numbers: (H, NUMBERS), float32: scales, offsets and limits.
        bias: (1 or B or a divisor of it, H, N, M), float32 and contiguous, or None; its batches repeat in order.
        probs_zero: Zero of the probabilities.
        log: 0 for a uniform grid of probabilities, else the codes per factor of two.
        offsets: Whether the grids of q, k, v have offsets.
        zero: Of the outputs' grid.
        has_offset: Whether that grid has an offset.
    """
    batch, heads, queries, dim = q.stored.shape
    keys = k.stored.shape[2]
    kind = torch.float32 if zero is None else torch.int8
    out = torch.empty(batch, queries, heads * dim, dtype=kind, device=q.stored.device)
    of_queries = 64 if math.ceil(queries / 64) * batch * heads >= PROCESSORS and queries > 16 else 16
    launch: Any = kernels.attention_kernel
    launch[(math.ceil(queries / of_queries), batch * heads)](
        q.stored, k.stored, v.stored, numbers if bias is None else bias, out, numbers, heads, queries, keys, dim,
        1 if bias is None else len(bias), zero or 0,
        *q.stored.stride()[:3], *k.stored.stride()[:3], *v.stored.stride()[:3],
        Q_ZERO=q.zero, K_ZERO=k.zero, V_ZERO=v.zero, P_ZERO=probs_zero,
        Q_OFFSET=offsets[0], K_OFFSET=offsets[1], V_OFFSET=offsets[2], BIAS=bias is not None, LOG=log,
        CODES=zero is not None, OFFSET=has_offset, NUMBERS=NUMBERS,
        QUERIES=of_queries, KEYS=64, DIM=max(32, _power_of_two(dim)), enable_fp_fusion=False,
    )  # fmt: skip
    return out


def _power_of_two(count: int) -> int:
    return 1 << (count - 1).bit_length()


def interpreted() -> bool:
    """Whether Triton interprets kernels on the CPU (`TRITON_INTERPRET=1`)."""
    from triton import knobs

    return bool(knobs.runtime.interpret)


@functools.cache
def sums_are_exact(device: torch.device) -> bool:
    """Whether products of the largest codes are exact on this device: of layers, packed or not, and of attention."""
    x = torch.full((3, 2 * 67), -128, dtype=torch.int8)
    x[1], x[2, ::2] = 127, 3
    for bits in (8, 4):
        least = -(2 ** (bits - 1))
        weight = torch.full((5, 2, 67), least, dtype=torch.int8)
        weight[1], weight[2, :, ::2] = -least - 1, 1
        ones = torch.ones(2, 5, device=device)
        own = (pack(weight) if bits <= 4 else weight).to(device)
        found = linear(Codes(x.to(device), 0), own, ones, torch.zeros(5, device=device), packed=bits <= 4)
        if not torch.equal(found.cpu(), (x.long() @ weight.flatten(1).long().t()).float()):
            return False
    codes = torch.tensor([-128, 127], dtype=torch.int8).repeat(40)[:66].view(1, 1, 66, 1).expand(1, 1, 66, 32)
    numbers = torch.zeros(1, NUMBERS)
    numbers[0, 6], numbers[0, 7], numbers[0, 8] = 1 / 66 / 255, 255, 1  # equal probabilities, at the largest code
    own = Codes(codes.contiguous().to(device), 0)
    about: dict[str, Any] = {"probs_zero": 128, "log": 0, "offsets": (False, False, False), "zero": None}
    found = attention(own, own, own, numbers.to(device), None, **about)
    return torch.equal(found.cpu(), torch.full((1, 66, 32), 255.0 * (33 * 127 - 33 * 128)))
