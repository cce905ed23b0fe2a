"""Q + L1 L2 for the least error of a matrix's *outputs* (METHODS §3.4).

Error-feedback rounding and coordinate descent; for ranks above 0 then factors of what that left, in the whitened
space, a fresh rounding of what the factors leave, and factors of what this left. The first factors are those of the
rounding error, not of W as in LQ-LoRA: feedback has dealt with most of what these would take.

Shapes: O out, I in, r rank.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from compress.quantize.config import FACTOR_8BIT, QuantConfig
from compress.quantize.decompose import (
    Decomposition,
    Factor,
    read_factor,
    squared_norm,
    store_factor,
)
from compress.quantize.hessian import InputStatistics
from compress.quantize.lowrank import truncated_svd
from compress.quantize.rounding import Rounded, refine, round_with_feedback

LEAST_ROOT = 1e-3
"""Least root of a row's weight, as a share of the largest."""

PASSES = 1
"""Passes of coordinate descent after each rounding."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OutputAware:
    """A decomposition and what it does to the outputs.

    Attributes:
        decomposition: Q and the stored factors.
        output_error: ``tr(E H E^T)`` with ``E = W - Q - L1 L2``.
        output_norm: ``tr(W H W^T)``.
    """

    decomposition: Decomposition
    output_error: float
    output_norm: float


def decompose_outputs(
    weight: torch.Tensor,
    config: QuantConfig,
    statistics: InputStatistics,
    *,
    rank: int,
    factor_config: QuantConfig | None = FACTOR_8BIT,
    row_weights: torch.Tensor | None = None,
    seed: int = 0,
) -> OutputAware:
    """Split a matrix into quantized weights and low-rank factors with the least output error.

    Args:
        weight: [O, I], any floating type; computed in float32.
        config: Of Q.
        statistics: Of the matrix's inputs.
        rank: r; 0 is error-feedback rounding alone.
        factor_config: How the factors are stored; None keeps them in 16 bits.
        row_weights: How much the loss minds a squared error at each output, [O], for the choice of the factors;
            None: all the same.
        seed: Of the randomized SVD.
    """
    wide = weight.detach().float()
    rounded = _rounded(wide, config, statistics)
    factor_out: Factor | None = None
    factor_in: Factor | None = None
    iterates = [squared_norm(wide - rounded.values())]
    if rank > 0:
        product = _product(
            *_factors(wide - rounded.values(), statistics, rank, factor_config, row_weights, seed)
        )
        rounded = _rounded(wide - product, config, statistics, rounded)
        left = wide - rounded.values()
        factor_out, factor_in = _factors(left, statistics, rank, factor_config, row_weights, seed)
        product = _product(factor_out, factor_in)
        iterates.append(squared_norm(left - product))
        rounded = refine(wide - product, rounded, statistics, passes=PASSES)
        rest = wide - rounded.values() - product
        iterates.append(squared_norm(rest))
    else:
        rest = wide - rounded.values()
    return OutputAware(
        decomposition=Decomposition(
            quantized=rounded.store(),
            factor_out=factor_out,
            factor_in=factor_in,
            rank=rank,
            error=squared_norm(rest),
            weight_norm=squared_norm(wide),
            iterates=tuple(iterates),
        ),
        output_error=statistics.output_error(rest),
        output_norm=statistics.output_error(wide),
    )


def _rounded(
    wide: torch.Tensor, config: QuantConfig, statistics: InputStatistics, known: Rounded | None = None
) -> Rounded:
    """Feedback, then descent; with the table of ``known`` when there is one."""
    grid = None if known is None else known.grid
    return refine(wide, round_with_feedback(wide, config, statistics, grid), statistics, passes=PASSES)


def _factors(
    rest: torch.Tensor,
    statistics: InputStatistics,
    rank: int,
    factor_config: QuantConfig | None,
    row_weights: torch.Tensor | None,
    seed: int,
) -> tuple[Factor, Factor]:
    """Stored factors [r, O] and [r, I] of ``rest``, the best of their rank for the outputs."""
    white = statistics.whiten(rest)
    roots = torch.ones(len(rest), device=rest.device)
    if row_weights is not None and float(row_weights.max()) > 0:
        roots = row_weights.to(rest).sqrt()
        roots = roots.clamp(
            min=LEAST_ROOT * float(roots.max())
        )  # rows nobody minds still have to be un-scaled
    u, s, vh = truncated_svd(roots[:, None] * white, rank, seed=seed)
    root = s.sqrt()
    return (
        store_factor((u * root / roots[:, None]).T, factor_config),
        store_factor(statistics.unwhiten(root[:, None] * vh), factor_config),
    )


def _product(factor_out: Factor, factor_in: Factor) -> torch.Tensor:
    return read_factor(factor_out).T @ read_factor(factor_in)
