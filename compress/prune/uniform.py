"""The uniform shape: the same sizes in every layer, so that the result loads in stock loaders."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from compress.errors import CompressError
from compress.importance.base import GroupScores
from compress.model.architecture import Architecture
from compress.prune.damage import DamageTable
from compress.prune.shape import (
    NEAR,
    TARGETS,
    Choices,
    HeadUnit,
    Shape,
    ShapePlan,
    check_ratio,
    check_reachable,
    choices_of,
    met_or_missed,
    plan_of,
    unit_notes,
)
from compress.structure import LayerShape

Accepts = Callable[[LayerShape], bool]


def choose_shape(
    arch: Architecture,
    ratio: float,
    *,
    targets: Sequence[str] = TARGETS,
    multiple: int = 64,
    head_unit: HeadUnit = "auto",
    scores: GroupScores | None = None,
    accepts: Accepts | None = None,
) -> ShapePlan:
    """The uniform shape whose removed fraction of the decoder linear parameters is nearest to ``ratio``.

    Every pair of KV groups and query heads per group is tried with the channel count that fits it best.
    Among the near-ties (distance within 1 % of all decoder linear parameters of the best) the smallest
    estimated damage wins; without scores the shape whose attention and MLP lose the most equal shares.

    Args:
        arch: The model.
        ratio: Fraction to remove, in (0, 1).
        targets: Any of "heads", "mlp".
        multiple: Kept channels are a multiple of this (or all channels).
        head_unit: What of the attention goes; see :func:`~compress.prune.shape.choices_of`.
        scores: Group scores for the estimate of damage.
        accepts: Says whether a model of this shape has a valid config; asked once for a pair of KV groups and
            query heads (what config classes refuse is head counts), and only near the request.

    Raises:
        UsageError: Ratio outside (0, 1), unknown targets or head unit, a multiple below 1.
        CompressError: The targets cannot be pruned in this model, or not to this ratio; names the range.
    """
    check_ratio(ratio)
    choices = choices_of(arch, targets=targets, multiple=multiple, head_unit=head_unit)
    notes = unit_notes(arch, choices, targets, head_unit)
    check_reachable(arch, ratio, choices.reach(), targets, notes=notes)
    damage = DamageTable(scores) if scores is not None else None
    wide = near_ties(choices, ratio, damage=damage, accepts=accepts, slack=max(NEAR, choices.half_step))
    if not wide:
        raise CompressError(
            "No smaller shape is valid for this model's configuration class.",
            "Prune only the MLP, or another model.",
        )
    limit = min(abs(shape.achieved - ratio) for shape in wide) + NEAR
    near = tuple(shape for shape in wide if abs(shape.achieved - ratio) <= limit)
    plan = uniform_plan(arch, choices, near[0].layer, ratio, targets=targets, head_unit=head_unit)
    return replace(plan, candidates=near, further=tuple(shape for shape in wide if shape not in near))


def uniform_plan(
    arch: Architecture,
    choices: Choices,
    shape: LayerShape,
    ratio: float,
    *,
    targets: Sequence[str],
    head_unit: HeadUnit,
) -> ShapePlan:
    """The plan in which every layer has ``shape``, with the reason why it misses ``ratio``."""
    reason = f"{met_or_missed(choices.removed(shape), ratio)}: {kept_sentence(choices, shape)}"
    if not reason.startswith("Exactly"):
        reason += f"; {unit_notes(arch, choices, targets, head_unit)}"
    return plan_of(arch, [shape] * arch.layers, ratio, f"{reason}.")


def near_ties(
    choices: Choices,
    ratio: float,
    *,
    damage: DamageTable | None,
    accepts: Accepts | None = None,
    whole: bool = False,
    slack: float = NEAR,
) -> list[Shape]:
    """The acceptable shapes near the nearest one, least damage first.

    For each pair of KV groups and query heads only its nearest channel count is among them: else the
    estimate of damage would simply prefer the shapes that remove less.

    Args:
        choices: What the layer may take.
        ratio: Fraction of the layer to remove.
        damage: Estimates; None: most equal shares of attention and MLP first.
        accepts: Says whether a shape is allowed.
        whole: Whether the layer may stay as it is.
        slack: How much farther from the request than the nearest shape is near.
    """
    fits = [s for pair in choices.pairs if (s := choices.nearest(pair, ratio, whole=whole)) is not None]

    def order(shape: Shape) -> tuple[float, int, int]:
        return abs(shape.achieved - ratio), -shape.kv_heads, -shape.queries

    near: list[Shape] = []
    limit = float("inf")
    for shape in sorted(fits, key=order):
        distance = abs(shape.achieved - ratio)
        if distance > limit:
            break
        if accepts is None or accepts(shape.layer):
            near.append(shape)
            limit = min(limit, distance + slack)
    if damage is None:
        return sorted(near, key=lambda s: (_imbalance(choices, s), *order(s)))
    judged = [(damage(s.layer), s) for s in near]
    judged.sort(key=lambda pair: (pair[0], *order(pair[1])))
    return [replace(shape, damage=value, parts=damage.parts(shape.layer)) for value, shape in judged]


def kept_sentence(choices: Choices, shape: LayerShape) -> str:
    """What stays, in words."""
    full = choices.full
    each = (
        "" if shape.queries == full.queries else f" with {shape.queries} of {full.queries} query heads each"
    )
    return (
        f"{shape.kv_heads} of {full.kv_heads} KV groups{each} "
        f"and {shape.channels} of {full.channels} channels stay"
    )


def _imbalance(choices: Choices, shape: Shape) -> float:
    full, units = choices.full, choices.units
    whole = units.attention(full.kv_heads, full.queries)
    attention = units.attention(shape.kv_heads, shape.queries) / whole if whole else 1.0
    return abs(attention - shape.channels / full.channels)
