"""What each configuration and rank would cost one matrix: the input of the allocation (LQ-LoRA §3.3)."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt
import torch

from compress.errors import CompressError, UsageError
from compress.quantize.config import FACTOR_8BIT, MENU, QuantConfig
from compress.quantize.decompose import factor_bits, squared_norm
from compress.quantize.dominated import MARGIN, finer_twins
from compress.quantize.lowrank import truncated_svd
from compress.quantize.rank_ratios import (
    decomposed_shares,
    mean_shares,
    noise_shares,
    refitted_shares,
    storage_error,
)
from compress.quantize.rounding_errors import rounding_errors

Effort = Literal["quick", "standard", "paper"]

RANKS = (0, 4, 8, 16, 32, 64)
"""Ranks offered to the allocation."""

ESTIMATE = "roundings of W and of what its leading factors leave; the gain of further rounds estimated"
DECOMPOSED = (
    "roundings of W and of what its leading factors leave; further rounds as in a decomposition per width"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class ErrorTable:
    """Costs and sizes of every choice for one matrix.

    Attributes:
        shape: (O, I).
        configs: C configurations.
        ranks: R ranks, 0 first.
        errors: Squared Frobenius error, float64 [C, R].
        bits: Stored bits including the factors, int64 [C, R].
        weight_norm: Squared Frobenius norm of the matrix.
        method: How the errors of ranks above 0 were obtained.
        skipped: Positions (rows of ``errors``) that were not computed, at one rank at least, because another
            configuration of the same size has the smaller bound; they hold that one's errors and a millionth more,
            so no choice of least cost takes them.
        sample: Share or number of rows that were read; None: all.
        exact: Positions in the flattened table that were then computed from all rows.
    """

    shape: tuple[int, int]
    configs: tuple[QuantConfig, ...]
    ranks: tuple[int, ...]
    errors: npt.NDArray[np.float64]
    bits: npt.NDArray[np.int64]
    weight_norm: float
    method: str
    skipped: tuple[int, ...] = ()
    sample: float | None = None
    exact: tuple[int, ...] = ()

    def position(self, config: QuantConfig, rank: int) -> int:
        """The inverse of `choice`."""
        return self.configs.index(config) * len(self.ranks) + self.ranks.index(rank)

    def choice(self, index: int) -> tuple[QuantConfig, int]:
        """Configuration and rank of an entry of the flattened (row-major) tables."""
        config, rank = divmod(index, len(self.ranks))
        return self.configs[config], self.ranks[rank]

    def to_dict(self) -> dict[str, Any]:
        """A JSON object that :meth:`from_dict` reads."""
        return {
            "format_version": 1,
            "shape": list(self.shape),
            "configs": [config.to_dict() for config in self.configs],
            "ranks": list(self.ranks),
            "errors": self.errors.tolist(),
            "bits": self.bits.tolist(),
            "weight_norm": self.weight_norm,
            "method": self.method,
            "skipped": list(self.skipped),
            "sample": self.sample,
            "exact": list(self.exact),
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ErrorTable:
        """The table of a JSON object.

        Raises:
            CompressError: It was written in another format version.
        """
        if values.get("format_version") != 1:
            raise CompressError(
                f"The error table has format version {values.get('format_version')!r}, not 1.",
                "Compute it again with this version of compress.",
            )
        return cls(
            shape=(values["shape"][0], values["shape"][1]),
            configs=tuple(QuantConfig.from_dict(config) for config in values["configs"]),
            ranks=tuple(values["ranks"]),
            errors=np.asarray(values["errors"], dtype=np.float64),
            bits=np.asarray(values["bits"], dtype=np.int64),
            weight_norm=float(values["weight_norm"]),
            method=values["method"],
            skipped=tuple(values.get("skipped", ())),
            sample=values.get("sample"),
            exact=tuple(values.get("exact", ())),
        )


def menu(effort: Effort) -> tuple[QuantConfig, ...]:
    """The configurations worth asking about.

    ``paper`` is the whole :data:`MENU`. ``standard`` keeps 16-bit second-level scales shared by 64 blocks: on
    trained matrices the convex hull of size and error holds little else, and float32 or other group sizes
    move an entry by less than 0.02 bits. ``quick`` keeps, of those, scale codes as wide as the weight codes,
    which is where that hull lies: twelve configurations.

    Raises:
        UsageError: There is no such effort.
    """
    if effort not in get_args(Effort):
        raise UsageError(f"There is no effort {effort!r}.", f"Choose one of: {', '.join(get_args(Effort))}.")
    if effort == "paper":
        return MENU
    slim = tuple(c for c in MENU if c.group_size == 64 and c.scale_dtype == "float16")
    return slim if effort == "standard" else tuple(c for c in slim if c.scale_bits == c.bits)


def offered_ranks(shape: tuple[int, int], ranks: Sequence[int] = RANKS) -> tuple[int, ...]:
    """The ranks below half of the smaller side, always with 0."""
    return tuple(sorted({0} | {r for r in ranks if 0 < r < min(shape) / 2}))


def stored_bits(
    shape: tuple[int, int],
    configs: Sequence[QuantConfig],
    ranks: Sequence[int],
    factor_config: QuantConfig | None,
) -> npt.NDArray[np.int64]:
    """Stored bits of a matrix of ``shape`` for every configuration and rank, factors included, int64 [C, R]."""
    sizes = np.asarray([config.storage_bits(shape) for config in configs], dtype=np.int64)
    extra = np.asarray([factor_bits(shape, rank, factor_config) for rank in ranks], dtype=np.int64)
    return sizes[:, None] + extra[None, :]


def error_table(
    weight: torch.Tensor,
    configs: Sequence[QuantConfig],
    ranks: Sequence[int] = RANKS,
    *,
    effort: Effort = "quick",
    factor_config: QuantConfig | None = FACTOR_8BIT,
    seed: int = 0,
    sample: float | None = None,
) -> ErrorTable:
    """Errors and stored bits of every configuration and rank for one matrix.

    One SVD serves all configurations and ranks. Of rank r, what its leading factors leave is rounded with every
    configuration; that is exact, and exact for rank 0 as a whole. What the further rounds of a decomposition take
    from it is estimated (``quick``, ``standard``: rather too little) or found by decompositions (``paper``).
    Configurations that :func:`finer_twins` rules out are not computed.

    Args:
        weight: [O, I], any floating type.
        configs: The menu, for instance ``menu(effort)``.
        ranks: Offered ranks; those not below half of the smaller side are left out, 0 is always in.
        effort: Whether the gain of further rounds is estimated or decomposed.
        factor_config: How the factors are stored; None keeps them in 16 bits.
        seed: Of the randomized SVDs and of the sample.
        sample: Share (float) or number (int) of rows that the roundings are estimated from; None: all rows. The
            entries that matter in the end can be had exactly with :func:`refined`.

    Raises:
        UsageError: There is no such effort, the menu is empty, or the sample is not positive.
        CompressError: A weight is not finite.
    """
    if effort not in get_args(Effort) or not configs:
        raise UsageError(
            f"An error table for the effort {effort!r} and {len(configs)} configurations cannot be made.",
            f"Choose an effort of {', '.join(get_args(Effort))} and a menu that is not empty.",
        )
    wide = weight.detach().float()
    shape = (wide.shape[0], wide.shape[1])
    offered = offered_ranks(shape, ranks)
    errors = np.empty((len(configs), len(offered)))
    errors[:, 0], skipped = _roundings(wide, configs, sample, seed)
    if len(offered) > 1:
        skipped |= _add_ranks(wide, configs, offered, errors, effort, factor_config, seed, sample)
    return ErrorTable(
        shape=shape,
        configs=tuple(configs),
        ranks=offered,
        errors=errors,
        bits=stored_bits(shape, configs, offered, factor_config),
        weight_norm=squared_norm(wide),
        method=DECOMPOSED if effort == "paper" else ESTIMATE,
        skipped=tuple(sorted(skipped)),
        sample=sample,
    )


def _roundings(
    rest: torch.Tensor, configs: Sequence[QuantConfig], sample: float | None, seed: int
) -> tuple[npt.NDArray[np.float64], set[int]]:
    """Rounding errors [C], and which of them are those of a twin with a margin."""
    twins = finer_twins(rest, configs)
    kept = [at for at in range(len(configs)) if at not in twins]
    errors = np.empty(len(configs))
    errors[kept] = rounding_errors(rest, [configs[at] for at in kept], sample=sample, seed=seed)
    skipped = {at for at, twin in twins.items() if errors[twin] > 0}
    for at in skipped:
        errors[at] = errors[twins[at]] * (1 + MARGIN)
    if others := [at for at in twins if at not in skipped]:  # a margin on no error would be none
        errors[others] = rounding_errors(rest, [configs[at] for at in others], sample=sample, seed=seed)
    return errors, skipped


def _add_ranks(
    wide: torch.Tensor,
    configs: Sequence[QuantConfig],
    ranks: Sequence[int],
    errors: npt.NDArray[np.float64],
    effort: Effort,
    factor_config: QuantConfig | None,
    seed: int,
    sample: float | None,
) -> set[int]:
    """Fill the columns of ``errors`` [C, R] behind the first, which holds the errors of rank 0; what was skipped.

    Q rounded against the stored factors forgoes the further rounds, but not more than plain rounding loses.
    """
    u, s, vh = truncated_svd(wide, max(ranks), seed=seed, power_iterations=1)
    left, right = u * s.sqrt(), s.sqrt()[:, None] * vh
    noise: npt.NDArray[np.float64] | None = None
    skipped: set[int] = set()
    for at in range(len(ranks) - 1, 0, -1):  # the largest rank first: it gives the spectrum of the noise
        rank = ranks[at]
        rest = torch.addmm(wide, left[:, :rank], right[:rank], alpha=-1)
        first, twins = _roundings(rest, configs, sample, seed)
        skipped |= twins
        if effort == "paper":
            found = first * decomposed_shares(wide, rest, rank, configs, factor_config, seed)
        else:
            noise = noise_shares(rest, ranks, seed) if noise is None else noise
            means = mean_shares(rest, configs)
            left_over = refitted_shares(first, squared_norm(rest), noise[at], means, configs)
            found = first * left_over + storage_error(left[:, :rank], right[:rank], factor_config)
        errors[:, at] = np.minimum(np.minimum(first, found), errors[:, 0])
    return skipped


def _finest(table: ErrorTable, config: int, rank: int) -> int:
    """The configuration of the same width and block size that loses least: the further rounds go by it."""
    kind = table.configs[config].bits, table.configs[config].block_size
    same = [at for at, other in enumerate(table.configs) if (other.bits, other.block_size) == kind]
    return min(same, key=lambda at: float(table.errors[at, rank]))


def refined(
    table: ErrorTable,
    weight: torch.Tensor,
    entries: Sequence[int],
    *,
    effort: Effort = "quick",
    factor_config: QuantConfig | None = FACTOR_8BIT,
    seed: int = 0,
) -> ErrorTable:
    """The table with some entries computed from all rows, such as those an allocation picked from a sampled table.

    Roundings are exact then; what the further rounds take from them is estimated as before. The other entries are
    scaled: see :func:`corrected`.

    Args:
        table: Of ``weight``.
        weight: [O, I], any floating type.
        entries: Positions in the flattened table.
        effort: As for :func:`error_table`.
        factor_config: As for :func:`error_table`.
        seed: As for :func:`error_table`.

    Raises:
        CompressError: A weight is not finite.
    """
    picked = [divmod(entry, len(table.ranks)) for entry in sorted(set(entries))]
    if not picked:
        return table
    configs = sorted({at for config, rank in picked for at in (config, _finest(table, config, rank))})
    ranks = [table.ranks[rank] for _, rank in picked]
    exact = error_table(
        weight,
        [table.configs[config] for config in configs],
        ranks,
        effort=effort,
        factor_config=factor_config,
        seed=seed,
    )
    found = {
        config * len(table.ranks) + rank: float(
            exact.errors[configs.index(config), exact.ranks.index(table.ranks[rank])]
        )
        for config, rank in picked
    }
    errors = corrected(table.errors.ravel(), table.exact, found).reshape(table.errors.shape)
    return replace(table, errors=errors, exact=tuple(sorted({*table.exact, *entries})))


def corrected(
    errors: npt.NDArray[np.float64], known: Collection[int], found: Mapping[int, float]
) -> npt.NDArray[np.float64]:
    """Errors estimated from a sample, some of which are known by now.

    Most of what a sample of rows gets wrong all formats of a matrix have in common: the rows drawn are harder or easier
    than the others. So estimates are scaled by the mean ratio, in logarithms, of those that have been computed from all
    rows. Without that, only what was chosen would be corrected, and choices would move to what looks too good.

    Args:
        errors: Estimates [N], scaled by those of ``known`` already.
        known: Positions of earlier calls' ``found``.
        found: Position -> the error from all rows.
    """
    result, numbers = errors.copy(), sorted({*known, *found})
    ratios = [
        math.log(value / errors[at])
        for at, value in found.items()
        if at not in known and value > 0 and errors[at] > 0
    ]
    estimated = np.ones(len(errors), dtype=bool)
    estimated[numbers] = False
    result[estimated] *= math.exp(math.fsum(ratios) / max(1, len(numbers)))
    for at, value in found.items():
        result[at] = value
    return result
