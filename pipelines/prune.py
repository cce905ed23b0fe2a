"""``compress prune``: LoRA-guided structured pruning, from a checkpoint to a smaller plain checkpoint."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from compress.model.load import load_model
from compress.pipelines.measure import training_windows, validation_perplexity, validation_windows
from compress.pipelines.model_input import ModelInput, current, device_and_dtype
from compress.pipelines.reopen import check_ids, check_reopens, record_logits
from compress.pipelines.reporter import human_bytes, human_count
from compress.pipelines.settings import PruneSettings
from compress.pipelines.stage import Context, Outcome, run_stage, settings_dict
from compress.pipelines.training import fit_config, training_metrics
from torch import Tensor
from transformers import PreTrainedModel

from compress.adapters.attach import attach_lora, lora_delta
from compress.adapters.train import fit
from compress.data.sources import default_source
from compress.data.windows import Windows
from compress.errors import CompressError, UsageError
from compress.importance import CRITERIA
from compress.importance.base import GroupScores, create_criterion
from compress.model.architecture import resized_config
from compress.model.checkpoint import Checkpoint, require_dense
from compress.prune.controller import PruneController
from compress.prune.schedule import PruningSchedule
from compress.prune.select import ShapePlan, choose_shape
from compress.prune.slice import slice_checkpoint
from compress.structure import StructureMap


def prune(context: Context, settings: PruneSettings) -> Outcome:
    """Prune the chain's current model; see ``compress prune --help``.

    Raises:
        UsageError: A ratio outside (0, 1), an unknown criterion or target, a criterion that cannot do
            without training steps.
        CompressError: The ratio cannot be reached with these targets, or the model cannot be pruned.
    """
    targets = parse_targets(settings.targets)
    if not 0 < settings.ratio < 1:
        raise UsageError(
            f"--ratio {settings.ratio} is not between 0 and 1.", "Give the fraction to remove, such as 0.5."
        )
    criterion = CRITERIA.get(settings.criterion)
    if criterion.requires_training and settings.steps < 1:
        raise UsageError(
            f"The criterion {settings.criterion} scores while it trains and --steps is {settings.steps}.",
            "Give --steps 1 or more, or another criterion.",
        )
    model = current(context, "prune")
    require_dense(model.checkpoint, allow_lq=False)
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
        network = load_model(model.path, dtype=dtype, device=device)
        validation = validation_windows(context, model.path, source)
        before = validation_perplexity(context, network, validation, "the model")
        windows = training_windows(context, model, source, settings)
        structure, plan, deltas, training = find_structure(
            context, model, settings, shape, windows, network, folder
        )
        context.reporter.say(f"prune: {plan.reason}")
        with context.reporter.bar("cut") as progress:
            slice_checkpoint(
                model.checkpoint, model.architecture, structure, folder, deltas=deltas, progress=progress
            )
        del network, deltas
        shutil.rmtree(folder / "training", ignore_errors=True)
        pruned = load_model(folder, dtype="float32", device=device)
        record_logits(pruned, check_ids(model.architecture.vocab, context.common.seed), folder)
        after = validation_perplexity(context, pruned.to(dtype), validation, "the pruned model")
        del pruned
        small = Checkpoint(folder)
        return {
            "before": size_metrics(model.checkpoint) | before,
            "after": size_metrics(small) | after,
            "requested_ratio": plan.requested,
            "achieved_ratio": plan.achieved,
            "removed_of_all_parameters": 1 - small.parameters / model.checkpoint.parameters,
            "removed_bytes": 1 - small.bytes / model.checkpoint.bytes,
            "reason": plan.reason,
            "criterion": settings.criterion,
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
            "reopened_relative_error": check_reopens(folder),
            "data_protocol": dict(windows.protocol),
            **training,
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


def find_structure(
    context: Context,
    model: ModelInput,
    settings: PruneSettings,
    shape: Callable[[GroupScores], ShapePlan],
    windows: Windows,
    network: PreTrainedModel,
    folder: Path,
) -> tuple[StructureMap, ShapePlan, Callable[[str], Tensor | None], dict[str, Any]]:
    """Score, mask and train with one loop.

    Returns:
        The kept indices, the shape they have, the deltas to fold into the weights, what training measured.
    """
    arch, seed = model.architecture, context.common.seed
    adapted = attach_lora(
        network, arch, rank=settings.rank, alpha=settings.alpha, dropout=settings.dropout, seed=seed
    )
    schedule = PruningSchedule(total_steps=max(1, settings.steps))
    measured: dict[str, Any] = {"losses": [], "tokens": 0, "train_seconds": 0.0}
    with PruneController(
        adapted, arch, create_criterion(settings.criterion, arch, seed=seed), schedule, shape
    ) as hook:
        if settings.steps > 0:
            with context.reporter.bar("score, mask and train") as progress:
                result = fit(
                    adapted,
                    windows,
                    fit_config(settings, seed),
                    hooks=[hook],
                    state_dir=folder / "training",
                    progress=progress,
                )
            measured = training_metrics(result)
        structure = hook.structure(base_fingerprint=model.id)
        measured["skipped_steps"] = hook.skipped_steps
        return structure, hook.plan, lambda name: lora_delta(adapted, name), measured


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
