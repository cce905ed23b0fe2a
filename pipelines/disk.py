"""Whether the disk has room for a stage, asked before anything is computed."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch

from compress.adapters.adapter_file import AdapterFile, owner
from compress.errors import CompressError
from compress.evaluate.training_memory import adapter_parameters
from compress.importance import CRITERIA
from compress.importance.moments import OUTPUTS, SKETCH_ROWS
from compress.model.checkpoint import SIDE_FILES
from compress.pipelines.footprint import (
    align_footprint,
    prune_footprint,
    quantize_footprint,
    train_footprint,
)
from compress.pipelines.measure import LENGTH, WINDOWS, positions
from compress.pipelines.model_input import ModelInput
from compress.pipelines.phase import SHARD_BYTES, Ground
from compress.pipelines.plan_models import PlannedModel, pruned, quantized
from compress.pipelines.prune_goal import Goal
from compress.pipelines.reporter import human_bytes
from compress.pipelines.settings import AlignSettings, QuantizeSettings, TrainSettings

RECORDS = 4 << 20
"""Bytes for what is small: error tables, records, logits."""


def require_space(root: Path, verb: str, needed: float, partial: Path) -> None:
    """Refuse a stage that would fill the disk.

    Args:
        root: The workspace.
        verb: The stage, for the message.
        needed: Bytes that it holds on disk at its peak.
        partial: Its unfinished folder; what an interrupted run left there is a part of ``needed``.

    Raises:
        CompressError: Less is free.
    """
    there = sum(path.stat().st_size for path in partial.rglob("*") if path.is_file())
    missing, free = max(0.0, needed - there), shutil.disk_usage(root).free
    if missing > free:
        raise CompressError(
            f"{verb} needs {human_bytes(missing)} on the disk of {root}, and {human_bytes(free)} are free.",
            "Free some space, or give a folder on a larger disk with --run.",
        )


def prune_disk(goal: Goal, dtype: torch.dtype, effort: str) -> float:
    """Bytes that ``prune`` holds at its peak, with what it keeps for a run that goes on after an interruption.

    That is the curvature at the outputs, ``8 L H min(H, 1024)``, and the refitted weights, ``4 L H (Q' + C')``.
    """
    model, settings = goal.model, goal.settings
    full = PlannedModel(name="", input=model)
    try:
        small = pruned(full, goal.foreseen())
    except CompressError:  # an allocation may lose whole branches, which no foreseen shape does
        small = full
    peak = prune_footprint(full, small, settings, _ground(model, dtype, effort)).disk_peak
    arch, kept = model.architecture, 0.0
    if settings.repair == "refit":
        kept += sum(
            4 * arch.hidden * small.arch.at(layer).linear_shape(spec)[1]
            for layer in range(arch.layers)
            for spec in small.arch.linears_at(layer)
            if spec.role in OUTPUTS
        )
    if CRITERIA.get(settings.criterion).needs == "moments":
        kept += 8 * arch.layers * arch.hidden * min(arch.hidden, SKETCH_ROWS)
    return peak + kept + _beside(model)


def thin_disk(model: ModelInput) -> float:
    """The same where single weights go: a model of the same size, its last shard twice, one bit a weight."""
    size = PlannedModel(name="", input=model).file_bytes
    return size + min(SHARD_BYTES, size) + model.architecture.decoder_linear_parameters() / 8 + _beside(model)


def align_disk(
    model: ModelInput, full: ModelInput, settings: AlignSettings, dtype: torch.dtype, effort: str
) -> float:
    """Bytes that ``align`` holds at its peak."""
    small, teacher = (PlannedModel(name="", input=each) for each in (model, full))
    ground = _ground(model, dtype, effort)
    return align_footprint(small, teacher, settings, ground).disk_peak + _beside(model)


def quantize_disk(model: ModelInput, settings: QuantizeSettings, dtype: torch.dtype, effort: str) -> float:
    """Bytes that ``quantize`` holds at its peak."""
    plain = PlannedModel(name="", input=model)
    small = quantized(plain, settings)
    ground = _ground(model, dtype, effort)
    return quantize_footprint(plain, small, settings, ground, known=True).disk_peak + _beside(model)


def train_disk(model: ModelInput, settings: TrainSettings, dtype: torch.dtype, effort: str) -> float:
    """Bytes that ``train`` holds at its peak."""
    planned = PlannedModel(name="", input=model)
    return train_footprint(planned, settings, _ground(model, dtype, effort)).disk_peak + RECORDS


def recover_disk(full: ModelInput, adapter: Path, *, merge: bool) -> float:
    """Bytes that ``recover`` holds at its peak: the adapter; with ``merge`` the model too, its last shard twice."""
    with AdapterFile(adapter) as file:
        ranks = [file.scaling(owner(name)[0]).rank for name in file.names if ".lora_" in name]
        rank = max(ranks, default=0) * (2 if file.has_initial_factors else 1)
    size = PlannedModel(name="", input=full).file_bytes
    merged = size + min(SHARD_BYTES, size) + _beside(full) if merge else 0.0
    return 4.0 * adapter_parameters(full.architecture, rank, head=True) + merged + RECORDS


def _ground(model: ModelInput, dtype: torch.dtype, effort: str) -> Ground:
    return Ground(itemsize=dtype.itemsize, length=min(LENGTH, positions(model.path)), windows=WINDOWS[effort])


def _beside(model: ModelInput) -> float:
    """Bytes of tokenizer, licence and the like, and of our records."""
    files = (model.path / name for name in SIDE_FILES)
    return RECORDS + sum(file.stat().st_size for file in files if file.is_file())
