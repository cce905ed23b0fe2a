"""The kinds of shapes by name: which layers lose how much."""

from __future__ import annotations

from collections.abc import Sequence

from compress.errors import UsageError
from compress.importance.base import GroupScores
from compress.model.architecture import Architecture
from compress.prune.local import RatioOf, local_shapes
from compress.prune.ranked import global_shapes
from compress.prune.shape import TARGETS, HeadUnit, ShapePlan
from compress.prune.uniform import Accepts, choose_shape

SHAPE_KINDS = ("uniform", "local", "global", "allocated")


def check_kind(kind: str) -> None:
    """Refuse a kind of shapes nobody knows with a UsageError."""
    if kind not in SHAPE_KINDS:
        raise UsageError(f"There is no shape {kind!r}.", f"Choose one of: {', '.join(SHAPE_KINDS)}.")


def plan_shapes(
    kind: str,
    arch: Architecture,
    ratio: float,
    *,
    targets: Sequence[str] = TARGETS,
    multiple: int = 64,
    head_unit: HeadUnit = "auto",
    scores: GroupScores | None = None,
    accepts: Accepts | None = None,
    skip_first: int | None = None,
    skip_last: int = 1,
    ratio_of: RatioOf = "model",
) -> ShapePlan:
    """The shapes of every layer by one of the kinds that need scores alone.

    Args:
        kind: "uniform", "local" or "global".
        arch: The model.
        ratio: Fraction of the decoder linear parameters to remove, in (0, 1).
        targets: Any of "heads", "mlp".
        multiple: Kept channels are a multiple of this (or all channels).
        head_unit: What of the attention goes; see :func:`~compress.prune.shape.choices_of`.
        scores: Group scores; "global" cannot do without.
        accepts: For "uniform" and "local": whether a model of this shape has a valid config.
        skip_first: For "local": first layers left whole; None: ``floor(0.1 * layers)``.
        skip_last: For "local": last layers left whole.
        ratio_of: For "local": what loses the ratio, the "model", each pruned one of the "layers", or its "parts".

    Raises:
        UsageError: An unknown kind, one that needs measured damages, or "global" without scores; and as the
            functions of the kinds.
        CompressError: The ratio cannot be reached; names the range.
    """
    check_kind(kind)
    if kind == "uniform":
        return choose_shape(
            arch,
            ratio,
            targets=targets,
            multiple=multiple,
            head_unit=head_unit,
            scores=scores,
            accepts=accepts,
        )
    if kind == "local":
        return local_shapes(
            arch,
            ratio,
            skip_first=skip_first,
            skip_last=skip_last,
            ratio_of=ratio_of,
            targets=targets,
            multiple=multiple,
            head_unit=head_unit,
            scores=scores,
            accepts=accepts,
        )
    if kind == "allocated":
        raise UsageError(
            "Allocated shapes need the measured damage of every layer.", "Choose uniform, local or global."
        )
    if scores is None:
        raise UsageError("Global shapes need scores.", "Score the model first, or choose uniform or local.")
    return global_shapes(arch, ratio, scores, targets=targets, multiple=multiple, head_unit=head_unit)
