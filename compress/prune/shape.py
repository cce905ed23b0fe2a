"""Shapes: what the units of a layer weigh, which shapes a layer may take, and the plan for all layers."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

from compress.errors import CompressError, UsageError
from compress.model.architecture import Architecture
from compress.model.uneven_config import refuse_uneven
from compress.structure import LayerShape, full_shape

TARGETS = ("heads", "mlp")
HeadUnit = Literal["group", "query", "auto"]
HEAD_UNITS: tuple[HeadUnit, ...] = ("group", "query", "auto")
NEAR = 0.01
"""Shapes whose distance to the request is at most this much larger than the smallest are near-ties."""


@dataclass(frozen=True, slots=True, kw_only=True)
class UnitSizes:
    """Decoder linear weights (no biases) that the units of one layer hold.

    Attributes:
        group: The k and v rows of one KV group.
        query: The q rows and o columns of one query head.
        channel: The gate and up rows and the down column of one MLP channel.
    """

    group: int
    query: int
    channel: int

    def attention(self, kv_heads: int, queries: int) -> int:
        """Weights of ``kv_heads`` KV groups with ``queries`` query heads each."""
        return kv_heads * (self.group + queries * self.query)

    def of(self, shape: LayerShape) -> int:
        """Weights of a layer of this shape."""
        return self.attention(shape.kv_heads, shape.queries) + shape.channels * self.channel


def unit_parameters(arch: Architecture) -> UnitSizes:
    """What one KV group's k and v, one query head and one channel weigh in a layer of ``arch``."""
    group = query = channel = 0
    for spec in arch.linears:
        rows, columns = arch.linear_shape(spec)
        if spec.role in ("q", "o"):
            query += rows * columns // arch.heads
        elif spec.role in ("k", "v"):
            group += rows * columns // arch.kv_heads
        elif spec.role == "qkv":
            query += arch.head_dim * columns
            group += 2 * arch.head_dim * columns
        else:
            channel += rows * columns // arch.channels
    return UnitSizes(group=group, query=query, channel=channel)


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """One candidate for a layer, or for all layers alike.

    Attributes:
        kv_heads: KV groups kept.
        queries: Query heads kept in each of them.
        channels: MLP channels kept.
        achieved: Fraction of the layer's linear parameters it removes.
        damage: Estimated damage (see :func:`compress.prune.damage.estimated_damage`), None without scores.
        parts: What of it the attention and the MLP bear, None without scores.
    """

    kv_heads: int
    queries: int
    channels: int
    achieved: float
    damage: float | None = None
    parts: tuple[float, float] | None = None

    @property
    def layer(self) -> LayerShape:
        """The sizes alone."""
        return LayerShape(kv_heads=self.kv_heads, queries=self.queries, channels=self.channels)


