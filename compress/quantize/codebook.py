"""Look-up tables fitted to one matrix: weighted Lloyd iterations (Lloyd 1982) from the NormalFloat table.

A block's weights are rounded in units of its scale, and what a table entry stands for is the same in every block of the
matrix. NormalFloat spreads its entries evenly over the quantiles of a normal distribution; the least squared error asks
for denser tails, and trained matrices are not normal. Storing the fitted table costs ``32 * 2 ** b`` bits a matrix.

Shapes: n blocks, B weights in a block, P blocks after which the weights of errors repeat, K table entries.
"""

from __future__ import annotations

import torch
from torch import Tensor

from compress.kernels import rounding as native
from compress.kernels.calling import serves
from compress.kernels.reference import Grid, make_grid, round_to_grid

ITERATIONS = 6
SMALLEST_STEP = 1e-3
"""Entries nearer than this are not told apart any further; the fit stops before."""


def lloyd(
    blocks_nB: Tensor, scales_n: Tensor, weights_PB: Tensor, start: Grid, *, iterations: int = ITERATIONS
) -> Tensor:
    """Table entries with a smaller weighted squared rounding error than the start's.

    Args:
        blocks_nB: Blocks of weights, float32; those outside of what their scale reaches count as the ends.
        scales_n: Their scales, float32; blocks of scale 0 are left out.
        weights_PB: Weights of the squared errors of the first P blocks, float32, repeated for the others.
        start: First table.
        iterations: At most so many.

    Returns:
        float32 [K], ascending, not yet scaled to [-1, 1]. An entry that nothing is rounded to stays where it is.
    """
    table, sums = start.table, native.entry_sums if serves(blocks_nB) else sums_by_torch
    for _ in range(iterations):
        mass, moment = sums(blocks_nB, scales_n, weights_PB, table)
        moved = torch.where(
            mass > 0, moment / mass.clamp(min=torch.finfo(torch.float64).tiny), table.double()
        )
        fitted = moved.float().clamp(-1, 1)
        if float(fitted.diff().min()) < SMALLEST_STEP:
            break
        table = fitted
    return table


def sums_by_torch(
    blocks_nB: Tensor, scales_n: Tensor, weights_PB: Tensor, table_K: Tensor
) -> tuple[Tensor, Tensor]:
    """Summed weights, and weights times units, of what is nearest to each entry, float64 [K] each, on any device."""
    used = scales_n > 0
    scales = scales_n[used, None]
    units = (blocks_nB[used] / scales).view(-1)
    at = torch.arange(len(blocks_nB), device=units.device) % len(weights_PB)
    weights = (weights_PB[at[used]] * scales.square()).view(-1).double()
    codes = round_to_grid(units, make_grid(table_K)).long()
    mass = torch.zeros(len(table_K), dtype=torch.float64, device=units.device)
    moment = torch.zeros_like(mass).index_add_(0, codes, weights * units.double())
    return mass.index_add_(0, codes, weights), moment


def fitted_grid(blocks_nB: Tensor, scales_n: Tensor, weights_PB: Tensor, start: Grid) -> tuple[Grid, float]:
    """The table for blocks with given scales, scaled so that its largest entry is 1 in magnitude.

    Args:
        blocks_nB: Blocks of weights, float32.
        scales_n: Their scales, float32; blocks of scale 0 are left out.
        weights_PB: Weights of the squared errors of the first P blocks, repeated for the others.
        start: First table.

    Returns:
        The table, and by how much the scales shrink with it: ``new scale = factor * scale``.
    """
    if not bool((scales_n > 0).any()):
        return start, 1.0
    table = lloyd(blocks_nB, scales_n, weights_PB, start)
    factor = float(table.abs().max())
    return make_grid((table / factor).contiguous()), factor
