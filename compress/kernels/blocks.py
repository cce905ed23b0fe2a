"""Plain rounding of blocks, by the C library or on a GPU by Triton: packed codes, values, the errors of a whole menu.

Codes, scales and values are those of the torch backend bit for bit, at every level and with any number of threads.

Shapes: O out, I in, N blocks in a row, K table entries, C scalings, T tables.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from compress.kernels.calling import call, contiguous
from compress.kernels.gpu import on_gpu

TABLES = 4
"""Tables that one call for the errors of a menu can take, of at most 256 entries each."""


def block_maxima(weight_OI: Tensor, block_size: int) -> Tensor:
    """Largest absolute weight of every block, float32 [O, N]; not finite where one of its weights is not.

    Args:
        weight_OI: float32.
        block_size: Weights of a block.
    """
    if on_gpu(weight_OI):
        from compress.kernels.triton import blocks as triton_blocks

        return triton_blocks.block_maxima(weight_OI, block_size)
    rows, columns = weight_OI.shape
    found = torch.empty(rows, -(-columns // block_size))
    call("ck_block_maxima", *contiguous(weight_OI), found, sizes=(rows, columns, block_size))
    return found


def packed_codes(weight_OI: Tensor, scales_ON: Tensor, block_size: int, table_K: Tensor, bits: int) -> Tensor:
    """Codes of the weights over their block's scale, rows padded to whole blocks, packed as a checkpoint has them.

    Args:
        weight_OI: float32, finite.
        scales_ON: Dequantized scales, float32, not negative; blocks of scale 0 get the code of zero.
        block_size: Weights of a block, a multiple of 8.
        table_K: The table, float32, ascending, 2 ** bits entries.
        bits: Width of a code: 2, 3, 4 or 8.

    Returns:
        uint8 1-D.
    """
    if on_gpu(weight_OI):
        from compress.kernels.triton import blocks as triton_blocks

        return triton_blocks.packed_codes(weight_OI, scales_ON, block_size, table_K, bits)
    packed = torch.empty(scales_ON.numel() * block_size * bits // 8, dtype=torch.uint8)
    inputs = contiguous(weight_OI, scales_ON, table_K)
    call("ck_quantize", *inputs, packed, None, sizes=(*weight_OI.shape, block_size, len(table_K), bits))
    return packed


def rounded_values(weight_OI: Tensor, scales_ON: Tensor, block_size: int, table_K: Tensor) -> Tensor:
    """What those codes stand for, float32 [O, I]; arguments as :func:`packed_codes`."""
    if on_gpu(weight_OI):
        from compress.kernels.triton import blocks as triton_blocks

        return triton_blocks.rounded_values(weight_OI, scales_ON, block_size, table_K)
    values = torch.empty(weight_OI.shape)
    inputs = contiguous(weight_OI, scales_ON, table_K)
    call("ck_quantize", *inputs, None, values, sizes=(*weight_OI.shape, block_size, len(table_K), 0))
    return values


def menu_errors(
    weight_OI: Tensor,
    element_weights: Tensor | None,
    block_size: int,
    scales_CON: Tensor,
    tables: Sequence[Tensor],
    uses: Sequence[Sequence[int]],
) -> Mapping[tuple[int, int], tuple[Tensor, Tensor]]:
    """Rounding errors of every row for many scalings and tables, from one read of the weights.

    Args:
        weight_OI: float32, finite.
        element_weights: Weight of each squared error, float32 [O, I]; None: 1.
        block_size: Weights of a block.
        scales_CON: Dequantized scales, float32, not negative.
        tables: At most :data:`TABLES`, float32, ascending.
        uses: For every scaling, the places in ``tables`` that are asked for.

    Returns:
        (scaling, table) -> sums of the squared errors and of the errors, rounded less exact, float64 [O] each.
    """
    if on_gpu(weight_OI):
        from compress.kernels.triton import blocks as triton_blocks

        return triton_blocks.menu_errors(weight_OI, element_weights, block_size, scales_CON, tables, uses)
    rows, columns = weight_OI.shape
    entries = torch.zeros(TABLES, dtype=torch.int64)
    padded = torch.zeros(TABLES, 256)
    for at, table in enumerate(tables):
        entries[at], padded[at, : len(table)] = len(table), table
    asked = torch.tensor([sum(1 << table for table in own) for own in uses], dtype=torch.int32)
    squares, sums = torch.empty(2, len(scales_CON), TABLES, rows, dtype=torch.float64)
    weight, scales = contiguous(weight_OI, scales_CON)
    counted = None if element_weights is None else element_weights.contiguous()
    sizes = (rows, columns, block_size, len(scales))
    call("ck_menu_errors", weight, counted, scales, asked, padded, entries, squares, sums, sizes=sizes)
    return {
        (at, table): (squares[at, table], sums[at, table]) for at, own in enumerate(uses) for table in own
    }
