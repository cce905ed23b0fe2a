"""Look-up tables fitted to one matrix: weighted Lloyd iterations (Lloyd 1982) from the NormalFloat table.

A block's weights are rounded in units of its scale, and what a table entry stands for is the same in every block of the
matrix. NormalFloat spreads its entries evenly over the quantiles of a normal distribution; the least squared error asks
for denser tails, and trained matrices are not normal. Storing the fitted table costs ``32 * 2 ** b`` bits a matrix.

Shapes: n blocks, B weights in a block, K table entries.
"""

from __future__ import annotations

import torch
from torch import Tensor

from compress.kernels.reference import Grid, make_grid, round_to_grid

ITERATIONS = 6
SMALLEST_STEP = 1e-3
"""Entries nearer than this are not told apart any further; the fit stops before."""


def lloyd(values: Tensor, weights: Tensor, start: Grid, *, iterations: int = ITERATIONS) -> Tensor:
    """Table entries with a smaller weighted squared rounding error than the start's.

    Args:
        values: What is rounded, any shape, float32; those outside [-1, 1] count as the ends.
        weights: Their weights, same shape, not negative.
        start: First table.
        iterations: At most so many.

    Returns:
        float32 [K], ascending, not yet scaled to [-1, 1]. An entry that nothing is rounded to stays where it is.
    """
    x, w = values.reshape(-1), weights.reshape(-1).double()
    grid, table = start, start.table
    for _ in range(iterations):
        codes = round_to_grid(x, grid).long()
        mass = torch.zeros(len(table), dtype=torch.float64, device=x.device).index_add_(0, codes, w)
        moment = torch.zeros_like(mass).index_add_(0, codes, w * x.double())
        moved = torch.where(
            mass > 0, moment / mass.clamp(min=torch.finfo(torch.float64).tiny), table.double()
        )
        fitted = moved.float().clamp(-1, 1)
        if float(fitted.diff().min()) < SMALLEST_STEP:
            break
        table = fitted
        grid = make_grid(table)
    return table


def fitted_grid(blocks_NB: Tensor, scales_N: Tensor, weights_NB: Tensor, start: Grid) -> tuple[Grid, float]:
    """The table for blocks with given scales, scaled so that its largest entry is 1 in magnitude.

    Args:
        blocks_NB: Blocks of weights, float32 [n, B].
        scales_N: Their scales, float32 [n]; blocks of scale 0 are left out.
        weights_NB: Weight of every squared error, [n, B] or anything that expands to it.
        start: First table.

    Returns:
        The table, and by how much the scales shrink with it: ``new scale = factor * scale``.
    """
    used = scales_N > 0
    blocks, scales = blocks_NB[used], scales_N[used, None]
    if blocks.numel() == 0:
        return start, 1.0
    weights = weights_NB.expand_as(blocks_NB)[used]
    table = lloyd(blocks / scales, weights * scales.square(), start)
    factor = float(table.abs().max())
    return make_grid((table / factor).contiguous()), factor
