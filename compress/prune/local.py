"""The local plan (the paper's): the same ratio in every pruned layer, the first and last layers left whole."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal, get_args

from compress.errors import CompressError, UsageError
from compress.importance.base import GroupScores
from compress.model.architecture import Architecture
from compress.prune.counts import published_kept
from compress.prune.damage import DamageTable
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
from compress.prune.uniform import Accepts, kept_sentence, near_ties
from compress.structure import LayerShape

RatioOf = Literal["model", "layers", "parts"]


def pruned_layers(layers: int, skip_first: int | None, skip_last: int) -> range:
    """The layers that are pruned when the first and last ones stay whole (None: the first tenth of them).

    Raises:
        UsageError: None is left, or a number is negative.
    """
    first = layers // 10 if skip_first is None else skip_first
    pruned = range(first, layers - skip_last)
    if min(first, skip_last) < 0 or not pruned:
        raise UsageError(
            f"With the first {first} and the last {skip_last} of {layers} layers left whole, "
            "no layer can be pruned.",
            "Skip fewer layers, and no negative number of them.",
        )
    return pruned


def local_shapes(
    arch: Architecture,
    ratio: float,
    *,
    skip_first: int | None = None,
    skip_last: int = 1,
    ratio_of: RatioOf = "model",
    targets: Sequence[str] = TARGETS,
    multiple: int = 64,
    head_unit: HeadUnit = "auto",
    scores: GroupScores | None = None,
    accepts: Accepts | None = None,
) -> ShapePlan:
    """The same ratio in every layer that is pruned (LoRAPrune, arXiv 2305.18403).

    Within a layer the shape is found as a uniform one is, with the near-ties judged by that layer's own
    scores. With ``ratio_of="model"`` what rounding leaves over in one layer is asked of the next.

    Args:
        arch: The model.
        ratio: Fraction to remove, in (0, 1).
        skip_first: First layers left whole; None: ``floor(0.1 * layers)``.
        skip_last: Last layers left whole.
        ratio_of: "layers" (the paper's): every pruned layer loses ``ratio``, the model as a whole less;
            "model": pruned layers lose more, so that the whole loses ``ratio``;
            "parts" (LoRAM's, arXiv 2502.13533): every pruned layer loses ``ratio`` of its KV groups and ``ratio`` of
            its channels, each rounded by itself, whatever the scores say.
        targets: Any of "heads", "mlp".
        multiple: Kept channels are a multiple of this (or all channels).
        head_unit: What of the attention goes; see :func:`~compress.prune.shape.choices_of`.
        scores: Group scores for the estimate of damage.
        accepts: Says whether a model with this shape in every layer has a valid config. Where no layer is left whole
            all may come out alike, so that none gets another shape.

    Raises:
        UsageError: As :func:`~compress.prune.uniform.choose_shape`; no layer is left to prune; an unknown
            convention; single query heads of a ratio of the parts.
        CompressError: The ratio cannot be reached; names the range.
    """
    check_ratio(ratio)
    if ratio_of not in get_args(RatioOf):
        raise UsageError(f"A ratio of {ratio_of!r} is not known.", "Choose model, layers or parts.")
    pruned = pruned_layers(arch.layers, skip_first, skip_last)
    first = pruned.start
    choices = choices_of(arch, targets=targets, multiple=multiple, head_unit=head_unit)
    if ratio_of == "parts":
        return _plan_of_parts(arch, choices, ratio, pruned, targets, multiple, head_unit, accepts)
    part = len(pruned) / arch.layers if ratio_of == "model" else 1.0
    reach = choices.reach()
    check_reachable(
        arch,
        ratio,
        None if reach is None else (reach[0] * part, reach[1] * part),
        targets,
        notes=unit_notes(arch, choices, targets, head_unit),
        of="the decoder linear parameters" if ratio_of == "model" else "a layer's linear parameters",
    )
    share, carried = ratio / part, 0.0
    shapes: list[LayerShape] = [choices.full] * arch.layers
    alike = accepts if len(pruned) == arch.layers else None
    for index in pruned:
        damage = DamageTable(scores, [index]) if scores is not None else None
        whole_too = ratio_of == "model"
        near = near_ties(choices, share + carried, damage=damage, whole=whole_too, accepts=alike)
        if not near:
            raise CompressError(
                "No smaller shape is valid for this model's configuration class in all layers.",
                "Leave a layer whole (--skip-first, --skip-last), or prune only the MLP.",
            )
        best = near[0]
        shapes[index] = best.layer
        if ratio_of == "model":
            carried += share - best.achieved
    plan = plan_of(arch, shapes, ratio, "")
    lead = met_or_missed(plan.achieved, ratio)
    whole = arch.layers - len(pruned)
    reason = f"{lead}: {len(pruned)} of {arch.layers} layers lose about {min(share, 1.0):.1%} each"
    if whole:
        reason += f"; the first {first} and the last {skip_last} stay whole"
    if not lead.startswith("Exactly"):
        reason += f"; {unit_notes(arch, choices, targets, head_unit)}"
    return replace(plan, reason=f"{reason}.")


def _plan_of_parts(
    arch: Architecture,
    choices: Choices,
    ratio: float,
    pruned: range,
    targets: Sequence[str],
    multiple: int,
    head_unit: HeadUnit,
    accepts: Accepts | None,
) -> ShapePlan:
    """The plan in which each pruned layer loses ``ratio`` of its KV groups and of its channels, as LoRAM counts."""
    if head_unit == "query" and "heads" in targets:
        raise UsageError(
            "A ratio of the parts counts whole KV groups, and the head unit is the query head.",
            "Give --head-unit group, or --ratio-of layers.",
        )
    full = choices.full
    kv_heads, channels = published_kept(arch, ratio)
    if not ("heads" in targets and arch.prunable_heads):
        kv_heads = full.kv_heads
    channels = channels // multiple * multiple if len(choices.widths) > 1 else full.channels
    shape = replace(full, kv_heads=kv_heads, channels=channels)
    if shape == full or not kv_heads or not channels:
        if choices.reach() is None:
            check_reachable(arch, ratio, None, targets, notes=unit_notes(arch, choices, targets, head_unit))
        what = f"{kv_heads} of {full.kv_heads} KV groups and {channels} of {full.channels} channels"
        raise CompressError(
            f"A ratio of {ratio:g} of each part keeps {what} of a layer.",
            "Give a larger ratio." if shape == full else "Give a smaller ratio or channel multiple.",
        )
    if accepts is not None and len(pruned) == arch.layers and not accepts(shape):
        raise CompressError(
            f"This model's configuration class does not take {kept_sentence(choices, shape)} in all layers.",
            "Leave a layer whole (--skip-first, --skip-last), or prune only the MLP.",
        )
    shapes = [shape if layer in pruned else full for layer in range(arch.layers)]
    plan = plan_of(arch, shapes, ratio, "")
    reason = (
        f"{met_or_missed(plan.achieved, ratio)}: in {len(pruned)} of {arch.layers} layers "
        f"{kept_sentence(choices, shape)}, {ratio:.1%} off each and rounded by itself"
    )
    if len(pruned) < arch.layers:
        reason += f"; the first {pruned.start} and the last {arch.layers - pruned.stop} stay whole"
    return replace(plan, reason=f"{reason}.")
