"""Affine grids: integers with and without zero points, rounded by the code that rounds to tables.

A block stands for ``scale * (code - zero)``. Shift the weights by ``scale * zero`` and it is a table
``0, 1, ..., 2 ** b - 1`` like any other, so that the same error feedback rounds it, in the same order, with the same
damping, and the same descent improves it.

Shapes: O out, I in, N blocks in a row, n blocks of the matrix, B weights in a block.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache

import torch
from torch import Tensor

from compress.kernels.reference import Grid, make_grid
from compress.quantize.blockwise import Scales, compress_scales, row_blocks
from compress.quantize.config import QuantConfig
from compress.quantize.descent import improve_codes
from compress.quantize.hessian import InputStatistics
from compress.quantize.output_aware import PASSES
from compress.quantize.rounding import RANGES, feedback

_CHUNK = 1 << 12
"""Blocks whose ranges are searched at once: the temporaries stay in a core's cache."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class AffineRounded:
    """A matrix in integers.

    Attributes:
        config: Width, block size and how scales are stored.
        codes: uint8 [O, I].
        scales: Steps between two levels of a block, as stored.
        zeros: The code that stands for zero, of each block, uint8 [O, N].
    """

    config: QuantConfig
    codes: Tensor
    scales: Scales
    zeros: Tensor

    @property
    def steps(self) -> Tensor:
        """Dequantized scales, float32 [O, N]."""
        return self.scales.values(self.config).view(self.zeros.shape)

    def spread(self, of_blocks_ON: Tensor) -> Tensor:
        """What belongs to blocks, at each of their weights, [O, I]."""
        return of_blocks_ON.repeat_interleave(self.config.block_size, dim=1)[:, : self.codes.shape[1]]

    def units(self) -> Tensor:
        """``code - zero``, float32 [O, I]."""
        return self.codes.float() - self.spread(self.zeros.float())

    def values(self) -> Tensor:
        """The weights it stands for, float32 [O, I]."""
        return self.units() * self.spread(self.steps)


def round_affine(
    wide_OI: Tensor, config: QuantConfig, statistics: InputStatistics, *, zero_points: bool
) -> AffineRounded:
    """Searched ranges, then error feedback.

    Args:
        wide_OI: The matrix, float32.
        config: Width, block size and how scales are stored.
        statistics: Of its inputs.
        zero_points: Whether each block has its own zero point; otherwise it is ``2 ** (bits - 1)``.
    """
    steps, zeros = affine_ranges(wide_OI, config, statistics.weights, zero_points=zero_points)
    scales = compress_scales(steps, config)
    start = AffineRounded(
        config=config,
        codes=torch.zeros(wide_OI.shape, dtype=torch.uint8),
        scales=scales,
        zeros=zeros.to(torch.uint8).view(len(wide_OI), -1),
    )
    codes, _ = feedback(
        _shifted(wide_OI, start),
        start.steps * (2**config.bits - 1),
        config.block_size,
        _counting_grid(config.bits),
        statistics,
    )
    return replace(start, codes=codes)


def refine_affine(wide_OI: Tensor, rounding: AffineRounded, statistics: InputStatistics) -> AffineRounded:
    """The same with a smaller or equal output error: scales once, then one pass over the codes."""
    config = rounding.config
    wanted = improved_steps(wide_OI, rounding, statistics.gram)
    moved = replace(rounding, scales=compress_scales(wanted.reshape(-1), config))
    if statistics.output_error(wide_OI - moved.values()) < statistics.output_error(
        wide_OI - rounding.values()
    ):
        rounding = moved
    codes = improve_codes(
        _shifted(wide_OI, rounding),
        rounding.codes,
        (rounding.steps * (2**config.bits - 1)).T.contiguous(),
        config.block_size,
        _counting_grid(config.bits),
        statistics.gram,
        passes=PASSES,
    )
    return replace(rounding, codes=codes)


@cache
def _counting_grid(bits: int) -> Grid:
    """``0, 1, ..., 2 ** bits - 1`` in units of the largest."""
    return make_grid(torch.arange(2**bits) / (2**bits - 1))


def _shifted(wide_OI: Tensor, rounded: AffineRounded) -> Tensor:
    return (wide_OI + rounded.spread(rounded.steps * rounded.zeros)).contiguous()


