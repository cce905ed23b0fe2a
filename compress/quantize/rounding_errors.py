"""Rounding errors of a matrix for a whole menu, without storing anything.

Shapes: O out, I in, S rows that are read (all, or a sample), N blocks in a row, B weights in a block.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import cache

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from compress.errors import CompressError, UsageError
from compress.kernels import blocks as native
from compress.kernels.calling import serves_blocks
from compress.kernels.reference import round_to_grid
from compress.quantize.block_model import BlockModel
from compress.quantize.blockwise import compress_scales, quantize_dequantize, row_blocks
from compress.quantize.config import QuantConfig
from compress.quantize.normal_float import TABLE_BITS, normal_float_grid
from compress.quantize.row_sample import RowSample, sample_rows

_CHUNK = 1 << 17
"""Weights handled at a time: all temporaries stay in cache, and a call works far longer than it takes to make."""

_CELLS, _FINE_CELLS, _SMALL = 1 << 17, 1 << 20, 1 << 18
"""Equal cells of [-1, 1], each with one table entry; finer ones for matrices of fewer weights than the third figure. A
weight whose cell holds a midpoint may take the other neighbour, which is as near to a part in 130,000 of the range:
4e-6 of the error at 8 bits, nothing at fewer."""

_COARSE = 2
"""Cells of narrower tables are as many powers of 2 wider, so that these tables stay in an inner cache."""

_GROUP = 256
"""Blocks of the widest groups."""


def rounding_errors(
    weight: Tensor,
    configs: Sequence[QuantConfig],
    *,
    element_weights: Tensor | None = None,
    sample: float | None = None,
    seed: int = 0,
) -> npt.NDArray[np.float64]:
    """Squared rounding errors of a matrix for many configurations, float64 [C].

    Largest weights of blocks are found once, those of wide blocks from those of narrow ones; scales once for all
    configurations that share them; the place of a weight between the table entries once for all widths.

    Args:
        weight: [O, I].
        configs: C configurations; the table is NormalFloat whatever their codebook.
        element_weights: Weight of each squared error, [O, I], not negative; None: 1.
        sample: Share (float) or number (int) of rows to estimate the errors from; the scales are
            those of the whole matrix all the same. None: all rows, exactly.
        seed: Of the sample.

    Raises:
        CompressError: A weight is not finite.
        UsageError: The sample is not positive, or a share above 1; the element weights have another shape.
    """
    if element_weights is not None and element_weights.shape != weight.shape:
        raise UsageError(
            f"Weights of shape {tuple(element_weights.shape)} cannot weigh errors of shape {tuple(weight.shape)}.",
            "Pass both as [out, in].",
        )
    by_size: dict[int, dict[QuantConfig, list[int]]] = {}
    for at, config in enumerate(configs):
        shared = replace(config, bits=2)
        by_size.setdefault(config.block_size, {}).setdefault(shared, []).append(at)
    maxima = block_maxima(weight, by_size)
    count, columns = weight.shape
    picked, rows, weighing = weight.detach().float(), None, element_weights
    if sample is not None:
        widest = max(maxima)
        sizes = _row_sizes(maxima[widest], _weights_of_blocks(weight, element_weights, widest))
        rows = sample_rows(sizes, sample, seed)
        picked, count = picked[rows.rows], len(rows.rows)
        weighing = None if element_weights is None else element_weights[rows.rows]
    width = max(-(-columns // size) * size for size in by_size)
    if width > columns:
        picked = torch.nn.functional.pad(picked, (0, width - columns))
    roots = None
    if weighing is not None:
        roots = torch.nn.functional.pad(weighing.float().sqrt(), (0, width - columns))
    squares = torch.zeros(len(configs), count, dtype=torch.float64, device=weight.device)
    corrections = torch.ones(len(configs), dtype=torch.float64, device=weight.device)
    for size, members in by_size.items():
        absmax = maxima[size]
        blocks = picked[:, : absmax.shape[1] * size].unflatten(1, (-1, size))
        of_rows = ScalesOfRows(absmax, rows)
        pairs = list(members.items())
        step = max(1, size // 2)  # the scales at hand take at most half the memory of the weights
        for start in range(0, len(pairs), step):
            scalings = [
                (of_rows(shared), [(at, configs[at].bits) for at in found])
                for shared, found in pairs[start : start + step]
            ]
            if serves_blocks(weight):
                _add_native_squares(picked[:, :columns], size, scalings, weighing, squares)
            else:
                _add_squares(blocks, scalings, roots, squares)
        if rows is not None:
            counted = _weights_of_blocks(weight, element_weights, size)
            widths = {configs[at].bits for found in members.values() for at in found}
            tables = {bits: _nearest(bits, _CELLS, weight.device) for bits in widths}
            model = BlockModel(weight, absmax, counted, tables, rows, size)
            for shared, found in pairs:
                for at in found:
                    corrections[at] = model.correction(shared, configs[at].bits)
    totals = squares.sum(1) if rows is None else squares @ rows.counts
    errors: npt.NDArray[np.float64] = (totals * corrections).cpu().numpy()
    return errors


def error_means(weight: Tensor, kinds: Sequence[tuple[int, int]]) -> list[tuple[float, float]]:
    """Summed squares of a matrix's rounding errors, and of what its rows' mean errors make up of them.

    Args:
        weight: [O, I], finite.
        kinds: Width and block size of each rounding; the scales have 8 bits.
    """
    wide, columns = weight.detach().float(), weight.shape[1]
    found: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}
    for size in {size for _, size in kinds}:
        widths = sorted({bits for bits, other in kinds if other == size})
        if serves_blocks(weight):
            shape = (len(wide), -1)
            absmax = native.block_maxima(wide, size).view(-1)
            scales = compress_scales(absmax, QuantConfig(bits=2, block_size=size))
            values = scales.values(QuantConfig(bits=2, block_size=size)).view(1, *shape)
            tables = [normal_float_grid(bits, weight.device).table for bits in widths]
            errors = native.menu_errors(wide, None, size, values, tables, [range(len(widths))])
            found |= {(bits, size): errors[0, at] for at, bits in enumerate(widths)}
        else:
            for bits in widths:
                error = (quantize_dequantize(wide, QuantConfig(bits=bits, block_size=size)) - wide).double()
                found[bits, size] = error.square().sum(1), error.sum(1)
    return [
        (float(squares.sum()), float(sums.square().sum()) / columns)
        for squares, sums in (found[kind] for kind in kinds)
    ]


def block_maxima(weight: Tensor, sizes: Iterable[int]) -> dict[int, Tensor]:
    """Largest absolute weight of every block, by block size: float32 [O, N].

    Raises:
        CompressError: A weight is not finite.
    """
    maxima: dict[int, Tensor] = {}
    for size in sorted(set(sizes)):
        smaller = max((known for known in maxima if size % known == 0), default=None)
        if smaller is None:
            if serves_blocks(weight):
                maxima[size] = native.block_maxima(weight.detach().float(), size)
            else:
                maxima[size] = row_blocks(weight, size).abs().amax(1).view(weight.shape[0], -1)
            if not bool(maxima[size].isfinite().all()):
                raise CompressError(
                    "The matrix to be quantized holds a value that is not finite.",
                    "Check the checkpoint or the training that produced it.",
                )
        else:
            ratio = size // smaller
            known = maxima[smaller]
            padded = torch.nn.functional.pad(known, (0, -known.shape[1] % ratio))
            maxima[size] = padded.unflatten(1, (-1, ratio)).amax(2)
    return maxima


def _weights_of_blocks(weight: Tensor, element_weights: Tensor | None, size: int) -> Tensor:
    """Summed weights of the elements of every block, [O, N]; without weights their number, [N]."""
    counted = (
        torch.ones(weight.shape[1], device=weight.device) if element_weights is None else element_weights
    )
    padded = torch.nn.functional.pad(counted.float(), (0, -weight.shape[1] % size))
    sums: Tensor = padded.unflatten(-1, (-1, size)).sum(-1)
    return sums


def _row_sizes(absmax: Tensor, weights: Tensor) -> Tensor:
    """About what each row adds to the errors, float64 [O]; ``weights`` are those of the blocks.

    Where the scales are fine a block's error goes with the square of its largest weight; where they are coarse, with
    the square of their step, which is that of the whole group. The mean of both serves every configuration.
    """
    flat = absmax.double().view(-1)
    size = min(_GROUP, len(flat))
    groups = torch.nn.functional.pad(flat - flat.min(), (0, -len(flat) % size)).view(-1, size)
    steps = groups.amax(1).repeat_interleave(size)[: len(flat)]
    fine, coarse = ((values.square().view(absmax.shape) * weights).sum(1) for values in (flat, steps))
    tiny = torch.finfo(fine.dtype).tiny
    return fine / fine.mean().clamp(min=tiny) + coarse / coarse.mean().clamp(min=tiny)


class ScalesOfRows:
    """Dequantized scales of some rows, equal to those that the whole matrix would give them.

    Args:
        absmax: float32 [O, N].
        rows: The rows; None: all.
    """

    def __init__(self, absmax: Tensor, rows: RowSample | None) -> None:
        self._absmax = absmax
        self._rows = None if rows is None else rows.rows
        self._least = absmax.min()
        self._touched: dict[int, tuple[Tensor, Tensor]] = {}

    def __call__(self, config: QuantConfig) -> Tensor:
        """float32 [S, N]."""
        if self._rows is None:
            scales = compress_scales(self._absmax.view(-1), config)
            return scales.values(config).view(self._absmax.shape)
        size = config.group_size
        if size not in self._touched:
            self._touched[size] = self._groups(self._rows, size)
        taken, places = self._touched[size]
        # One more group in front holds the smallest scale of the matrix, to which all the others are relative.
        absmax = torch.cat((self._least.expand(size), self._absmax.view(-1)[taken]))
        return compress_scales(absmax, config).values(config)[size:][places]

    def _groups(self, rows: Tensor, size: int) -> tuple[Tensor, Tensor]:
        """The blocks of all groups that the rows touch, and where among them the rows' own are, [S, N]."""
        blocks = self._absmax.shape[1]
        own = rows[:, None] * blocks + torch.arange(blocks, device=rows.device)
        groups = torch.unique(own // size)
        taken = (groups[:, None] * size + torch.arange(size, device=rows.device)).view(-1)
        taken = taken[taken < self._absmax.numel()]
        return taken, torch.searchsorted(taken, own)


@cache
def _nearest(bits: int, fine_cells: int, device: torch.device) -> Tensor:
    """The table entry nearest to the middle of each cell, float32 [cells]."""
    grid = normal_float_grid(bits, device)
    cells = fine_cells if bits == 8 else fine_cells >> _COARSE
    middles = (torch.arange(cells, device=device) + 0.5) * (2 / cells) - 1
    return grid.table.index_select(0, round_to_grid(middles, grid).to(torch.int32))


def _add_native_squares(
    rows_SI: Tensor,
    size: int,
    scalings: list[tuple[Tensor, list[tuple[int, int]]]],
    weights_SI: Tensor | None,
    squares: Tensor,
) -> None:
    """What :func:`_add_squares` does, by the C library or by Triton, whose divisions are exact but for the last bit."""
    tables = [normal_float_grid(bits, rows_SI.device).table for bits in TABLE_BITS]
    uses = [
        [TABLE_BITS.index(bits) for bits in sorted({bits for _, bits in widths})] for _, widths in scalings
    ]
    counted = None if weights_SI is None else weights_SI.detach().float()
    scales = torch.stack([scales_SN for scales_SN, _ in scalings])
    found = native.menu_errors(rows_SI, counted, size, scales, tables, uses)
    for scaling, (_, widths) in enumerate(scalings):
        for at, bits in widths:
            squares[at], _ = found[scaling, TABLE_BITS.index(bits)]


def _add_squares(
    blocks_SNB: Tensor,
    scalings: list[tuple[Tensor, list[tuple[int, int]]]],
    roots: Tensor | None,
    squares: Tensor,
) -> None:
    """Put the squared error of every row into ``squares`` [C, S]; scalings are ([S, N], [(configuration, bits)])."""
    count, blocks, size = blocks_SNB.shape
    cells = _FINE_CELLS if blocks_SNB.numel() < _SMALL else _CELLS
    half, most = cells // 2, torch.finfo(blocks_SNB.dtype).max
    step = max(1, _CHUNK // (blocks * size))
    room = torch.empty(min(step, count), blocks, size, device=blocks_SNB.device)
    room_for_index = torch.empty(room.numel(), dtype=torch.int64, device=room.device)
    room_for_coarse = torch.empty_like(room_for_index)
    room_for_values = torch.empty_like(room_for_index, dtype=torch.float32)
    tables = {bits: _nearest(bits, cells, room.device) for _, widths in scalings for _, bits in widths}
    weights_SNB = None if roots is None else roots[:, : blocks * size].unflatten(1, (blocks, size))
    for start in range(0, count, step):
        part = blocks_SNB[start : start + step]
        error = room[: len(part)]
        fine, coarse, values = (r[: part.numel()] for r in (room_for_index, room_for_coarse, room_for_values))
        fine_SNB, values_SNB, error_SI = (
            fine.view(part.shape),
            values.view(part.shape),
            error.view(len(part), -1),
        )
        for scales_SN, widths in scalings:
            scale = scales_SN[start : start + step, :, None]
            # A tiny scale has no finite reciprocal, and zero times infinity has no cell.
            torch.mul(part, torch.where(scale > 0, (half / scale).clamp_(max=most), 0.0), out=error)
            fine_SNB.copy_(error.add_(half).clamp_(0, cells - 1))
            torch.bitwise_right_shift(fine, _COARSE, out=coarse)
            for at, bits in widths:
                torch.index_select(tables[bits], 0, fine if bits == 8 else coarse, out=values)
                torch.addcmul(part, values_SNB, scale, value=-1, out=error)
                if weights_SNB is not None:
                    error.mul_(weights_SNB[start : start + step])
                norms = torch.linalg.vector_norm(error_SI, dim=1)
                squares[at, start : start + step] = norms.double().square_()
