"""Rounding with error feedback: what one column loses, the columns after it make up for (METHODS §3.4).

GPTQ's recurrence (arXiv 2210.17323) on a table whose double-quantized block scales are fixed beforehand, so columns
may be rounded in any order; the strongest inputs go first. Each block's scale is searched (a range below the largest
weight costs that weight and sharpens all the others), in turns with the table where the matrix has its own.

Shapes: O out, I in, N blocks in a row, B weights in a block.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from compress.kernels import rounding as native
from compress.kernels.calling import serves
from compress.kernels.reference import Grid, round_to_grid
from compress.quantize.blockwise import QuantizedTensor, Scales, compress_scales, row_blocks, stored
from compress.quantize.codebook import fitted_grid
from compress.quantize.config import QuantConfig
from compress.quantize.descent import improve_codes, improve_scales
from compress.quantize.hessian import InputStatistics
from compress.quantize.normal_float import normal_float_grid

RANGES = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6, 0.55, 0.5)
"""Ranges tried for a block, as shares of its largest weight."""

FITS = 2
"""Turns of fitting a table and searching the ranges for it."""

SAMPLE = 1 << 17
"""Weights that a table is fitted to; of a larger matrix, rows at even distances."""

PANEL = 128
"""Columns whose feedback is applied at once to the rest."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Rounded:
    """A matrix as codes, not packed yet.

    Attributes:
        config: Of the grid.
        codes: uint8 [O, I].
        scales: As stored.
        grid: The table.
        output_error: ``tr(E H E^T)`` of what the matrix it was rounded from is left with, where that is known.
    """

    config: QuantConfig
    codes: Tensor
    scales: Scales
    grid: Grid
    output_error: float | None = None

    @property
    def by_block(self) -> Tensor:
        """Dequantized scales by block and row, float32 [N, O]."""
        return self.scales.values(self.config).view(self.codes.shape[0], -1).T.contiguous()

    def values(self) -> Tensor:
        """The weights the codes stand for, float32 [O, I]."""
        units = self.grid.table.index_select(0, self.codes.reshape(-1).to(torch.int32)).view(self.codes.shape)
        spread = self.by_block.T.repeat_interleave(self.config.block_size, dim=1)
        return units * spread[:, : units.shape[1]]

    def store(self) -> QuantizedTensor:
        """The form a checkpoint holds."""
        rows, columns = self.codes.shape
        short = -columns % self.config.block_size
        codes = self.codes
        if short:  # padding decodes to what is nearest to zero, as in blockwise quantization
            zero = int(round_to_grid(torch.zeros(1, device=codes.device), self.grid))
            codes = torch.nn.functional.pad(codes, (0, short), value=zero)
        blocks = codes.reshape(-1, self.config.block_size)
        return stored(blocks, self.scales, self.grid, (rows, columns), self.config)


def searched_ranges(weight_OI: Tensor, config: QuantConfig, weights_I: Tensor, grid: Grid) -> Tensor:
    """Per block, the range of :data:`RANGES` with the least weighted rounding error, float32 [O * N].

    Args:
        weight_OI: The matrix.
        config: Gives the width and the block size.
        weights_I: Weight of each column's squared error.
        grid: The table.
    """
    if config.bits < 8 and serves(weight_OI):
        size = config.block_size
        return native.searched_ranges(weight_OI.float(), size, weights_I.float(), grid.table, RANGES).view(-1)
    return ranges_by_torch(weight_OI, config, weights_I, grid)


def ranges_by_torch(weight_OI: Tensor, config: QuantConfig, weights_I: Tensor, grid: Grid) -> Tensor:
    """:func:`searched_ranges` on any device."""
    blocks = row_blocks(weight_OI, config.block_size)
    absmax = blocks.abs().amax(1)
    if config.bits >= 8:
        return absmax
    cost_NB = _in_blocks(weights_I, config.block_size)
    best, chosen = torch.full_like(absmax, torch.inf), absmax.clone()
    for share in RANGES:
        scale = share * absmax
        divisor = torch.where(scale > 0, scale, torch.inf)[:, None]
        codes = round_to_grid(blocks / divisor, grid).view(-1).to(torch.int32)
        error = grid.table.index_select(0, codes).view(blocks.shape) * scale[:, None] - blocks
        total = (error.square_().view(-1, *cost_NB.shape) * cost_NB).sum(-1).view(-1)
        better = total < best
        best, chosen = torch.where(better, total, best), torch.where(better, scale, chosen)
    return chosen


