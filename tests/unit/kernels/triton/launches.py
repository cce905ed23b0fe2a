"""What the compiler is tried on: calls of the kernels' own functions, with sizes as models have them."""

from __future__ import annotations

import torch

from compress.kernels.packed import Geometry, TiledMatrix
from compress.kernels.triton import blocks, dense, grouped, importance, layout, product, rows
from compress.kernels.triton.choice import Tiles


def matrix(bits: int, rows: int = 512, columns: int = 256) -> TiledMatrix:
    """A matrix of zeros."""
    g = Geometry(rows=rows, columns=columns, bits=bits, scale_bits=8, block_size=64, group_size=256)
    return TiledMatrix(
        geometry=g,
        codes=torch.zeros(g.tiles, g.chunks, bits, 16, dtype=torch.int32),
        scale_codes=torch.zeros(g.tiles, g.blocks, 16, dtype=torch.uint8),
        steps=torch.zeros(-(-rows * g.blocks // 256)),
        offset=torch.zeros(1),
        table=torch.zeros(2**bits),
    )


def few_tokens(bits: int = 4, dtype: torch.dtype = torch.bfloat16) -> None:
    """A product of two shares with factors."""
    rows = 32 if dtype == torch.float32 else 128
    m, tiles = matrix(bits), Tiles(rows=rows, chunks=2, splits=2)
    factors = (torch.zeros(64, 512, dtype=dtype), torch.zeros(64, 256, dtype=dtype))
    product.product(torch.zeros(16, 256, dtype=dtype), m, factors, choice=tiles)


def widths() -> None:
    """The product of one share, without factors, in every width: what the roofline counts the instructions of."""
    for bits in (2, 3, 4, 8):
        tiles = Tiles(rows=128, chunks=2)
        product.product(torch.zeros(1, 256, dtype=torch.bfloat16), matrix(bits), None, choice=tiles)


def gradient(bits: int = 4, dtype: torch.dtype = torch.bfloat16) -> None:
    """Its gradient in the input."""
    m, tiles = matrix(bits), Tiles(rows=64, chunks=2, splits=2)
    product.product_transposed(torch.zeros(16, 512, dtype=dtype), m, None, choice=tiles)


def products() -> None:
    """Every width in both directions, and float32."""
    for bits in (2, 3, 4, 8):
        few_tokens(bits)
        gradient(bits)
        dense.dequantize(matrix(bits), torch.bfloat16)
        rows.picked_rows(matrix(bits), torch.zeros(3, dtype=torch.int64))
    few_tokens(4, torch.float32)
    few_tokens(4, torch.float16)


def layouts() -> None:
    """The packed layout made and turned back."""
    for bits in (2, 3, 4, 8):
        g = Geometry(rows=64, columns=256, bits=bits, scale_bits=bits, block_size=64, group_size=256)
        m = layout.tile(
            g,
            codes=torch.zeros(64 * 256 * bits // 8, dtype=torch.uint8),
            scale_codes=torch.zeros(256 * bits // 8, dtype=torch.uint8),
            scale_max=torch.zeros(1),
            offset=torch.zeros(1),
            table=torch.zeros(2**bits),
        )
        layout.untile(g, m.codes, m.scale_codes)


def groups() -> None:
    """A group of three with factors."""
    members = [matrix(4), matrix(4, rows=128), matrix(4, rows=128)]
    factors = [
        (torch.zeros(16, m.geometry.rows).bfloat16(), torch.zeros(16, 256).bfloat16()) for m in members
    ]
    tiles = Tiles(rows=64, chunks=2, splits=2)
    grouped.group_product(torch.zeros(1, 256).bfloat16(), members, factors, tiles)


def rounding() -> None:
    """Blocks, codes, values, errors and importance."""
    weight, scales = torch.zeros(64, 512), torch.zeros(64, 8)
    blocks.block_maxima(weight, 64)
    for bits in (2, 3, 4, 8):
        blocks.packed_codes(weight, scales, 64, torch.zeros(2**bits), bits)
    blocks.rounded_values(weight, scales, 64, torch.zeros(16))
    tables = [torch.zeros(2**bits) for bits in (2, 3, 4, 8)]
    blocks.menu_errors(weight, weight, 64, scales[None], tables, [(0, 1, 2, 3)])
    for square, over_columns in ((True, False), (False, True)):
        importance.importance_sums(
            weight, torch.zeros(64, 24), torch.zeros(24, 512), over_columns=over_columns, square=square
        )


def single_rows() -> None:
    """Sizes of one, which a launch makes constants of the kernel."""
    weight = torch.zeros(1, 8)
    blocks.menu_errors(weight, None, 8, weight[:, :1, None], [torch.zeros(4)], [(0,)])
    product.product(
        torch.zeros(1, 32), matrix(4, 1, 32), (torch.zeros(1, 1), torch.zeros(1, 32)), choice=Tiles(rows=32)
    )
    g = Geometry(rows=1, columns=8, bits=3, scale_bits=3, block_size=8, group_size=1)
    plain = {"codes": torch.zeros(3, dtype=torch.uint8), "scale_codes": torch.zeros(2, dtype=torch.uint8)}
    m = layout.tile(g, **plain, scale_max=torch.zeros(1), offset=torch.zeros(1), table=torch.zeros(8))
    layout.untile(g, m.codes, m.scale_codes)
