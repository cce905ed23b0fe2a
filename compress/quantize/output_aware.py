"""Q + L1 L2 for the least error of a matrix's *outputs*, and the table that predicts it (METHODS §3.4).

One pass: error-feedback rounding, then the low-rank factors of what it left, in the whitened space. Factors fitted
before the rounding, as alternation does, take from the weights what feedback would have dealt with for nothing.

Shapes: O out, I in, r rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from compress.quantize.blockwise import quantize_dequantize
from compress.quantize.config import FACTOR_8BIT, QuantConfig
from compress.quantize.decompose import (
    Decomposition,
    Factor,
    read_factor,
    squared_norm,
    store_factor,
)
from compress.quantize.error_table import RANKS, ErrorTable, offered_ranks, stored_bits
from compress.quantize.hessian import InputStatistics
from compress.quantize.lowrank import truncated_svd
from compress.quantize.rounding import round_with_feedback
from compress.quantize.rounding_errors import rounding_errors

METHOD = "squared output error, estimated from one plain rounding weighed by the conditional input variances"
PROBE_BITS = 3


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


def typical_range(config: QuantConfig) -> float:
    """The block range the search of ``rounding`` settles on, as a share of the largest weight.

    Means over trained matrices; a table made at the full range would call narrow widths worse than they are.
    """
    if config.bits == 2:
        return {16: 0.70, 32: 0.62, 64: 0.56}.get(config.block_size, 0.56)
    return {3: 0.85, 4: 0.95}.get(config.bits, 1.0)


def decompose_outputs(
    weight: torch.Tensor,
    config: QuantConfig,
    statistics: InputStatistics,
    *,
    rank: int,
    factor_config: QuantConfig | None = FACTOR_8BIT,
    seed: int = 0,
) -> OutputAware:
    """Split a matrix into quantized weights and low-rank factors with the least output error.

    Args:
        weight: [O, I], any floating type; computed in float32.
        config: Of Q.
        statistics: Of the matrix's inputs.
        rank: r; 0 is error-feedback rounding alone.
        factor_config: How the factors are stored; None keeps them in 16 bits.
        seed: Of the randomized SVD.
    """
    wide = weight.detach().float()
    quantized = round_with_feedback(wide, config, statistics)
    rest = wide - quantized.dequantize()
    factor_out: Factor | None = None
    factor_in: Factor | None = None
    iterates = [squared_norm(rest)]
    if rank > 0:
        u, s, vh = truncated_svd(statistics.whiten(rest), rank, seed=seed)
        root = s.sqrt()
        factor_out = store_factor((u * root).T, factor_config)
        factor_in = store_factor(statistics.unwhiten(root[:, None] * vh), factor_config)
        rest = rest - read_factor(factor_out).T @ read_factor(factor_in)
        iterates.append(squared_norm(rest))
    return OutputAware(
        decomposition=Decomposition(
            quantized=quantized,
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


def output_error_table(
    weight: torch.Tensor,
    configs: Sequence[QuantConfig],
    statistics: InputStatistics,
    ranks: Sequence[int] = RANKS,
    *,
    factor_config: QuantConfig | None = FACTOR_8BIT,
    seed: int = 0,
) -> ErrorTable:
    """Estimated squared output errors and stored bits of every configuration and rank for one matrix.

    ``errors`` and ``weight_norm`` of the result are ``tr(E H E^T)`` and ``tr(W H W^T)``. The share that factors of a
    rank take away is measured on one plain rounding at three bits in the whitened space.
    """
    wide = weight.detach().float()
    shape = (wide.shape[0], wide.shape[1])
    offered = offered_ranks(shape, ranks)
    plain = rounding_errors(wide, configs, column_weights=statistics.weights, ranges=typical_range)
    left = np.ones(len(offered))
    if max(offered) > 0:
        probe = QuantConfig(bits=PROBE_BITS)
        noise = (wide - quantize_dequantize(wide, probe)) * statistics.weights.sqrt()
        total = squared_norm(noise)
        energy = (
            truncated_svd(noise, max(offered), seed=seed, power_iterations=1)[1].double().square().cumsum(0)
        )
        if total > 0:
            left = np.array([1.0 - (float(energy[r - 1]) / total if r else 0.0) for r in offered])
    return ErrorTable(
        shape=shape,
        configs=tuple(configs),
        ranks=offered,
        errors=plain[:, None] * left[None, :],
        bits=stored_bits(shape, configs, offered, factor_config),
        weight_norm=statistics.output_error(wide),
        method=METHOD,
    )
