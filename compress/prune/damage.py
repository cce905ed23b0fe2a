"""Estimated damage of a shape: the measured rise of the loss, or the share of importance it gives up."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from compress.importance.base import GroupScores, LayerScores
from compress.structure import LayerShape

# Shapes: K KV groups, Q query heads of a group, C channels.


def from_zero(scores: torch.Tensor) -> torch.Tensor:
    """Scores as float64, moved up where some are negative (standardised ones), so that shares make sense."""
    wide = scores.double()
    return wide - wide.min().clamp(max=0) if wide.numel() else wide


def attention_loss(layer: LayerScores) -> torch.Tensor:
    """Importance lost by keeping the best k KV groups and the best q query heads in each, [K + 1, Q + 1].

    A query head takes with it its share of its group's importance: the output of a group is the sum of what
    its heads add, so a group without heads is lost whole, whatever its keys and values score.
    """
    groups_K = from_zero(layer.kv_groups)
    heads_KQ = from_zero(layer.query_heads).view(len(groups_K), -1)
    count = heads_KQ.shape[1]
    sums_K1 = heads_KQ.sum(dim=1, keepdim=True)
    share_KQ = torch.where(sums_K1 > 0, heads_KQ / sums_K1.clamp(min=1e-300), 1 / count)
    best_KQ = share_KQ.sort(dim=1, descending=True).values.cumsum(dim=1)
    order = groups_K.sort(descending=True, stable=True).indices
    kept = torch.zeros(len(groups_K) + 1, count + 1, dtype=torch.float64)
    kept[1:, 1:] = (groups_K[:, None] * best_KQ)[order].cumsum(dim=0)
    return (kept[-1, -1] - kept).clamp(min=0)


def channel_loss(layer: LayerScores) -> torch.Tensor:
    """Importance lost by keeping the best c channels, [C + 1]."""
    lost = from_zero(layer.channels).sort().values.cumsum(dim=0)
    return torch.cat([torch.zeros(1, dtype=torch.float64), lost]).flip(0)


class DamageTable:
    """Damage of any shape, from one sort of the scores of each layer.

    Summed over the layers. Measured rises of the loss are taken as they are. Without them attention and MLP each
    count by the *share* of their importance lost, as scores normalised per linear have no unit common to groups
    and channels.

    Args:
        scores: Scores of the model.
        layers: The layers that take the shape; None: all.
    """

    def __init__(self, scores: GroupScores, layers: Sequence[int] | None = None) -> None:
        indices = range(len(scores.layers)) if layers is None else layers
        if scores.rises is not None:
            attention = [scores.rises[i].attention for i in indices]
            channels = [scores.rises[i].channels for i in indices]
        else:
            attention = [_share(attention_loss(scores.layers[i])) for i in indices]
            channels = [_share(channel_loss(scores.layers[i])) for i in indices]
        self._attention = torch.stack(attention).sum(dim=0)
        self._channels = torch.stack(channels).sum(dim=0)

    def __call__(self, shape: LayerShape) -> float:
        """Damage of giving every one of the layers this shape."""
        return float(self._attention[shape.kv_heads, shape.queries] + self._channels[shape.channels])

    def parts(self, shape: LayerShape) -> tuple[float, float]:
        """What of it the attention and the MLP bear."""
        return float(self._attention[shape.kv_heads, shape.queries]), float(self._channels[shape.channels])


def estimated_damage(scores: GroupScores, shape: LayerShape) -> float:
    """Damage of keeping only the best units of every layer; see :class:`DamageTable`."""
    return DamageTable(scores)(shape)


def _share(lost: torch.Tensor) -> torch.Tensor:
    """Loss by share of the whole, which is the largest entry; nothing is lost where all scores are zero."""
    whole = lost.max()
    return lost / whole if whole > 0 else torch.zeros_like(lost)
