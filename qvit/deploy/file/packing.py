"""Numbers to bytes: dense bit-packing of integer codes. The only place in qvit where a code becomes bits.

A code q of width b on a grid that begins at quant_min is stored as the unsigned number

    u = q - quant_min        0 ≤ u < 2^b        signed: quant_min = -2^(b-1), unsigned: quant_min = 0

The stream is little-endian in bits: bit k of u at stream position p + k, and stream bit i is bit i mod 8 of byte
i // 8. Codes follow one another without padding; only the last byte is filled up, with zero bits:

    3 bits, unsigned, codes 1, 2, 7:   001 → bits 1 0 0,  010 → 0 1 0,  111 → 1 1 1     0b11_010_001, 0b0000000_1

    bytes = ceil(Σ b / 8)

A weight site has one width, or one per head. With one width its codes are taken row by row, as they lie in memory.
With one per head they are taken head by head, whether heads are blocks of rows (W_q, W_k, W_v) or of columns (W_o):
all codes of head 0 (row by row within the head), then all of head 1, in one stream: a head begins in the middle of a
byte where the one before it ends there. So a site takes what `CostModel.weight_bytes` counts for it.

Work is done in chunks of 65,536 codes: temporary memory is a few MB whatever the tensor.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from qvit.errors import QvitError, UsageError
from qvit.functional import integer_range
from qvit.plan.spec import Layout

_CHUNK = 1 << 16


def site_size(count: int, widths: Sequence[int]) -> int:
    """Bytes of a site of `count` codes with one width, or one for each of its equally large heads."""
    return math.ceil(sum(count // len(widths) * width for width in widths) / 8)


def code_dtype(widths: Sequence[int], signed: bool) -> torch.dtype:
    """The smallest of int8, int16 and int32 that holds all codes of these widths."""
    bits = max(widths) + (0 if signed else 1)
    return next(dtype for dtype in (torch.int8, torch.int16, torch.int32) if bits <= torch.iinfo(dtype).bits)


def pack_site(codes: Tensor, widths: Sequence[int], signed: bool, layout: Layout) -> Tensor:
    """The codes of a weight site as bytes.

    Args:
        codes: Integers of any integer dtype in the shape of the site's weight, in the range of the grid.
        widths: One width, or one per head, from 1 to 16.
        signed: See `functional.integer_range`.
        layout: The site's axes: where its heads are.

    Returns:
        uint8 of shape `(site_size(codes.numel(), widths),)`.

    Raises:
        UsageError: A code outside of the grid's range, a width that does not exist, codes that are no integers, or
            widths that are not as many as the heads.
    """
    parts = list(_heads(codes, len(widths), layout))
    total = sum(part.numel() * _checked(width) for part, width in zip(parts, widths, strict=True))
    out = np.empty(math.ceil(total / 8), dtype=np.uint8)
    done, carry = 0, np.empty(0, dtype=np.uint8)
    for part, width in zip(parts, widths, strict=True):
        lowest = _check_range(part, width, signed)
        for chunk in part.detach().cpu().reshape(-1).split(_CHUNK):
            unsigned = (chunk.to(torch.int32).numpy() - lowest).astype("<u2")
            bits = np.unpackbits(unsigned.view(np.uint8).reshape(-1, 2), axis=1, count=width, bitorder="little")
            bits = np.concatenate([carry, bits.reshape(-1)])
            whole = len(bits) // 8
            out[done : done + whole] = np.packbits(bits[: 8 * whole], bitorder="little")
            done, carry = done + whole, bits[8 * whole :].copy()
    if len(carry):
        out[done] = np.packbits(carry, bitorder="little")[0]
    return torch.from_numpy(out)


def unpack_site(packed: Tensor, shape: Sequence[int], widths: Sequence[int], signed: bool, layout: Layout) -> Tensor:
    """The inverse of `pack_site`: codes of `shape`, in the dtype that `code_dtype` says.

    Raises QvitError if `packed` is not exactly what these codes take.
    """
    codes = torch.empty(tuple(shape), dtype=code_dtype([_checked(width) for width in widths], signed))
    parts = list(_heads(codes, len(widths), layout))  # views, which may be strided
    total = sum(part.numel() * _checked(width) for part, width in zip(parts, widths, strict=True))
    if packed.dtype != torch.uint8 or packed.dim() != 1 or len(packed) != math.ceil(total / 8):
        raise QvitError(
            f"packed codes of {total} bits are {math.ceil(total / 8)} bytes (uint8), "
            f"not {tuple(packed.shape)} of {packed.dtype}"
        )
    source = packed.detach().cpu().numpy()
    if total % 8 and source[-1] >> (total % 8):
        raise QvitError("the bits after the last packed code are not zero")
    position = 0
    for part, width in zip(parts, widths, strict=True):
        lowest, _ = integer_range(width, signed)
        flat = torch.empty(part.numel(), dtype=part.dtype)
        for chunk in flat.split(_CHUNK):
            end = position + len(chunk) * width
            bits = np.unpackbits(source[position // 8 : math.ceil(end / 8)], bitorder="little")
            bits = bits[position % 8 : position % 8 + end - position].reshape(-1, width)
            columns = np.packbits(bits, axis=1, bitorder="little")
            unsigned = columns[:, 0].astype(np.int32)
            if width > 8:
                unsigned |= columns[:, 1].astype(np.int32) << 8
            chunk.copy_(torch.from_numpy(unsigned + int(lowest)))
            position = end
        part.copy_(flat.view(part.shape))
    return codes


def _heads(codes: Tensor, count: int, layout: Layout) -> Iterator[Tensor]:
    """The part of each width, as views of `codes`: the whole of it, or one per head."""
    if count == 1:
        yield codes
        return
    if layout.heads is None or layout.num_heads != count:
        raise UsageError(f"{count} bit-widths given for a tensor with {layout.num_heads} head(s)")
    viewed = codes if layout.view is None else codes.view(layout.view)
    axis = viewed.dim() - len(layout.heads) + layout.heads.index(count)
    yield from viewed.unbind(axis)


def _checked(bit_width: int) -> int:
    if isinstance(bit_width, bool) or not isinstance(bit_width, int) or not 1 <= bit_width <= 16:
        raise UsageError(f"bit_width {bit_width!r} must be an integer between 1 and 16")
    return bit_width


def _check_range(codes: Tensor, width: int, signed: bool) -> int:
    """quant_min of the grid. Raises UsageError for a code outside of it."""
    if codes.is_floating_point() or codes.is_complex() or codes.dtype == torch.bool:
        raise UsageError(f"codes are integers, not {codes.dtype}")
    low, high = integer_range(width, signed)
    if codes.numel():
        smallest, largest = (int(value) for value in torch.aminmax(codes))
        if smallest < low or largest > high:
            wrong = smallest if smallest < low else largest
            raise UsageError(f"code {wrong} is outside of the grid of {width} bits, {low} to {high}")
    return int(low)
