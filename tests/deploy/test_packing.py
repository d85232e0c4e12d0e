"""Bytes of codes: hand-worked streams, the identity for every width and length, heads of rows and of columns."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from qvit.deploy.file import packing
from qvit.deploy.file.packing import code_dtype, pack_site, site_size, unpack_site
from qvit.errors import QvitError, UsageError
from qvit.functional import integer_range
from qvit.plan.cost import CostModel
from qvit.plan.spec import Layout, Site, TensorSpec

ROWS = Layout(view=(3, 2, 5), heads=(3, 1, 1), channels=(3, 2, 1))
COLUMNS = Layout(view=(5, 3, 2), heads=(3, 1), channels=(5, 1, 1))


def pack(codes: Tensor, width: int, signed: bool) -> Tensor:
    """Codes of one width."""
    return pack_site(codes, [width], signed, Layout())


def unpack(packed: Tensor, width: int, count: int, signed: bool) -> Tensor:
    return unpack_site(packed, (count,), [width], signed, Layout())


def random_codes(shape: tuple[int, ...], width: int, signed: bool, seed: int = 0) -> Tensor:
    low, high = integer_range(width, signed)
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(low, high + 1, shape, generator=generator, dtype=torch.int32)


def test_bytes_written_by_hand() -> None:
    """Bits of the stream from the lowest bit of the first byte on."""
    assert pack(torch.tensor([1, 2, 7]), 3, signed=False).tolist() == [0b11_010_001, 0b1]
    assert pack(torch.tensor([-4, -3, 3]), 3, signed=True).tolist() == [0b11_001_000, 0b1]
    assert pack(torch.tensor([-2, -1, 0, 1, 1]), 2, signed=True).tolist() == [0b11_10_01_00, 0b11]
    assert pack(torch.tensor([1, 0, 1, 1, 0, 0, 0, 0, 1]), 1, signed=False).tolist() == [0b0000_1101, 1]
    assert pack(torch.tensor([-128, 127]), 8, signed=True).tolist() == [0, 255]
    assert pack(torch.tensor([0xABC, 0x123]), 12, signed=False).tolist() == [0xBC, 0x3A, 0x12]
    assert pack(torch.tensor([-32768, 32767]), 16, signed=True).tolist() == [0, 0, 255, 255]


def test_heads_follow_one_another_without_padding() -> None:
    """Widths 2, 3, 1 of two codes each: 12 bits in two bytes; columns are taken head by head."""
    weight = torch.tensor([[1, 5, 0], [2, 7, 1]])
    layout = Layout(view=(2, 3, 1), heads=(3, 1), channels=(2, 1, 1))
    stream = 1 | 2 << 2 | 5 << 4 | 7 << 7 | 0 << 10 | 1 << 11
    packed = pack_site(weight, (2, 3, 1), False, layout)
    assert packed.tolist() == [stream & 255, stream >> 8]
    assert torch.equal(unpack_site(packed, (2, 3), (2, 3, 1), False, layout), weight.to(torch.int8))
    assert pack_site(weight, (3,), False, layout).tolist() == pack(weight, 3, False).tolist(), "one width: row by row"


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("width", range(1, 17))
def test_identity_at_every_length(width: int, signed: bool) -> None:
    for length in range(71):
        codes = random_codes((length,), width, signed, seed=length)
        packed = pack(codes, width, signed)
        assert len(packed) == math.ceil(length * width / 8) == site_size(length, [width])
        assert packed.dtype == torch.uint8
        found = unpack(packed, width, length, signed)
        assert torch.equal(found.int(), codes) and found.dtype == code_dtype([width], signed)


@given(width=st.integers(1, 16), signed=st.booleans(), length=st.integers(0, 70), data=st.data())
def test_identity_of_any_codes(width: int, signed: bool, length: int, data: st.DataObject) -> None:
    low, high = integer_range(width, signed)
    codes = data.draw(st.lists(st.integers(low, high), min_size=length, max_size=length))
    packed = pack(torch.tensor(codes, dtype=torch.int64), width, signed)
    assert unpack(packed, width, length, signed).tolist() == codes
    whole = sum((code - low) << width * i for i, code in enumerate(codes))
    assert int.from_bytes(bytes(packed.tolist()), "little") == whole, "the stream is one little-endian number"


@given(widths=st.tuples(*[st.integers(1, 9)] * 3), columns=st.booleans(), signed=st.booleans(), seed=st.integers(0, 99))
def test_identity_with_a_width_per_head(widths: tuple[int, ...], columns: bool, signed: bool, seed: int) -> None:
    layout = COLUMNS if columns else ROWS
    shape = (5, 6) if columns else (6, 5)
    codes = torch.empty(shape, dtype=torch.int32)
    parts = codes.view(layout.view or ()).unbind(1 if columns else 0)
    for part, width in zip(parts, widths, strict=True):
        part.copy_(random_codes(tuple(part.shape), width, signed, seed))
    packed = pack_site(codes, widths, signed, layout)
    cost = CostModel({"w": Site("w", "weight", layout, TensorSpec(), numel=30)}, [])
    assert len(packed) == cost.weight_bytes({"w": widths}) == site_size(30, widths) == math.ceil(10 * sum(widths) / 8)
    assert torch.equal(unpack_site(packed, shape, widths, signed, layout).int(), codes)
    stream = int.from_bytes(bytes(packed.tolist()), "little")
    for part, width in zip(parts, widths, strict=True):
        for code in part.flatten().tolist():
            assert stream & (2**width - 1) == code - integer_range(width, signed)[0]
            stream >>= width
    assert stream == 0


def test_long_tensors_go_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    for chunk in (1, 3, 8, 1 << 16):
        monkeypatch.setattr(packing, "_CHUNK", chunk)
        codes = random_codes((6, 5), 3, True)
        packed = pack_site(codes, (3, 4, 7), True, ROWS)
        assert torch.equal(unpack_site(packed, (6, 5), (3, 4, 7), True, ROWS).int(), codes)
        if chunk == 1:
            first = packed
        assert torch.equal(packed, first)


@pytest.mark.parametrize(
    ("width", "signed", "dtype"),
    [(1, False, torch.int8), (7, False, torch.int8), (8, True, torch.int8), (8, False, torch.int16),
     (9, True, torch.int16), (16, True, torch.int16), (16, False, torch.int32)],
)  # fmt: skip
def test_the_smallest_type_that_holds_all_codes(width: int, signed: bool, dtype: torch.dtype) -> None:
    assert code_dtype([width], signed) == dtype == code_dtype([1, width], signed)
    codes = torch.tensor(integer_range(width, signed))
    assert unpack(pack(codes, width, signed), width, 2, signed).tolist() == codes.tolist()


@pytest.mark.parametrize("width", [1, 2, 3, 8, 11])
@pytest.mark.parametrize("signed", [True, False])
def test_codes_outside_of_the_grid_raise(width: int, signed: bool) -> None:
    low, high = integer_range(width, signed)
    for code in (low - 1, high + 1):
        with pytest.raises(UsageError, match=rf"code {code} is outside of the grid of {width} bits"):
            pack(torch.tensor([0, code], dtype=torch.int64), width, signed)


def test_what_is_refused() -> None:
    with pytest.raises(UsageError, match="codes are integers, not torch.float32"):
        pack(torch.zeros(2), 2, True)
    for width in (0, 17, 2.0, True):
        with pytest.raises(UsageError, match="between 1 and 16"):
            pack(torch.zeros(2, dtype=torch.int8), width, True)  # type: ignore[arg-type]
        with pytest.raises(UsageError, match="between 1 and 16"):
            unpack(torch.zeros(2, dtype=torch.uint8), width, 1, True)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="2 bit-widths given for a tensor with 3 head"):
        pack_site(torch.zeros(6, 5, dtype=torch.int8), (2, 3), True, ROWS)
    with pytest.raises(QvitError, match="packed codes of 9 bits are 2 bytes"):
        unpack(torch.zeros(3, dtype=torch.uint8), 3, 3, True)
    with pytest.raises(QvitError, match="2 bytes"):
        unpack(torch.zeros(2, dtype=torch.int8), 3, 3, True)
    with pytest.raises(QvitError, match="not zero"):
        unpack(torch.tensor([0, 2], dtype=torch.uint8), 3, 3, True)
