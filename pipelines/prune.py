"""``compress prune``: LoRA-guided structured pruning, from a checkpoint to a smaller plain checkpoint."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from compress.adapters.attach import attach_lora, lora_delta, save_adapter
from compress.adapters.merge import merge_adapter
from compress.adapters.train import fit
from compress.data.sources import default_source
from compress.data.windows import Windows
from compress.errors import CompressError, UsageError
from compress.importance import CRITERIA
from compress.importance.base import GroupScores, create_criterion
from compress.model.architecture import resized_config
from compress.model.checkpoint import Checkpoint, checkpoint_architecture, require_dense
from compress.model.load import load_model
from compress.pipelines.measure import (
    calibration_windows,
    check_length,
    training_windows,
    validation_perplexity,
    validation_windows,
)
from compress.pipelines.model_input import ModelInput, current, device_and_dtype
from compress.pipelines.reopen import check_ids, check_reopens, record_logits
from compress.pipelines.reporter import human_bytes, human_count
from compress.pipelines.settings import PruneSettings
from compress.pipelines.stage import Context, Outcome, run_stage, settings_dict
from compress.pipelines.training import fit_config, training_metrics
from compress.pipelines.workspace import FORMAT_VERSION, read_json, write_json
from compress.prune.compensate import compensate
from compress.prune.controller import PruneController
from compress.prune.schedule import PruningSchedule
from compress.prune.select import ShapePlan, choose_shape
from compress.prune.slice import slice_checkpoint
from compress.structure import FILE_NAME as STRUCTURE
from compress.structure import StructureMap

BATCH = 4
"""Windows per forward pass of the refit."""


def prune(context: Context, settings: PruneSettings) -> Outcome:
    """Prune the chain's current model; see ``compress prune --help``.

    Raises:
        UsageError: An unknown criterion or target, a criterion that cannot do
            without training steps, windows longer than the model's positions.
        CompressError: The ratio cannot be reached with these targets, or the model cannot be pruned.
    """
    targets = parse_targets(settings.targets)
    criterion = CRITERIA.get(settings.criterion)
    if criterion.requires_training and settings.steps < 1:
        raise UsageError(
            f"The criterion {settings.criterion} scores while it trains and --steps is {settings.steps}.",
            "Give --steps 1 or more, or another criterion.",
        )
    model = current(context, "prune")
    require_dense(model.checkpoint, allow_lq=False)
    check_length(model.path, settings.sequence)
    multiple = settings.multiple or default_multiple(model.architecture.channels)
    shape = shape_for(model, settings.ratio, targets, multiple)
    device, dtype = device_and_dtype(context.common)
    source = context.common.data or default_source()
    config = settings_dict(settings) | {
        "multiple": multiple,
        "data": source,
        "seed": context.common.seed,
        "dtype": str(dtype).removeprefix("torch."),
    }

    def work(folder: Path) -> Mapping[str, Any]:
        validation = validation_windows(context, model.path, source)
        measured = cut_and_repair(context, model, settings, shape, source, folder, device, dtype)
        before = validation_perplexity(
            context, load_model(model.path, dtype=dtype, device=device), validation, "the model"
        )
        pruned = load_model(folder, dtype="float32", device=device)
        record_logits(pruned, check_ids(model.architecture.vocab, context.common.seed), folder)
        after = validation_perplexity(context, pruned.to(dtype), validation, "the pruned model")
        del pruned
        reopened = check_reopens(folder)
        for name in ("cut", "scoring", "repair"):
            shutil.rmtree(folder / name, ignore_errors=True)
        small = Checkpoint(folder)
        return {
            "before": size_metrics(model.checkpoint) | before,
            "after": size_metrics(small) | after,
            "removed_of_all_parameters": 1 - small.parameters / model.checkpoint.parameters,
            "removed_bytes": 1 - small.bytes / model.checkpoint.bytes,
            "criterion": settings.criterion,
            "reopened_relative_error": reopened,
            **measured,
        }

    outcome = run_stage(context, "prune", config=config, inputs={"model": model.id}, work=work)
    if outcome.fresh and outcome.stage is not None:
        show(context, outcome.stage.record["metrics"])
    return outcome


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


def shape_for(
    model: ModelInput, ratio: float, targets: tuple[str, ...], multiple: int
) -> Callable[[GroupScores], ShapePlan]:
    """A function from scores to the shape nearest to ``ratio``; near-ties go to the one that hurts less.

    Raises:
        UsageError, CompressError: The ratio cannot be had; said at once, before anything is scored.
    """

    def accepts(kv_heads: int, channels: int) -> bool:
        arch = model.architecture
        heads = kv_heads * arch.queries_per_group
        try:
            resized_config(model.checkpoint.config, arch, heads=heads, kv_heads=kv_heads, channels=channels)
        except CompressError:
            return False
        return True

    def choose(scores: GroupScores | None = None) -> ShapePlan:
        return choose_shape(
            model.architecture, ratio, targets=targets, multiple=multiple, scores=scores, accepts=accepts
        )

    choose()
    return choose


def cut_and_repair(
    context: Context,
    model: ModelInput,
    settings: PruneSettings,
    shape: Callable[[GroupScores], ShapePlan],
    source: str,
    folder: Path,
    device: str,
    dtype: Any,
) -> dict[str, Any]:
    """Write the pruned model into ``folder``; its steps are kept in sub-folders, which the caller removes.

    Returns:
        What was chosen and measured on the way, as JSON values.
    """
    cut = folder / "cut"
    if not (cut / "measured.json").is_file():
        shutil.rmtree(cut, ignore_errors=True)
        network = load_model(model.path, dtype=dtype, device=device)
        windows = training_windows(context, model.path, source, settings)
        structure, plan, deltas, training = find_structure(
            context, model, settings, shape, windows, network, folder / "scoring"
        )
        if settings.repair == "refit":
            del deltas
            deltas = refit_deltas(context, model, settings, structure, source, device, dtype)
        with context.reporter.bar("cut") as progress:
            slice_checkpoint(
                model.checkpoint, model.architecture, structure, cut, deltas=deltas, progress=progress
            )
        del network, deltas
        training["data_protocol"] = dict(windows.protocol)
        write_json(
            cut / "measured.json",
            {"format_version": FORMAT_VERSION, **shape_metrics(plan, model, structure), **training},
        )
    measured = read_json(cut / "measured.json")
    measured.pop("format_version")
    context.reporter.say(f"prune: {measured['reason']}")
    if settings.repair_steps > 0:
        measured["repair"] = repair(context, model, cut, settings, source, folder, device, dtype)
    else:
        for file in cut.iterdir():
            shutil.copyfile(file, folder / file.name)
        (folder / "measured.json").unlink()
    shutil.copyfile(cut / STRUCTURE, folder / STRUCTURE)
    return measured


def find_structure(
    context: Context,
    model: ModelInput,
    settings: PruneSettings,
    shape: Callable[[GroupScores], ShapePlan],
    windows: Windows,
    network: PreTrainedModel,
    state_dir: Path,
) -> tuple[StructureMap, ShapePlan, Callable[[str], Tensor | None], dict[str, Any]]:
    """Score, mask and train with one loop.

    Returns:
        The kept indices, the shape they have, the adapter's deltas by module, what training measured.
    """
    arch, seed = model.architecture, context.common.seed
    adapted = attach_lora(
        network, arch, rank=settings.rank, alpha=settings.alpha, dropout=settings.dropout, seed=seed
    )
    schedule = PruningSchedule(total_steps=max(1, settings.steps))
    criterion = create_criterion(settings.criterion, arch, seed=seed)
    measured: dict[str, Any] = {"losses": [], "tokens": 0, "train_seconds": 0.0}
    with PruneController(adapted, arch, criterion, schedule, shape) as hook:
        if settings.steps > 0:
            with context.reporter.bar("score and mask") as progress:
                result = fit(
                    adapted,
                    windows,
                    fit_config(settings, seed),
                    hooks=[hook],
                    state_dir=state_dir,
                    progress=progress,
                )
            measured = training_metrics(result)
        structure = hook.structure(base_fingerprint=model.id)
        measured["skipped_steps"] = hook.skipped_steps
        return structure, hook.plan, lambda name: lora_delta(adapted, name), measured


def refit_deltas(
    context: Context,
    model: ModelInput,
    settings: PruneSettings,
    structure: StructureMap,
    source: str,
    device: str,
    dtype: Any,
) -> Callable[[str], Tensor | None]:
    """What refitting o and down to the full model's activations adds to their weights, by module."""
    windows = calibration_windows(context, model.path, source, tokens=settings.refit_tokens)
    network = load_model(model.path, dtype=dtype, device=device)
    with context.reporter.bar("refit o and down") as progress:
        weights = compensate(
            network,
            model.architecture,
            structure,
            windows.ids,
            batch=min(BATCH, len(windows)),
            progress=progress,
        )

    arch = model.architecture
    transposed = {arch.module_name(i, s) for i in range(arch.layers) for s in arch.linears if s.transposed}

    def delta(name: str) -> Tensor | None:
        if name not in weights:
            return None
        stored = model.checkpoint.read(f"{name}.weight").float()
        return weights[name] - (stored.t() if name in transposed else stored)

    return delta


