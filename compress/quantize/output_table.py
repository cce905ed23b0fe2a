"""What each configuration and rank will cost the loss, predicted for one matrix before it is rounded (METHODS §3.4).

Rounding with error feedback leaves about ``sum_j d_j ||e_j||^2`` of output error, ``e_j`` being the error of rounding
column j alone and ``d_j`` what the columns after it cannot take over. A sample of rows is rounded plainly, with the
ranges and the table that rounding itself would choose, and its errors are weighed so.

Shapes: O out, I in, S sampled rows, N blocks in a row, B weights in a block.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from compress.kernels.reference import Grid, quantize_blocks
from compress.quantize.blockwise import compress_scales, quantize_dequantize, row_blocks
from compress.quantize.config import FACTOR_8BIT, QuantConfig
from compress.quantize.decompose import squared_norm
from compress.quantize.error_table import RANKS, Effort, ErrorTable, menu, offered_ranks, stored_bits
from compress.quantize.hessian import InputStatistics
from compress.quantize.lowrank import truncated_svd
from compress.quantize.rounding import fitted_table, searched_ranges

METHOD = "predicted from plain roundings of a sample of rows, weighed by conditional input variances"
ROWS = 64
"""Rows that are rounded."""
PROBE_BITS = 3
REFITS = 1.5
"""Fits of the factors that a decomposition is worth: the second follows a fresh rounding."""


def learned_menu(effort: Effort) -> tuple[QuantConfig, ...]:
    """The configurations worth asking about where outputs count: learned tables up to 4 bits, NormalFloat at 8.

    Second-level scales have 16 bits and are shared by 64 blocks; ``quick`` keeps first-level scales of 3 and 4 bits,
    on which feedback makes coarse scales cheap: smaller blocks are worth more than finer scales. ``paper`` is the
    paper's own :data:`MENU`.
    """
    if effort == "paper":
        return menu(effort)
    scale_bits = (3, 4) if effort == "quick" else (2, 3, 4, 8)
    narrow = tuple(
        QuantConfig(
            bits=b, scale_bits=b0, scale_dtype="float16", block_size=size, group_size=64, codebook="learned"
        )
        for b, b0, size in product((2, 3, 4), scale_bits, (16, 32, 64))
    )
    wide = (QuantConfig(bits=8, scale_bits=8, scale_dtype="float16", block_size=64, group_size=64),)
    return narrow + wide


def output_error_table(
    weight: Tensor,
    configs: Sequence[QuantConfig],
    statistics: InputStatistics,
    ranks: Sequence[int] = RANKS,
    *,
    factor_config: QuantConfig | None = FACTOR_8BIT,
    row_weights: Tensor | None = None,
    rows: int = ROWS,
    seed: int = 0,
) -> ErrorTable:
    """Predicted costs and stored bits of every configuration and rank for one matrix.

    ``errors`` and ``weight_norm`` of the result are ``tr(M E H E^T)`` and ``tr(M W H W^T)`` with M the row weights.

    Args:
        weight: [O, I], any floating type.
        configs: C configurations.
        statistics: Of its inputs.
        ranks: Offered ranks; those not below half of the smaller side are left out, 0 is always in.
        factor_config: How the factors are stored; None keeps them in 16 bits.
        row_weights: How much the loss minds a squared error at each output, [O]; None: all the same.
        rows: How many rows to round, at even distances; the rest is taken to fare alike.
        seed: Of the randomized SVD.
    """
    wide = weight.detach().float()
    minds = torch.ones(len(wide)) if row_weights is None else row_weights.float()
    minds = minds.to(wide.device)
    shape = (wide.shape[0], wide.shape[1])
    offered = offered_ranks(shape, ranks)
    plain = _sampled_errors(wide, configs, statistics.weights, minds, rows)
    left = _left_by_ranks(wide, statistics, minds, offered, seed)
    norms = torch.linalg.vector_norm(statistics.whiten(wide), dim=1).double().square()
    return ErrorTable(
        shape=shape,
        configs=tuple(configs),
        ranks=offered,
        errors=plain[:, None] * left[None, :],
        bits=stored_bits(shape, configs, offered, factor_config),
        weight_norm=float((minds.double() * norms).sum()),
        method=METHOD,
    )


def _sampled_errors(
    wide: Tensor, configs: Sequence[QuantConfig], weights_I: Tensor, minds_O: Tensor, rows: int
) -> npt.NDArray[np.float64]:
    """Weighed errors of the whole matrix, [C], from some rows."""
    picked = torch.arange(min(rows, len(wide)), device=wide.device) * len(wide) // min(rows, len(wide))
    some_SI = wide[picked]
    sizes = some_SI.double().square().sum(1)
    # Rows stand for the others of their stretch in proportion to size and weight.
    shares = minds_O.double() * wide.double().square().sum(1)
    stretch = torch.bucketize(torch.arange(len(wide), device=wide.device), picked, right=True) - 1
    totals = torch.zeros(len(picked), dtype=torch.float64, device=wide.device).index_add_(0, stretch, shares)
    minds_S = torch.where(sizes > 0, totals / sizes, torch.zeros_like(totals))
    chosen: dict[tuple[int, int, str], tuple[Grid, Tensor]] = {}
    errors = np.empty(len(configs))
    for at, config in enumerate(configs):
        key = (config.bits, config.block_size, config.codebook)
        if key not in chosen:
            grid = fitted_table(some_SI, config, weights_I)
            chosen[key] = grid, searched_ranges(some_SI, config, weights_I, grid)
        grid, ranges = chosen[key]
        blocks = row_blocks(some_SI, config.block_size)
        scales = compress_scales(ranges, config).values(config)
        codes = quantize_blocks(blocks, scales, grid).view(-1).to(torch.int32)
        rounded = grid.table.index_select(0, codes).view(blocks.shape) * scales[:, None]
        error_SI = (rounded - blocks).view(len(some_SI), -1)[:, : wide.shape[1]]
        errors[at] = float(((error_SI.square() @ weights_I.float()).double() * minds_S).sum())
    return errors


def _left_by_ranks(
    wide: Tensor, statistics: InputStatistics, minds_O: Tensor, ranks: Sequence[int], seed: int
) -> npt.NDArray[np.float64]:
    """Share of the error that factors of each rank leave, [R]: measured on one plain rounding, whitened by d."""
    if max(ranks) == 0:
        return np.ones(len(ranks))
    noise = wide - quantize_dequantize(wide, QuantConfig(bits=PROBE_BITS))
    noise = minds_O.sqrt()[:, None] * noise * statistics.weights.sqrt()
    total = squared_norm(noise)
    if total == 0:
        return np.ones(len(ranks))
    energy = truncated_svd(noise, max(ranks), seed=seed, power_iterations=1)[1].double().square().cumsum(0)
    shares = [1.0 - (float(energy[r - 1]) / total if r else 0.0) for r in ranks]
    left: npt.NDArray[np.float64] = np.maximum(np.asarray(shares), 0.0) ** REFITS
    return left
