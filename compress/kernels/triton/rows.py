"""Some rows of a tiled matrix, as an embedding looks them up: nothing waits for the device.

Shapes: O out, I in, n rows that are asked for.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from compress.kernels.packed import CHUNK, TiledMatrix
from compress.kernels.triton.decode import looked_up, scaled, words_of
from compress.kernels.triton.launch import arguments, check, check_matrix, on_its_device

_ROWS, _CHUNKS = 16, 4
"""Rows and chunks that one program dequantizes."""


@triton.jit(do_not_specialize=["count"])
def rows_kernel(
    out, index, count, codes, scale_codes, steps, offset, table, rows, columns, tiles, chunks, blocks,
    group_size, ROWS: tl.constexpr, CHUNKS: tl.constexpr, BITS: tl.constexpr, SCALE_BITS: tl.constexpr,
    BLOCK: tl.constexpr, SHIFT: tl.constexpr,
):  # fmt: skip
    """Rows ``index`` [n] as float32 [n, I], NaN for a number that no row has; grid (parts of n, of the columns)."""
    at = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    asked = tl.load(index + at, mask=at < count, other=0)
    known = (asked >= 0) & (asked < rows)
    row = tl.where(known, asked, 0).to(tl.int32)
    chunk = tl.program_id(1) * CHUNKS
    words, high = words_of(codes, row, tiles, chunks, chunk, CHUNKS, BITS, False)
    weight = scaled(
        looked_up(words, high, table, CHUNKS, BITS), scale_codes, steps, offset, row, rows, chunk, blocks, group_size,
        CHUNKS, BITS, SCALE_BITS, BLOCK, SHIFT, False,
    )  # fmt: skip
    weight = tl.reshape(weight, (ROWS, CHUNKS * 32))
    weight = tl.where(known[:, None], weight, float("nan"))
    column = chunk * 32 + tl.arange(0, CHUNKS * 32)
    there = (at < count)[:, None] & (column < columns)[None, :]
    tl.store(out + at.to(tl.int64)[:, None] * columns + column[None, :], weight, mask=there)


@on_its_device
def picked_rows(matrix: TiledMatrix, index: Tensor) -> Tensor:
    """``dequantize(matrix)[index]`` bit for bit; a number that no row has gives NaN.

    Args:
        matrix: The tiled matrix.
        index: Row numbers, int64, any shape [...].

    Returns:
        float32 [..., I].

    Raises:
        UsageError: Types or devices do not fit, or no kernel runs there.
    """
    g, device = matrix.geometry, matrix.codes.device
    check_matrix(matrix, device)
    check("the row numbers", index, index.numel(), (torch.int64,), device)
    out = torch.empty(*index.shape, g.columns, device=device)
    if out.numel():
        rows_kernel[(-(-index.numel() // _ROWS), -(-g.columns // (CHUNK * _CHUNKS)))](
            out,
            index.contiguous(),
            index.numel(),
            ROWS=_ROWS,
            CHUNKS=_CHUNKS,
            enable_fp_fusion=False,  # each operation rounds, as on the CPU
            **arguments(matrix),
        )
    return out
