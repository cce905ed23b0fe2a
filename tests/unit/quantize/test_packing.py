"""Packing round trips and layout."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from compress.errors import UsageError
from compress.quantize.packing import pack, packed_bytes, unpack


@given(st.data(), st.sampled_from([2, 3, 4, 8]))
def test_codes_unpack_to_the_codes_packed(data: st.DataObject, bits: int) -> None:
    values = data.draw(st.lists(st.integers(0, 2**bits - 1), max_size=100))
    codes = torch.tensor(values, dtype=torch.uint8)
    packed = pack(codes, bits)
    assert packed.dtype == torch.uint8
    assert packed.numel() == packed_bytes(len(values), bits)
    assert torch.equal(unpack(packed, bits, len(values)), codes)


def test_layout_is_low_bits_first_and_three_bits_are_two_planes() -> None:
    codes = torch.tensor([1, 2, 3, 0, 7], dtype=torch.uint8)
    assert pack(codes[:4], 2).tolist() == [0b00_11_10_01]
    assert pack(codes[:3], 4).tolist() == [0x21, 0x03]
    assert pack(codes, 3).tolist() == [0b00_11_10_01, 0b11, 0b10000]
    assert pack(codes, 8).tolist() == codes.tolist()


def test_matrices_pack_in_row_major_order() -> None:
    codes = torch.arange(12, dtype=torch.uint8).view(3, 4)
    assert torch.equal(pack(codes.T, 4), pack(codes.T.contiguous().view(-1), 4))


def test_sizes() -> None:
    assert [packed_bytes(n, 3) for n in (0, 1, 4, 5, 8, 9)] == [0, 2, 2, 3, 3, 5]
    assert packed_bytes(1000, 4) == 500


def test_another_width_is_refused() -> None:
    with pytest.raises(UsageError, match="5 bits"):
        pack(torch.zeros(3, dtype=torch.uint8), 5)
