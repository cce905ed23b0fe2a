"""Shapes that a plan cannot tell apart are tried: masked, repaired by statistics, and scored on text."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from compress.data.windows import Windows
from compress.evaluate.perplexity import mean_loss
from compress.importance.base import GroupScores
from compress.importance.gram_store import GramStore, fits
from compress.importance.moments import OUTPUTS
from compress.pipelines.measure import calibration_windows
from compress.pipelines.prune_goal import Goal
from compress.pipelines.prune_place import BATCH, Place
from compress.prune.compensate import compensate, gather_moments, refit_from_store, swapped
from compress.prune.mask import GroupMasks
from compress.prune.select import select
from compress.prune.shape import ShapePlan
from compress.structure import StructureMap, structure_map

TRIAL_TOKENS = 4096
TRIAL_DRAW = 1
"""Which draw of the training text they are scored on; 0 is the one that groups are scored and refitted on."""


def try_shapes(
    place: Place,
    goal: Goal,
    network: PreTrainedModel,
    scores: GroupScores,
    plan: ShapePlan,
    store: GramStore | None,
) -> tuple[ShapePlan, list[dict[str, Any]]]:
    """The best of the first ``--trials`` candidates of a uniform plan, by their loss on training text.

    Predictions rank shapes of nearly the same size poorly where heads stand against channels; a masked model tells.

    Args:
        place: Where to compute and what to read.
        goal: What to aim at.
        network: The full model; as it was afterwards.
        scores: Scores of its groups.
        plan: With candidates, best first.
        store: Second moments of the inputs, where they were kept.

    Returns:
        The plan with the best shape, and what every trial measured; the same plan and nothing for one candidate.
    """
    candidates = plan.candidates[: goal.settings.trials]
    if len(candidates) < 2:
        return plan, []
    arch = goal.model.architecture
    windows = calibration_windows(
        place.context, goal.model.path, place.source, tokens=TRIAL_TOKENS, draw=TRIAL_DRAW
    )
    found: list[dict[str, Any]] = []
    losses: list[float] = []
    with place.context.reporter.bar("try shapes") as progress:
        for done, candidate in enumerate(candidates, start=1):
            layers = select(arch, scores, [candidate.layer] * arch.layers)
            structure = structure_map(arch, layers, base_fingerprint="")
            weights = _repaired(place, goal, network, structure, store)
            with swapped(network, arch, weights), GroupMasks(network, arch, layers):
                loss = mean_loss(network, windows, batch_size=min(BATCH, len(windows)))
            shape = {
                "kv_heads": candidate.kv_heads,
                "queries": candidate.queries,
                "channels": candidate.channels,
            }
            found.append({**shape, "loss": loss, "predicted": candidate.damage})
            losses.append(loss)
            progress(done, len(candidates), f"loss {loss:.3f}")
    chosen = candidates[losses.index(min(losses))]
    rest = tuple(candidate for candidate in plan.candidates if candidate is not chosen)
    return replace(goal.uniform(chosen.layer), candidates=(chosen, *rest)), found


def _repaired(
    place: Place, goal: Goal, network: PreTrainedModel, structure: StructureMap, store: GramStore | None
) -> dict[str, Tensor]:
    """New weights of o and down for a structure; none where the repair has none.

    Moments are gathered once for all trials and the refit itself, where the store can hold them.
    """
    arch = goal.model.architecture
    if goal.settings.repair != "refit":
        return {}
    if store is None or not fits(arch, OUTPUTS):
        windows = _calibration(place, goal)
        return compensate(network, arch, structure, windows.ids, batch=min(BATCH, len(windows)))
    if not store.complete(arch):
        windows = _calibration(place, goal)
        gather_moments(network, arch, windows.ids, store, batch=min(BATCH, len(windows)))
    transposed = {arch.module_name(i, s) for i in range(arch.layers) for s in arch.linears if s.transposed}

    def weight_of(name: str) -> Tensor:
        stored: Tensor = network.get_submodule(name).get_parameter("weight").detach().cpu()
        return stored.t() if name in transposed else stored

    return refit_from_store(weight_of, arch, structure, store)


def _calibration(place: Place, goal: Goal) -> Windows:
    return calibration_windows(
        place.context, goal.model.path, place.source, tokens=goal.settings.calibration_tokens
    )
