"""How much of the rounding error factors of each rank leave: estimated, or from decompositions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache

import numpy as np
import numpy.typing as npt
import torch

from compress.quantize.config import QuantConfig
from compress.quantize.decompose import decompose, read_factor, squared_norm, store_factor
from compress.quantize.lowrank import truncated_svd
from compress.quantize.rounding_errors import rounding_errors

EXACT_ITERATIONS = 5

Ratios = Callable[[QuantConfig, float], npt.NDArray[np.float64]]
"""(configuration, its rank-0 error) -> ratio of rank-r to rank-0 error for each rank, [R]."""


@cache
def _white_share(shape: tuple[int, int], rank: int) -> float:
    """Share of white noise's squared norm that factors of this rank, found as in a decomposition, take."""
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    _, s, _ = truncated_svd(noise, rank, seed=0)
    return squared_norm(s[None]) / squared_norm(noise)


def _probe_of(config: QuantConfig) -> tuple[int, int]:
    """What the effect of a rank on rounding depends on: 2 bits or more, and the block size."""
    return min(config.bits, 3), config.block_size


def estimated_ratios(
    weight: torch.Tensor,
    configs: Sequence[QuantConfig],
    ranks: Sequence[int],
    factor_config: QuantConfig | None,
    seed: int,
) -> Ratios:
    """Ratios of rank-r to rank-0 error as a function of the configuration and its rank-0 error, [R].

    With L the rank-r part of W, rounding W - L in place of W lowers every block's scale: by a factor that
    hardly depends on anything but the block size and is measured at 2 and at 3 bits. The factors are then
    fitted once more, to what the rounding left. A share of that, as large as the relative rounding error,
    lies along W - L, where L took the leading directions already; the rest is close to white noise, of which
    the factors take what they take of white noise. The further rounds of a decomposition are not credited,
    which keeps the estimate above what it will find. Factors add their own storage error, measured here,
    unless Q is rounded against them, which forgoes the second fit.
    """
    u, s, vh = truncated_svd(weight, max(ranks), seed=seed, power_iterations=1)
    root = s.sqrt()
    left, right = u * root, root[:, None] * vh
    probes: dict[tuple[int, int], QuantConfig] = {}
    for config in configs:
        probes.setdefault(_probe_of(config), config)
    plain = rounding_errors(weight, list(probes.values()))
    shrink = np.ones((len(probes), len(ranks)))
    stored = np.zeros(len(ranks))
    refit = np.ones((len(probes), len(ranks)))
    for at, rank in enumerate(ranks):
        if rank == 0:
            continue
        product = left[:, :rank] @ right[:rank]
        kept_out, kept_in = (read_factor(store_factor(f[:rank], factor_config)) for f in (left.T, right))
        stored[at] = squared_norm(product - kept_out.T @ kept_in)
        rest = weight - product
        after = rounding_errors(rest, list(probes.values()))
        white = 1 - after / max(squared_norm(rest), float(after.max()), torch.finfo(rest.dtype).tiny)
        refit[:, at] = 1 - white * _white_share((weight.shape[0], weight.shape[1]), rank)
        shrink[:, at] = np.divide(after, plain, out=np.ones(len(probes)), where=plain > 0)
    measured = dict(zip(probes, zip(shrink, refit, strict=True), strict=True))

    def ratios(config: QuantConfig, error: float) -> npt.NDArray[np.float64]:
        if error <= 0:
            return np.ones(len(ranks))
        first, again = measured[_probe_of(config)]
        second = first * again + stored / error
        lower: npt.NDArray[np.float64] = np.minimum(np.minimum(first, second), 1.0)
        return lower

    return ratios


def decomposed_ratios(
    weight: torch.Tensor,
    configs: Sequence[QuantConfig],
    ranks: Sequence[int],
    factor_config: QuantConfig | None,
    seed: int,
) -> Ratios:
    """The same function from decompositions of every width and rank with blocks of 64."""
    table: dict[int, npt.NDArray[np.float64]] = {}
    for bits in sorted({config.bits for config in configs}):
        config = QuantConfig(bits=bits)
        found = [
            decompose(
                weight,
                config,
                rank=rank,
                factor_config=factor_config,
                iterations=EXACT_ITERATIONS,
                seed=seed,
            ).error
            for rank in ranks
        ]
        table[bits] = np.asarray(found) / found[0] if found[0] > 0 else np.ones(len(ranks))
    floor = {bits: np.minimum(found, 1.0) for bits, found in table.items()}
    return lambda config, error: floor[config.bits]
