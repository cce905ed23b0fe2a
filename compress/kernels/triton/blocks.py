"""Plain rounding of blocks by Triton: largest weights, packed codes, values, and the errors of a whole menu.

Functions and results are those of :mod:`compress.kernels.blocks`; codes, scales and values equal bit for bit.

Shapes: O out, I in, N blocks in a row, K table entries, C scalings, T tables, J tiles of columns.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from compress.kernels.triton.launch import check, on_its_device

TABLES = 4
"""Tables that one call for the errors of a menu can take, each of a power of two of at most 256 entries."""

_BLOCKS = 64
_OCTETS = 256
_ROWS, _COLUMNS = 4, 512
"""What one program takes."""


@triton.jit
def nearest(unit, midpoints, BITS: tl.constexpr):
    """Number of midpoints below each unit: the nearest of 2 ** BITS entries, ties to the lower one."""
    code = tl.zeros(unit.shape, tl.int32)
    if BITS <= 3:
        for j in tl.static_range(2**BITS - 1):
            code += (unit > tl.load(midpoints + j)).to(tl.int32)
    else:
        for j in tl.static_range(BITS):
            half = 2 ** (BITS - 1 - j)
            code += tl.where(unit > tl.load(midpoints + code + (half - 1)), half, 0)
    return code


@triton.jit
def units(weight, scale):
    """Weights over their scale, each quotient rounded; 0 where the scale is not positive."""
    return tl.div_rn(weight, tl.where(scale > 0, scale, float("inf")))


@triton.jit
def maxima_kernel(
    weight, maxima, count, blocks, columns, block_size, BLOCKS: tl.constexpr, WIDTH: tl.constexpr
):
    """Largest absolute weight of blocks in row-major order, infinity where a weight is not finite."""
    at = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    place = tl.arange(0, WIDTH)
    column = (at % blocks * block_size)[:, None] + place[None, :]
    there = (at < count)[:, None] & (place < block_size)[None, :] & (column < columns)
    size = tl.abs(tl.load(weight + (at // blocks * columns)[:, None] + column, mask=there, other=0.0))
    undefined = tl.max(tl.where(size < float("inf"), 0, 1), axis=1)
    tl.store(maxima + at, tl.where(undefined > 0, float("inf"), tl.max(size, axis=1)), mask=at < count)


@triton.jit
def quantize_kernel(
    weight, scales, midpoints, table, packed, values, count, octets, columns, blocks, block_size, high,
    BITS: tl.constexpr, PACK: tl.constexpr, OCTETS: tl.constexpr,
):  # fmt: skip
    """Octets of rows padded to whole blocks: their codes as a checkpoint packs them, or what the codes stand for."""
    at = tl.program_id(0).to(tl.int64) * OCTETS + tl.arange(0, OCTETS)
    row = at // octets
    first = at % octets * 8
    column = first[:, None] + tl.arange(0, 8)[None, :]
    there = (at < count)[:, None] & (column < columns)
    given = tl.load(weight + (row * columns)[:, None] + column, mask=there, other=0.0)
    scale = tl.load(scales + row * blocks + first // block_size, mask=at < count, other=0.0)[:, None]
    code = nearest(units(given, scale), midpoints, BITS)
    if PACK:
        WIDTH: tl.constexpr = 2 if BITS == 3 else BITS
        PER: tl.constexpr = 8 // WIDTH
        shifted = (
            tl.reshape(code & (2**WIDTH - 1), (OCTETS, WIDTH, PER))
            << (WIDTH * tl.arange(0, PER))[None, None, :]
        )
        offset = (at * WIDTH)[:, None] + tl.arange(0, WIDTH)[None, :]
        tl.store(packed + offset, tl.sum(shifted, axis=2).to(tl.uint8), mask=(at < count)[:, None])
        if BITS == 3:
            bits = tl.sum((code >> 2) << tl.arange(0, 8)[None, :], axis=1)
            tl.store(packed + high + at, bits.to(tl.uint8), mask=at < count)
    else:
        value = tl.load(table + code) * scale
        tl.store(values + (row * columns)[:, None] + column, value, mask=there)


@triton.jit
def _add_errors(
    weight,
    counted,
    scale,
    there,
    midpoints,
    table,
    squares,
    sums,
    at,
    held,
    WEIGHED: tl.constexpr,
    BITS: tl.constexpr,
):
    error = tl.load(table + nearest(units(weight, scale), midpoints, BITS)) * scale - weight
    error = tl.where(there, error, 0.0)
    square = error * error
    if WEIGHED:
        square = square * counted
    tl.store(squares + at, tl.sum(square, axis=1), mask=held)
    tl.store(sums + at, tl.sum(error, axis=1), mask=held)


@triton.jit
def menu_kernel(
    weight, element_weights, scales, uses, midpoints, tables, squares, sums, rows, columns, blocks, block_size,
    scalings, BITS0: tl.constexpr, BITS1: tl.constexpr, BITS2: tl.constexpr, BITS3: tl.constexpr,
    WEIGHED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Sums over a tile of columns of squared errors and of errors, [C, 4, J, O]; the weights are read once."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    held = row < rows
    there = held[:, None] & (column < columns)[None, :]
    place = row.to(tl.int64)[:, None] * columns + column[None, :]
    given = tl.load(weight + place, mask=there, other=0.0)
    counted = given
    if WEIGHED:
        counted = tl.load(element_weights + place, mask=there, other=0.0)
    block = row.to(tl.int64)[:, None] * blocks + (column // block_size)[None, :]
    size = tl.num_programs(1).to(tl.int64) * rows
    at = tl.program_id(1).to(tl.int64) * rows + row
    for scaling in range(scalings):
        scale = tl.load(scales + block, mask=there, other=0.0)
        asked = tl.load(uses + scaling)
        if (asked & 1) != 0:
            _add_errors(
                given, counted, scale, there, midpoints, tables, squares, sums, at, held, WEIGHED, BITS0
            )
        if (asked & 2) != 0:
            _add_errors(
                given,
                counted,
                scale,
                there,
                midpoints + 256,
                tables + 256,
                squares,
                sums,
                at + size,
                held,
                WEIGHED,
                BITS1,
            )
        if (asked & 4) != 0:
            _add_errors(
                given, counted, scale, there, midpoints + 512, tables + 512, squares, sums, at + 2 * size, held,
                WEIGHED, BITS2,
            )  # fmt: skip
        if (asked & 8) != 0:
            _add_errors(
                given, counted, scale, there, midpoints + 768, tables + 768, squares, sums, at + 3 * size, held,
                WEIGHED, BITS3,
            )  # fmt: skip
        block += tl.cast(rows, tl.int64) * blocks
        at += 4 * size


def _midpoints(table: Tensor) -> Tensor:
    """Halfway between entries, rounded once, as :func:`compress.kernels.reference.make_grid` takes them."""
    wide = table.double()
    return ((wide[1:] + wide[:-1]) / 2).float()


def _bits(table: Tensor) -> int:
    return max(1, (table.numel() - 1).bit_length())


@on_its_device
def block_maxima(weight_OI: Tensor, block_size: int) -> Tensor:
    """As :func:`compress.kernels.blocks.block_maxima`, on the device."""
    rows, columns = weight_OI.shape
    blocks = -(-columns // block_size)
    check("weights", weight_OI, rows * columns, (torch.float32,), weight_OI.device)
    found = weight_OI.new_empty(rows, blocks)
    maxima_kernel[(-(-rows * blocks // _BLOCKS),)](
        weight_OI.contiguous(),
        found,
        rows * blocks,
        blocks,
        columns,
        block_size,
        BLOCKS=_BLOCKS,
        WIDTH=triton.next_power_of_2(block_size),
        enable_fp_fusion=False,
    )
    return found


def _quantize(
    weight_OI: Tensor,
    scales_ON: Tensor,
    block_size: int,
    table_K: Tensor,
    packed: Tensor | None,
    values: Tensor | None,
) -> None:
    rows, columns = weight_OI.shape
    blocks, device, floats = -(-columns // block_size), weight_OI.device, (torch.float32,)
    check("weights", weight_OI, rows * columns, floats, device)
    check("scales", scales_ON, rows * blocks, floats, device)
    bits = _bits(table_K)
    check("table", table_K, 2**bits, floats, device)
    octets = blocks * block_size // 8
    quantize_kernel[(-(-rows * octets // _OCTETS),)](
        weight_OI.contiguous(),
        scales_ON.contiguous(),
        _midpoints(table_K),
        table_K.contiguous(),
        packed if packed is not None else weight_OI,
        values if values is not None else weight_OI,
        rows * octets,
        octets,
        columns,
        blocks,
        block_size,
        2 * rows * octets,
        BITS=bits,
        PACK=packed is not None,
        OCTETS=_OCTETS,
        enable_fp_fusion=False,
    )


@on_its_device
def packed_codes(weight_OI: Tensor, scales_ON: Tensor, block_size: int, table_K: Tensor, bits: int) -> Tensor:
    """As :func:`compress.kernels.blocks.packed_codes`, on the device."""
    packed = torch.empty(
        scales_ON.numel() * block_size * bits // 8, dtype=torch.uint8, device=weight_OI.device
    )
    _quantize(weight_OI, scales_ON, block_size, table_K, packed, None)
    return packed


@on_its_device
def rounded_values(weight_OI: Tensor, scales_ON: Tensor, block_size: int, table_K: Tensor) -> Tensor:
    """As :func:`compress.kernels.blocks.rounded_values`, on the device."""
    values = torch.empty_like(weight_OI, memory_format=torch.contiguous_format)
    _quantize(weight_OI, scales_ON, block_size, table_K, None, values)
    return values


@on_its_device
def menu_errors(
    weight_OI: Tensor,
    element_weights: Tensor | None,
    block_size: int,
    scales_CON: Tensor,
    tables: Sequence[Tensor],
    uses: Sequence[Sequence[int]],
) -> Mapping[tuple[int, int], tuple[Tensor, Tensor]]:
    """As :func:`compress.kernels.blocks.menu_errors`, on the device; sums are float32 within 512 columns."""
    rows, columns = weight_OI.shape
    device, floats = weight_OI.device, (torch.float32,)
    blocks, tiles = -(-columns // block_size), -(-columns // _COLUMNS)
    check("weights", weight_OI, rows * columns, floats, device)
    check("scales", scales_CON, len(scales_CON) * rows * blocks, floats, device)
    if element_weights is not None:
        check("element weights", element_weights, rows * columns, floats, device)
    entries, midpoints = torch.zeros(2, TABLES, 256, device=device)
    widths = [1] * TABLES
    for at, table in enumerate(tables):
        widths[at] = _bits(table)
        check("table", table, 2 ** widths[at], floats, device)
        entries[at, : len(table)], midpoints[at, : len(table) - 1] = table, _midpoints(table)
    asked = torch.tensor([sum(1 << table for table in own) for own in uses], dtype=torch.int32, device=device)
    squares, sums = weight_OI.new_empty(2, len(scales_CON), TABLES, tiles, rows)
    menu_kernel[(-(-rows // _ROWS), tiles)](
        weight_OI.contiguous(),
        weight_OI if element_weights is None else element_weights.contiguous(),
        scales_CON.contiguous(),
        asked,
        midpoints,
        entries,
        squares,
        sums,
        rows,
        columns,
        blocks,
        block_size,
        len(scales_CON),
        BITS0=widths[0],
        BITS1=widths[1],
        BITS2=widths[2],
        BITS3=widths[3],
        WEIGHED=element_weights is not None,
        ROWS=_ROWS,
        COLUMNS=_COLUMNS,
        enable_fp_fusion=False,
    )
    return {
        (at, table): (squares[at, table].double().sum(0), sums[at, table].double().sum(0))
        for at, own in enumerate(uses)
        for table in own
    }
