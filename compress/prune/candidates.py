"""The shapes whose damage is measured for an allocation, and the damage of all the others between them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TypeVar

import numpy as np

from compress.errors import UsageError
from compress.model.architecture import Architecture
from compress.prune.shape import TARGETS, Choices, HeadUnit, choices_of

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidates:
    """What a layer may keep, and what of it is measured.

    Attributes:
        attention: (KV groups, query heads in each), all of them measured, from everything down.
        measured: Channel counts that are measured, from all of them down.
        channels: Every channel count that may be kept, from all of them down.
    """

    attention: tuple[tuple[int, int], ...]
    measured: tuple[int, ...]
    channels: tuple[int, ...]


def candidates(
    arch: Architecture,
    *,
    targets: Sequence[str] = TARGETS,
    multiple: int = 64,
    grid: int = 8,
    head_unit: HeadUnit = "auto",
    allow_drop: bool = False,
) -> Candidates:
    """Shapes of one layer to measure.

    Args:
        arch: The model.
        targets: Any of "heads", "mlp".
        multiple: Kept channels are a multiple of this (or all channels).
        grid: Most shapes of the attention, and most channel counts, to measure: the whole branch, the smallest, and
            others evenly spaced between them (the attention by its weights).
        head_unit: What of the attention goes; see :func:`~compress.prune.shape.choices_of`.
        allow_drop: Also offer to remove a whole branch that may be pruned: no KV group, no channel.

    Raises:
        UsageError: A grid below 2; as :func:`~compress.prune.shape.choices_of`.
    """
    if grid < 2:
        raise UsageError(f"A grid of {grid} values is not possible.", "Give at least 2.")
    choices = choices_of(arch, targets=targets, multiple=multiple, head_unit=head_unit)
    attention = choices.pairs if len(choices.pairs) <= grid else _thinned(_by_weight(choices), grid)
    channels = tuple(reversed(choices.widths))
    measured = _thinned(channels, grid)
    if allow_drop and "heads" in targets and arch.prunable_heads:
        attention += ((0, choices.full.queries),)
    if allow_drop and "mlp" in targets and arch.prunable_channels:
        measured, channels = (*measured, 0), (*channels, 0)
    return Candidates(attention=attention, measured=measured, channels=channels)


def interpolate(measured: Mapping[int, float], channels: Iterable[int]) -> dict[int, float]:
    """Damage of every channel count, from the damage of some.

    Monotone and piecewise linear in the number of channels: a count is given at least the damage of every
    larger one that was measured (noise apart, keeping less cannot help). Linear and not in the logarithm, as the
    damage of keeping everything is 0.

    Args:
        measured: Channels kept -> damage.
        channels: Counts between the smallest and the largest of them.

    Raises:
        ValueError: A count lies outside.
    """
    down = sorted(measured, reverse=True)
    damages = list(accumulate((measured[count] for count in down), max))
    wanted = list(channels)
    if any(not down[-1] <= count <= down[0] for count in wanted):
        raise ValueError("channel counts outside the measured range")
    found = np.interp(wanted, down[::-1], damages[::-1])
    return dict(zip(wanted, found.tolist(), strict=True))


def _by_weight(choices: Choices) -> tuple[tuple[int, int], ...]:
    """Pairs from most weights down; of pairs that weigh the same the one with more query heads."""
    heads: dict[int, tuple[int, int]] = {}
    for pair in choices.pairs:
        weight = choices.units.attention(*pair)
        if weight not in heads or pair[0] * pair[1] > heads[weight][0] * heads[weight][1]:
            heads[weight] = pair
    return tuple(heads[weight] for weight in sorted(heads, reverse=True))


def _thinned(values: tuple[T, ...], count: int) -> tuple[T, ...]:
    """At most ``count`` of them, evenly spaced by position, the first and the last included."""
    if len(values) <= count:
        return values
    last = len(values) - 1
    return tuple(values[round(i * last / (count - 1))] for i in range(count))