def repair(
    context: Context,
    model: ModelInput,
    cut: Path,
    settings: PruneSettings,
    source: str,
    folder: Path,
    device: str,
    dtype: Any,
) -> dict[str, Any]:
    """Distil the full model into the small one through a LoRA; the merged result goes into ``folder``.

    Distilled, not trained on the text: what the text teaches is left for the adapters that recovery carries over.
    """
    checkpoint = Checkpoint(cut)
    arch, seed = checkpoint_architecture(checkpoint), context.common.seed
    training = replace(
        settings, steps=settings.repair_steps, lr=settings.repair_lr, rank=settings.repair_rank,
        alpha=2 * settings.repair_rank, dropout=0.0,
    )  # fmt: skip
    windows = training_windows(context, cut, source, training, offset=1)
    adapted = attach_lora(
        load_model(cut, dtype=dtype, device=device),
        arch,
        rank=training.rank,
        alpha=training.alpha,
        dropout=training.dropout,
        seed=seed + 1,
    )
    work = folder / "repair"
    with context.reporter.bar("repair") as progress:
        result = fit(
            adapted,
            windows,
            fit_config(training, seed),
            state_dir=work,
            progress=progress,
            teacher=load_model(model.path, dtype=dtype, device=device),
        )
    save_adapter(adapted, work / "adapter", base_name="cut")
    merge_adapter(checkpoint, work / "adapter", folder)
    return training_metrics(result)


