"""How much of the rounding error further rounds of a decomposition leave: estimated, or from decompositions."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from compress.quantize.blockwise import quantize_dequantize
from compress.quantize.config import QuantConfig
from compress.quantize.decompose import decompose, read_factor, squared_norm, store_factor
from compress.quantize.lowrank import truncated_svd
from compress.quantize.rounding_errors import error_means, rounding_errors

EXACT_ITERATIONS = 5

_FURTHER, _FADES = 0.5, 0.3
"""First refits that the further rounds of a decomposition are worth at least, and the share of the noise that factors
take at which they are worth nothing; measured on heavy-tailed, Gaussian and trained matrices."""

_ROWS = 256
"""Rows on which the mean rounding errors are measured."""


def noise_shares(rest: torch.Tensor, ranks: Sequence[int], seed: int) -> npt.NDArray[np.float64]:
    """Share of a rounding error's squared norm that factors of each rank take away, [R].

    Measured on one rounding at 4 bits, whose error is noise without a mean; errors of all widths and block sizes have
    that spectrum, apart from their means.

    Args:
        rest: [O, I], what the factors leave to be rounded.
        ranks: R ranks, 0 for none.
        seed: Of the randomized SVD.
    """
    noise = rest - quantize_dequantize(rest, QuantConfig(bits=4))
    total = squared_norm(noise)
    if total == 0:
        return np.zeros(len(ranks))
    energy = truncated_svd(noise, max(ranks), seed=seed, power_iterations=1)[1].double().square().cumsum(0)
    return np.asarray([float(energy[rank - 1]) / total if rank else 0.0 for rank in ranks])


def refitted_shares(
    first: npt.NDArray[np.float64],
    norm: float,
    noise: float,
    means: npt.NDArray[np.float64],
    configs: Sequence[QuantConfig],
) -> npt.NDArray[np.float64]:
    """What the rounds of a decomposition leave of the first rounding's error, [C].

    Of that error a share as large as the relative error itself lies along what was rounded, where the factors took
    the leading directions already. The rest is noise, of which a refit takes what factors take of noise, but for the
    means of the rows, which it takes whole. What coarse scales add sits in single weights; of it, factors take half
    as much.

    Args:
        first: Squared errors of the first rounding, [C].
        norm: Squared norm of what was rounded.
        noise: From :func:`noise_shares`.
        means: From :func:`mean_shares`, [C].
        configs: C configurations.
    """
    kinds = [(config.bits, config.block_size) for config in configs]
    finest = {
        kind: min(e for e, other in zip(first, kinds, strict=True) if other == kind) for kind in set(kinds)
    }
    fine = np.asarray([finest[kind] for kind in kinds]) / np.maximum(first, np.finfo(np.float64).tiny)
    white = 1 - first / max(norm, float(first.max()), float(np.finfo(np.float64).tiny))
    taken = np.minimum((noise + means) * white, 1.0)
    exponent = 1 + _FURTHER * max(0.0, 1 - noise / _FADES)
    left: npt.NDArray[np.float64] = (1 - taken) ** (exponent * (1 + fine) / 2)
    return left


def mean_shares(rest: torch.Tensor, configs: Sequence[QuantConfig]) -> npt.NDArray[np.float64]:
    """Share of the rounding error's squared norm that lies in the means of the rows, [C].

    The table of 2 bits is so lopsided that its errors have a mean that goes with the scales of the row: a part of
    rank one, which the first refit takes whole. Means depend on width and block size alone.

    Args:
        rest: [O, I], what is rounded; some rows are looked at.
        configs: C configurations.
    """
    some = rest[:: -(-len(rest) // _ROWS)]
    columns = some.shape[1]
    kinds = [(config.bits, config.block_size) for config in configs]
    found = [
        max(0.0, of_means / total - 1 / columns) if total > 0 else 0.0
        for total, of_means in error_means(some, kinds)
    ]
    return np.asarray(found)


def storage_error(left: torch.Tensor, right: torch.Tensor, factor_config: QuantConfig | None) -> float:
    """Squared error that storing the factors L1 [O, r] and L2 [r, I] adds to their product."""
    kept_left = read_factor(store_factor(left.T.contiguous(), factor_config)).T
    kept_right = read_factor(store_factor(right, factor_config))
    # L1 L2 - K1 K2 = [L1 - K1, K1] [L2; L2 - K2]: its norm from two small Gram matrices.
    tall = torch.cat((left - kept_left, kept_left), dim=1).double()
    wide = torch.cat((right, right - kept_right)).double()
    return max(0.0, float(((tall.T @ tall) * (wide @ wide.T)).sum()))


def decomposed_shares(
    weight: torch.Tensor,
    rest: torch.Tensor,
    rank: int,
    configs: Sequence[QuantConfig],
    factor_config: QuantConfig | None,
    seed: int,
) -> npt.NDArray[np.float64]:
    """What a decomposition of five iterations leaves of the first rounding's error, [C].

    One is done for every width, with blocks of 64.

    Args:
        weight: [O, I].
        rest: What the leading factors of ``weight`` leave.
        rank: Of the decomposition.
        configs: C configurations.
        factor_config: How the factors are stored.
        seed: Of the randomized SVDs.
    """
    probes = [QuantConfig(bits=bits) for bits in sorted({config.bits for config in configs})]
    first = rounding_errors(rest, probes)
    left = {}
    for probe, error in zip(probes, first, strict=True):
        found = decompose(
            weight, probe, rank=rank, factor_config=factor_config, iterations=EXACT_ITERATIONS, seed=seed
        ).error
        left[probe.bits] = found / float(error) if error > 0 else 1.0
    return np.asarray([left[config.bits] for config in configs])