@dataclass(frozen=True, slots=True, kw_only=True)
class ShapePlan:
    """The shapes chosen for a requested ratio.

    Attributes:
        shapes: One per layer.
        requested: Requested fraction of the decoder linear parameters to remove.
        achieved: The fraction these shapes remove.
        reason: One sentence: why the two differ, or that they do not.
        candidates: The near-ties a uniform shape was chosen from, best first; else empty.
        further: Shapes that are no near-ties only because channels come in multiples, best first: worth a trial.
        certificate: Of an allocation: damage, lower bound, gap, solver, seconds; else None.
    """

    shapes: tuple[LayerShape, ...]
    requested: float
    achieved: float
    reason: str
    candidates: tuple[Shape, ...] = ()
    further: tuple[Shape, ...] = ()
    certificate: Mapping[str, Any] | None = None

    @property
    def uniform(self) -> LayerShape | None:
        """What every layer keeps, or None when the layers differ or one loses a whole branch."""
        first = self.shapes[0]
        alike = all(shape == first for shape in self.shapes)
        return first if alike and first.kv_heads and first.channels else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Choices:
    """The shapes one layer may take.

    Attributes:
        full: The layer as it is.
        units: What its units weigh.
        pairs: (KV groups, query heads in each), most first.
        widths: Channel counts, ascending; the last is all of them.
    """

    full: LayerShape
    units: UnitSizes
    pairs: tuple[tuple[int, int], ...]
    widths: tuple[int, ...]

    @property
    def size(self) -> int:
        """Linear weights of the whole layer."""
        return self.units.of(self.full)

    @property
    def half_step(self) -> float:
        """Half of the fraction that lies between two channel counts: the nearest one may miss a ratio by so much."""
        steps = [b - a for a, b in pairwise(self.widths)]
        return max(steps, default=0) * self.units.channel / self.size / 2

    def removed(self, shape: LayerShape) -> float:
        """Fraction of the layer's linear weights that ``shape`` removes."""
        return 1 - self.units.of(shape) / self.size

    def nearest(self, pair: tuple[int, int], ratio: float, *, whole: bool = False) -> Shape | None:
        """The shape with these heads that removes the fraction nearest to ``ratio``.

        Args:
            pair: One of :attr:`pairs`.
            ratio: Fraction of the layer to remove.
            whole: Whether the layer may stay as it is; else this gives None where nothing smaller exists.
        """
        full_pair = pair == (self.full.kv_heads, self.full.queries)
        widths = self.widths if whole or not full_pair else self.widths[:-1]
        if not widths:
            return None
        wanted = ((1 - ratio) * self.size - self.units.attention(*pair)) / self.units.channel
        above = bisect_left(widths, wanted)
        around = widths[max(0, above - 1) : above + 1]
        shapes = [LayerShape(kv_heads=pair[0], queries=pair[1], channels=width) for width in around]
        best = min(shapes, key=lambda shape: abs(self.removed(shape) - ratio))
        return Shape(kv_heads=pair[0], queries=pair[1], channels=best.channels, achieved=self.removed(best))

    def reach(self) -> tuple[float, float] | None:
        """Least and most of the layer that can be removed, as fractions; None when nothing can."""
        least = [s for pair in self.pairs if (s := self.nearest(pair, 0.0)) is not None]
        most = [s for pair in self.pairs if (s := self.nearest(pair, 1.0)) is not None]
        if not least:
            return None
        return min(s.achieved for s in least), max(s.achieved for s in most)


def choices_of(arch: Architecture, *, targets: Sequence[str], multiple: int, head_unit: HeadUnit) -> Choices:
    """The shapes a layer of ``arch`` may take.

    Args:
        arch: The model.
        targets: Any of "heads", "mlp".
        multiple: Kept channels are a multiple of this (or all channels).
        head_unit: "group": whole KV groups go, with all their query heads; "query": the same number of query
            heads goes from every KV group, and all groups stay; "auto": both.

    Raises:
        UsageError: Unknown targets or head unit, a multiple below 1.
        CompressError: The layers differ in size already.
    """
    if not targets or any(target not in TARGETS for target in targets):
        given = ", ".join(targets) or "none"
        raise UsageError(f"The pruning targets {given!r} are not known.", "Choose heads, mlp, or both.")
    if multiple < 1:
        raise UsageError(f"Channels cannot come in multiples of {multiple}.", "Give at least 1.")
    if head_unit not in HEAD_UNITS:
        raise UsageError(f"There is no head unit {head_unit!r}.", f"Choose one of: {', '.join(HEAD_UNITS)}.")
    refuse_uneven(arch)
    full = full_shape(arch)
    pairs = [(full.kv_heads, full.queries)]
    if "heads" in targets and arch.prunable_heads:
        groups = range(full.kv_heads, 0, -1) if head_unit != "query" else (full.kv_heads,)
        queries = range(full.queries, 0, -1) if head_unit != "group" else (full.queries,)
        pairs = [(group, query) for group in groups for query in queries]
    free = "mlp" in targets and arch.prunable_channels
    widths = (*(range(multiple, arch.channels, multiple) if free else ()), arch.channels)
    return Choices(full=full, units=unit_parameters(arch), pairs=tuple(pairs), widths=widths)