def fitted_table(weight_OI: Tensor, config: QuantConfig, weights_I: Tensor) -> Grid:
    """The table for a matrix: NormalFloat, or one fitted in turns with the ranges.

    Args:
        weight_OI: The matrix.
        config: Says which.
        weights_I: Weight of each column's squared error.
    """
    grid = normal_float_grid(config.bits, weight_OI.device)
    if config.codebook == "normal":
        return grid
    sample_OI = weight_OI[:: -(-weight_OI.numel() // SAMPLE)]
    blocks = row_blocks(sample_OI, config.block_size)
    cost = _in_blocks(weights_I, config.block_size)
    for _ in range(FITS):
        grid, _ = fitted_grid(blocks, searched_ranges(sample_OI, config, weights_I, grid), cost, grid)
    return grid


def _in_blocks(weights_I: Tensor, block_size: int) -> Tensor:
    """Column weights in the blocks of one row, float32 [N, B]; padding weighs nothing."""
    short = -len(weights_I) % block_size
    return torch.nn.functional.pad(weights_I.float(), (0, short)).view(-1, block_size)


def round_with_feedback(
    weight_OI: Tensor, config: QuantConfig, statistics: InputStatistics, grid: Grid | None = None
) -> Rounded:
    """Quantize a matrix for the least output error on the inputs behind ``statistics``.

    Args:
        weight_OI: The matrix, any floating type.
        config: Grid and scales.
        statistics: Of its inputs.
        grid: The table; None: :func:`fitted_table`.
    """
    wide = weight_OI.detach().float()
    table = fitted_table(wide, config, statistics.weights) if grid is None else grid
    scales = compress_scales(searched_ranges(wide, config, statistics.weights, table), config)
    values_ON = scales.values(config).view(wide.shape[0], -1)
    codes, errors = feedback(wide, values_ON, config.block_size, table, statistics)
    return Rounded(config=config, codes=codes, scales=scales, grid=table, output_error=float(errors.sum()))


def refine(wide_OI: Tensor, rounded: Rounded, statistics: InputStatistics, *, passes: int) -> Rounded:
    """The same matrix with a smaller or equal output error: scales once, then codes in ``passes`` passes.

    Args:
        wide_OI: What the codes stand for, float32.
        rounded: Where to start; its ``output_error``, where there is one, is against ``wide_OI``.
        statistics: Of the inputs.
        passes: Of coordinate descent over all columns.
    """
    config, gram = rounded.config, statistics.gram
    block_size = config.block_size
    wanted = improve_scales(wide_OI, rounded.codes, rounded.by_block, block_size, rounded.grid, gram)
    scales = compress_scales(wanted.T.reshape(-1), config)
    moved = replace(rounded, scales=scales)
    before = rounded.output_error
    if before is None:
        before = statistics.output_error(wide_OI - rounded.values())
    if statistics.output_error(wide_OI - moved.values()) < before:
        rounded = moved
    codes = improve_codes(
        wide_OI, rounded.codes, rounded.by_block, block_size, rounded.grid, gram, passes=passes
    )
    return replace(rounded, codes=codes, output_error=None)


def feedback(
    wide_OI: Tensor, scales_ON: Tensor, block_size: int, grid: Grid, statistics: InputStatistics
) -> tuple[Tensor, Tensor]:
    """Codes uint8 [O, I] for given scales, and the squared output error of each row, float64 [O]."""
    if not serves(wide_OI):
        return feedback_by_torch(wide_OI, scales_ON, block_size, grid, statistics)
    return native.feedback(
        wide_OI,
        scales_ON,
        block_size,
        grid.table,
        steps_II=statistics.steps(),
        costs_I=statistics.weights,
        order_I=statistics.order,
    )


def feedback_by_torch(
    wide_OI: Tensor, scales_ON: Tensor, block_size: int, grid: Grid, statistics: InputStatistics
) -> tuple[Tensor, Tensor]:
    """:func:`feedback` on any device."""
    order, steps_II = statistics.order, statistics.steps()
    scales_NO = scales_ON.T.contiguous()
    errors_O = torch.zeros(len(wide_OI), dtype=torch.float64, device=wide_OI.device)
    work_IO = wide_OI[:, order].T.contiguous()  # one column of the matrix is one contiguous row here
    divisors_NO = torch.where(scales_NO > 0, scales_NO, torch.inf)
    codes_IO = torch.empty(work_IO.shape, dtype=torch.uint8, device=work_IO.device)
    block_of = (order // block_size).tolist()
    count = len(block_of)
    for start in range(0, count, PANEL):
        stop = min(count, start + PANEL)
        panel, lost = work_IO[start:stop], torch.empty_like(work_IO[start:stop])
        steps = steps_II[start:stop, start:stop].contiguous()
        for at in range(stop - start):
            row, block = panel[at], block_of[start + at]
            codes = round_to_grid(row / divisors_NO[block], grid)
            error = row - grid.table.index_select(0, codes.to(torch.int32)) * scales_NO[block]
            codes_IO[start + at] = codes
            lost[at] = error
            if at + 1 < stop - start:
                panel[at + 1 :].addr_(steps[at, at + 1 :], error, alpha=-1)
        errors_O += statistics.weights[order[start:stop]].double() @ lost.double().square()
        if stop < count:
            work_IO[stop:].addmm_(steps_II[start:stop, stop:].T, lost, alpha=-1)
    codes_OI = torch.empty_like(codes_IO).T.contiguous()
    codes_OI[:, order] = codes_IO.T
    return codes_OI, errors_O
