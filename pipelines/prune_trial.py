"""Shapes that a plan cannot tell apart are tried: masked, repaired as the cut will be, and scored on text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from torch import Tensor, nn

from compress.evaluate.perplexity import mean_loss
from compress.importance.base import GroupScores
from compress.importance.gram_store import GramStore
from compress.kept import Kept
from compress.pipelines.measure import calibration_windows
from compress.pipelines.prune_bias import bias_additions
from compress.pipelines.prune_goal import Goal
from compress.pipelines.prune_place import Place
from compress.pipelines.prune_refit import refitted
from compress.prune.compensate import swapped
from compress.prune.mask import GroupMasks
from compress.prune.mean_bias import added_biases
from compress.prune.select import select
from compress.prune.shape import ShapePlan
from compress.prune.trials import next_trial
from compress.structure import LayerStructure, structure_map

TRIAL_TOKENS, TRIAL_SHARE = 4096, 0.25
"""Tokens they are scored on: a share of the calibration tokens, at least so many."""


def try_shapes(
    place: Place,
    goal: Goal,
    network: nn.Module,
    scores: GroupScores,
    plan: ShapePlan,
    store: GramStore,
    kept: Kept,
) -> tuple[ShapePlan, dict[str, Any]]:
    """The best of ``--trials`` candidates of a uniform plan, by their loss on training text.

    A repair by training comes too late for a trial, except for the adapter that has scored.
    Predictions rank shapes of nearly the same size poorly where heads stand against channels; a masked model tells.

    Args:
        place: Where to compute and what to read.
        goal: What to aim at.
        network: What will be cut: the full model, with the adapter that is folded in; as it was afterwards.
        scores: Scores of its groups.
        plan: With candidates, best first.
        store: Where the moments of the inputs are, for the refit.
        kept: Has the losses that an interrupted run has found.

    Returns:
        The plan with the best shape, and what every trial measured and on which text, as JSON values; the same plan
        and nothing for one candidate.
    """
    candidates = (*plan.candidates, *plan.further)
    trials = min(goal.settings.trials, len(candidates))
    if trials < 2:
        return plan, {}
    arch = goal.model.architecture
    repair, scored_on = goal.settings.repair, goal.settings.calibration_tokens
    tokens = max(TRIAL_TOKENS, round(TRIAL_SHARE * scored_on))
    windows = calibration_windows(
        place.context, goal.model.path, place.source, tokens=tokens, apart_from=scored_on
    )

    def loss_of(layers: Sequence[LayerStructure]) -> float:
        weights: Mapping[str, Tensor] = {}
        biases: Mapping[str, Tensor] = {}
        structure = structure_map(arch, layers, base_fingerprint="")
        if repair == "bias":
            biases = bias_additions(place, goal.model, structure, scored_on, kept, network)
        elif repair == "refit":
            weights = refitted(
                place,
                goal.model,
                structure,
                store,
                tokens=scored_on,
                network=network,
            )
        with (
            swapped(network, arch, weights),
            added_biases(network, arch, biases),
            GroupMasks(network, arch, layers),
        ):
            return mean_loss(network, windows)

    found: list[dict[str, Any]] = []
    losses: dict[int, float] = {}
    with place.context.reporter.bar("try shapes") as progress:
        whole = kept.number("held-out-whole", lambda: mean_loss(network, windows))
        for done in range(1, trials + 1):
            at = next_trial(candidates, {known: loss - whole for known, loss in losses.items()})
            candidate = candidates[at]
            layers = select(arch, scores, [candidate.layer] * arch.layers)
            losses[at] = kept.number(f"held-out-{at:04d}-{repair}", partial(loss_of, layers))
            shape = {
                "kv_heads": candidate.kv_heads,
                "queries": candidate.queries,
                "channels": candidate.channels,
            }
            found.append(
                {**shape, "loss": losses[at], "rise": losses[at] - whole, "predicted": candidate.damage}
            )
            progress(done, trials, f"loss {losses[at]:.3f}")
    chosen = candidates[min(losses, key=lambda at: losses[at])]
    rest = tuple(candidate for candidate in plan.candidates if candidate is not chosen)
    measured = {"trials": found, "trials_protocol": dict(windows.protocol)}
    return replace(goal.uniform(chosen.layer), candidates=(chosen, *rest), further=plan.further), measured
