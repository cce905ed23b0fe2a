"""The global plan: the units of all layers ranked together, so that layers end up with different sizes.

Shapes: K KV groups, Q query heads of a group, C channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from compress.importance.base import GroupScores, LayerScores
from compress.model.architecture import Architecture
from compress.prune.damage import attention_loss
from compress.prune.shape import (
    TARGETS,
    Choices,
    HeadUnit,
    ShapePlan,
    check_ratio,
    check_reachable,
    choices_of,
    met_or_missed,
    plan_of,
    unit_notes,
)
from compress.structure import LayerShape


def global_shapes(
    arch: Architecture,
    ratio: float,
    scores: GroupScores,
    *,
    targets: Sequence[str] = TARGETS,
    multiple: int = 64,
    head_unit: HeadUnit = "auto",
) -> ShapePlan:
    """Remove the units with the least score per parameter, wherever they are, until ``ratio`` is reached.

    A unit's score per parameter is divided by the mean of its kind (all attention units, or all channels, of
    all pruned layers), as scores normalised per linear have no unit common to both kinds. Scores with negative
    values are moved up to zero first. Channel counts are then rounded to multiples by largest remainders, so
    that the total is the nearest one that whole multiples reach; one KV group with one query head (as far
    as ``head_unit`` lets them go) and one multiple stay in every layer.

    Args:
        arch: The model.
        ratio: Fraction of the decoder linear parameters to remove, in (0, 1).
        scores: Group scores.
        targets: Any of "heads", "mlp".
        multiple: Kept channels are a multiple of this (or all channels).
        head_unit: "group": KV groups go one by one; "query": one query head of every KV group of a layer at a
            time; "auto": whichever of the two has the lower score per parameter.

    Raises:
        UsageError: As :func:`~compress.prune.uniform.choose_shape`.
        CompressError: The ratio cannot be reached; names the range.
    """
    check_ratio(ratio)
    choices = choices_of(arch, targets=targets, multiple=multiple, head_unit=head_unit)
    reach = choices.reach()
    notes = unit_notes(arch, choices, targets, head_unit)
    scaled = None if reach is None else (reach[0] / arch.layers, reach[1])
    check_reachable(arch, ratio, scaled, targets, notes=notes)
    ranking = _rank(choices, scores)
    target = round(ratio * choices.size * arch.layers)
    attention, gone = ranking.prefix(target)
    options = [attention]
    if len(choices.widths) > 1:  # the heads at the border may cost more than channels can make up for
        options += ranking.neighbours(attention)
    else:
        options[0] = ranking.filled(attention, target)
    plans: list[tuple[int, list[LayerShape]]] = []
    for steps in options:
        pairs = [path[count] for path, count in zip(ranking.pairs, steps, strict=True)]
        kept = sum(choices.units.attention(*pair) for pair in pairs)
        budget = choices.size * arch.layers - target - kept
        widths = round_channels(
            [choices.full.channels - count for count in gone], choices.widths, budget / choices.units.channel
        )
        error = abs(sum(widths) * choices.units.channel - budget)
        shapes = [
            LayerShape(kv_heads=pair[0], queries=pair[1], channels=width)
            for pair, width in zip(pairs, widths, strict=True)
        ]
        plans.append((error, shapes))
        if 2 * error <= choices.widths[0] * choices.units.channel:
            break
    best = min(plans, key=lambda plan: plan[0])[1]
    plan = plan_of(arch, best, ratio, "")
    reason = f"{met_or_missed(plan.achieved, ratio)}: {_kept_sentence(choices, best)}"
    if not reason.startswith("Exactly"):
        reason += f"; {unit_notes(arch, choices, targets, head_unit)}"
    return replace(plan, reason=f"{reason}.")


def round_channels(wanted: Sequence[float], widths: Sequence[int], total: float) -> list[int]:
    """Channel counts out of ``widths`` near ``wanted`` whose sum is as near to ``total`` as steps bring it.

    Starts at the next lower count of every layer, then moves layers step by step, those with the largest
    remainder first (ties: the lower layer), while that brings the sum nearer. The sum is the nearest of all
    when the widths are evenly spaced.
    """
    at = [max(0, sum(width <= count for width in widths) - 1) for count in wanted]
    left = total - sum(widths[i] for i in at)
    while True:
        up = left > 0
        moves = []
        for layer, i in enumerate(at):
            j = i + 1 if up else i - 1
            if 0 <= j < len(widths) and abs(left - (widths[j] - widths[i])) < abs(left):
                over = wanted[layer] - widths[i]
                moves.append((-over if up else over, layer, j))
        if not moves:
            return [widths[i] for i in at]
        _, layer, j = min(moves)
        left -= widths[j] - widths[at[layer]]
        at[layer] = j


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Ranking:
    """All units of a model in the order they go.

    Attributes:
        pairs: Per layer: (KV groups, query heads in each) after each number of attention steps.
        steps: (layer, weights) of every attention step, in the order they go.
        weights_U: Weights of every unit in the order they go, int64.
        owner_U: 2 * layer for an attention step, 2 * layer + 1 for a channel, int64.
    """

    pairs: tuple[tuple[tuple[int, int], ...], ...]
    steps: tuple[tuple[int, int], ...]
    weights_U: torch.Tensor
    owner_U: torch.Tensor

    def prefix(self, target: int) -> tuple[list[int], list[int]]:
        """Attention steps and channels gone per layer in the prefix whose weight is nearest to ``target``."""
        sums = torch.cat([torch.zeros(1, dtype=torch.int64), self.weights_U.cumsum(dim=0)])
        count = int((sums - target).abs().argmin())
        gone = torch.bincount(self.owner_U[:count], minlength=2 * len(self.pairs)).view(-1, 2)
        return gone[:, 0].tolist(), gone[:, 1].tolist()

    def neighbours(self, taken: Sequence[int]) -> list[list[int]]:
        """One attention step fewer, and one more."""
        count = sum(taken)
        found = []
        for position, change in ((count - 1, -1), (count, 1)):
            if 0 <= position < len(self.steps):
                layer = self.steps[position][0]
                found.append([n + change if i == layer else n for i, n in enumerate(taken)])
        return found

    def filled(self, taken: Sequence[int], target: int) -> list[int]:
        """More attention steps, in order, as long as each brings the weight nearer to ``target``."""
        result, count = list(taken), sum(taken)
        left = target - sum(weight for _, weight in self.steps[:count])
        closed: set[int] = set()
        for layer, weight in self.steps[count:]:
            if layer not in closed and abs(left - weight) < abs(left):
                result[layer] += 1
                left -= weight
            else:
                closed.add(layer)  # a later step of this layer builds on the one left out
        return result


def _rank(choices: Choices, scores: GroupScores) -> _Ranking:
    units, full = choices.units, choices.full
    heads_free, smallest = len(choices.pairs) > 1, choices.widths[0]
    layers = _from_zero(scores.layers)
    losses = [attention_loss(layer) for layer in layers]
    mean_attention = sum(float(loss.max()) for loss in losses) / max(
        1, units.attention(full.kv_heads, full.queries) * len(losses)
    )
    mean_channel = sum(float(layer.channels.sum()) for layer in layers) / (
        full.channels * units.channel * len(losses)
    )
    keys: list[torch.Tensor] = []
    weights: list[torch.Tensor] = []
    owners: list[torch.Tensor] = []
    pairs: list[tuple[tuple[int, int], ...]] = []

    def add(key: torch.Tensor, weight: torch.Tensor, mean: float, owner: int) -> None:
        keys.append(key / mean if mean > 0 else torch.zeros_like(key))
        weights.append(weight)
        owners.append(torch.full((len(key),), owner, dtype=torch.int64))

    for index, loss in enumerate(losses):
        path = _path(choices, loss) if heads_free else ((full.kv_heads, full.queries),)
        pairs.append(path)
        sizes = torch.tensor([units.attention(*pair) for pair in path])
        lost = torch.stack([loss[pair] for pair in path])
        step = sizes[:-1] - sizes[1:]
        # a step cannot go before the one it builds on: it is ranked no lower
        key = (lost.diff() / step).cummax(dim=0).values if len(step) else step.double()
        add(key, step, mean_attention, 2 * index)
    for index, layer in enumerate(layers):
        free = layer.channels.sort().values[: full.channels - smallest]
        weight = torch.full((len(free),), units.channel, dtype=torch.int64)
        add(free / units.channel, weight, mean_channel, 2 * index + 1)
    order = torch.cat(keys).sort(stable=True).indices
    weights_U, owner_U = torch.cat(weights)[order], torch.cat(owners)[order]
    attention = (owner_U % 2 == 0).nonzero().flatten()
    return _Ranking(
        pairs=tuple(pairs),
        steps=tuple(
            (owner // 2, weight)
            for owner, weight in zip(owner_U[attention].tolist(), weights_U[attention].tolist(), strict=True)
        ),
        weights_U=weights_U,
        owner_U=owner_U,
    )


def _from_zero(layers: Sequence[LayerScores]) -> list[LayerScores]:
    """Scores of each kind moved up by one number for all layers, where some are negative."""
    lowest_group = min(0.0, *(float(layer.kv_groups.min()) for layer in layers))
    lowest_channel = min(0.0, *(float(layer.channels.min()) for layer in layers))
    return [
        LayerScores(
            kv_groups=layer.kv_groups.double() - lowest_group,
            channels=layer.channels.double() - lowest_channel,
            query_heads=layer.query_heads,
        )
        for layer in layers
    ]


def _path(choices: Choices, loss: torch.Tensor) -> tuple[tuple[int, int], ...]:
    """The shapes the attention of a layer goes through, by the least loss per weight at each step."""
    allowed, units = set(choices.pairs), choices.units
    path = [choices.pairs[0]]
    while True:
        kv_heads, queries = path[-1]
        here = units.attention(kv_heads, queries)
        next_pairs = [p for p in ((kv_heads - 1, queries), (kv_heads, queries - 1)) if p in allowed]
        if not next_pairs:
            return tuple(path)
        path.append(
            min(next_pairs, key=lambda p: float(loss[p] - loss[path[-1]]) / (here - units.attention(*p)))
        )


def _kept_sentence(choices: Choices, shapes: Sequence[LayerShape]) -> str:
    full = choices.full
    groups, channels = [s.kv_heads for s in shapes], [s.channels for s in shapes]
    queries = [s.queries for s in shapes]
    each = "" if min(queries) == full.queries else f" with {min(queries)} to {max(queries)} query heads"
    return (
        f"layers keep {min(groups)} to {max(groups)} of {full.kv_heads} KV groups{each} "
        f"and {min(channels)} to {max(channels)} of {full.channels} channels"
    )