def improved_steps(wide_OI: Tensor, rounded: AffineRounded, gram_II: Tensor) -> Tensor:
    """Scales [O, N] with a smaller or equal output error for the same codes, one block after the other.

    As `compress.quantize.descent.improve_scales`, whose units come from one table for all blocks.
    """
    units, size = rounded.units(), rounded.config.block_size
    steps = rounded.steps.clone()
    slope = (wide_OI - rounded.values()) @ gram_II  # minus half the error's gradient
    for block, start in enumerate(range(0, units.shape[1], size)):
        part = slice(start, min(start + size, units.shape[1]))
        own = units[:, part]
        curve = (own * (own @ gram_II[part, part])).sum(1)
        pull = (own * slope[:, part]).sum(1)
        step = torch.where(curve > 0, pull / curve, torch.zeros_like(pull))
        step = torch.maximum(step, -steps[:, block])
        steps[:, block] += step
        slope -= (own * step[:, None]) @ gram_II[part]
    return steps


def affine_ranges(
    weight_OI: Tensor, config: QuantConfig, weights_I: Tensor, *, zero_points: bool
) -> tuple[Tensor, Tensor]:
    """Per block, the scale and zero point with the least weighted rounding error of those tried, float32 [n] each.

    With zero points the range reaches from the block's least weight to its largest (and holds zero): both ends are cut
    by the same share of :data:`RANGES`, then either end by its own. Without, ranges are as wide on both sides.

    Args:
        weight_OI: The matrix.
        config: Gives the width and the block size.
        weights_I: Weight of each column's squared error.
        zero_points: Whether zero may be any of the codes.
    """
    size = config.block_size
    cost_NB = torch.nn.functional.pad(weights_I.float(), (0, -len(weights_I) % size)).view(-1, size)
    blocks = row_blocks(weight_OI, size)
    rows = max(1, _CHUNK // len(cost_NB)) * len(cost_NB)
    found = []
    for part in blocks.split(rows):
        search = _Search(part, cost_NB.repeat(len(part) // len(cost_NB), 1), config.bits)
        if zero_points:
            low, high = part.amin(1).clamp(max=0), part.amax(1).clamp(min=0)
            for share in RANGES:
                search.try_range(share * low, share * high)
            for share in RANGES:
                search.try_range(share * low, search.high)
            for share in RANGES:
                search.try_range(search.low, share * high)
        else:
            absmax = part.abs().amax(1)
            for share in RANGES:
                search.try_steps(
                    2 * share * absmax / search.levels, torch.full_like(absmax, 2 ** (config.bits - 1))
                )
        found.append((search.steps, search.zeros))
    return torch.cat([steps for steps, _ in found]), torch.cat([zeros for _, zeros in found])


class _Search:
    """The best range of each block so far."""

    def __init__(self, blocks_nB: Tensor, cost_nB: Tensor, bits: int) -> None:
        self.levels = 2**bits - 1
        self._blocks, self._cost = blocks_nB, cost_nB
        nothing = torch.zeros(len(blocks_nB))
        self._least = torch.full_like(nothing, torch.inf)
        self.low, self.high, self.steps, self.zeros = nothing, nothing, nothing, nothing

    def try_range(self, low_n: Tensor, high_n: Tensor) -> None:
        """Levels spread from one end to the other."""
        steps = (high_n - low_n) / self.levels
        zeros = (-low_n / torch.where(steps > 0, steps, 1.0)).round().clamp(0, self.levels)
        better = self.try_steps(steps, zeros)
        self.low = torch.where(better, low_n, self.low)
        self.high = torch.where(better, high_n, self.high)

    def try_steps(self, steps_n: Tensor, zeros_n: Tensor) -> Tensor:
        """Where this is better than all before, bool [n]."""
        inverse = torch.where(steps_n > 0, 1 / steps_n, 0.0)
        codes = (self._blocks * inverse[:, None] + zeros_n[:, None]).round_().clamp_(0, self.levels)
        error = codes.sub_(zeros_n[:, None]).mul_(steps_n[:, None]).sub_(self._blocks).square_()
        total = error.mul_(self._cost).sum(1)
        better = total < self._least
        self._least = torch.where(better, total, self._least)
        self.steps = torch.where(better, steps_n, self.steps)
        self.zeros = torch.where(better, zeros_n, self.zeros)
        return better
