"""Exact rounding errors of a matrix for a whole menu, without storing anything."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from compress.kernels.reference import round_to_grid
from compress.quantize.blockwise import compress_scales, row_blocks
from compress.quantize.config import QuantConfig
from compress.quantize.normal_float import normal_float_grid

_CHUNK = 1 << 18


def rounding_errors(weight: torch.Tensor, configs: Sequence[QuantConfig]) -> npt.NDArray[np.float64]:
    """Exact squared rounding errors of a matrix for many configurations, float64 [C].

    Blocks and scales are computed once for all configurations that share them.
    """
    by_scales: dict[int, dict[QuantConfig, list[int]]] = {}
    for at, config in enumerate(configs):
        shared = QuantConfig(**{**config.to_dict(), "bits": 2})
        by_scales.setdefault(config.block_size, {}).setdefault(shared, []).append(at)
    errors = np.zeros(len(configs))
    for block_size, scalings in by_scales.items():
        blocks = row_blocks(weight, block_size)
        absmax = blocks.abs().amax(1)
        for shared, members in scalings.items():
            scales = compress_scales(absmax, shared).values(shared)
            _add_errors(blocks, scales, [(at, configs[at].bits) for at in members], errors)
    return errors


def _add_errors(
    blocks: torch.Tensor,
    scales: torch.Tensor,
    widths: list[tuple[int, int]],
    errors: npt.NDArray[np.float64],
) -> None:
    divisors = torch.where(scales > 0, scales, torch.inf)[:, None]
    step = max(1, _CHUNK // blocks.shape[1])
    for start in range(0, blocks.shape[0], step):
        part = blocks[start : start + step]
        scaled = part / divisors[start : start + step]
        for at, bits in widths:
            grid = normal_float_grid(bits, blocks.device)
            codes = round_to_grid(scaled, grid).view(-1).to(torch.int32)
            values = grid.table.index_select(0, codes).view(part.shape)
            values.mul_(scales[start : start + step, None]).sub_(part)
            errors[at] += float(torch.linalg.vector_norm(values)) ** 2
