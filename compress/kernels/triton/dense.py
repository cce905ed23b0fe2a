"""Products with many tokens: slices of a matrix are dequantized into a bounded workspace and multiplied by torch.

Shapes: O out, I in, T tokens, r rank.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from compress.errors import UsageError
from compress.kernels.cuda import product as native
from compress.kernels.packed import CHUNK, TiledMatrix
from compress.kernels.triton.choice import Slices
from compress.kernels.triton.decode import looked_up, rounded, scaled, words_of
from compress.kernels.triton.launch import TYPES, arguments, check_matrix, interpreted, on_its_device

WORKSPACE = 64 << 20
"""Most bytes of the workspace."""
_UNITS = (2048, 1024, 512, 256)
"""Widths of slices that go well with tiles of products."""

StoredFactors = tuple[Tensor, Tensor]

_ROWS, _CHUNKS = 32, 4
"""Rows and chunks that one program dequantizes."""


@triton.jit(do_not_specialize=["first_row", "last_row"])
def dequantize_kernel(
    out, codes, scale_codes, steps, offset, table, rows, columns, tiles, chunks, blocks, group_size,
    first_row, last_row, first_column, last_column, ROWS: tl.constexpr, CHUNKS: tl.constexpr, BITS: tl.constexpr,
    SCALE_BITS: tl.constexpr, BLOCK: tl.constexpr, SHIFT: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Rows from first_row and columns from first_column (a multiple of 32) on; grid (parts of rows, of columns)."""
    row = first_row + tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    chunk = first_column // 32 + tl.program_id(1) * CHUNKS
    words, high = words_of(codes, row, tiles, chunks, chunk, CHUNKS, BITS, False)
    weight = scaled(
        looked_up(words, high, table, CHUNKS, BITS), scale_codes, steps, offset, row, rows, chunk, blocks, group_size,
        CHUNKS, BITS, SCALE_BITS, BLOCK, SHIFT, False,
    )  # fmt: skip
    weight = tl.reshape(weight, (ROWS, CHUNKS * 32))
    column = chunk * 32 + tl.arange(0, CHUNKS * 32)
    at = (row - first_row).to(tl.int64)[:, None] * (last_column - first_column) + (column - first_column)[
        None, :
    ]
    there = ((row >= first_row) & (row < last_row))[:, None] & (
        (column >= first_column) & (column < last_column)
    )[None, :]
    tl.store(out + at, rounded(weight, out.dtype.element_ty, INTERPRETED), mask=there)


@on_its_device
def dequantize_into(out: Tensor, matrix: TiledMatrix, row: int, column: int) -> None:
    """Write the weights from a row and a column (a multiple of 32) on: table entry times scale, rounded once.

    Args:
        out: [rows, columns], contiguous, of a type in :data:`compress.kernels.triton.launch.TYPES`.
        matrix: The tiled matrix.
        row: First row.
        column: First column.
    """
    if not out.numel():
        return
    whole_rows = column == 0 and out.shape[1] == matrix.geometry.columns and out.is_contiguous()
    if whole_rows and out.data_ptr() % 16 == 0 and native.dequantizes(out.device, matrix.geometry, out.dtype):
        native.dequantize_rows(out, matrix, row)
        return
    parts = -(-out.shape[0] // _ROWS), -(-out.shape[1] // (CHUNK * _CHUNKS))
    dequantize_kernel[parts](
        out,
        first_row=row,
        last_row=row + out.shape[0],
        first_column=column,
        last_column=column + out.shape[1],
        ROWS=_ROWS,
        CHUNKS=_CHUNKS,
        INTERPRETED=interpreted(),
        enable_fp_fusion=False,  # each operation rounds, as on the CPU
        **arguments(matrix),
    )


@on_its_device
def dequantize(
    matrix: TiledMatrix, dtype: torch.dtype = torch.float32, start: int = 0, stop: int | None = None
) -> Tensor:
    """Weights of rows ``start`` to ``stop`` (None: all), [stop - start, I], equal to the reference bit for bit.

    Raises:
        UsageError: The type is none of the kernels', there are no such rows, or no kernel runs on the device.
    """
    if dtype not in TYPES:
        raise UsageError(
            f"The Triton kernels do not make {dtype}.", f"Choose one of {', '.join(map(str, TYPES))}."
        )
    check_matrix(matrix, matrix.codes.device)
    g = matrix.geometry
    end = g.rows if stop is None else stop
    if not 0 <= start <= end <= g.rows:
        raise UsageError(f"Rows {start} to {end} were asked for.", f"The matrix has rows 0 to {g.rows}.")
    out = torch.empty(end - start, g.columns, dtype=dtype, device=matrix.codes.device)
    dequantize_into(out, matrix, start, 0)
    return out


def _pieces(whole: int, across: int, slices: Slices, size: int) -> tuple[int, list[tuple[int, int]]]:
    """Width of a slice and where the slices of ``whole`` lie.

    A slice that is not the whole is as many of the largest of :data:`_UNITS` wide as fit: so many of cuBLAS's tiles
    keep all multiprocessors busy to the end of its product.
    """
    most = min(slices.nbytes, WORKSPACE) // (across * size)
    width = -(-whole // CHUNK) * CHUNK
    if width > most:
        unit = next((unit for unit in _UNITS if unit <= most), CHUNK)
        width = max(CHUNK, most // unit * unit)
    return width, [(at, min(at + width, whole)) for at in range(0, whole, width)]


def product_by_slices(
    x: Tensor, matrix: TiledMatrix, factors: StoredFactors | None, slices: Slices
) -> tuple[Tensor, Tensor]:
    """As :func:`compress.kernels.triton.product.product`; weights and ``x @ L2.T`` are rounded to the type of x."""
    g, tokens = matrix.geometry, x.shape[0]
    y = x.new_empty(tokens, g.rows)
    inner = x.new_empty(tokens, 0) if factors is None else torch.mm(x, factors[1].T)
    width, pieces = _pieces(g.rows, g.columns, slices, x.element_size())
    workspace = x.new_empty(width, g.columns)
    for start, stop in pieces:
        held = workspace[: stop - start]
        dequantize_into(held, matrix, start, 0)
        torch.mm(x, held.T, out=y[:, start:stop])
    if factors is not None:
        y.addmm_(inner, factors[0])
    return y, inner.float()


def transposed_by_slices(
    grad: Tensor, matrix: TiledMatrix, factors: StoredFactors | None, slices: Slices
) -> Tensor:
    """As :func:`compress.kernels.triton.product.product_transposed`, by slices of columns: no sum crosses a slice."""
    g, tokens = matrix.geometry, grad.shape[0]
    out = grad.new_empty(tokens, g.columns)
    width, pieces = _pieces(g.columns, g.rows, slices, grad.element_size())
    workspace = grad.new_empty(g.rows * width)
    for start, stop in pieces:
        held = workspace[: g.rows * (stop - start)].view(g.rows, stop - start)
        dequantize_into(held, matrix, 0, start)
        torch.mm(grad, held, out=out[:, start:stop])
    if factors is not None:
        out.addmm_(torch.mm(grad, factors[0].T), factors[1])
    return out
