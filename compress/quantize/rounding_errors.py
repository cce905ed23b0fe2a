"""Exact rounding errors of a matrix for a whole menu, without storing anything."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
import torch

from compress.kernels.reference import round_to_grid
from compress.quantize.blockwise import compress_scales, row_blocks
from compress.quantize.config import QuantConfig
from compress.quantize.normal_float import normal_float_grid

_CHUNK = 1 << 18


def rounding_errors(
    weight: torch.Tensor,
    configs: Sequence[QuantConfig],
    *,
    column_weights: torch.Tensor | None = None,
    ranges: Callable[[QuantConfig], float] | None = None,
) -> npt.NDArray[np.float64]:
    """Exact squared rounding errors of a matrix for many configurations, float64 [C].

    Blocks and scales are computed once for all configurations that share them.

    Args:
        weight: [O, I].
        configs: C configurations.
        column_weights: Weight of each column's squared error, [I]; None: 1.
        ranges: A block's range as a share of its largest weight, by configuration; None: 1.
    """
    by_scales: dict[int, dict[tuple[float, QuantConfig], list[int]]] = {}
    for at, config in enumerate(configs):
        shared = QuantConfig(**{**config.to_dict(), "bits": 2})
        share = 1.0 if ranges is None else ranges(config)
        by_scales.setdefault(config.block_size, {}).setdefault((share, shared), []).append(at)
    errors = np.zeros(len(configs))
    for block_size, scalings in by_scales.items():
        blocks = row_blocks(weight, block_size)
        absmax = blocks.abs().amax(1)
        roots = None if column_weights is None else _roots(column_weights, block_size)
        for (share, shared), members in scalings.items():
            scales = compress_scales(share * absmax, shared).values(shared)
            _add_errors(blocks, scales, [(at, configs[at].bits) for at in members], errors, roots)
    return errors


def _roots(column_weights: torch.Tensor, block_size: int) -> torch.Tensor:
    """Square roots of the column weights in the blocks of one row, [N, B]; padding weighs nothing."""
    short = -len(column_weights) % block_size
    return torch.nn.functional.pad(column_weights.float().sqrt(), (0, short)).view(-1, block_size)


def _add_errors(
    blocks: torch.Tensor,
    scales: torch.Tensor,
    widths: list[tuple[int, int]],
    errors: npt.NDArray[np.float64],
    roots: torch.Tensor | None,
) -> None:
    divisors = torch.where(scales > 0, scales, torch.inf)[:, None]
    row = 1 if roots is None else len(roots)  # whole rows in a chunk, so that the columns line up
    step = max(1, _CHUNK // (blocks.shape[1] * row)) * row
    for start in range(0, blocks.shape[0], step):
        part = blocks[start : start + step]
        scaled = part / divisors[start : start + step]
        for at, bits in widths:
            grid = normal_float_grid(bits, blocks.device)
            codes = round_to_grid(scaled, grid).view(-1).to(torch.int32)
            values = grid.table.index_select(0, codes).view(part.shape)
            values.mul_(scales[start : start + step, None]).sub_(part)
            if roots is not None:
                values.view(-1, *roots.shape).mul_(roots)
            errors[at] += float(torch.linalg.vector_norm(values)) ** 2