def shape_metrics(plan: ShapePlan, model: ModelInput, structure: StructureMap) -> dict[str, Any]:
    """What was kept, as JSON values."""
    return {
        "requested_ratio": plan.requested,
        "achieved_ratio": plan.achieved,
        "reason": plan.reason,
        "shape": {"kv_heads": plan.kv_heads, "channels": plan.channels},
        "original": {
            "kv_heads": model.architecture.kv_heads,
            "channels": model.architecture.channels,
            "layers": model.architecture.layers,
        },
        "kept": {
            "kv_groups": [layer.kv_groups.tolist() for layer in structure.layers],
            "channels_kept_per_layer": [len(layer.channels) for layer in structure.layers],
        },
    }


def size_metrics(checkpoint: Checkpoint) -> dict[str, int]:
    """Parameters and bytes of the stored tensors."""
    return {"parameters": checkpoint.parameters, "bytes": checkpoint.bytes}


def show(context: Context, metrics: Mapping[str, Any]) -> None:
    """Print the before and after table."""
    before, after = metrics["before"], metrics["after"]
    context.reporter.table(
        "prune",
        ("", "before", "after"),
        [
            ("parameters", human_count(before["parameters"]), human_count(after["parameters"])),
            ("weight bytes", human_bytes(before["bytes"]), human_bytes(after["bytes"])),
            (
                "perplexity (validation)",
                f"{before['perplexity']:.2f}",
                f"{after['perplexity']:.2f}",
            ),
            (
                "decoder linear parameters removed",
                f"asked {metrics['requested_ratio']:.1%}",
                f"{metrics['achieved_ratio']:.1%}",
            ),
        ],
    )
    context.reporter.out.print(f"perplexity: {after['protocol_line']}", markup=False)
