"""``compress train``: a low-rank adapter on the chain's current model, quantized or not."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel

from compress.adapters.attach import (
    attach_factors,
    attach_lora,
    attach_pissa,
    load_adapter,
    save_adapter,
    target_modules,
)
from compress.adapters.masked import mask_adapters
from compress.data.sources import default_source
from compress.errors import UsageError
from compress.model.architecture import Architecture
from compress.model.checkpoint import Checkpoint, checkpoint_architecture
from compress.model.load import load_model
from compress.model.recompute import require_recompute
from compress.pipelines.measure import check_length, training_windows, validation_windows
from compress.pipelines.model_input import ModelInput, current, device_and_dtype, original
from compress.pipelines.reopen import check_ids, record_logits
from compress.pipelines.settings import TrainSettings
from compress.pipelines.small_files import is_small, public_name, write_base_beside
from compress.pipelines.stage import Context, Outcome, aside_dict, run_stage, settings_dict
from compress.pipelines.text import text_inputs
from compress.pipelines.training import (
    announced,
    fit_config,
    parse_adapter_targets,
    train_model,
    training_metrics,
)
from compress.pipelines.ways import choose_way
from compress.pipelines.ways_of_stages import train_count
from compress.prune.weight_masks import FILE_NAME as MASKS
from compress.prune.weight_masks import load_masks
from compress.structure import FILE_NAME as STRUCTURE
from compress.structure import StructureMap


def train(context: Context, settings: TrainSettings) -> Outcome:
    """Train an adapter; see ``compress train --help``.

    Raises:
        UsageError: ``lq`` on a model that is not an LQ checkpoint, ``pissa`` on one, either on a thinned model; a
            target that the model has not got; windows longer than the model's positions; layers that cannot be run
            again.
    """
    start = original(context)
    model = current(context, "train", start)
    check_length(model.path, settings.sequence)
    if settings.recompute:
        require_recompute(model.checkpoint.config)
    quantized = is_quantized(model)
    if settings.method == "lq" and not quantized:
        raise UsageError(
            f"{model.name} is not quantized, so it has no factors to start from.",
            "Quantize it first, or use --method lora.",
        )
    targets = parse_adapter_targets(settings.adapter_targets)
    target_modules(model.architecture, targets)
    tied_head = model.architecture.tied and "lm_head" in targets
    if settings.method == "pissa" and (quantized or tied_head):
        reason = "its weights are quantized" if quantized else "its output matrix is tied to the embedding"
        raise UsageError(
            f"PiSSA takes a part out of each weight of {model.name}, and {reason}.",
            "Use --method lq." if quantized else "Leave lm_head out of --adapter-targets.",
        )
    masks = load_masks(model.path)
    if settings.method != "lora" and masks is not None:
        raise UsageError(
            f"--method {settings.method} starts from dense factors, and adapters of {model.name} have its zeros.",
            "Use --method lora.",
        )
    device, dtype = device_and_dtype(context.common)
    source = context.common.data or default_source()
    config = settings_dict(settings) | {
        "data": source,
        "seed": context.common.seed,
        "dtype": str(dtype).removeprefix("torch."),
    }

    way = choose_way(
        context,
        "train",
        model,
        device,
        dtype,
        train_count(model, settings),
        source=source,
        recompute=settings.recompute,
    )

    def work(folder: Path) -> Mapping[str, Any]:
        windows = training_windows(context, model.path, source, settings)
        validation = validation_windows(context, model.path, source, length=settings.sequence)
        what: dict[str, Any] = {
            "path": str(model.path),
            "dtype": config["dtype"],
            "settings": asdict(settings),
            "seed": context.common.seed,
        }
        ranks = announced(context, "train", device, what)
        adapted, initial = adapter_to_train(device=device, **what)
        with context.reporter.bar("train") as progress:
            result = train_model(
                context,
                adapted,
                windows,
                fit_config(settings, context.common),
                ranks=ranks,
                state_dir=folder / "training",
                progress=progress,
                validation=validation,
            )
        name = public_name(model.name)
        base = StructureMap.load(model.path / STRUCTURE) if is_small(model.path) else start.id
        save_adapter(adapted, folder, base_name=name, initial=initial, base=base)
        write_base_beside(context, start, model.path, folder)
        if masks is not None:
            masks.save(folder / MASKS)
        trainable = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
        del adapted
        reopened = load_adapter(way.open(model.path, dtype="float32", device=device), folder)
        record_logits(reopened, check_ids(model.architecture.vocab, context.common.seed), folder)
        return training_metrics(result) | {
            "method": settings.method,
            "base": name,
            "trainable_parameters": trainable,
            "data_protocol": dict(windows.protocol),
            "validation_protocol": dict(validation.protocol),
        }

    def disk() -> float:
        from compress.pipelines.disk import train_disk

        return train_disk(model, settings, dtype, context.common.effort or "quick")

    outcome = run_stage(
        context,
        "train",
        config=config,
        inputs={"model": model.id} | text_inputs(source),
        work=work,
        scratch=("training",),
        disk=disk,
        aside=aside_dict(settings),
    )
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


def adapter_to_train(
    *, path: str, dtype: str, settings: Mapping[str, Any], seed: int, device: str
) -> tuple[PeftModel, dict[str, Tensor] | None]:
    """A model with adapters as the settings start them, and their initial factors where those are not zero.

    Args:
        path: Folder of the model.
        dtype: In which it computes.
        settings: Those of ``train``, as JSON values.
        seed: Of the factors.
        device: Where it is.
    """
    wanted = TrainSettings(**settings)
    network = load_model(path, dtype=dtype, device=device)
    adapted, initial = attach(network, checkpoint_architecture(Checkpoint(path)), wanted, seed)
    masks = load_masks(Path(path))
    if masks is not None:
        mask_adapters(adapted, masks)
    return adapted, initial


def attach(
    network: PreTrainedModel, arch: Architecture, settings: TrainSettings, seed: int
) -> tuple[PeftModel, dict[str, Tensor] | None]:
    """The network with adapters as the settings start them, and their initial factors where those are not zero."""
    shared: dict[str, Any] = {
        "rank": settings.rank,
        "alpha": settings.alpha,
        "targets": parse_adapter_targets(settings.adapter_targets),
        "rank_stabilized": settings.rslora,
    }
    if settings.method == "lq":
        return attach_factors(network, arch, seed=seed, **shared)
    if settings.method == "pissa":
        return attach_pissa(network, arch, **shared)
    return attach_lora(network, arch, dropout=settings.dropout, seed=seed, **shared), None


def is_quantized(model: ModelInput) -> bool:
    """Whether the model is an LQ checkpoint."""
    return (model.checkpoint.config.get("quantization_config") or {}).get("quant_method") == "lq"
