"""Which groups stay: the best of every layer, in the numbers a shape gives."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from compress.importance.base import GroupScores, LayerScores
from compress.model.architecture import Architecture
from compress.structure import LayerShape, LayerStructure, full_layer, kept_heads


def select(
    arch: Architecture,
    scores: GroupScores,
    shapes: Sequence[LayerShape],
    *,
    alive: Sequence[LayerStructure] | None = None,
) -> tuple[LayerStructure, ...]:
    """Keep the best units of every layer (local ranking, LoRAPrune §3.3); ties to the lower index.

    KV groups are ranked by their own scores, then the query heads inside each kept group by theirs.

    Args:
        arch: The model.
        scores: Its group scores.
        shapes: How much each layer keeps; nothing of a branch where the shape says 0.
        alive: Only units in here may be kept, and where it has fewer than a shape asks for, all of them are;
            None: every unit.
    """
    current = alive if alive is not None else [full_layer(arch)] * arch.layers
    return tuple(
        _layer(arch, layer, shape, allowed)
        for layer, shape, allowed in zip(scores.layers, shapes, current, strict=True)
    )


def _layer(
    arch: Architecture, scores: LayerScores, shape: LayerShape, alive: LayerStructure
) -> LayerStructure:
    groups = _best(scores.kv_groups, alive.kv_groups, shape.kv_heads)
    heads = kept_heads(arch, alive).int()
    owners = heads // arch.queries_per_group
    kept = [_best(scores.query_heads, heads[owners == group], shape.queries) for group in groups.tolist()]
    whole = all(len(part) == arch.queries_per_group for part in kept)
    return LayerStructure(
        kv_groups=groups,
        channels=_best(scores.channels, alive.channels, shape.channels),
        query_heads=None if whole else torch.cat(kept),
    )


def _best(scores: torch.Tensor, allowed: torch.Tensor, count: int) -> torch.Tensor:
    if count >= len(allowed):
        return allowed
    order = torch.sort(scores[allowed.long()], descending=True, stable=True).indices
    return allowed[order[:count]].sort().values
