"""Coordinate descent on codes: one column after the other takes the best value that all the others leave it.

Error feedback decides every column once, knowing only those before it. With all codes known, the output error
``tr(E H E^T)`` is a quadratic in any one column, whose best value on the grid is the one nearest to the quadratic's
minimum; no step raises the error. Likewise each block's scale has a best value for given codes.

Shapes: O out, I in, N blocks in a row, P columns of a panel.
"""

from __future__ import annotations

import torch
from torch import Tensor

from compress.kernels import rounding as native
from compress.kernels.calling import serves
from compress.kernels.reference import Grid, round_to_grid

PANEL = 64


def improve_codes(
    wide_OI: Tensor,
    codes_OI: Tensor,
    scales_NO: Tensor,
    block_size: int,
    grid: Grid,
    gram_II: Tensor,
    *,
    passes: int,
) -> Tensor:
    """Codes with a smaller or equal output error.

    Args:
        wide_OI: What the codes stand for, float32.
        codes_OI: uint8 codes to start from.
        scales_NO: Dequantized scale of every block, by block and row.
        block_size: Weights of a row that share a scale.
        grid: The table.
        gram_II: H, float32, damped: its diagonal is above zero.
        passes: Over all columns.
    """
    if not serves(wide_OI):
        return codes_by_torch(wide_OI, codes_OI, scales_NO, block_size, grid, gram_II, passes=passes)
    return native.improve_codes(
        wide_OI, codes_OI, scales_NO.T, block_size, grid.table, gram_II, passes=passes
    )


def codes_by_torch(
    wide_OI: Tensor,
    codes_OI: Tensor,
    scales_NO: Tensor,
    block_size: int,
    grid: Grid,
    gram_II: Tensor,
    *,
    passes: int,
) -> Tensor:
    """:func:`improve_codes` on any device."""
    value_IO = _values(codes_OI, scales_NO, block_size, grid)
    codes_IO = codes_OI.T.contiguous()
    divisor_NO = torch.where(scales_NO > 0, scales_NO, torch.inf)
    slope_IO = gram_II @ (wide_OI.T - value_IO)  # minus half the error's gradient
    diagonal = gram_II.diagonal()
    order = torch.argsort(diagonal, descending=True, stable=True)
    for _ in range(passes):
        for panel in order.split(PANEL):
            corner_PP = gram_II[panel][:, panel].contiguous()
            slope_PO, moved_PO = slope_IO[panel], torch.zeros_like(slope_IO[panel])
            for at, column in enumerate(panel.tolist()):
                scale = scales_NO[column // block_size]
                wanted = value_IO[column] + slope_PO[at] / diagonal[column]
                codes = round_to_grid(wanted / divisor_NO[column // block_size], grid)
                value = grid.table.index_select(0, codes.to(torch.int32)) * scale
                step = value - value_IO[column]
                codes_IO[column], value_IO[column], moved_PO[at] = codes, value, step
                if at + 1 < len(panel):
                    slope_PO[at + 1 :].addr_(corner_PP[at, at + 1 :], step, alpha=-1)
            slope_IO.addmm_(gram_II[:, panel], moved_PO, alpha=-1)
    return codes_IO.T.contiguous()


def improve_scales(
    wide_OI: Tensor, codes_OI: Tensor, scales_NO: Tensor, block_size: int, grid: Grid, gram_II: Tensor
) -> Tensor:
    """Scales [N, O] with a smaller or equal output error for the same codes, one block after the other.

    Never negative: a block whose best scale would be is given zero. Arguments as :func:`improve_codes`.
    """
    if not serves(wide_OI):
        return scales_by_torch(wide_OI, codes_OI, scales_NO, block_size, grid, gram_II)
    return native.improve_scales(wide_OI, codes_OI, scales_NO.T, block_size, grid.table, gram_II).T


def scales_by_torch(
    wide_OI: Tensor, codes_OI: Tensor, scales_NO: Tensor, block_size: int, grid: Grid, gram_II: Tensor
) -> Tensor:
    """:func:`improve_scales` on any device."""
    unit_IO = grid.table.index_select(0, codes_OI.T.reshape(-1).to(torch.int32)).view(codes_OI.T.shape)
    scales_NO = scales_NO.clone()
    value_IO = unit_IO * scales_NO.repeat_interleave(block_size, dim=0)[: len(unit_IO)]
    slope_IO = gram_II @ (wide_OI.T - value_IO)
    for block, start in enumerate(range(0, len(unit_IO), block_size)):
        part = slice(start, min(start + block_size, len(unit_IO)))
        unit_BO = unit_IO[part]
        curve_O = (unit_BO * (gram_II[part, part] @ unit_BO)).sum(dim=0)
        pull_O = (unit_BO * slope_IO[part]).sum(dim=0)
        step_O = torch.where(curve_O > 0, pull_O / curve_O, torch.zeros_like(pull_O))
        step_O = torch.maximum(step_O, -scales_NO[block])
        scales_NO[block] += step_O
        slope_IO.addmm_(gram_II[:, part], unit_BO * step_O, alpha=-1)
    return scales_NO


def _values(codes_OI: Tensor, scales_NO: Tensor, block_size: int, grid: Grid) -> Tensor:
    unit_IO = grid.table.index_select(0, codes_OI.T.reshape(-1).to(torch.int32)).view(codes_OI.T.shape)
    return unit_IO * scales_NO.repeat_interleave(block_size, dim=0)[: len(unit_IO)]
