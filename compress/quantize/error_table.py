"""What each configuration and rank would cost one matrix: the input of the allocation (LQ-LoRA §3.3)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt
import torch

from compress.errors import CompressError, UsageError
from compress.quantize.config import FACTOR_8BIT, MENU, QuantConfig
from compress.quantize.decompose import factor_bits, squared_norm
from compress.quantize.rank_ratios import decomposed_ratios, estimated_ratios
from compress.quantize.rounding_errors import rounding_errors

Effort = Literal["quick", "standard", "paper"]

RANKS = (0, 4, 8, 16, 32, 64)
"""Ranks offered to the allocation."""

ESTIMATE = "rank 0 exact; rank r estimated from the singular values of W and one rounding of the rest"
DECOMPOSED = (
    "rank 0 exact; rank r from a decomposition of five iterations per width, scaled to each configuration"
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
    """

    shape: tuple[int, int]
    configs: tuple[QuantConfig, ...]
    ranks: tuple[int, ...]
    errors: npt.NDArray[np.float64]
    bits: npt.NDArray[np.int64]
    weight_norm: float
    method: str

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
) -> ErrorTable:
    """Errors and stored bits of every configuration and rank for one matrix.

    Rank 0 is always exact. Higher ranks are estimated (``quick``, ``standard``: on the side of too much
    error, 4 to 36 % above five iterations of decomposition on a trained model) or decomposed (``paper``).

    Args:
        weight: [O, I], any floating type.
        configs: The menu, for instance ``menu(effort)``.
        ranks: Offered ranks; those not below half of the smaller side are left out, 0 is always in.
        effort: Whether ranks above 0 are estimated or decomposed.
        factor_config: How the factors are stored; None keeps them in 16 bits.
        seed: Of the randomized SVDs.

    Raises:
        UsageError: There is no such effort, or the menu is empty.
    """
    if effort not in get_args(Effort) or not configs:
        raise UsageError(
            f"An error table for the effort {effort!r} and {len(configs)} configurations cannot be made.",
            f"Choose an effort of {', '.join(get_args(Effort))} and a menu that is not empty.",
        )
    wide = weight.detach().float()
    shape = (wide.shape[0], wide.shape[1])
    offered = offered_ranks(shape, ranks)
    plain = rounding_errors(wide, configs)
    errors = np.repeat(plain[:, None], len(offered), axis=1)
    if len(offered) > 1:
        measure = decomposed_ratios if effort == "paper" else estimated_ratios
        ratios = measure(wide, configs, offered, factor_config, seed)
        for at, config in enumerate(configs):
            errors[at] *= ratios(config, float(plain[at]))
    return ErrorTable(
        shape=shape,
        configs=tuple(configs),
        ranks=offered,
        errors=errors,
        bits=stored_bits(shape, configs, offered, factor_config),
        weight_norm=squared_norm(wide),
        method=DECOMPOSED if effort == "paper" else ESTIMATE,
    )
