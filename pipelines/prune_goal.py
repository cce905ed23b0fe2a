"""How much to prune, and where: from the options of ``prune`` to a function that chooses shapes from scores."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from compress.errors import CompressError, UsageError
from compress.importance.base import GroupScores
from compress.model.architecture import Architecture, LayerShape, resized_config
from compress.model.family import family_of
from compress.model.uneven_config import can_be_uneven, refuse_uneven
from compress.pipelines.allocation_of_shapes import LayerDamage, allocate_shapes
from compress.pipelines.model_input import ModelInput
from compress.pipelines.prune_size import OUTPUT_OF, added_parameters
from compress.pipelines.settings import PruneSettings
from compress.prune.goal import parse_count, ratio_for_bytes, ratio_for_parameters
from compress.prune.plan import plan_shapes
from compress.prune.shape import NEAR, Choices, ShapePlan, check_ratio, choices_of, unit_parameters
from compress.prune.slice import with_biases
from compress.prune.uniform import uniform_plan
from compress.solvers.budget import parse_budget

Measure = Callable[[GroupScores], GroupScores]
"""Adds what the ranked groups cost to scores that do not say."""

DEFAULT_RATIO = 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class Goal:
    """What one pruning of a model aims at.

    Attributes:
        model: What is pruned.
        ratio: Fraction of its decoder linear parameters to remove.
        settings: Targets, shape and the rest.
        targets: The parsed targets.
        multiple: Channel counts are multiples of this.
    """

    model: ModelInput
    ratio: float
    settings: PruneSettings
    targets: tuple[str, ...]
    multiple: int

    def check(self) -> None:
        """Say at once, before anything is scored, what cannot be had.

        Raises:
            UsageError, CompressError: The ratio cannot be reached, or the family has no uneven models.
        """
        kind, arch = self.settings.shape, self.model.architecture
        refuse_uneven(arch)
        self._repaired()
        if kind != "uniform" and (reason := can_be_uneven(self.model.checkpoint.config, arch)):
            raise CompressError(
                f"--shape {kind} makes layers of different sizes, which this model cannot have: {reason}.",
                "Give --shape uniform.",
            )
        if kind == "allocated":  # whole branches may go, so that every ratio has shapes
            check_ratio(self.ratio)
            self._check_something_stays()
        else:  # global ones need scores; a uniform shape of the same ratio exists when theirs do
            self._plan("local" if kind == "local" else "uniform", None)
        self._check_rounds()

    def choose(self, scores: GroupScores, measure: Measure) -> ShapePlan:
        """The shapes for these scores; an allocation first measures what the ranked groups cost."""
        if self.settings.shape != "allocated":
            return self._plan(self.settings.shape, scores)
        return self._allocate(scores if scores.rises is not None else measure(scores))

    def foreseen(self) -> ShapePlan:
        """The shapes before anything is scored, uniform or local: attention and MLP lose the most equal shares.

        Raises:
            UsageError, CompressError: The ratio cannot be reached, or the layers differ in size already.
        """
        self._repaired()
        return self._plan("local" if self.settings.shape == "local" else "uniform", None)

    def uniform(self, shape: LayerShape) -> ShapePlan:
        """The plan in which every layer has this shape."""
        arch = self.model.architecture
        choices = self._choices()
        return uniform_plan(
            arch, choices, shape, self.ratio, targets=self.targets, head_unit=self.settings.head_unit
        )

    def _choices(self) -> Choices:
        return choices_of(
            self.model.architecture,
            targets=self.targets,
            multiple=self.multiple,
            head_unit=self.settings.head_unit,
        )

    def _check_something_stays(self) -> None:
        """Refuse an allocation that would leave nothing of the targets in any layer."""
        arch, choices = self.model.architecture, self._choices()
        units, full, free = choices.units, choices.full, list[int]()
        fixed = choices.size
        if "heads" in self.targets and arch.prunable_heads:
            fixed -= units.attention(full.kv_heads, full.queries)
            free.append(min(units.attention(*pair) for pair in choices.pairs))
        if "mlp" in self.targets and arch.prunable_channels:
            fixed -= units.channel * full.channels
            free.append(units.channel * choices.widths[0])
        total = arch.decoder_linear_parameters()
        most = 1 - (arch.layers * fixed + min(free, default=0)) / total
        if self.ratio > most:
            raise CompressError(
                f"Removing {self.ratio:.1%} leaves nothing of {' and '.join(self.targets)} in any layer.",
                f"Ask for {most:.1%} or less, or name more --targets.",
            )

    def _check_rounds(self) -> None:
        """Refuse rounds that would each remove less than the smallest step there is."""
        rounds = self.settings.rounds
        if rounds == 1:
            return
        reach, share = self._choices().reach(), 1 - (1 - self.ratio) ** (1 / rounds)
        if reach is not None and share < reach[0] / (1 - self.ratio) + 2 * NEAR:
            raise UsageError(
                f"Each of {rounds} rounds would remove {share:.1%} of what is left, and the smallest step is "
                f"{reach[0]:.1%} of the whole.",
                "Give fewer rounds, or a smaller channel multiple.",
            )

    def _plan(self, kind: str, scores: GroupScores | None) -> ShapePlan:
        return plan_shapes(
            kind,
            self.model.architecture,
            self.ratio,
            targets=self.targets,
            multiple=self.multiple,
            head_unit=self.settings.head_unit,
            scores=scores,
            accepts=self._accepts,
            skip_first=self.settings.skip_first,
            skip_last=self.settings.skip_last,
            ratio_of=self.settings.ratio_of,
        )

    def _accepts(self, shape: LayerShape) -> bool:
        """Whether a stock configuration describes a model with this shape in every layer."""
        config, arch = self._repaired()
        try:
            resized_config(
                config,
                arch,
                heads=shape.kv_heads * shape.queries,
                kv_heads=shape.kv_heads,
                channels=shape.channels,
                prove=family_of(arch.family) is None,
            )
        except CompressError:
            return False
        return True

    def _repaired(self) -> tuple[Mapping[str, Any], Architecture]:
        """Config and architecture with the biases that the repair adds, which not every config class takes."""
        model = self.model
        if self.settings.repair != "bias":
            return model.checkpoint.config, model.architecture
        roles = [OUTPUT_OF[target] for target in self.targets]
        return with_biases(model.checkpoint, model.architecture, roles)

    def _allocate(self, scores: GroupScores) -> ShapePlan:
        arch, units = self.model.architecture, unit_parameters(self.model.architecture)
        choices = self._choices()
        pairs, widths = choices.pairs, choices.widths
        if "heads" in self.targets and arch.prunable_heads:
            pairs += ((0, arch.queries_per_group),)
        if "mlp" in self.targets and arch.prunable_channels:
            widths += (0,)
        damages = [
            LayerDamage(
                attention={pair: float(rise.attention[pair]) for pair in pairs},
                mlp={count: float(rise.channels[count]) for count in widths},
            )
            for rise in scores.rises or ()
        ]
        total = arch.decoder_linear_parameters()
        budget = round((1 - self.ratio) * total)
        allocation = allocate_shapes(damages, units.of, budget, allow_drop=True, solver=self.settings.solver)
        achieved = 1 - allocation.parameters / total
        gone = (
            sum(not shape.kv_heads for shape in allocation.shapes),
            sum(not shape.channels for shape in allocation.shapes),
        )
        reason = (
            f"{achieved:.2%} for {self.ratio:.2%}: the allocation keeps at most what was asked for, in multiples of "
            f"{self.multiple} channels and whole heads; predicted rise of the loss {allocation.damage:.3f} nats per "
            f"token; {gone[0]} layers lose their attention and {gone[1]} their MLP."
        )
        return ShapePlan(
            shapes=allocation.shapes,
            requested=self.ratio,
            achieved=achieved,
            reason=reason,
            certificate={"damage": allocation.damage, **allocation.certificate},
        )


def goal_of(model: ModelInput, settings: PruneSettings, targets: tuple[str, ...], multiple: int) -> Goal:
    """The goal that the options name, checked.

    Raises:
        UsageError: A size that cannot be read.
        CompressError: A size that cannot be reached; names the range.
    """
    goal = requested_goal(model, settings, targets, multiple)
    goal.check()
    return goal


def requested_goal(
    model: ModelInput, settings: PruneSettings, targets: tuple[str, ...], multiple: int
) -> Goal:
    """The goal that the options name: ``--ratio``, ``--params`` or ``--size``; a half without any. Not checked yet.

    Raises:
        UsageError: A size that cannot be read, or a convention of the ratio that the shape does not have.
        CompressError: A size that cannot be reached; names the range.
    """
    arch, checkpoint = model.architecture, model.checkpoint
    biases = added_parameters(model, settings, targets)
    if settings.ratio_of == "parts" and settings.shape != "local":
        raise UsageError(
            f"--ratio-of parts rounds heads and channels of each pruned layer, and --shape {settings.shape} does not.",
            "Give --shape local, or another --ratio-of.",
        )
    sized = settings.params is not None or settings.size is not None
    if sized and settings.shape == "local" and settings.ratio_of != "model":
        raise UsageError(
            f"--params and --size are about the whole model, --ratio-of {settings.ratio_of} about each pruned layer.",
            "Give --ratio-of model, or --ratio.",
        )
    ratio = settings.ratio if settings.ratio is not None else DEFAULT_RATIO
    if settings.params is not None:
        ratio = ratio_for_parameters(
            checkpoint.parameters + biases,
            arch,
            parse_count(settings.params),
            targets=targets,
            multiple=multiple,
            head_unit=settings.head_unit,
        )
    elif settings.size is not None:
        size = _file_size(settings.size)
        itemsize = checkpoint.dtype(arch.tensor_name(0, arch.linears[0])).itemsize
        ratio = ratio_for_bytes(
            checkpoint.bytes + itemsize * biases,
            itemsize,
            arch,
            size,
            targets=targets,
            multiple=multiple,
            head_unit=settings.head_unit,
        )
    return Goal(model=model, ratio=ratio, settings=settings, targets=targets, multiple=multiple)


def _file_size(text: str) -> float:
    """``150MB`` in bytes.

    Raises:
        UsageError: It is no size of a file.
    """
    remedy = "Give bytes with a unit, such as 500kB, 150MB or 0.5GiB."
    try:
        budget = parse_budget(text)
    except UsageError as error:
        raise UsageError(f"--size {text} is no file size.", remedy) from error
    if budget.kind != "bytes":
        raise UsageError(f"--size {text} is no file size.", remedy)
    return budget.value


def parse_targets(text: str) -> tuple[str, ...]:
    """``"heads,mlp"`` as a tuple.

    Raises:
        UsageError: Something else is named.
    """
    targets = tuple(part.strip() for part in text.split(",") if part.strip())
    if not targets or not set(targets) <= {"heads", "mlp"}:
        raise UsageError(f"--targets {text!r} is not understood.", "Give heads, mlp, or heads,mlp.")
    return targets


def default_multiple(channels: int) -> int:
    """Channel counts are rounded to 64, to 128 on wide models, and to less on tiny ones."""
    return (
        128 if channels >= 8192 else next(m for m in (64, 32, 16, 8, 4, 2, 1) if m == 1 or channels >= 8 * m)
    )


def channel_multiple(settings: PruneSettings, channels: int) -> int:
    """The multiple that is asked for, or the default one: 1 for a ratio of the parts, as in the paper's tables."""
    if settings.multiple is not None:
        return settings.multiple
    return 1 if settings.ratio_of == "parts" else default_multiple(channels)


def parse_options(text: str) -> dict[str, Any]:
    """``"element=abs,first_order=true,momentum=0.8"`` as a mapping.

    Raises:
        UsageError: A part is not ``name=value``.
    """
    found: dict[str, Any] = {}
    for part in (part.strip() for part in text.split(",")):
        if not part:
            continue
        name, equals, value = (piece.strip() for piece in part.partition("="))
        if not equals or not name or not value:
            raise UsageError(
                f"--criterion-options {text!r} is not understood.", "Write name=value, separated by commas."
            )
        found[name.replace("-", "_")] = _value(value)
    return found


def _value(text: str) -> Any:
    words = {"true": True, "false": False}
    if text.lower() in words:
        return words[text.lower()]
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text
