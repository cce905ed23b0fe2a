"""Attention and MLP of a layer, ranked by optimal brain surgeon: pieces of work for an engine."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from compress.importance.base import GroupScores, LayerRise, LayerScores
from compress.importance.surgeon import (
    RemovalOrder,
    block_order,
    column_order,
    damage_along,
    damped_inverse,
    remove,
)
from compress.kept import Kept
from compress.model.architecture import Architecture

# Shapes: K rows of a root, C columns.


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Branch:
    """Attention or MLP of a layer, to be ranked: what goes in, and what is known of the layer without it."""

    index: int
    role: Literal["o", "down"]
    weight_KC: Tensor
    gram_CC: Tensor
    arch: Architecture
    damping: float
    parts: int
    scores: LayerScores
    rise: LayerRise
    greedy: bool


def ranked_branch(branch: Branch) -> tuple[LayerScores, LayerRise]:
    """Scores and rises of the branch's own groups; those of the other branch as they were given."""
    inverse_CC = damped_inverse(branch.gram_CC, branch.damping)
    given = branch.weight_KC, inverse_CC
    if branch.role == "o":
        return _heads(*given, branch.arch, branch.scores, branch.rise, greedy=branch.greedy)
    return _channels(*given, branch.parts, branch.scores, branch.rise, greedy=branch.greedy)


def _joined(
    found: Mapping[str, tuple[LayerScores, LayerRise]], scores: LayerScores, rise: LayerRise
) -> GroupScores:
    """Heads of the one branch, channels of the other; of one that was not ranked, what was known before."""
    heads, heads_rise = found.get("o", (scores, rise))
    channels, channels_rise = found.get("down", (scores, rise))
    both = LayerScores(kv_groups=heads.kv_groups, channels=channels.channels, query_heads=heads.query_heads)
    return GroupScores(
        layers=(both,),
        rises=(LayerRise(attention=heads_rise.attention, channels=channels_rise.channels),),
    )


def head_order(weight_KC: Tensor, inverse_CC: Tensor, arch: Architecture) -> tuple[Tensor, Tensor, Tensor]:
    """Scores of the KV groups and query heads of one layer, and what every number of them kept costs.

    Groups are ranked by a greedy order of whole groups. Heads inside groups are ranked by one in which every
    group loses a head before any loses the next.

    Args:
        weight_KC: Root of the output curvature times the weight of o, float64.
        inverse_CC: Damped inverse of the second moment of its inputs.
        arch: The architecture.

    Returns:
        Scores [kv_heads], scores [heads], and the rise table of :class:`LayerRise`.
    """
    queries, width = arch.queries_per_group, arch.head_dim
    columns = torch.arange(arch.heads * width, device=weight_KC.device)
    groups = block_order(weight_KC, inverse_CC, list(columns.split(queries * width)))
    rise = torch.full((arch.kv_heads + 1, queries + 1), float(groups.damage[-1]), dtype=torch.float64)
    heads = torch.zeros(arch.heads, dtype=torch.float64)
    for gone in range(arch.kv_heads):
        kept = arch.kv_heads - gone
        rise[kept, queries] = groups.damage[gone]
        if queries > 1:
            sets = [list(range(group * queries, (group + 1) * queries)) for group in range(kept)]
            order = block_order(
                weight_KC, inverse_CC, list(columns[: kept * queries * width].split(width)), sets
            )
            rise[kept, 1:queries] = groups.damage[gone] + order.damage[kept : kept * queries : kept].flip(0)
            if gone == 0:
                heads[order.units] = _steps(order)
        if kept > 1:
            place = sorted(groups.units[gone:].tolist()).index(int(groups.units[gone]))
            first = place * queries * width
            _, weight_KC, inverse_CC = remove(weight_KC, inverse_CC, columns[first : first + queries * width])
    scores = unit_scores(groups)
    return scores, scores if queries == 1 else heads, rise


def unit_scores(order: RemovalOrder) -> Tensor:
    """Score of every unit, float64 [U]: the cost of its step, never below an earlier one's, so that ranks nest."""
    scores = torch.zeros(len(order.units), dtype=torch.float64)
    scores[order.units] = _steps(order)
    return scores


def _steps(order: RemovalOrder) -> Tensor:
    steps = order.damage.diff().cummax(dim=0).values
    return steps * (1 + 1e-9 * torch.arange(1, len(steps) + 1, dtype=torch.float64))


