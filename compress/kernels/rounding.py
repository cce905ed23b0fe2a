"""Rounding by the C library: searched ranges, error feedback, coordinate descent, the sums a table is fitted to.

Each function is the torch one of `compress.quantize` with sums taken in another order, by tiles of 64 rows; no result
depends on the number of threads. AVX2 and AVX-512 give the same bits. The scalar level rounds products before it adds
them and may differ in the last bit, and so in codes of what is as near to one table entry as to the next.

Shapes: O out, I in, N blocks in a row, K table entries.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from compress.kernels.calling import call, contiguous

FIT_CHUNK = 256
"""Blocks whose sums are taken apart from the others' when a table is fitted."""


def searched_ranges(
    weight_OI: Tensor, block_size: int, weights_I: Tensor, table_K: Tensor, shares: Sequence[float]
) -> Tensor:
    """Per block, of ``shares`` of its largest weight, the one with the least weighted rounding error, float32 [O, N].

    Args:
        weight_OI: float32, finite.
        block_size: Weights of a row that share a range.
        weights_I: Weight of each column's squared error, float32.
        table_K: The table, float32, ascending.
        shares: Tried in this order; of equal errors the first is kept.
    """
    rows, columns = weight_OI.shape
    found = torch.empty(rows, -(-columns // block_size))
    tried = torch.tensor(shares, dtype=torch.float32)
    inputs = contiguous(weight_OI, weights_I, table_K, tried)
    call("ck_searched_ranges", *inputs, found, sizes=(rows, columns, block_size, len(table_K), len(tried)))
    return found


def feedback(
    weight_OI: Tensor,
    scales_ON: Tensor,
    block_size: int,
    table_K: Tensor,
    *,
    steps_II: Tensor,
    costs_I: Tensor,
    order_I: Tensor,
) -> tuple[Tensor, Tensor]:
    """Codes uint8 [O, I] by error feedback, and the squared output error of every row, float64 [O].

    Args:
        weight_OI: float32, finite.
        scales_ON: Dequantized scales.
        block_size: Weights of a row that share a scale.
        table_K: The table, float32, ascending.
        steps_II: The upper factor of the inverse of H in rounding order, each row over its diagonal.
        costs_I: d, what a squared error of a column costs, in the matrix's own order.
        order_I: Columns in the order they are rounded in, int64.
    """
    codes = torch.empty(weight_OI.shape, dtype=torch.uint8)
    errors = torch.empty(len(weight_OI), dtype=torch.float64)
    inputs = contiguous(weight_OI, scales_ON, steps_II, costs_I, order_I, table_K)
    call("ck_feedback", *inputs, codes, errors, sizes=(*weight_OI.shape, block_size, len(table_K)))
    return codes, errors


def improve_codes(
    weight_OI: Tensor,
    codes_OI: Tensor,
    scales_ON: Tensor,
    block_size: int,
    table_K: Tensor,
    gram_II: Tensor,
    *,
    passes: int,
) -> Tensor:
    """Codes uint8 [O, I] after coordinate descent, columns of strong inputs first.

    Args:
        weight_OI: float32, finite.
        codes_OI: Where to start; stays as it is.
        scales_ON: Dequantized scales.
        block_size: Weights of a row that share a scale.
        table_K: The table, float32, ascending.
        gram_II: H, float32, symmetric, its diagonal above zero.
        passes: Over all columns.
    """
    codes = codes_OI.clone(memory_format=torch.contiguous_format)
    diagonal = gram_II.diagonal().contiguous()
    order = torch.argsort(diagonal, descending=True, stable=True)
    inputs = contiguous(weight_OI, scales_ON, gram_II, diagonal, order, table_K)
    call("ck_improve_codes", *inputs, codes, sizes=(*weight_OI.shape, block_size, len(table_K), passes))
    return codes


def improve_scales(
    weight_OI: Tensor, codes_OI: Tensor, scales_ON: Tensor, block_size: int, table_K: Tensor, gram_II: Tensor
) -> Tensor:
    """Scales float32 [O, N], none negative, that serve the same codes better; arguments as :func:`improve_codes`."""
    found = torch.empty_like(scales_ON, memory_format=torch.contiguous_format)
    inputs = contiguous(weight_OI, codes_OI, scales_ON, gram_II, table_K)
    call("ck_improve_scales", *inputs, found, sizes=(*weight_OI.shape, block_size, len(table_K)))
    return found


def entry_sums(
    blocks_nB: Tensor, scales_n: Tensor, weights_PB: Tensor, table_K: Tensor
) -> tuple[Tensor, Tensor]:
    """Summed weights, and weights times units, of what is nearest to each table entry, float64 [K] each.

    Args:
        blocks_nB: float32; a unit is a value over its block's scale.
        scales_n: float32; blocks of scale 0 are left out.
        weights_PB: float32, those of the first P blocks, repeated for the others; times the square of the scale.
        table_K: The table, float32, ascending.
    """
    chunks, size = -(-len(blocks_nB) // FIT_CHUNK), blocks_nB.shape[1]
    sums = torch.empty(chunks, 2, len(table_K), dtype=torch.float64)
    inputs = contiguous(blocks_nB, scales_n, weights_PB, table_K)
    call("ck_entry_sums", *inputs, sums, sizes=(len(blocks_nB), size, len(weights_PB), len(table_K)))
    mass, moment = sums.sum(0)
    return mass, moment
