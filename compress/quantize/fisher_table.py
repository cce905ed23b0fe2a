"""What each configuration and rank would cost one matrix under its Fisher information (LQ-LoRA §3.3, §3.4)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from torch import Tensor

from compress.errors import UsageError
from compress.quantize.blockwise import quantize_dequantize
from compress.quantize.config import FACTOR_8BIT, QuantConfig
from compress.quantize.decompose import read_factor, store_factor
from compress.quantize.error_table import RANKS, ErrorTable, offered_ranks, stored_bits
from compress.quantize.fisher import Fisher
from compress.quantize.fisher_decompose import weighted_factors
from compress.quantize.rounding_errors import rounding_errors

METHOD = (
    "Fisher-weighted error; rank 0 exact; rank r from two rounds of decomposition at 2, 3 and 8 bits, scaled to "
    "each configuration"
)

ROUNDS = 2
"""Rounds of the decomposition that the probes go through."""


def fisher_error_table(
    weight: Tensor,
    configs: Sequence[QuantConfig],
    fisher: Fisher,
    ranks: Sequence[int] = RANKS,
    *,
    factor_config: QuantConfig | None = FACTOR_8BIT,
    seed: int = 0,
) -> ErrorTable:
    """Weighted errors and stored bits of every configuration and rank for one matrix.

    ``errors`` and ``weight_norm`` of the result are ``sum F E^2`` and ``sum F W^2``. They have one meaning in every
    matrix of a model, so the allocation adds them up as they are. Rank 0 is exact for the F that ``fisher`` holds.
    Higher ranks are estimated, mostly a little too high: one SVD of the scaled W gives the factors of every rank, and
    from there two rounds are gone through at 2, at 3 (or 4) and at 8 bits with blocks of a middle size. The ratio to
    the error of plain rounding is taken to be that of every configuration of this width.

    Args:
        weight: [O, I], any floating type.
        configs: The menu.
        fisher: Of the matrix.
        ranks: Offered ranks; those not below half of the smaller side are left out, 0 is always in.
        factor_config: How the factors are stored; None keeps them in 16 bits.
        seed: Of the randomized SVDs.

    Raises:
        UsageError: The menu is empty, or F has another shape.
        CompressError: A weight is not finite.
    """
    if not configs:
        raise UsageError("An error table without configurations is empty.", "Give a menu.")
    wide = weight.detach().float()
    shape = (wide.shape[0], wide.shape[1])
    offered = offered_ranks(shape, ranks)
    norm = fisher.cost(wide)
    plain = _roundings(wide, configs, fisher)
    errors = np.repeat(plain[:, None], len(offered), axis=1)
    if len(offered) > 1:
        by_width: dict[int, list[int]] = {}
        for at, config in enumerate(configs):
            by_width.setdefault(3 if config.bits == 4 else config.bits, []).append(at)
        leading = weighted_factors(wide, max(offered), fisher, seed=seed, power_iterations=1)
        for members in by_width.values():
            probe = sorted(members, key=lambda at: configs[at].block_size)[len(members) // 2]
            error = plain[probe]
            for r, rank in enumerate(offered):
                if rank == 0 or error == 0:
                    continue
                factors = leading[0][:, :rank], leading[1][:rank]
                found = _rounds(wide, configs[probe], fisher, factors, factor_config, seed)
                ratios = plain[members] / error
                refitted = found.fitted * ratios + found.stored
                errors[members, r] = np.minimum(np.minimum(found.rounded * ratios, refitted), plain[members])
    return ErrorTable(
        shape=shape,
        configs=tuple(configs),
        ranks=offered,
        errors=errors,
        bits=stored_bits(shape, configs, offered, factor_config),
        weight_norm=norm,
        method=METHOD,
    )


def _roundings(wide: Tensor, configs: Sequence[QuantConfig], fisher: Fisher) -> npt.NDArray[np.float64]:
    """Weighted errors of plain rounding, [C]; those of NormalFloat tables in one go where F is known whole."""
    together = [
        at for at, config in enumerate(configs) if fisher.full is not None and config.codebook == "normal"
    ]
    errors = np.empty(len(configs))
    if together:
        errors[together] = rounding_errors(
            wide, [configs[at] for at in together], element_weights=fisher.full
        )
    for at in sorted(set(range(len(configs))) - set(together)):
        errors[at] = fisher.cost(wide - quantize_dequantize(wide, configs[at]))
    return errors


@dataclass(frozen=True, slots=True, kw_only=True)
class _Ends:
    """Weighted errors at the end of some rounds.

    Attributes:
        fitted: With Q and the exact factors fitted to it.
        stored: Of storing these factors.
        rounded: With the stored factors and Q rounded against them.
    """

    fitted: float
    stored: float
    rounded: float


def _rounds(
    wide: Tensor,
    config: QuantConfig,
    fisher: Fisher,
    factors: tuple[Tensor, Tensor],
    factor_config: QuantConfig | None,
    seed: int,
) -> _Ends:
    """Go through the first rounds of the decomposition, from factors of W on."""
    exact, rest = factors[0] @ factors[1], wide
    kept = _kept(factors, factor_config)
    for step in range(1, ROUNDS + 1):
        rest = wide - quantize_dequantize(wide - kept, config)
        factors = weighted_factors(rest, len(factors[1]), fisher, seed=seed + step, power_iterations=1)
        exact, kept = factors[0] @ factors[1], _kept(factors, factor_config)
    return _Ends(
        fitted=fisher.cost(rest - exact),
        stored=fisher.cost(exact - kept),
        rounded=fisher.cost(wide - kept - quantize_dequantize(wide - kept, config)),
    )


def _kept(factors: tuple[Tensor, Tensor], config: QuantConfig | None) -> Tensor:
    """The product of the factors as they are stored."""
    out, into = (read_factor(store_factor(factor, config)) for factor in (factors[0].T, factors[1]))
    return out.T @ into