def check_ratio(ratio: float) -> None:
    """Refuse a ratio outside (0, 1) with a UsageError."""
    if not 0 < ratio < 1:
        raise UsageError(f"The ratio {ratio} is not between 0 and 1.", "Give a fraction such as 0.5.")


def check_reachable(
    arch: Architecture,
    ratio: float,
    reach: tuple[float, float] | None,
    targets: Sequence[str],
    *,
    notes: str = "",
    of: str = "the decoder linear parameters",
) -> None:
    """Refuse a ratio that no shape comes near.

    Args:
        arch: The model, for the reasons why a target cannot be pruned.
        ratio: Requested fraction.
        reach: Least and most that can be removed; None: nothing.
        targets: What was asked for.
        notes: Why there is nothing, of :func:`unit_notes`, where no reason of the model is known.
        of: What the fractions are of.

    Raises:
        CompressError: Names the range.
    """
    what = " and ".join(targets)
    reasons = {"heads": arch.heads_reason, "mlp": arch.channels_reason}
    why = "".join(f" ({reasons[target]})" for target in targets if reasons[target])
    if reach is None:
        raise CompressError(
            f"Nothing of {what} can be pruned in this model{why or (notes and f' ({notes})')}.",
            "Choose other targets, another head unit or a smaller channel multiple.",
        )
    low, high = reach
    if ratio > high + NEAR or ratio < low / 2:
        raise CompressError(
            f"Pruning {what} can remove {low:.1%} to {high:.1%} of {of}{why}, not {ratio:.1%}.",
            "Ask for a ratio in this range, or choose other targets or a smaller channel multiple.",
        )


def plan_of(
    arch: Architecture,
    shapes: Sequence[LayerShape],
    ratio: float,
    reason: str,
    candidates: Sequence[Shape] = (),
) -> ShapePlan:
    """A plan of these shapes, with the fraction they remove counted exactly."""
    units, whole = unit_parameters(arch), unit_parameters(arch).of(full_shape(arch)) * arch.layers
    kept = sum(units.of(shape) for shape in shapes)
    return ShapePlan(
        shapes=tuple(shapes),
        requested=ratio,
        achieved=(whole - kept) / whole,
        reason=reason,
        candidates=tuple(candidates),
    )


def met_or_missed(achieved: float, ratio: float) -> str:
    """The lead of a reason: "Exactly 50.0% as requested" or "50.5% instead of 50.0%"."""
    if abs(achieved - ratio) < 5e-5:
        return f"Exactly {achieved:.1%} as requested"
    digits = 1 if f"{achieved:.1%}" != f"{ratio:.1%}" else 2
    return f"{achieved:.{digits}%} instead of {ratio:.{digits}%}"


def unit_notes(arch: Architecture, choices: Choices, targets: Sequence[str], head_unit: HeadUnit) -> str:
    """Why not every ratio exists: the units that go and their share of a layer, for a reason."""
    units, full, size = choices.units, choices.full, choices.size
    notes = []
    group = (
        "one KV group, which has to stay"
        if full.kv_heads == 1
        else f"{full.kv_heads} whole KV groups of {units.attention(1, full.queries) / size:.1%} each"
    )
    query = f"one query head of every KV group is {full.kv_heads * units.query / size:.1%}"
    if "heads" not in targets:
        notes.append("heads were not asked for")
    elif not arch.prunable_heads:
        notes.append(f"heads cannot be pruned ({arch.heads_reason})")
    elif head_unit == "query" and full.queries == 1:
        notes.append("every KV group has one query head only")
    else:
        notes += [f"a layer has {group}"] if head_unit != "query" else []
        notes += [query] if head_unit != "group" and full.queries > 1 else []
    if "mlp" not in targets:
        notes.append("channels were not asked for")
    elif not arch.prunable_channels:
        notes.append(f"channels cannot be pruned ({arch.channels_reason})")
    elif len(choices.widths) == 1:
        notes.append(f"{full.channels} channels are not more than one multiple")
    else:
        step = choices.widths[0]
        notes.append(f"channels come in multiples of {step}, {units.channel * step / size:.1%} each")
    return "; ".join(notes)
