"""Configurations that need not be computed, because another of the same size bounds its error more tightly."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from compress.quantize.config import QuantConfig
from compress.quantize.rounding_errors import block_maxima

MARGIN = 1e-6
"""What a configuration that was not computed is said to lose more than the one that stands for it, relatively; so no
least-cost choice takes it."""

_SMALLEST, _LARGEST = 2.0**-17, torch.finfo(torch.float16).max
"""Between these, float16 rounds a number by at most what bfloat16 may round it by (2 ** -9 of its power of two):
by an eighth of that above 2 ** -14, below it by 2 ** -25 at most."""


def finer_twins(weight: torch.Tensor, configs: Sequence[QuantConfig]) -> dict[int, int]:
    """For each configuration with bfloat16 second-level scales, the one that differs in float16 alone.

    Both take the same bits and have the same scale codes up to rounding, and the bound of what the rounding of the
    second-level scales adds is smaller for float16, provided that every group's scale lies within its range. That is
    checked on the matrix; a configuration with a group outside stays out.

    Args:
        weight: [O, I].
        configs: The menu.

    Returns:
        Position of the dominated configuration -> position of its twin.

    Raises:
        CompressError: A weight is not finite.
    """
    where = {config: at for at, config in enumerate(configs)}
    pairs = {
        at: where[replace(config, scale_dtype="float16")]
        for config, at in where.items()
        if config.scale_dtype == "bfloat16" and replace(config, scale_dtype="float16") in where
    }
    if not pairs:
        return {}
    absmax = block_maxima(weight, {configs[at].block_size for at in pairs})
    inside = {}
    for size, group in {(configs[at].block_size, configs[at].group_size) for at in pairs}:
        above = absmax[size].view(-1) - absmax[size].min()
        short = -len(above) % group
        largest = torch.nn.functional.pad(above, (0, short)).view(-1, group).amax(1)
        found = (largest == 0) | ((largest >= _SMALLEST) & (largest <= _LARGEST))
        inside[size, group] = bool(found.all())
    return {at: twin for at, twin in pairs.items() if inside[configs[at].block_size, configs[at].group_size]}
