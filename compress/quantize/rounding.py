"""Rounding with error feedback: what one column loses, the columns after it make up for (METHODS §3.4).

GPTQ's recurrence (arXiv 2210.17323) on a NormalFloat grid whose double-quantized block scales are fixed beforehand,
so columns may be rounded in any order; the strongest inputs go first. Each block's scale is searched: a range
below the largest weight costs that weight and sharpens all the others.

Shapes: O out, I in, N blocks in a row, B weights in a block.
"""

from __future__ import annotations

import torch
from torch import Tensor

from compress.kernels.reference import round_to_grid
from compress.quantize.blockwise import QuantizedTensor, Scales, compress_scales, row_blocks
from compress.quantize.config import QuantConfig
from compress.quantize.hessian import InputStatistics
from compress.quantize.normal_float import normal_float_grid
from compress.quantize.packing import pack

RANGES = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6, 0.55, 0.5)
"""Ranges tried for a block, as shares of its largest weight."""

PANEL = 128
"""Columns whose feedback is applied at once to the rest."""


def searched_ranges(weight_OI: Tensor, config: QuantConfig, weights_I: Tensor) -> Tensor:
    """Per block, the range of :data:`RANGES` with the least weighted rounding error, float32 [O * N].

    Args:
        weight_OI: The matrix.
        config: The grid.
        weights_I: Weight of each column's squared error.
    """
    blocks = row_blocks(weight_OI, config.block_size)
    absmax = blocks.abs().amax(1)
    if config.bits >= 8:
        return absmax
    per_row = len(blocks) // weight_OI.shape[0]
    padded = torch.nn.functional.pad(weights_I.float(), (0, per_row * config.block_size - len(weights_I)))
    cost_NB = padded.view(per_row, config.block_size)
    grid = normal_float_grid(config.bits, weight_OI.device)
    best, chosen = torch.full_like(absmax, torch.inf), absmax.clone()
    for share in RANGES:
        scale = share * absmax
        divisor = torch.where(scale > 0, scale, torch.inf)[:, None]
        codes = round_to_grid(blocks / divisor, grid).view(-1).to(torch.int32)
        error = grid.table.index_select(0, codes).view(blocks.shape) * scale[:, None] - blocks
        total = (error.square_().view(-1, per_row, config.block_size) * cost_NB).sum(-1).view(-1)
        better = total < best
        best, chosen = torch.where(better, total, best), torch.where(better, scale, chosen)
    return chosen


def round_with_feedback(
    weight_OI: Tensor, config: QuantConfig, statistics: InputStatistics
) -> QuantizedTensor:
    """Quantize a matrix for the least output error on the inputs behind ``statistics``.

    Args:
        weight_OI: The matrix, any floating type.
        config: Grid and scales.
        statistics: Of its inputs.
    """
    wide = weight_OI.detach().float()
    scales = compress_scales(searched_ranges(wide, config, statistics.weights), config)
    values_NO = scales.values(config).view(wide.shape[0], -1).T.contiguous()
    codes_OI = _feedback(wide, values_NO, config, statistics)
    return _stored(codes_OI, scales, config)


def _feedback(wide_OI: Tensor, scales_NO: Tensor, config: QuantConfig, statistics: InputStatistics) -> Tensor:
    """Codes uint8 [O, I]."""
    order, upper = statistics.order, statistics.upper
    grid = normal_float_grid(config.bits, wide_OI.device)
    work_IO = wide_OI[:, order].T.contiguous()  # one column of the matrix is one contiguous row here
    divisors_NO = torch.where(scales_NO > 0, scales_NO, torch.inf)
    codes_IO = torch.empty(work_IO.shape, dtype=torch.uint8, device=work_IO.device)
    block_of = (order // config.block_size).tolist()
    count = len(block_of)
    for start in range(0, count, PANEL):
        stop = min(count, start + PANEL)
        panel, lost = work_IO[start:stop], torch.empty_like(work_IO[start:stop])
        corner = upper[start:stop, start:stop]
        steps = (corner / corner.diagonal()[:, None]).contiguous()
        for at in range(stop - start):
            row, block = panel[at], block_of[start + at]
            codes = round_to_grid(row / divisors_NO[block], grid)
            error = row - grid.table.index_select(0, codes.to(torch.int32)) * scales_NO[block]
            codes_IO[start + at] = codes
            lost[at] = error
            if at + 1 < stop - start:
                panel[at + 1 :].addr_(steps[at, at + 1 :], error, alpha=-1)
        if stop < count:
            rest = upper[start:stop, stop:] / corner.diagonal()[:, None]
            work_IO[stop:].addmm_(rest.T, lost, alpha=-1)
    codes_OI = torch.empty_like(codes_IO).T.contiguous()
    codes_OI[:, order] = codes_IO.T
    return codes_OI


def _stored(codes_OI: Tensor, scales: Scales, config: QuantConfig) -> QuantizedTensor:
    rows, columns = codes_OI.shape
    short = -columns % config.block_size
    if short:  # padding decodes to the grid's zero, as in blockwise quantization
        grid = normal_float_grid(config.bits, codes_OI.device)
        zero = int(round_to_grid(torch.zeros(1, device=codes_OI.device), grid))
        codes_OI = torch.nn.functional.pad(codes_OI, (0, short), value=zero)
    return QuantizedTensor(
        shape=(rows, columns),
        config=config,
        codes=pack(codes_OI.reshape(-1, config.block_size), config.bits),
        scale_codes=pack(scales.codes, config.scale_bits),
        scale_max=scales.maxima,
        offset=scales.offset,
    )
