"""What each stage holds, from the inputs and settings with which it is about to begin."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from compress.adapters.adapter_file import AdapterFile
from compress.errors import CompressError
from compress.machine import capacity
from compress.model.architecture import Architecture
from compress.model.checkpoint import checkpoint_architecture
from compress.model.planned import headers_of
from compress.pipelines.footprint import (
    align_footprint,
    eval_footprint,
    quantize_footprint,
    recover_footprint,
    train_footprint,
)
from compress.pipelines.model_input import ModelInput
from compress.pipelines.phase import Footprint, Ground
from compress.pipelines.plan_models import PlannedModel, pruned, quantized
from compress.pipelines.prune_footprint import prune_footprint
from compress.pipelines.prune_goal import Goal
from compress.pipelines.settings import (
    AlignSettings,
    Common,
    EvalSettings,
    PruneSettings,
    QuantizeSettings,
    TrainSettings,
)
from compress.pipelines.stage import Context
from compress.pipelines.ways import Count, best_fit, counted, limit_of, refuse

Located = tuple[Path, Path | None]
"""Folder of a model, and that of the adapter on it."""


def prune_count(model: ModelInput, goal: Goal, settings: PruneSettings) -> Count:
    """Of ``prune``; shapes that scores decide are counted as the uniform one, or as nothing removed."""
    full = counted(model)
    try:
        small = pruned(full, goal.foreseen())
    except CompressError:
        small = full

    def count(ground: Ground) -> Footprint:
        return prune_footprint(full, small, settings, ground)

    return count


def thin_count(model: ModelInput, settings: PruneSettings) -> Count:
    """Of ``prune`` that sets single weights to zero: scores, no repair, one matrix at a time."""
    full, plain = counted(model), replace(settings, repair="none", repair_steps=0, trials=1)

    def count(ground: Ground) -> Footprint:
        return prune_footprint(full, full, plain, ground)

    return count


def quantize_count(context: Context, model: ModelInput, settings: QuantizeSettings) -> Count:
    """Of ``quantize``."""
    full = counted(model)
    small = quantized(full, settings)
    known = any(
        stage.id == model.id and "after" in stage.record["metrics"] for stage in context.workspace.stages
    )

    def count(ground: Ground) -> Footprint:
        return quantize_footprint(full, small, settings, ground, known=known)

    return count


def train_count(model: ModelInput, settings: TrainSettings) -> Count:
    """Of ``train``, which holds the model whole whatever the way; what proves the result does not."""
    base = counted(model)

    def count(ground: Ground) -> Footprint:
        return train_footprint(base, settings, ground)

    return count


def align_count(model: ModelInput, full: Path | None, settings: AlignSettings) -> Count:
    """Of ``align``, which trains all weights, beside the teacher in the folder ``full`` where there is one."""
    small = teacher = counted(model)
    if full is not None:
        teacher = counted(_opened(full))

    def count(ground: Ground) -> Footprint:
        return align_footprint(small, teacher, settings, ground)

    return count


def eval_count(entries: Sequence[Located], settings: EvalSettings, reference: Located | None = None) -> Count:
    """Of ``eval``, which holds one model after the other whole, then each beside the reference.

    A model of a kind that is not understood here is left out.
    """
    models = {place: found for place in entries if (found := _located(place)) is not None}
    compared = None if reference is None or not settings.kl_windows else _located(reference)
    if reference in models and compared is not None:
        compared = models[reference]

    def count(ground: Ground) -> Footprint:
        return eval_footprint(
            list(models.values()),
            ground,
            length=settings.sequence,
            windows=settings.windows,
            reference=compared,
        )

    return count


def refuse_evaluation(
    common: Common,
    entries: Sequence[Located],
    reference: Located,
    settings: EvalSettings,
    device: str,
    dtype: torch.dtype,
) -> None:
    """Refuse an evaluation that ``--memory-limit`` has no room for.

    Args:
        common: Gives the limit.
        entries: What is measured.
        reference: What it is compared with: one of them, or another.
        settings: Of the verb.
        device: Where models compute.
        dtype: In which precision.

    Raises:
        UsageError: The limit is no memory size.
        CompressError: A model does not fit into it whole, or not beside the reference; memory and speed are measured
            of nothing less.
    """
    limit = limit_of(common)
    if limit is None:
        return
    ground = Ground(itemsize=dtype.itemsize, length=settings.sequence, windows=settings.windows)
    machine = capacity(common.run, device)
    count = eval_count(entries, settings, reference)
    if not count(ground).phases:  # models of kinds that are not understood here, all of them
        return
    found = best_fit(count, ground, "eval", limit=limit, device_free=machine.device_free, streams=False)
    refuse(common, "eval", found)


def _located(place: Located) -> tuple[PlannedModel, int] | None:
    folder, adapter = place
    try:
        model = counted(_opened(folder))
    except CompressError:
        return None
    return model, 0 if adapter is None else _parameters(adapter, model.arch)


def _opened(folder: Path) -> ModelInput:
    checkpoint, _ = headers_of(str(folder))  # in a dry run there may be no weights
    architecture = checkpoint_architecture(checkpoint)
    return ModelInput(name=folder.name, path=folder, id="", checkpoint=checkpoint, architecture=architecture)


def _parameters(adapter: Path, arch: Architecture) -> int:
    """Of an adapter once its rows and columns are those of ``arch``."""
    shapes = {
        arch.module_name(layer, spec): arch.at(layer).linear_shape(spec)
        for layer in range(arch.layers)
        for spec in arch.linears_at(layer)
    }
    with AdapterFile(adapter) as file:
        return sum(
            file.scaling(module).rank * sum(shapes[module]) for module in file.modules if module in shapes
        )


def recover_count(full: ModelInput, adapter: Path, *, merged: bool, device: str = "cpu") -> Count:
    """Of ``recover``: the full model with an adapter as large as the small one's rows and columns become."""
    model, parameters = counted(full), _parameters(adapter, full.architecture)

    def count(ground: Ground) -> Footprint:
        return recover_footprint(model, parameters, ground, merged=merged, batched=device != "cpu")

    return count
