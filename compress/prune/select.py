"""How much to prune (the shape) and which groups (the selection)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch

from compress.errors import CompressError, UsageError
from compress.importance.base import GroupScores
from compress.model.architecture import Architecture
from compress.prune.counts import unit_sizes
from compress.structure import LayerStructure, full_layer

TARGETS = ("heads", "mlp")
NEAR = 0.01
"""Shapes whose distance to the request is at most this much larger than the smallest are near-ties."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """One uniform shape.

    Attributes:
        kv_heads: KV groups kept in every layer.
        channels: MLP channels kept in every layer.
        achieved: Fraction of the decoder linear parameters it removes.
        damage: Estimated damage (see :func:`estimated_damage`), None without scores.
    """

    kv_heads: int
    channels: int
    achieved: float
    damage: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ShapePlan:
    """The shape chosen for a requested ratio.

    Attributes:
        kv_heads: KV groups kept in every layer.
        channels: MLP channels kept in every layer.
        requested: Requested fraction of the decoder linear parameters to remove.
        achieved: The fraction this shape removes.
        reason: One sentence: why the two differ, or that they do not.
        candidates: The near-ties it was chosen from, best first.
    """

    kv_heads: int
    channels: int
    requested: float
    achieved: float
    reason: str
    candidates: tuple[Shape, ...]


def choose_shape(
    arch: Architecture,
    ratio: float,
    *,
    targets: Sequence[str] = TARGETS,
    multiple: int = 64,
    scores: GroupScores | None = None,
    accepts: Callable[[int, int], bool] | None = None,
) -> ShapePlan:
    """The uniform shape whose removed fraction of the decoder linear parameters is nearest to ``ratio``.

    Every number of KV groups is tried with the channel counts that fit it best. Among the near-ties
    (distance within 1 % of all decoder linear parameters of the best) the smallest estimated damage wins;
    without scores the shape whose heads and channels lose the most equal shares.

    Args:
        arch: The model.
        ratio: Fraction to remove, in (0, 1).
        targets: Any of "heads", "mlp".
        multiple: Kept channels are a multiple of this (or all channels).
        scores: Group scores for the estimate of damage.
        accepts: Says whether a model of (kv_heads, channels) has a valid config; asked only near the request.

    Raises:
        UsageError: Ratio outside (0, 1), unknown targets, a multiple below 1.
        CompressError: The targets cannot be pruned in this model, or not to this ratio; names the range.
    """
    if not 0 < ratio < 1:
        raise UsageError(f"The ratio {ratio} is not between 0 and 1.", "Give a fraction such as 0.5.")
    if not targets or any(target not in TARGETS for target in targets):
        given = ", ".join(targets) or "none"
        raise UsageError(f"The pruning targets {given!r} are not known.", "Choose heads, mlp, or both.")
    if multiple < 1:
        raise UsageError(f"Channels cannot come in multiples of {multiple}.", "Give at least 1.")
    heads_free = "heads" in targets and arch.prunable_heads
    channels_free = "mlp" in targets and arch.prunable_channels
    group_size, channel_size = unit_sizes(arch)
    total = group_size * arch.kv_heads + channel_size * arch.channels

    def shape(kv_heads: int, channels: int) -> Shape:
        removed = group_size * (arch.kv_heads - kv_heads) + channel_size * (arch.channels - channels)
        return Shape(kv_heads=kv_heads, channels=channels, achieved=removed / total)

    head_options = range(1, arch.kv_heads + 1) if heads_free else (arch.kv_heads,)
    multiples = range(multiple, arch.channels, multiple) if channels_free else ()
    shapes = [shape(kv, c) for kv in head_options for c in (*multiples, arch.channels)]
    ranked = sorted(
        (s for s in shapes if (s.kv_heads, s.channels) != (arch.kv_heads, arch.channels)),
        key=lambda s: (abs(s.achieved - ratio), -s.kv_heads),
    )
    _check_reachable(arch, ratio, ranked, targets)
    near = _near_ties(ranked, ratio, accepts)
    if scores is not None:
        damage = _DamageTable(scores)
        near = [_with_damage(s, damage(s.kv_heads, s.channels)) for s in near]
        near.sort(key=lambda s: (s.damage, abs(s.achieved - ratio), -s.kv_heads))
    else:
        near.sort(key=lambda s: (_imbalance(arch, s), abs(s.achieved - ratio), -s.kv_heads))
    best = near[0]
    return ShapePlan(
        kv_heads=best.kv_heads,
        channels=best.channels,
        requested=ratio,
        achieved=best.achieved,
        reason=_reason(arch, ratio, best, targets, multiple, group_size / total, channel_size / total),
        candidates=tuple(near),
    )


def estimated_damage(scores: GroupScores, kv_heads: int, channels: int) -> float:
    """Importance lost by keeping only the best ``kv_heads`` groups and ``channels`` channels.

    Summed over the layers; attention and MLP each count by the *share* of their importance lost, as scores
    normalised per linear have no unit common to groups and channels.
    """
    return _DamageTable(scores)(kv_heads, channels)


def select(
    arch: Architecture,
    scores: GroupScores,
    kv_heads: int,
    channels: int,
    *,
    alive: Sequence[LayerStructure] | None = None,
) -> tuple[LayerStructure, ...]:
    """Keep the best groups of every layer (local ranking, LoRAPrune §3.3); ties to the lower index.

    Args:
        arch: The model.
        scores: Its group scores.
        kv_heads: KV groups to keep in each layer.
        channels: Channels to keep in each layer.
        alive: Only groups in here may be kept; None: all of them.
    """
    current = alive if alive is not None else [full_layer(arch)] * arch.layers
    return tuple(
        LayerStructure(
            kv_groups=_best(layer.kv_groups, allowed.kv_groups, kv_heads),
            channels=_best(layer.channels, allowed.channels, channels),
        )
        for layer, allowed in zip(scores.layers, current, strict=True)
    )


def _best(scores: torch.Tensor, allowed: torch.Tensor, count: int) -> torch.Tensor:
    if count >= len(allowed):
        return allowed
    order = torch.sort(scores[allowed.long()], descending=True, stable=True).indices
    return allowed[order[:count]].sort().values


def _near_ties(
    ranked: Sequence[Shape], ratio: float, accepts: Callable[[int, int], bool] | None
) -> list[Shape]:
    """The acceptable shapes near the best one, for each number of KV groups only the nearest channel count.

    Without the last restriction the estimate of damage would simply prefer the shapes that remove less.
    """
    near: dict[int, Shape] = {}
    limit = float("inf")
    for shape in ranked:
        distance = abs(shape.achieved - ratio)
        if distance > limit:
            break
        if shape.kv_heads in near or (accepts is not None and not accepts(shape.kv_heads, shape.channels)):
            continue
        near[shape.kv_heads] = shape
        limit = min(limit, distance + NEAR)
    if not near:
        raise CompressError(
            "No smaller shape is valid for this model's configuration class.",
            "Prune only the MLP, or another model.",
        )
    return list(near.values())


def _check_reachable(
    arch: Architecture, ratio: float, shapes: Sequence[Shape], targets: Sequence[str]
) -> None:
    what = " and ".join(targets)
    reasons = {"heads": arch.heads_reason, "mlp": arch.channels_reason}
    why = "".join(f" ({reasons[target]})" for target in targets if reasons[target])
    if not shapes:
        raise CompressError(
            f"Nothing of {what} can be pruned in this model{why}.",
            "Choose other targets, or a smaller channel multiple.",
        )
    low, high = min(s.achieved for s in shapes), max(s.achieved for s in shapes)
    if ratio > high + NEAR or ratio < low / 2:
        raise CompressError(
            f"Pruning {what} can remove {low:.1%} to {high:.1%} of the decoder linear parameters{why}, "
            f"not {ratio:.1%}.",
            "Ask for a ratio in this range, or choose other targets or a smaller channel multiple.",
        )


def _imbalance(arch: Architecture, shape: Shape) -> float:
    return abs(shape.kv_heads / arch.kv_heads - shape.channels / arch.channels)


def _with_damage(shape: Shape, damage: float) -> Shape:
    return Shape(kv_heads=shape.kv_heads, channels=shape.channels, achieved=shape.achieved, damage=damage)


class _DamageTable:
    """Damage of keeping any number of groups, from one sort of the scores of each layer."""

    def __init__(self, scores: GroupScores) -> None:
        self._groups = _lost_shares([layer.kv_groups for layer in scores.layers])
        self._channels = _lost_shares([layer.channels for layer in scores.layers])

    def __call__(self, kv_heads: int, channels: int) -> float:
        return self._groups[-1 - kv_heads] + self._channels[-1 - channels]


def _lost_shares(vectors: Sequence[torch.Tensor]) -> list[float]:
    """Entry n: the share of importance in the n least important entries, summed over ``vectors``."""
    total = torch.zeros(len(vectors[0]), dtype=torch.float64)
    for vector in vectors:
        whole = vector.sum()
        if whole > 0:
            total += vector.double().sort().values / whole
    return [0.0, *accumulate(total.tolist())]


def _reason(
    arch: Architecture,
    ratio: float,
    best: Shape,
    targets: Sequence[str],
    multiple: int,
    group_share: float,
    channel_share: float,
) -> str:
    """One sentence for the result table."""
    groups = f"{best.kv_heads} of {arch.kv_heads} KV groups"
    kept = f"{groups} and {best.channels} of {arch.channels} channels stay"
    notes = []
    if "heads" not in targets:
        notes.append("heads were not asked for")
    elif not arch.prunable_heads:
        notes.append(f"heads cannot be pruned ({arch.heads_reason})")
    else:
        notes.append(f"a layer has {arch.kv_heads} whole KV groups of {group_share:.1%} each")
    if "mlp" not in targets:
        notes.append("channels were not asked for")
    elif not arch.prunable_channels:
        notes.append(f"channels cannot be pruned ({arch.channels_reason})")
    else:
        notes.append(f"channels come in multiples of {multiple}, {channel_share * multiple:.1%} each")
    if abs(best.achieved - ratio) < 5e-5:
        return f"Exactly {best.achieved:.1%} as requested: {kept}."
    return f"{best.achieved:.1%} instead of {ratio:.1%}: {kept}; {'; '.join(notes)}."
