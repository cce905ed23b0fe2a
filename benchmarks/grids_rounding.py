"""Families of grids behind one interface, and the errors each of them leaves of a matrix.

Shapes: O out, I in.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from typing import Protocol

import torch
from torch import Tensor

from compress.benchmarks.grids_affine import AffineRounded, refine_affine, round_affine
from compress.kernels.reference import Grid, make_grid
from compress.quantize.config import FACTOR_8BIT, QuantConfig
from compress.quantize.decompose import Factor, read_factor, store_factor
from compress.quantize.hessian import InputStatistics
from compress.quantize.lowrank import truncated_svd
from compress.quantize.output_aware import PASSES
from compress.quantize.packing import packed_bytes
from compress.quantize.rounding import Rounded, refine, round_with_feedback


class Rounding(Protocol):
    """A matrix on a grid."""

    def values(self) -> Tensor:
        """The weights it stands for, float32 [O, I]."""
        ...


class Family(Protocol):
    """One way to lay the values of a block."""

    def bits(self, shape: tuple[int, int], config: QuantConfig) -> int:
        """Stored bits of a matrix [out, in], everything counted."""
        ...

    def round(
        self, wide_OI: Tensor, config: QuantConfig, statistics: InputStatistics, known: Rounding | None = None
    ) -> Rounding:
        """Searched ranges and error feedback; with the table of ``known`` where there is one."""
        ...

    def refine(self, wide_OI: Tensor, rounding: Rounding, statistics: InputStatistics) -> Rounding:
        """The same with scales and codes improved by descent; never a larger error."""
        ...


@dataclass(frozen=True)
class Table:
    """A look-up table in units of the block's scale.

    Attributes:
        learned: Fit the table to the matrix and store it.
        half_steps: Evenly spaced entries, none of them zero: ``-1, ..., 1`` in steps of ``2 / (2 ** b - 1)``.
    """

    learned: bool = False
    half_steps: bool = False

    def bits(self, shape: tuple[int, int], config: QuantConfig) -> int:
        """As :class:`Family`."""
        return self._config(config).storage_bits(shape)

    def round(
        self, wide_OI: Tensor, config: QuantConfig, statistics: InputStatistics, known: Rounding | None = None
    ) -> Rounded:
        """As :class:`Family`."""
        grid = known.grid if isinstance(known, Rounded) else None
        if self.half_steps:
            grid = half_step_grid(config.bits)
        return round_with_feedback(wide_OI, self._config(config), statistics, grid)

    def refine(self, wide_OI: Tensor, rounding: Rounding, statistics: InputStatistics) -> Rounded:
        """As :class:`Family`."""
        assert isinstance(rounding, Rounded)
        return refine(wide_OI, rounding, statistics, passes=PASSES)

    def _config(self, config: QuantConfig) -> QuantConfig:
        return replace(config, codebook="learned" if self.learned else "normal")


@cache
def half_step_grid(bits: int) -> Grid:
    """``2 ** bits`` evenly spaced entries from -1 to 1."""
    return make_grid(torch.linspace(-1, 1, 2**bits))


@dataclass(frozen=True)
class Affine:
    """Integers times a scale.

    Attributes:
        zero_points: Each block stores the code of zero; otherwise that is ``2 ** (bits - 1)`` everywhere.
    """

    zero_points: bool

    def bits(self, shape: tuple[int, int], config: QuantConfig) -> int:
        """As :class:`Family`: codes and both scale levels as for a table, and ``bits`` bits a block of zero points."""
        zeros = 8 * packed_bytes(config.blocks(shape), config.bits) if self.zero_points else 0
        return config.storage_bits(shape) + zeros

    def round(
        self, wide_OI: Tensor, config: QuantConfig, statistics: InputStatistics, known: Rounding | None = None
    ) -> AffineRounded:
        """As :class:`Family`."""
        return round_affine(wide_OI, config, statistics, zero_points=self.zero_points)

    def refine(self, wide_OI: Tensor, rounding: Rounding, statistics: InputStatistics) -> AffineRounded:
        """As :class:`Family`."""
        assert isinstance(rounding, AffineRounded)
        return refine_affine(wide_OI, rounding, statistics)


FAMILIES: dict[str, Family] = {
    "NormalFloat": Table(),
    "learned": Table(learned=True),
    "affine": Affine(zero_points=True),
    "symmetric": Affine(zero_points=False),
    "half steps": Table(half_steps=True),
}


def whitened_factors(
    rest_OI: Tensor, statistics: InputStatistics, rank: int, factor_config: QuantConfig | None
) -> Tensor:
    """The product of the best rank-``rank`` factors of ``rest_OI`` for the outputs, as stored, float32 [O, I]."""
    u, s, vh = truncated_svd(statistics.whiten(rest_OI), rank, seed=0)
    root = s.sqrt()
    out: Factor = store_factor((u * root).T.contiguous(), factor_config)
    into: Factor = store_factor(statistics.unwhiten(root[:, None] * vh), factor_config)
    return read_factor(out).T @ read_factor(into)


def measured(
    wide_OI: Tensor,
    config: QuantConfig,
    statistics: InputStatistics,
    held_out: InputStatistics,
    family: Family,
    rank: int,
) -> dict[str, float]:
    """Relative output errors of one family: ``feedback``, ``descent`` after it, and ``corrected`` by factors.

    The correction is in the order of `compress.quantize.output_aware`: factors of the rounding error, a fresh rounding
    of what they leave, factors of what this leaves, descent. ``corrected`` is missing for rank 0. With
    ``_held_out`` behind the name they are on the inputs behind ``held_out``.
    """

    def errors(name: str, rest_OI: Tensor) -> dict[str, float]:
        return {
            name: statistics.output_error(rest_OI) / statistics.output_error(wide_OI),
            f"{name}_held_out": held_out.output_error(rest_OI) / held_out.output_error(wide_OI),
        }

    first = family.round(wide_OI, config, statistics)
    second = family.refine(wide_OI, first, statistics)
    found = errors("feedback", wide_OI - first.values()) | errors("descent", wide_OI - second.values())
    if rank > 0:
        product = whitened_factors(wide_OI - second.values(), statistics, rank, FACTOR_8BIT)
        left = wide_OI - product
        again = family.refine(left, family.round(left, config, statistics, second), statistics)
        product = whitened_factors(wide_OI - again.values(), statistics, rank, FACTOR_8BIT)
        left = wide_OI - product
        found |= errors("corrected", left - family.refine(left, again, statistics).values())
    return found
