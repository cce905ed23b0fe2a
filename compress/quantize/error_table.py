"""What each configuration and rank would cost one matrix: the input of the allocation (LQ-LoRA §3.3)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt
import torch

from compress.errors import CompressError, UsageError
from compress.kernels.reference import round_to_grid
from compress.quantize.blockwise import compress_scales, row_blocks
from compress.quantize.config import FACTOR_8BIT, MENU, QuantConfig
from compress.quantize.decompose import decompose, factor_bits, read_factor, squared_norm, store_factor
from compress.quantize.lowrank import truncated_svd
from compress.quantize.normal_float import normal_float_grid

Effort = Literal["quick", "standard", "paper"]

RANKS = (0, 4, 8, 16, 32, 64)
"""Ranks offered to the allocation."""

ESTIMATE = "rank 0 exact; rank r estimated from the singular values of W and one rounding of the rest"
DECOMPOSED = (
    "rank 0 exact; rank r from a decomposition of five iterations per width, scaled to each configuration"
)
EXACT_ITERATIONS = 5

_CHUNK = 1 << 18


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


def rounding_errors(weight: torch.Tensor, configs: Sequence[QuantConfig]) -> npt.NDArray[np.float64]:
    """Exact squared rounding errors of a matrix for many configurations, float64 [C].

    Blocks and scales are computed once for all configurations that share them.
    """
    by_scales: dict[int, dict[QuantConfig, list[int]]] = {}
    for at, config in enumerate(configs):
        shared = QuantConfig(**{**config.to_dict(), "bits": 2})
        by_scales.setdefault(config.block_size, {}).setdefault(shared, []).append(at)
    errors = np.zeros(len(configs))
    for block_size, scalings in by_scales.items():
        blocks = row_blocks(weight, block_size)
        absmax = blocks.abs().amax(1)
        for shared, members in scalings.items():
            scales = compress_scales(absmax, shared).values(shared)
            _add_errors(blocks, scales, [(at, configs[at].bits) for at in members], errors)
    return errors


def _add_errors(
    blocks: torch.Tensor,
    scales: torch.Tensor,
    widths: list[tuple[int, int]],
    errors: npt.NDArray[np.float64],
) -> None:
    divisors = torch.where(scales > 0, scales, torch.inf)[:, None]
    step = max(1, _CHUNK // blocks.shape[1])
    for start in range(0, blocks.shape[0], step):
        part = blocks[start : start + step]
        scaled = part / divisors[start : start + step]
        for at, bits in widths:
            grid = normal_float_grid(bits, blocks.device)
            codes = round_to_grid(scaled, grid).view(-1).to(torch.int32)
            values = grid.table.index_select(0, codes).view(part.shape)
            values.mul_(scales[start : start + step, None]).sub_(part)
            errors[at] += float(torch.linalg.vector_norm(values)) ** 2


@cache
def _white_share(shape: tuple[int, int], rank: int) -> float:
    """Share of white noise's squared norm that factors of this rank, found as in a decomposition, take."""
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    _, s, _ = truncated_svd(noise, rank, seed=0)
    return squared_norm(s[None]) / squared_norm(noise)


def _probe_of(config: QuantConfig) -> tuple[int, int]:
    """What the effect of a rank on rounding depends on: 2 bits or more, and the block size."""
    return min(config.bits, 3), config.block_size


def _estimated_ratios(
    weight: torch.Tensor,
    configs: Sequence[QuantConfig],
    ranks: Sequence[int],
    factor_config: QuantConfig | None,
    seed: int,
) -> Callable[[QuantConfig, float], npt.NDArray[np.float64]]:
    """Ratios of rank-r to rank-0 error as a function of the configuration and its rank-0 error, [R].

    With L the rank-r part of W, rounding W - L in place of W lowers every block's scale: by a factor that hardly
    depends on anything but the block size and is measured at 2 and at 3 bits. The factors are then fitted once
    more, to what the rounding left. A share of that, as large as the relative rounding error, lies along
    W - L, where L took the leading directions already; the rest is close to white noise, of which the factors
    take what they take of white noise. The further rounds of a decomposition are not credited, which keeps the
    estimate above what it will find. Factors add their own storage error, measured here, unless Q is rounded
    against them, which forgoes the second fit.
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


def _decomposed_ratios(
    weight: torch.Tensor,
    configs: Sequence[QuantConfig],
    ranks: Sequence[int],
    factor_config: QuantConfig | None,
    seed: int,
) -> Callable[[QuantConfig, float], npt.NDArray[np.float64]]:
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
    error, within a third of it on trained matrices) or decomposed (``paper``).

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
        measure = _decomposed_ratios if effort == "paper" else _estimated_ratios
        ratios = measure(wide, configs, offered, factor_config, seed)
        for at, config in enumerate(configs):
            errors[at] *= ratios(config, float(plain[at]))
    sizes = np.asarray([c.storage_bits(shape) for c in configs], dtype=np.int64)
    extra = np.asarray([factor_bits(shape, rank, factor_config) for rank in offered], dtype=np.int64)
    return ErrorTable(
        shape=shape,
        configs=tuple(configs),
        ranks=offered,
        errors=errors,
        bits=sizes[:, None] + extra[None, :],
        weight_norm=squared_norm(wide),
        method=DECOMPOSED if effort == "paper" else ESTIMATE,
    )
