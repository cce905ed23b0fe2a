"""``compress train``: a low-rank adapter on the chain's current model, quantized or not."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from compress.adapters.attach import attach_factors, attach_lora, load_adapter, save_adapter
from compress.adapters.masked import mask_adapters
from compress.adapters.train import fit
from compress.data.sources import default_source
from compress.errors import UsageError
from compress.model.load import load_model
from compress.pipelines.measure import check_length, training_windows, validation_windows
from compress.pipelines.model_input import ModelInput, current, device_and_dtype
from compress.pipelines.reopen import check_ids, record_logits
from compress.pipelines.settings import TrainSettings
from compress.pipelines.stage import Context, Outcome, run_stage, settings_dict
from compress.pipelines.training import fit_config, training_metrics
from compress.prune.weight_masks import FILE_NAME as MASKS
from compress.prune.weight_masks import load_masks


def train(context: Context, settings: TrainSettings) -> Outcome:
    """Train an adapter; see ``compress train --help``.

    Raises:
        UsageError: ``lq`` on a model that is not an LQ checkpoint, or is a thinned one; or windows longer than the
            model's positions.
    """
    model = current(context, "train")
    check_length(model.path, settings.sequence)
    quantized = is_quantized(model)
    if settings.method == "lq" and not quantized:
        raise UsageError(
            f"{model.name} is not quantized, so it has no factors to start from.",
            "Quantize it first, or use --method lora.",
        )
    masks = load_masks(model.path)
    if settings.method == "lq" and masks is not None:
        raise UsageError(
            f"The factors of {model.name} are dense, and adapters of a thinned model have its zeros.",
            "Use --method lora.",
        )
    device, dtype = device_and_dtype(context.common)
    source = context.common.data or default_source()
    config = settings_dict(settings) | {
        "data": source,
        "seed": context.common.seed,
        "dtype": str(dtype).removeprefix("torch."),
    }

    def work(folder: Path) -> Mapping[str, Any]:
        windows = training_windows(context, model.path, source, settings)
        validation = validation_windows(context, model.path, source, length=settings.sequence)
        network = load_model(model.path, dtype=dtype, device=device)
        initial = None
        if settings.method == "lq":
            adapted, initial = attach_factors(
                network,
                model.architecture,
                rank=settings.rank,
                alpha=settings.alpha,
                seed=context.common.seed,
            )
        else:
            adapted = attach_lora(
                network,
                model.architecture,
                rank=settings.rank,
                alpha=settings.alpha,
                dropout=settings.dropout,
                seed=context.common.seed,
            )
        if masks is not None:
            mask_adapters(adapted, masks)
        with context.reporter.bar("train") as progress:
            result = fit(
                adapted,
                windows,
                fit_config(settings, context.common),
                state_dir=folder / "training",
                progress=progress,
                validation=validation,
            )
        save_adapter(adapted, folder, base_name=model.name, initial=initial)
        if masks is not None:
            masks.save(folder / MASKS)
        trainable = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
        del adapted, network
        reopened = load_adapter(load_model(model.path, dtype="float32", device=device), folder)
        record_logits(reopened, check_ids(model.architecture.vocab, context.common.seed), folder)
        shutil.rmtree(folder / "training")
        return training_metrics(result) | {
            "method": settings.method,
            "base": model.name,
            "trainable_parameters": trainable,
            "data_protocol": dict(windows.protocol),
            "validation_protocol": dict(validation.protocol),
        }

    outcome = run_stage(context, "train", config=config, inputs={"model": model.id}, work=work)
    if outcome.fresh and outcome.stage is not None:
        metrics = outcome.stage.record["metrics"]
        context.reporter.table(
            "train",
            ("", "before", "after"),
            [
                (
                    "held-out loss (validation)",
                    f"{metrics['validation_loss_before']:.4f}",
                    f"{metrics['validation_loss_after']:.4f}",
                )
            ],
        )
    return outcome


def is_quantized(model: ModelInput) -> bool:
    """Whether the model is an LQ checkpoint."""
    return (model.checkpoint.config.get("quantization_config") or {}).get("quant_method") == "lq"
