"""Rounding and low-rank factors in turns, with the output error after every half of a turn, and what it is made of.

One turn rounds ``W - L`` and then takes new factors ``L`` of ``W - Q``. With ``E = W - L - Q`` the rounding error of
this turn, the new factors see ``L_before + E``: one rank r for what the old ones held and for the new error.

Shapes: O out, I in, r rank.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from itertools import islice
from typing import Literal

import torch
from torch import Tensor

from compress.benchmarks.grids_rounding import FAMILIES, Rounding, whitened_factors
from compress.quantize.blockwise import quantize_dequantize, row_blocks
from compress.quantize.config import QuantConfig
from compress.quantize.hessian import InputStatistics, input_statistics

How = Literal["plain", "feedback", "both", "descent"]
"""``plain``: to the nearest entry, ranges to the largest weight. ``feedback``: searched ranges and error feedback, anew
in every turn. ``both``: the same, and descent after it. ``descent``: feedback in the first turn, and in every turn the
codes and scales there are, improved."""
First = Literal["rounding", "factors"]
"""``rounding``: of W itself. ``factors``: of W itself, as LQ-LoRA begins; the first turn rounds what they leave."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """One turn; errors relative to ``tr(W H W^T)``.

    Attributes:
        rounded: Error after rounding, with the factors of the turn before.
        fitted: Error after new factors.
        held_out: The same on other text.
        taken: Share of ``rounded`` that the new factors took.
        could_take: Share of the rounding error that factors of the same rank take if they have nothing else to hold.
        overlap: Cosine, in the outputs, between this rounding error and that of the turn before; None in the first.
        range: Mean largest weight of a block of ``W - L`` relative to that of W.
    """

    rounded: float
    fitted: float
    held_out: float
    taken: float
    could_take: float
    overlap: float | None
    range: float


def halves(
    wide_OI: Tensor,
    config: QuantConfig,
    statistics: InputStatistics,
    *,
    rank: int,
    how: How,
    first: First,
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Decompose in turns with NormalFloat and exact factors (METHODS §3.1, §3.4), without end.

    Args:
        wide_OI: The matrix, float32.
        config: Of Q.
        statistics: Of its inputs; :func:`unweighted` for the plain weight error.
        rank: r.
        how: How ``W - L`` is rounded.
        first: What is done first.

    Yields:
        Of each turn: what was rounded (``W - L_before``), Q, and the new factors' product.
    """
    product = torch.zeros_like(wide_OI)
    if first == "factors":
        product = whitened_factors(wide_OI, statistics, rank, None)
    rounding: Rounding | None = None
    while True:
        left = wide_OI - product
        rounding, values = _rounded(left, config, statistics, how, rounding)
        product = whitened_factors(wide_OI - values, statistics, rank, None)
        yield left, values, product


def alternate(
    wide_OI: Tensor,
    config: QuantConfig,
    statistics: InputStatistics,
    held_out: InputStatistics,
    *,
    rank: int,
    how: How,
    first: First,
    turns: int,
) -> list[Turn]:
    """Errors of the first turns of :func:`halves`.

    Args:
        wide_OI: The matrix, float32.
        config: Of Q.
        statistics: Of its inputs; :func:`unweighted` for the plain weight error.
        held_out: Of its inputs on other text.
        rank: r.
        how: How ``W - L`` is rounded.
        first: What is done first.
        turns: How many.
    """
    norm, other_norm = statistics.output_error(wide_OI), held_out.output_error(wide_OI)
    width = _mean_range(wide_OI, config)
    before: Tensor | None = None
    made: list[Turn] = []
    endless = halves(wide_OI, config, statistics, rank=rank, how=how, first=first)
    for left, values, product in islice(endless, turns):
        error, rest = left - values, wide_OI - values - product
        rounded, fitted = statistics.output_error(error), statistics.output_error(rest)
        alone = statistics.output_error(error - whitened_factors(error, statistics, rank, None))
        white = statistics.whiten(error).double()
        cosine = None if before is None else float((white * before).sum() / (white.norm() * before.norm()))
        made.append(
            Turn(
                rounded=rounded / norm,
                fitted=fitted / norm,
                held_out=held_out.output_error(rest) / other_norm,
                taken=1 - fitted / rounded,
                could_take=1 - alone / rounded,
                overlap=cosine,
                range=_mean_range(left, config) / width,
            )
        )
        before = white
    return made


def _rounded(
    left_OI: Tensor, config: QuantConfig, statistics: InputStatistics, how: How, known: Rounding | None
) -> tuple[Rounding | None, Tensor]:
    if how == "plain":
        return None, quantize_dequantize(left_OI, config)
    family = FAMILIES["NormalFloat"]
    if how != "descent" or known is None:
        known = family.round(left_OI, config, statistics)
    if how != "feedback":
        known = family.refine(left_OI, known, statistics)
    return known, known.values()


def _mean_range(weight_OI: Tensor, config: QuantConfig) -> float:
    return float(row_blocks(weight_OI, config.block_size).abs().amax(1).double().mean())


def unweighted(columns: int) -> InputStatistics:
    """Statistics under which the output error is the squared weight error: all inputs alike and independent."""
    return input_statistics(torch.eye(columns, dtype=torch.float64), damping=1e-9)


VARIANTS: dict[str, tuple[How, First, bool]] = {
    "plain, rounding first": ("plain", "rounding", True),
    "plain, factors first": ("plain", "factors", True),
    "feedback, rounding first": ("feedback", "rounding", True),
    "feedback, factors first": ("feedback", "factors", True),
    "feedback and descent, rounding first": ("both", "rounding", True),
    "feedback and descent, factors first": ("both", "factors", True),
    "descent, rounding first": ("descent", "rounding", True),
    "descent, factors first": ("descent", "factors", True),
    "weight error, rounding first": ("plain", "rounding", False),
    "weight error, factors first": ("plain", "factors", False),
}
"""Name -> how, what first, and whether the inputs count."""
ONE_PASS = "feedback, rounding first"
"""The variant whose first turn is the unit of errors of the outputs."""


def all_variants(
    wide_OI: Tensor,
    config: QuantConfig,
    statistics: InputStatistics,
    held_out: InputStatistics,
    rank: int,
    turns: int,
    names: Iterable[str] = tuple(VARIANTS),
) -> dict[str, list[dict[str, float | None]]]:
    """The turns of every variant (or of those named), as JSON values."""
    found = {}
    for name in names:
        how, first, weighed = VARIANTS[name]
        known, other = statistics, held_out
        if not weighed:
            known = other = unweighted(wide_OI.shape[1])
        made = alternate(wide_OI, config, known, other, rank=rank, how=how, first=first, turns=turns)
        found[name] = [asdict(turn) for turn in made]
    return found
