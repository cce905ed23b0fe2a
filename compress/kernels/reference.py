"""The torch backend: rounding to a table, dequantization and the quantized product on any torch device.

Shapes: O out, I in, N blocks in a row, B weights in a block, T tokens, r rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch

from compress.errors import UsageError

_CHUNK = 1 << 15
"""Weights handled at a time: the temporaries stay in a core's cache, and torch does not split operations of this
size among threads, which on busy machines wait for each other far longer than they work."""


_MOST_CELLS = 1 << 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Grid:
    """A sorted table with an index that finds the nearest entry without a search.

    Attributes:
        table: float32 [K] ascending, within [-1, 1].
        base: uint8 [cells + 1], entries whose upper midpoint lies in an earlier cell.
        cut: float32 [cells + 1], the one midpoint inside the cell, infinity where there is none.
    """

    table: torch.Tensor
    base: torch.Tensor
    cut: torch.Tensor

    @property
    def cells(self) -> int:
        """Equal intervals that [-1, 1] is divided into."""
        return self.base.numel() - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedMatrix:
    """What a kernel needs of a quantized matrix [O, I].

    Attributes:
        codes: uint8 1-D, packed, rows padded to whole blocks.
        scales: float32 [O, N], dequantized first-level scales.
        table: float32 [2 ** bits].
        bits: Width of a code.
        block_size: Weights that share a scale, a multiple of 8.
        rows: O.
        columns: I.
    """

    codes: torch.Tensor
    scales: torch.Tensor
    table: torch.Tensor
    bits: int
    block_size: int
    rows: int
    columns: int


Factors = tuple[torch.Tensor, torch.Tensor]
"""Dense low-rank factors (L1 [O, r], L2 [r, I])."""


def _cell(x: torch.Tensor, cells: int) -> torch.Tensor:
    # Monotone in x even when rounded to float32, which is all that `round_to_grid` needs.
    return ((x + 1) * (cells / 2)).to(torch.int32)


def make_grid(table: torch.Tensor) -> Grid:
    """Index a sorted table of at most 256 float32 entries in [-1, 1] for :func:`round_to_grid`.

    Raises:
        UsageError: Two entries are equal or too close to be told apart.
    """
    wide = table.double()
    midpoints = ((wide[1:] + wide[:-1]) / 2).float()
    cells = 64
    while _cell(midpoints, cells).unique().numel() < midpoints.numel():
        if cells == _MOST_CELLS:
            raise UsageError("Two entries of the look-up table are nearly equal.", "Merge them.")
        cells *= 2
    where = _cell(midpoints, cells).long()
    held = torch.zeros(cells + 1, dtype=torch.int64, device=table.device)
    held[where] = 1
    cut = torch.full((cells + 1,), torch.inf, device=table.device)
    cut[where] = midpoints
    return Grid(table=table, base=(held.cumsum(0) - held).to(torch.uint8), cut=cut)


def round_to_grid(x: torch.Tensor, grid: Grid) -> torch.Tensor:
    """The index of the nearest table entry, ties to the lower one.

    Equal to ``torch.bucketize(x, midpoints)`` for every finite float32, and several times faster on a CPU.

    Args:
        x: float32, any shape; values outside [-1, 1] go to the ends.
        grid: From :func:`make_grid`.

    Returns:
        uint8, the shape of ``x``.
    """
    flat = x.clamp(-1, 1).reshape(-1)
    cell = _cell(flat, grid.cells)
    codes = grid.base.index_select(0, cell)
    codes += flat > grid.cut.index_select(0, cell)
    return codes.view(x.shape)


def quantize_blocks(blocks: torch.Tensor, scales: torch.Tensor, grid: Grid) -> torch.Tensor:
    """Codes of blocks of weights divided by their scales.

    Args:
        blocks: float32 [n, B].
        scales: float32 [n], not negative; a block with scale 0 gets the code of zero.
        grid: The table to round to.

    Returns:
        uint8 [n, B], not packed.
    """
    codes = torch.empty(blocks.shape, dtype=torch.uint8, device=blocks.device)
    divisors = torch.where(scales > 0, scales, torch.inf)[:, None]
    step = max(1, _CHUNK // blocks.shape[1])
    for start in range(0, blocks.shape[0], step):
        part = slice(start, start + step)
        codes[part] = round_to_grid(blocks[part] / divisors[part], grid)
    return codes


@cache
def _digits(bits: int, device: torch.device) -> torch.Tensor:
    """The codes that one packed index holds, int64 [indices, codes of it]."""
    if bits == 3:  # 8 bits of the low plane (four codes) and 4 bits of the high plane
        index = torch.arange(4096, device=device)[:, None]
        at = torch.arange(4, device=device)
        low = (index >> (2 * at)) & 3
        return low.bitwise_or(((index >> (8 + at)) & 1) << 2)
    index = torch.arange(256, device=device)[:, None]
    return (index >> torch.arange(0, 8, bits, device=device)).bitwise_and(2**bits - 1)


def _indices(matrix: PackedMatrix, start: int, stop: int) -> torch.Tensor:
    """Packed indices of codes ``start`` to ``stop`` (multiples of 8), int32."""
    codes = matrix.codes
    if matrix.bits != 3:
        return codes[start * matrix.bits // 8 : stop * matrix.bits // 8].to(torch.int32)
    high_plane = matrix.rows * matrix.scales.shape[1] * matrix.block_size // 4
    low = codes[start // 4 : stop // 4].to(torch.int32)
    high = codes[high_plane + start // 8 : high_plane + stop // 8].to(torch.int32)
    low.view(-1, 2)[:, 0] |= (high & 15) << 8
    low.view(-1, 2)[:, 1] |= (high & 240) << 4
    return low


def dequantize(
    matrix: PackedMatrix, dtype: torch.dtype = torch.float32, start: int = 0, stop: int | None = None
) -> torch.Tensor:
    """Weights of rows ``start`` to ``stop``: table entry times scale in float32, then cast.

    Args:
        matrix: The packed matrix.
        dtype: Of the result.
        start: First row.
        stop: Row after the last, None for all.

    Returns:
        [stop - start, I] of ``dtype``, contiguous.
    """
    stop = matrix.rows if stop is None else stop
    blocks = matrix.scales.shape[1]
    width = blocks * matrix.block_size
    values = matrix.table[_digits(matrix.bits, matrix.table.device)]
    if values.shape[1] == 1:  # a lookup of single entries is faster on a flat table
        values = values.view(-1)
    out = torch.empty(stop - start, width, dtype=dtype, device=matrix.codes.device)
    step = max(1, _CHUNK // width)
    for row in range(start, stop, step):
        end = min(row + step, stop)
        entries = values.index_select(0, _indices(matrix, row * width, end * width))
        torch.mul(
            entries.view(end - row, blocks, matrix.block_size),
            matrix.scales[row:end, :, None],
            out=out[row - start : end - start].view(end - row, blocks, matrix.block_size),
        )
    return out if width == matrix.columns else out[:, : matrix.columns].contiguous()


def matmul(x: torch.Tensor, matrix: PackedMatrix, factors: Factors | None) -> torch.Tensor:
    """``x @ (Q + L1 @ L2).T``.

    Args:
        x: [..., I], floating; its dtype is the compute dtype.
        matrix: Q, packed.
        factors: (L1 [O, r], L2 [r, I]) in the dtype of ``x``, or None.

    Returns:
        [..., O] in the dtype of ``x``.
    """
    y: torch.Tensor = torch.nn.functional.linear(x, dequantize(matrix, x.dtype))
    if factors is not None:
        left, right = factors
        y += torch.nn.functional.linear(torch.nn.functional.linear(x, right), left)
    return y


def matmul_transposed(grad: torch.Tensor, matrix: PackedMatrix, factors: Factors | None) -> torch.Tensor:
    """``grad @ (Q + L1 @ L2)``: the gradient of :func:`matmul` in its input.

    Args:
        grad: [..., O], floating; its dtype is the compute dtype.
        matrix: Q, packed.
        factors: (L1 [O, r], L2 [r, I]) in the dtype of ``grad``, or None.

    Returns:
        [..., I] in the dtype of ``grad``.
    """
    out = grad @ dequantize(matrix, grad.dtype)
    if factors is not None:
        left, right = factors
        out += (grad @ left) @ right
    return out
