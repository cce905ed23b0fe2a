"""NormalFloat look-up tables: quantiles of a normal distribution (QLoRA, arXiv 2305.14314; LQ-LoRA §3)."""

from __future__ import annotations

from functools import cache
from statistics import NormalDist

import torch

from compress.errors import UsageError
from compress.kernels.reference import Grid, make_grid

TABLE_BITS = (2, 3, 4, 8)
"""Widths a table exists for."""

_TAIL = (1 / 30 + 1 / 32) / 2


@cache
def _quantiles(bits: int) -> tuple[float, ...]:
    if bits not in TABLE_BITS:
        raise UsageError(f"There is no {bits}-bit NormalFloat table.", "Choose 2, 3, 4 or 8 bits.")
    half = 2 ** (bits - 1)
    lower = [_TAIL + (0.5 - _TAIL) * i / (half - 1) for i in range(half)]
    upper = [0.5 + (0.5 - _TAIL) * i / half for i in range(1, half + 1)]
    inverse = NormalDist().inv_cdf
    # The middle quantile is exactly zero, so that zero weights stay zero.
    values = [inverse(p) for p in lower[:-1]] + [0.0] + [inverse(p) for p in upper]
    return tuple(v / values[-1] if v > 0 else v / -values[0] for v in values)


def normal_float_table(bits: int) -> torch.Tensor:
    """The sorted NF table of a width.

    Args:
        bits: 2, 3, 4 or 8.

    Returns:
        float32 [2 ** bits] from -1 to 1, with an exact zero at index ``2 ** (bits - 1) - 1``.

    Raises:
        UsageError: No table has that width.
    """
    return torch.tensor(_quantiles(bits), dtype=torch.float32)


@cache
def normal_float_grid(bits: int, device: torch.device) -> Grid:
    """The table with its rounding index on a device, built once; treat it as read-only."""
    return make_grid(normal_float_table(bits).to(device))