def _heads(
    weight_KC: Tensor,
    inverse_CC: Tensor,
    arch: Architecture,
    scores: LayerScores,
    rise: LayerRise,
    *,
    greedy: bool,
) -> tuple[LayerScores, LayerRise]:
    if greedy:
        kv_groups, query_heads, attention = head_order(weight_KC, inverse_CC, arch)
        scores = LayerScores(kv_groups=kv_groups, channels=scores.channels, query_heads=query_heads)
    else:
        attention = _ranked_heads(weight_KC, inverse_CC, arch, scores)
    return scores, LayerRise(attention=attention, channels=rise.channels)


def _ranked_heads(weight_KC: Tensor, inverse_CC: Tensor, arch: Architecture, scores: LayerScores) -> Tensor:
    """The rise table [K + 1, Q + 1] where groups, and heads inside them, go by ``scores``."""
    queries, width = arch.queries_per_group, arch.head_dim
    table = torch.zeros(arch.kv_heads + 1, queries + 1, dtype=torch.float64)
    groups = scores.kv_groups.sort(descending=True, stable=True).indices
    heads = scores.query_heads.view(arch.kv_heads, queries).sort(dim=1, descending=True, stable=True).indices
    every = torch.arange(arch.heads * width).view(arch.kv_heads, queries, width)
    for kept in range(arch.kv_heads + 1):
        for each in range(queries + 1):
            gone = torch.ones(arch.kv_heads, queries, dtype=torch.bool)
            for group in groups[:kept].tolist():
                gone[group, heads[group, :each]] = False
            columns = every[gone].flatten().to(weight_KC.device)
            table[kept, each] = damage_along(weight_KC, inverse_CC, columns)[-1]
    return table


def _channels(
    weight_KC: Tensor,
    inverse_CC: Tensor,
    parts: int,
    scores: LayerScores,
    rise: LayerRise,
    *,
    greedy: bool,
) -> tuple[LayerScores, LayerRise]:
    if greedy:
        order = column_order(weight_KC, inverse_CC, block=max(1, weight_KC.shape[1] // parts))
        damage = order.damage
        scores = LayerScores(
            kv_groups=scores.kv_groups, channels=unit_scores(order), query_heads=scores.query_heads
        )
    else:
        worst_first = scores.channels.sort(descending=True, stable=True).indices.flip(0)
        damage = damage_along(weight_KC, inverse_CC, worst_first.to(weight_KC.device))
    return scores, LayerRise(attention=rise.attention, channels=damage.flip(0))


def untouched(arch: Architecture) -> tuple[LayerScores, LayerRise]:
    """Zeros, for branches that cannot be pruned."""
    return (
        LayerScores(
            kv_groups=torch.zeros(arch.kv_heads, dtype=torch.float64),
            channels=torch.zeros(arch.channels, dtype=torch.float64),
            query_heads=torch.zeros(arch.heads, dtype=torch.float64),
        ),
        LayerRise(
            attention=torch.zeros(arch.kv_heads + 1, arch.queries_per_group + 1, dtype=torch.float64),
            channels=torch.zeros(arch.channels + 1, dtype=torch.float64),
        ),
    )


class Results:
    """What the branches of every layer came to; a layer is kept once all of its branches are there."""

    def __init__(self, kept: Kept) -> None:
        self._kept = kept
        self._done: dict[int, GroupScores] = {}
        self._parts: dict[int, dict[str, tuple[LayerScores, LayerRise]]] = {}
        self._expected: dict[int, tuple[int, LayerScores, LayerRise]] = {}

    def known(self, index: int) -> bool:
        """Whether the layer is ranked, by this run or one that was interrupted."""
        if index in self._done:
            return True
        if not self._kept.has(_name(index)):
            return False
        self._done[index] = GroupScores.from_tensors(self._kept.get(_name(index)))
        return True

    def expect(self, index: int, branches: int, scores: LayerScores, rise: LayerRise) -> None:
        """A layer with so many branches to rank; ``scores`` and ``rise`` are those of the others."""
        self._expected[index] = branches, scores, rise
        self._parts[index] = {}
        self._complete(index)

    def keep(self, branch: Branch, result: tuple[LayerScores, LayerRise]) -> None:
        """A branch that was ranked."""
        self._parts[branch.index][branch.role] = result
        self._complete(branch.index)

    def in_order(self) -> list[GroupScores]:
        """Every layer's."""
        return [self._done[index] for index in sorted(self._done)]

    def _complete(self, index: int) -> None:
        branches, scores, rise = self._expected[index]
        if len(self._parts[index]) == branches:
            tensors = _joined(self._parts.pop(index), scores, rise).to_tensors()
            self._kept.put(_name(index), tensors)
            self._done[index] = GroupScores.from_tensors(tensors)


def _name(index: int) -> str:
    return f"layer-{index:04d}"
