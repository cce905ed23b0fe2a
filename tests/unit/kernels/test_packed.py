"""The packed layout: back to the plain tensors byte for byte, and where docs/kernels.md says that codes lie."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from compress.kernels.library import library
from compress.kernels.packed import Geometry, TiledMatrix, tile, untile
from compress.quantize.packing import pack

pytestmark = pytest.mark.skipif(library() is None, reason="the C library was not built")

WIDTHS = (2, 3, 4, 8)


def random_codes(count: int, bits: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(2**bits, (count,), generator=generator).to(torch.uint8)


def tiled(geometry: Geometry, codes: torch.Tensor, scale_codes: torch.Tensor) -> TiledMatrix:
    groups = -(-geometry.rows * geometry.blocks // geometry.group_size)
    return tile(
        geometry,
        codes=pack(codes, geometry.bits),
        scale_codes=pack(scale_codes, geometry.scale_bits),
        scale_max=torch.ones(groups),
        offset=torch.zeros(1),
        table=torch.linspace(-1, 1, 2**geometry.bits),
    )


@given(
    rows=st.integers(1, 70),
    columns=st.integers(1, 150),
    bits=st.sampled_from(WIDTHS),
    scale_bits=st.sampled_from(WIDTHS),
    block_size=st.sampled_from((8, 16, 24, 40, 64)),
    threads=st.integers(1, 2),
)
def test_untile_inverts_tile(
    rows: int, columns: int, bits: int, scale_bits: int, block_size: int, threads: int
) -> None:
    geometry = Geometry(
        rows=rows, columns=columns, bits=bits, scale_bits=scale_bits, block_size=block_size, group_size=16
    )
    codes = random_codes(rows * geometry.blocks * block_size, bits, 1)
    scale_codes = random_codes(rows * geometry.blocks, scale_bits, 2)
    torch.set_num_threads(threads)
    made = tiled(geometry, codes, scale_codes)
    plain, plain_scales = untile(geometry, made.codes, made.scale_codes)
    assert torch.equal(plain, pack(codes, bits))
    assert torch.equal(plain_scales, pack(scale_codes, scale_bits))


@pytest.mark.parametrize("bits", WIDTHS)
def test_codes_lie_where_the_documents_say(bits: int) -> None:
    rows, columns = 37, 96
    geometry = Geometry(rows=rows, columns=columns, bits=bits, scale_bits=8, block_size=32, group_size=16)
    codes = random_codes(rows * columns, bits, 3).view(rows, columns)
    packed = tiled(geometry, codes, random_codes(rows * 3, 8, 4)).codes.long() & 0xFFFFFFFF
    for row in range(rows):
        for column in range(columns):
            q, f = column % 32 // 8, column % 8
            words = packed[row // 16, column // 32, :, row % 16]
            if bits == 8:
                found = words[2 * q + f // 4] >> (8 * (f % 4)) & 255
            elif bits == 4:
                found = words[q] >> (4 * f) & 15
            else:
                found = words[q // 2] >> (4 * f + 2 * (q % 2)) & 3
                found = found | ((words[2] >> (4 * f + q) & 1) << 2 if bits == 3 else 0)
            assert int(found) == int(codes[row, column])


def test_scale_codes_lie_in_tile_order() -> None:
    geometry = Geometry(rows=20, columns=64, bits=4, scale_bits=8, block_size=32, group_size=16)
    scale_codes = random_codes(40, 8, 5).view(20, 2)
    found = tiled(geometry, random_codes(20 * 64, 4, 6), scale_codes).scale_codes
    assert found.shape == (2, 2, 16)
    assert torch.equal(found[0], scale_codes[:16].T)
    assert torch.equal(found[1, :, :4], scale_codes[16:].T)
    assert not found[1, :, 4:].any()
