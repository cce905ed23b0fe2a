"""LoRA-guided importance by Triton: one tile product of rank 2R, with sums over rows or columns as it goes.

Shapes: O out, I in, R rank, J tiles.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from compress.kernels.triton.decode import times
from compress.kernels.triton.launch import check, interpreted, on_its_device

_ROWS, _COLUMNS, _RANKS = 64, 64, 16
"""What a program takes at a time."""


@triton.jit
def _low_rank(
    left,
    right,
    row,
    column,
    rows,
    columns,
    first,
    last,
    ranks,
    RANKS: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """Terms ``first`` to ``last`` of ``left @ right``, of a tile."""
    sums = tl.zeros((row.shape[0], column.shape[0]), tl.float32)
    for start in range(first, last, RANKS):
        k = start + tl.arange(0, RANKS)
        a = tl.load(
            left + row[:, None] * ranks + k[None, :],
            mask=(row < rows)[:, None] & (k < last)[None, :],
            other=0.0,
        )
        b = tl.load(
            right + k[:, None] * columns + column[None, :],
            mask=(k < last)[:, None] & (column < columns)[None, :],
            other=0.0,
        )
        sums = times(a, b, sums, INTERPRETED)
    return sums


@triton.jit
def importance_kernel(
    weight, left, right, partial, rows, columns, rank, SQUARE: tl.constexpr, OVER_COLUMNS: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, RANKS: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Sums of a tile's importance over its columns [J, O], or its rows [J, I]; left [O, 3 R], right [3 R, I]."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    ranks = 3 * rank
    there = (row < rows)[:, None] & (column < columns)[None, :]
    merged = tl.load(weight + row[:, None] * columns + column[None, :], mask=there, other=0.0)
    merged += _low_rank(left, right, row, column, rows, columns, 2 * rank, ranks, ranks, RANKS, INTERPRETED)
    product = (
        _low_rank(left, right, row, column, rows, columns, 0, 2 * rank, ranks, RANKS, INTERPRETED) * merged
    )
    product = product * product if SQUARE else tl.abs(product)
    if OVER_COLUMNS:
        at = tl.program_id(0).to(tl.int64) * columns + column
        tl.store(partial + at, tl.sum(product, axis=0), mask=column < columns)
    else:
        at = tl.program_id(1).to(tl.int64) * rows + row
        tl.store(partial + at, tl.sum(product, axis=1), mask=row < rows)


@on_its_device
def importance_sums(
    weight_OI: Tensor, left_OR: Tensor, right_RI: Tensor, *, over_columns: bool, square: bool
) -> Tensor:
    """As :func:`compress.kernels.importance.importance_sums`, on the device; sums are float32 within a tile.

    Raises:
        UsageError: Sizes, types or devices do not fit.
    """
    rows, columns = weight_OI.shape
    device, floats, ranks = weight_OI.device, (torch.float32,), left_OR.shape[1]
    check("weights", weight_OI, rows * columns, floats, device)
    check("the left factor", left_OR, rows * ranks, floats, device)
    check("the right factor", right_RI, ranks * columns, floats, device)
    grid = (-(-rows // _ROWS), -(-columns // _COLUMNS))
    partial = weight_OI.new_empty(*((grid[0], columns) if over_columns else (grid[1], rows)))
    importance_kernel[grid](
        weight_OI.contiguous(),
        left_OR.contiguous(),
        right_RI.contiguous(),
        partial,
        rows,
        columns,
        ranks // 3,
        SQUARE=square,
        OVER_COLUMNS=over_columns,
        ROWS=_ROWS,
        COLUMNS=_COLUMNS,
        RANKS=_RANKS,
        INTERPRETED=interpreted(),
        enable_fp_fusion=False,
    )
    return partial.double().sum(0)
