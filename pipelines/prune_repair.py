"""Repair of a pruned model: refit or bias from calibration statistics, then training folded into the weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from compress.adapters.attach import attach_lora, save_adapter
from compress.adapters.merge import merge_adapter
from compress.adapters.train import Distillation, fit
from compress.importance.gram_store import GramStore
from compress.kept import Kept
from compress.model.checkpoint import Checkpoint, checkpoint_architecture
from compress.pipelines.measure import calibration_windows, training_windows
from compress.pipelines.model_input import ModelInput
from compress.pipelines.prune_find import Deltas
from compress.pipelines.prune_place import BATCH, Place
from compress.pipelines.prune_refit import refitted, stored_weight
from compress.pipelines.settings import PruneSettings
from compress.pipelines.training import fit_config, training_metrics
from compress.prune.compensate import mean_biases
from compress.structure import StructureMap

TEXT_SHARE = {"distill": 0.0, "both": 0.5, "text": 1.0}
"""Share of the text itself in the targets of repair training."""


def refit_deltas(
    place: Place, model: ModelInput, structure: StructureMap, store: GramStore, tokens: int, kept: Kept
) -> Deltas:
    """What refitting o and down to the model's own activations adds to their weights, by module."""
    with place.context.reporter.bar("refit o and down") as progress:
        weights = refitted(place, model, structure, store, tokens=tokens, kept=kept, progress=progress)

    def delta(name: str) -> Tensor | None:
        return (
            weights[name] - stored_weight(model.checkpoint, model.architecture, name)
            if name in weights
            else None
        )

    return delta


def bias_additions(
    place: Place, model: ModelInput, structure: StructureMap, tokens: int
) -> Mapping[str, Tensor]:
    """The mean of what the removed inputs of o and down added, by module."""
    windows = calibration_windows(place.context, model.path, place.source, tokens=tokens)
    with place.context.reporter.bar("mean of what is removed") as progress:
        return mean_biases(
            place.load(model.path),
            model.architecture,
            structure,
            windows.ids,
            batch=min(BATCH, len(windows)),
            progress=progress,
        )


def train_repair(
    place: Place,
    cut: Path,
    full: Path,
    settings: PruneSettings,
    out: Path,
    state_dir: Path,
    *,
    offset: int = 1,
) -> dict[str, Any]:
    """Train the pruned model ``cut`` through a LoRA and write the merged result to ``out``.

    With ``repair_loss`` distill the targets are the predictions of ``full``: what the text teaches is left for the
    adapters that recovery carries over. With text they are the text, with both the mean of the two.

    Args:
        place: Where to compute and what to read.
        cut: The pruned model.
        full: The model it should agree with.
        settings: The ``repair_*`` settings, ``micro_batch``, ``accumulation`` and ``sequence``.
        out: Folder of the result.
        state_dir: Where training can be resumed from.
        offset: Which draw of the training windows to read.
    """
    checkpoint, seed = Checkpoint(cut), place.context.common.seed
    training = replace(
        settings,
        steps=settings.repair_steps,
        lr=settings.repair_lr,
        rank=settings.repair_rank,
        alpha=2 * settings.repair_rank,
        dropout=0.0,
    )
    windows = training_windows(place.context, cut, place.source, training, offset=offset)
    adapted = attach_lora(
        place.load_whole(cut),
        checkpoint_architecture(checkpoint),
        rank=training.rank,
        alpha=training.alpha,
        dropout=training.dropout,
        seed=seed + offset,
    )
    share = TEXT_SHARE[settings.repair_loss]
    distillation = None
    if share < 1:
        distillation = Distillation(
            teacher=place.load_whole(full), text_share=share, feature_weight=settings.repair_features
        )
    with place.context.reporter.bar("repair") as progress:
        result = fit(
            adapted,
            windows,
            fit_config(training, place.context.common),
            state_dir=state_dir,
            progress=progress,
            distillation=distillation,
        )
    save_adapter(adapted, state_dir / "adapter", base_name=cut.name)
    merge_adapter(checkpoint, state_dir / "adapter", out)
    return {**training_metrics(result), "data_protocol": dict(windows.protocol)}
