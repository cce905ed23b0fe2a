"""Find what to keep: score the groups, with or without training, choose the shapes, rank, and fold what was trained."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel

from compress.adapters.attach import attach_lora, lora_delta
from compress.adapters.train import StepHook
from compress.data.windows import Windows
from compress.importance.base import Criterion, GroupScores, create_criterion
from compress.importance.collect import collect
from compress.importance.gram_store import GramStore, fits
from compress.importance.moments import OUTPUTS
from compress.importance.obs import ObsConfig, ObsCriterion, rank_groups
from compress.kept import NOTHING_KEPT, Kept
from compress.model.architecture import Architecture
from compress.model.int8 import to_int8
from compress.pipelines.measure import calibration_windows, summed_loss, training_windows
from compress.pipelines.prune_goal import Goal, parse_options
from compress.pipelines.prune_place import BATCH, Place
from compress.pipelines.prune_trial import try_shapes
from compress.pipelines.training import announced, fit_config, train_model, training_metrics
from compress.prune.controller import PruneController
from compress.prune.schedule import PruningSchedule
from compress.prune.select import select
from compress.prune.shape import ShapePlan
from compress.structure import StructureMap, structure_map

Deltas = Callable[[str], Tensor | None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """The outcome of scoring.

    Attributes:
        structure: The kept indices.
        plan: Their shapes and the reason.
        deltas: What the scoring adapter adds to the weights, by module; None where nothing was trained.
        measured: JSON values.
    """

    structure: StructureMap
    plan: ShapePlan
    deltas: Deltas
    measured: dict[str, Any]


def find_structure(place: Place, goal: Goal, state_dir: Path, store: GramStore) -> Found:
    """Score the groups of ``goal.model`` and choose what stays.

    Args:
        place: Where to compute and what to read.
        goal: What to aim at.
        state_dir: Where training is resumed from.
        store: Where the moments of the inputs that the refit needs are left when scoring gathers them.

    What was scored and tried lies in ``state_dir`` too, for a run that goes on after an interruption.
    """
    settings, model = goal.settings, goal.model
    options: dict[str, Any] = {"seed": place.context.common.seed, **parse_options(settings.criterion_options)}
    criterion = create_criterion(settings.criterion, model.architecture, **options)
    if (
        isinstance(criterion, ObsCriterion)
        and settings.repair == "refit"
        and fits(model.architecture, OUTPUTS)
    ):
        criterion.store = store
    kept = Kept(state_dir)
    if isinstance(criterion, ObsCriterion):
        criterion.kept = kept
        criterion.engine = place.context.engine
    if criterion.needs == "adapters":
        return _train(place, goal, lambda: place.load_whole(model.path), criterion, state_dir, store, kept)
    trains = settings.repair == "lora"
    network = (place.load_whole if trains or criterion.needs == "gradients" else place.load)(model.path)
    windows: Windows | None = None
    if criterion.needs != "weights":
        windows = calibration_windows(
            place.context, model.path, place.source, tokens=settings.calibration_tokens
        )
    if not kept.has("criterion"):
        _calibrate(place, goal, network, criterion, windows)
        kept.put("criterion", criterion.state_dict())
    criterion.load_state_dict(kept.get("criterion"))
    if trains:
        return _train(place, goal, lambda: network, criterion, state_dir, store, kept)
    measured: dict[str, Any] = {"skipped_steps": criterion.skipped_steps, "scoring_tokens": 0}
    if windows is not None:
        measured |= {"data_protocol": dict(windows.protocol), "scoring_tokens": windows.ids.numel()}
    return _tried(place, goal, network, criterion.scores(), store, kept, lambda _: None, measured)


def _tried(
    place: Place,
    goal: Goal,
    network: nn.Module,
    scores: GroupScores,
    store: GramStore,
    kept: Kept,
    deltas: Deltas,
    measured: dict[str, Any],
) -> Found:
    """Choose by final scores, with trials on ``network``, which is what will be cut."""
    plan = goal.choose(scores, lambda known: _measured(place, goal, known, Kept(kept.path("costs"))))
    plan, trials = try_shapes(place, goal, network, scores, plan, store, kept)
    arch = goal.model.architecture
    layers = select(arch, scores, plan.shapes)
    return Found(
        structure=structure_map(arch, layers, base_fingerprint=goal.model.id),
        plan=plan,
        deltas=deltas,
        measured=measured | trials,
    )


def _calibrate(
    place: Place, goal: Goal, network: nn.Module, criterion: Criterion, windows: Windows | None
) -> None:
    """Let a criterion that needs no adapters see the model, on text where weights are not enough."""
    if windows is None:
        criterion.observe(network)
        return
    with place.context.reporter.bar(f"score ({goal.settings.criterion})") as progress:
        collect(
            criterion,
            network,
            goal.model.architecture,
            windows.ids,
            loss=summed_loss(network),
            batch=min(BATCH, len(windows)),
            recompute=goal.settings.recompute,
            progress=progress,
        )


def _measured(place: Place, goal: Goal, scores: GroupScores, kept: Kept = NOTHING_KEPT) -> GroupScores:
    """``scores`` with what the groups cost in the order that they rank them."""
    windows = calibration_windows(
        place.context, goal.model.path, place.source, tokens=goal.settings.calibration_tokens
    )
    network = place.load(goal.model.path)
    with place.context.reporter.bar("measure what groups cost") as progress:
        return rank_groups(
            network,
            goal.model.architecture,
            windows.ids,
            ObsConfig(seed=place.context.common.seed),
            loss=summed_loss(network),
            batch=min(BATCH, len(windows)),
            ranked=scores,
            kept=kept,
            engine=place.context.engine,
            recompute=goal.settings.recompute,
            progress=progress,
        )


def _train(
    place: Place,
    goal: Goal,
    opened: Callable[[], PreTrainedModel],
    criterion: Criterion,
    state_dir: Path,
    store: GramStore,
    kept: Kept,
) -> Found:
    """One loop scores, closes the masks and trains the adapter (LoRAPrune, arXiv 2305.18403, algorithm 1).

    Where it does not close masks, shapes are tried afterwards: on the model with the adapter that the cut folds in,
    else on the one that it started from.
    """
    settings, model = goal.settings, goal.model
    arch = model.architecture
    windows = training_windows(place.context, model.path, place.source, settings)
    what: dict[str, Any] = {
        "rank": settings.rank,
        "alpha": settings.alpha,
        "dropout": settings.dropout,
        "int8": settings.int8,
        "seed": place.context.common.seed,
    }
    beside = {"path": str(model.path), "dtype": str(place.dtype).removeprefix("torch."), "adapter": what}
    ranks = announced(place.context, "score", place.device, beside)
    adapted = scored_adapter(opened(), arch, **what)
    schedule = PruningSchedule(total_steps=settings.steps)

    def choose(scores: GroupScores) -> ShapePlan:
        return goal.choose(scores, lambda known: _measured(place, goal, known))

    hook = PruneController(adapted, arch, criterion, schedule, choose, one_shot=settings.one_shot)
    hooks: list[StepHook] = [hook]
    if ranks is not None:
        from compress.adapters.followed import MaskLeader

        hooks.append(MaskLeader(hook, ranks))
    with hook, place.context.reporter.bar("score and mask") as progress:
        result = train_model(
            place.context,
            adapted,
            windows,
            fit_config(settings, place.context.common),
            ranks=ranks,
            hooks=hooks,
            state_dir=state_dir,
            progress=progress,
        )
        structure = None if settings.one_shot else hook.structure(base_fingerprint=model.id)
    measured = {
        **training_metrics(result),
        "skipped_steps": hook.skipped_steps,
        "data_protocol": dict(windows.protocol),
    }
    folds = settings.repair == "lora"
    deltas = _deltas_of(adapted) if folds else (lambda _: None)
    if structure is not None:
        return Found(structure=structure, plan=hook.plan, deltas=deltas, measured=measured)
    network: nn.Module = adapted if folds else adapted.unload()
    if settings.int8 and not folds:  # what is cut is not in 8 bit; the model that is goes first
        del adapted, hook, hooks, network
        network = place.load(model.path)
    return _tried(place, goal, network, criterion.scores(), store, kept, deltas, measured)


def _deltas_of(adapted: PeftModel) -> Deltas:
    return lambda name: lora_delta(adapted, name)


def scored_adapter(
    network: PreTrainedModel,
    arch: Architecture,
    *,
    rank: int,
    alpha: int,
    dropout: float,
    int8: bool,
    seed: int,
) -> PeftModel:
    """The network with the LoRA that trains while groups are scored, on 8-bit weights if that is wanted."""
    if int8:
        to_int8(network, arch)
    return attach_lora(network, arch, rank=rank, alpha=alpha, dropout=dropout, seed=seed)
