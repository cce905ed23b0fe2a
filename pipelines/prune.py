"""``compress prune``: structured pruning and repair, from a checkpoint to a smaller checkpoint."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from compress.data.sources import default_source
from compress.errors import UsageError, choose
from compress.importance import CRITERIA
from compress.importance.base import criterion_config
from compress.importance.gram_store import GramStore, fits
from compress.importance.moments import OUTPUTS
from compress.importance.obs import is_ranked_apart
from compress.kept import Kept
from compress.model.architecture import Architecture
from compress.model.checkpoint import Checkpoint, checkpoint_architecture, require_dense
from compress.model.recompute import require_recompute
from compress.pipelines.engines import require_processors
from compress.pipelines.measure import (
    MEASURES,
    check_length,
    measured_once,
    validation_perplexity,
    validation_windows,
)
from compress.pipelines.model_input import ModelInput, current, device_and_dtype
from compress.pipelines.prove import record_and_score
from compress.pipelines.prune_bias import bias_additions, unrepaired
from compress.pipelines.prune_find import find_structure
from compress.pipelines.prune_goal import (
    Goal,
    channel_multiple,
    goal_of,
    parse_options,
    parse_targets,
)
from compress.pipelines.prune_masks import MASKED, thin
from compress.pipelines.prune_metrics import show, size_metrics, structure_metrics
from compress.pipelines.prune_place import Place
from compress.pipelines.prune_repair import refit_deltas, train_repair
from compress.pipelines.prune_size import sized_reason
from compress.pipelines.reopen import check_reopens
from compress.pipelines.settings import PruneSettings
from compress.pipelines.small_files import write_base
from compress.pipelines.stage import Context, Outcome, aside_dict, run_stage, settings_dict
from compress.pipelines.text import text_inputs
from compress.pipelines.ways import choose_way
from compress.pipelines.ways_of_stages import prune_count
from compress.pipelines.workspace import FORMAT_VERSION, read_json, write_json
from compress.prune.counts import kept_linear_parameters
from compress.prune.shape import met_or_missed
from compress.prune.slice import slice_checkpoint
from compress.solvers.solve import SOLVERS
from compress.structure import FILE_NAME as STRUCTURE
from compress.structure import StructureMap, composed

MEASURED = "measured.json"
DONE = "done.json"
NOT_SHARED = "prune: nothing here is for a cluster; it is computed on this machine."


def prune(context: Context, settings: PruneSettings) -> Outcome:
    """Prune the chain's current model; see ``compress prune --help``.

    Raises:
        UsageError: An unknown criterion or target, options that do nothing together, windows longer than the
            model's positions, layers that cannot be run again.
        CompressError: The ratio cannot be reached with these targets, or the model cannot be pruned.
    """
    if settings.shape in MASKED:
        if context.common.engine != "local":
            context.reporter.say(NOT_SHARED)
        return thin(context, settings)
    targets = parse_targets(settings.targets)
    check_settings(settings)
    model = current(context, "prune")
    require_dense(model.checkpoint, allow_lq=False)
    check_length(model.path, settings.sequence)
    if settings.recompute:
        require_recompute(model.checkpoint.config)
    multiple = channel_multiple(settings, model.architecture.channels)
    goal = goal_of(model, settings, targets, multiple)
    device, dtype = device_and_dtype(context.common)
    require_processors(context.common, device)
    if context.common.engine != "local" and not shares_work(settings, model.architecture):
        context.reporter.say(NOT_SHARED)
    source = context.common.data or default_source()
    place = Place(
        context=context,
        source=source,
        device=device,
        dtype=dtype,
        way=choose_way(
            context,
            "prune",
            model,
            device,
            dtype,
            prune_count(model, goal, settings),
            source=source,
            recompute=settings.recompute,
        ),
    )
    config = settings_dict(settings) | {
        "multiple": multiple,
        "data": place.source,
        "seed": context.common.seed,
        "dtype": str(dtype).removeprefix("torch."),
    }
    if settings.params is None and settings.size is None:
        config["ratio"] = goal.ratio

    def work(folder: Path) -> Mapping[str, Any]:
        validation = validation_windows(context, model.path, place.source)
        measured = prune_in_rounds(place, goal, folder)
        write_base(context, model, folder)
        before = measured_once(
            folder / MEASURES / "before.json",
            lambda: validation_perplexity(context, place.load(model.path), validation, "the model"),
        )
        after = record_and_score(
            context,
            folder,
            model.architecture.vocab,
            validation,
            "the pruned model",
            dtype=dtype,
            device=device,
            way=place.way,
            into=folder / MEASURES / "after.json",
        )
        reopened = check_reopens(folder, way=place.way)
        small = Checkpoint(folder)
        sized = sized_reason(settings, small.parameters, small.bytes)
        if sized is not None:
            measured["requested_size"] = settings.params or settings.size
            measured["reason"] = f"{sized}. {measured['reason']}"
        return {
            "before": size_metrics(model.checkpoint) | before,
            "after": size_metrics(small) | after,
            "removed_of_all_parameters": 1 - small.parameters / model.checkpoint.parameters,
            "removed_bytes": 1 - small.bytes / model.checkpoint.bytes,
            "criterion": settings.criterion,
            "reopened_relative_error": reopened,
            **measured,
        }

    def disk() -> float:
        from compress.pipelines.disk import (
            prune_disk,
        )  # it needs what the plan needs, and that needs this module

        return prune_disk(goal, dtype, context.common.effort or "quick")

    outcome = run_stage(
        context,
        "prune",
        config=config,
        inputs={"model": model.id} | text_inputs(source),
        work=work,
        scratch=("round-*", MEASURES),
        disk=disk,
        aside=aside_dict(settings),
    )
    if outcome.fresh and outcome.stage is not None:
        show(context, outcome.stage.record["metrics"])
    return outcome


def shares_work(settings: PruneSettings, arch: Architecture) -> bool:
    """Whether a cluster has a part in this: in ranking with ``obs``, or in refits from moments that are kept."""
    ranks = settings.criterion == "obs" or settings.shape == "allocated"
    return (ranks and is_ranked_apart(arch)) or (settings.repair == "refit" and fits(arch, OUTPUTS))


def check_settings(settings: PruneSettings) -> None:
    """Refuse settings that contradict each other, before any model is opened.

    Raises:
        UsageError: An unknown criterion, one that cannot do without training steps, or options that would do
            nothing.
    """
    needs = CRITERIA.get(settings.criterion).needs
    criterion_config(settings.criterion, **parse_options(settings.criterion_options))
    if settings.solver not in SOLVERS:
        raise UsageError(f"There is no solver {settings.solver!r}.", choose(settings.solver, SOLVERS))
    if needs == "adapters" and settings.steps < 1:
        raise UsageError(
            f"The criterion {settings.criterion} scores while it trains and --steps is {settings.steps}.",
            "Give --steps 1 or more, or another criterion.",
        )
    if settings.repair == "lora" and settings.steps < 1:
        raise UsageError(
            "--repair lora folds in what training has learned, and --steps is 0.", "Give --steps 1 or more."
        )
    trains = needs == "adapters" or settings.repair == "lora"
    for name, given in (("one-shot", settings.one_shot), ("int8", settings.int8)):
        if given and not trains:
            raise UsageError(
                f"--{name} is about training with masks, which the criterion {settings.criterion} does without.",
                "Give --criterion lora, or --repair lora.",
            )
    gradients = trains or needs in ("gradients", "moments") or settings.shape == "allocated"
    if settings.recompute and not (gradients or settings.repair_steps > 0):
        raise UsageError(
            f"--recompute is about backward passes, which the criterion {settings.criterion} and its repair do "
            "without.",
            "Leave it out.",
        )


def prune_in_rounds(place: Place, goal: Goal, folder: Path) -> dict[str, Any]:
    """Write the pruned model into ``folder``; sub-folders ``round-N`` hold what an interrupted run goes on from.

    Each round removes the same share of what the one before it left, and repairs before the next one scores.

    Returns:
        What was chosen and measured on the way, as JSON values.
    """
    rounds, model = goal.settings.rounds, goal.model
    total = goal.model.architecture.decoder_linear_parameters()
    structure: StructureMap | None = None
    measured: dict[str, Any] = {}
    by_round: list[dict[str, Any]] = []
    for number in range(1, rounds + 1):
        here = folder / f"round-{number}"
        here.mkdir(exist_ok=True)
        left = model.architecture.decoder_linear_parameters() / total
        kept = (1 - goal.ratio) ** (number / rounds)
        this = replace(
            goal,
            model=model,
            ratio=1 - kept / left,
            settings=replace(goal.settings, repair_steps=_share(goal.settings.repair_steps, number, rounds)),
        )
        target = folder if number == rounds else here / "model"
        if number == rounds or not (here / DONE).is_file():
            if number < rounds:
                shutil.rmtree(target, ignore_errors=True)  # of an interrupted run, incomplete
            measured = _prune_once(place, this, goal.model, here, target, number)
            write_json(here / DONE, {"format_version": FORMAT_VERSION, "measured": measured})
        else:
            measured = read_json(here / DONE).get("measured", {})  # an earlier version kept none
        by_round.append(dict(measured))
        found = StructureMap.load(here / "cut" / STRUCTURE)
        structure = found if structure is None else composed(structure, found)
        if number < rounds:
            checkpoint = Checkpoint(target)
            model = ModelInput(
                name=here.name,
                path=target,
                id=checkpoint.fingerprint(),
                checkpoint=checkpoint,
                architecture=checkpoint_architecture(checkpoint),
            )
    if structure is not None:
        structure.save(folder / STRUCTURE)
        achieved = 1 - kept_linear_parameters(goal.model.architecture, structure) / total
        measured |= structure_metrics(goal.model, structure)
        measured |= {"requested_ratio": goal.ratio, "achieved_ratio": achieved, "rounds": rounds}
        if rounds > 1:
            lead = met_or_missed(achieved, goal.ratio)
            measured["reason"] = f"{lead} in {rounds} rounds; the last round: {measured['reason']}"
            measured["by_round"] = by_round
    return measured


def _share(steps: int, number: int, rounds: int) -> int:
    """Steps of round ``number`` when all rounds together take ``steps``."""
    return steps * number // rounds - steps * (number - 1) // rounds


def _prune_once(
    place: Place, goal: Goal, full: ModelInput, here: Path, target: Path, number: int
) -> dict[str, Any]:
    """One round: find, cut with what statistics repair, train the rest; the model goes into ``target``."""
    settings, model, cut = goal.settings, goal.model, here / "cut"
    context = place.context
    if not (here / MEASURED).is_file():
        shutil.rmtree(cut, ignore_errors=True)
        store = GramStore(here / "moments")
        found = find_structure(place, goal, here / "scoring", store)
        deltas, biases, lost = found.deltas, None, list[str]()
        if settings.repair == "refit":
            kept = Kept(here / "refit")
            deltas = refit_deltas(place, model, found.structure, store, settings.calibration_tokens, kept)
        elif settings.repair == "bias":
            biases = bias_additions(
                place, model, found.structure, settings.calibration_tokens, Kept(here / "scoring")
            )
            lost = unrepaired(model.architecture, found.structure, biases)
        with context.reporter.bar("cut") as progress:
            slice_checkpoint(
                model.checkpoint,
                model.architecture,
                found.structure,
                cut,
                deltas=deltas,
                biases=biases,
                progress=progress,
            )
        metrics = {
            "requested_ratio": found.plan.requested,
            "achieved_ratio": found.plan.achieved,
            "reason": found.plan.reason,
            "certificate": found.plan.certificate,
            **found.measured,
        }
        if lost:
            metrics["biases_lost"] = lost
            metrics["reason"] += (
                f" The mean of {len(lost)} branches that are gone whole is not made up for: nothing is left there "
                "that could hold a bias."
            )
        write_json(here / MEASURED, {"format_version": FORMAT_VERSION, **metrics})
        for scratch in (store.folder, here / "refit", here / "scoring"):
            shutil.rmtree(scratch, ignore_errors=True)
    measured = read_json(here / MEASURED)
    measured.pop("format_version")
    context.reporter.say(f"prune: {measured['reason']}")
    if settings.repair_steps > 0:
        adapter = here / "repair"
        measured["repair"] = train_repair(place, cut, full.path, settings, target, adapter, offset=number)
    else:
        target.mkdir(exist_ok=True)
        for file in cut.iterdir():
            shutil.copyfile(file, target / file.name)
    return measured
