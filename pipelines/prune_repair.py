"""Repair of a pruned model: the refit from calibration statistics, then training folded into the weights."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from peft import PeftModel
from torch import Tensor

from compress.adapters.attach import attach_lora, save_adapter
from compress.adapters.merge import merge_adapter
from compress.adapters.train import Distillation
from compress.importance.gram_store import GramStore
from compress.kept import Kept
from compress.model.checkpoint import Checkpoint, checkpoint_architecture
from compress.model.load import load_model
from compress.pipelines.measure import training_windows
from compress.pipelines.model_input import ModelInput
from compress.pipelines.prune_find import Deltas
from compress.pipelines.prune_place import Place
from compress.pipelines.prune_refit import refitted, stored_weight
from compress.pipelines.settings import PruneSettings
from compress.pipelines.training import announced, fit_config, train_model, training_metrics
from compress.structure import StructureMap

FEW, ENOUGH = 8, 16
"""Calibration tokens for each channel that stays: below the first a refit may do harm on other text."""

TEXT_SHARE = {"distill": 0.0, "both": 0.5, "text": 1.0}
"""Share of the text itself in the targets of repair training."""


def refit_deltas(
    place: Place, model: ModelInput, structure: StructureMap, store: GramStore, tokens: int, kept: Kept
) -> Deltas:
    """What refitting o and down to the model's own activations adds to their weights, by module."""
    _say_if_few(place, model, structure, tokens)
    with place.context.reporter.bar("refit o and down") as progress:
        weights = refitted(place, model, structure, store, tokens=tokens, kept=kept, progress=progress)

    def delta(name: str) -> Tensor | None:
        return (
            weights[name] - stored_weight(model.checkpoint, model.architecture, name)
            if name in weights
            else None
        )

    return delta


def _say_if_few(place: Place, model: ModelInput, structure: StructureMap, tokens: int) -> None:
    """Say it where the calibration text is short for the widest matrix that is refitted."""
    counts = [len(layer.channels) for layer in structure.layers]
    most = max((count for count in counts if count < model.architecture.channels), default=0)
    if tokens < FEW * most:
        place.context.reporter.say(
            f"prune: the refit reads {tokens / most:.1f} calibration tokens for every channel that stays; "
            f"{ENOUGH} or more are safe (--calibration-tokens {ENOUGH * most})."
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
    )
    windows = training_windows(place.context, cut, place.source, training, offset=offset)
    what: dict[str, Any] = {
        "path": str(cut),
        "teacher": None if settings.repair_loss == "text" else str(full),
        "text_share": TEXT_SHARE[settings.repair_loss],
        "feature_weight": settings.repair_features,
        "rank": training.rank,
        "dtype": str(place.dtype).removeprefix("torch."),
        "seed": seed + offset,
    }
    ranks = announced(place.context, "repair", place.device, what)
    adapted, distillation = repair_to_train(device=place.device, **what)
    with place.context.reporter.bar("repair") as progress:
        result = train_model(
            place.context,
            adapted,
            windows,
            fit_config(training, place.context.common),
            ranks=ranks,
            state_dir=state_dir,
            progress=progress,
            distillation=distillation,
        )
    save_adapter(adapted, state_dir / "adapter", base_name=cut.name)
    merge_adapter(checkpoint, state_dir / "adapter", out)
    return {**training_metrics(result), "data_protocol": dict(windows.protocol)}


def repair_to_train(
    *,
    path: str,
    teacher: str | None,
    text_share: float,
    feature_weight: float,
    rank: int,
    dtype: str,
    seed: int,
    device: str,
) -> tuple[PeftModel, Distillation | None]:
    """A pruned model with a fresh LoRA, and what it is trained towards.

    Args:
        path: Folder of the pruned model.
        teacher: Folder of the full one; None: the text is all there is.
        text_share: The text's share of the targets.
        feature_weight: Weight of the hidden states.
        rank: Of the LoRA; its alpha is twice that.
        dtype: In which both models compute.
        seed: Of the factors.
        device: Where they are.
    """
    adapted = attach_lora(
        load_model(path, dtype=dtype, device=device),
        checkpoint_architecture(Checkpoint(path)),
        rank=rank,
        alpha=2 * rank,
        dropout=0.0,
        seed=seed,
    )
    distillation = None
    if teacher is not None:
        distillation = Distillation(
            teacher=load_model(teacher, dtype=dtype, device=device),
            text_share=text_share,
            feature_weight=feature_weight,
        )
    return adapted, distillation
