"""``compress align``: continued pre-training of the pruned model's own weights, before anything is quantized."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedModel

from compress.adapters.align import release_weights, write_weights
from compress.adapters.masked import MaskedWeights
from compress.adapters.optimizer import require_galore
from compress.adapters.train import Distillation
from compress.data.sources import default_source
from compress.errors import UsageError
from compress.model.checkpoint import Checkpoint, require_dense
from compress.model.load import load_model
from compress.model.recompute import require_recompute
from compress.pipelines.measure import (
    MEASURES,
    check_length,
    known_perplexity,
    measured_once,
    training_windows,
    validation_windows,
)
from compress.pipelines.model_input import current, device_and_dtype
from compress.pipelines.prove import record_and_score
from compress.pipelines.prune_metrics import size_metrics
from compress.pipelines.prune_repair import TEXT_SHARE
from compress.pipelines.reopen import check_reopens
from compress.pipelines.settings import AlignSettings
from compress.pipelines.small_files import carry, is_small
from compress.pipelines.stage import Context, Outcome, aside_dict, run_stage, settings_dict
from compress.pipelines.text import text_inputs
from compress.pipelines.training import announced, fit_config, train_model, training_metrics
from compress.pipelines.ways import choose_way
from compress.pipelines.ways_of_stages import align_count
from compress.prune.weight_masks import load_masks

if TYPE_CHECKING:  # one process needs none of it
    from compress.adapters.ranks import Ranks

DRAW = 1000
"""Which draw of the training text alignment reads: another one than scoring, repair and ``train``."""


def align(context: Context, settings: AlignSettings) -> Outcome:
    """Train the weights of the chain's pruned model; see ``compress align --help``.

    The weights are held in float32 while they train and stored in the model's own dtypes.

    Raises:
        UsageError: There is no pruned model, its full model is not in the chain and distillation is wanted, GaLore is
            wanted for a thinned model, windows are longer than the model's positions, or its layers cannot be run
            again.
        CompressError: The model is quantized, or the package that GaLore needs is missing.
    """
    model = current(context, "align")
    known = context.workspace.model or {}
    full = Path(str(known.get("path", model.path)))
    require_dense(model.checkpoint, allow_lq=False)
    if not is_small(model.path):
        raise UsageError(
            f"{model.name} was not pruned, so there is nothing to align.", "Run compress prune first."
        )
    if settings.loss != "text" and is_small(full):
        raise UsageError(
            f"The chain starts from the small model {full.name}, so there is no full model to distil from.",
            "Give --loss text.",
        )
    if settings.optimizer == "galore":
        require_galore()
    masks = load_masks(model.path)
    if masks is not None and settings.optimizer == "galore":
        raise UsageError(
            "GaLore's updates would fill the zeros of a thinned model.", "Use --optimizer adamw."
        )
    if masks is not None and context.team is not None:
        raise UsageError(
            f"{model.name} is thinned, and its zeros are kept in whole matrices, of which each process has a part.",
            "Run align without torchrun.",
        )
    transposed = any(spec.transposed for spec in model.architecture.linears)
    check_length(model.path, settings.sequence)
    if settings.recompute:
        require_recompute(model.checkpoint.config)
    device, dtype = device_and_dtype(context.common)
    source = context.common.data or default_source()
    config = settings_dict(settings) | {
        "data": source,
        "seed": context.common.seed,
        "dtype": str(dtype).removeprefix("torch."),
    }

    choose_way(
        context,
        "align",
        model,
        device,
        dtype,
        align_count(model, full if settings.loss != "text" else None, settings),
        source=source,
        streams=False,
        recompute=settings.recompute,
    )

    def work(folder: Path) -> Mapping[str, Any]:
        windows = training_windows(context, model.path, source, settings, offset=DRAW)
        validation = validation_windows(context, model.path, source)
        before = measured_once(
            folder / MEASURES / "before.json",
            lambda: known_perplexity(context, model, validation, dtype, device),
        )
        what: dict[str, Any] = {
            "path": str(model.path),
            "teacher": None if settings.loss == "text" else str(full),
            "text_share": TEXT_SHARE[settings.loss],
            "dtype": config["dtype"],
        }
        ranks = announced(context, "align", device, what)
        network, trainable, distillation = weights_to_train(device=device, ranks=ranks, **what)
        hooks = [] if masks is None else [MaskedWeights(network, masks, transposed=transposed)]
        with context.reporter.bar("align") as progress:
            result = train_model(
                context,
                network,
                windows,
                fit_config(settings, context.common),
                ranks=ranks,
                hooks=hooks,
                sharded=ranks is not None,
                state_dir=folder / "training",
                progress=progress,
                distillation=distillation,
            )
        write_weights(network, model.checkpoint, folder, ranks=ranks)
        carry(model.path, folder)
        del network, distillation
        after = record_and_score(
            context,
            folder,
            model.architecture.vocab,
            validation,
            "the aligned model",
            dtype=dtype,
            device=device,
            into=folder / MEASURES / "after.json",
        )
        reopened = check_reopens(folder)
        return {
            **training_metrics(result),
            "before": size_metrics(model.checkpoint) | before,
            "after": size_metrics(Checkpoint(folder)) | after,
            "trainable_parameters": trainable,
            "frozen_parameters": model.checkpoint.parameters - trainable,
            "data_protocol": dict(windows.protocol),
            "reopened_relative_error": reopened,
        }

    def disk() -> float:
        from compress.pipelines.disk import align_disk

        return align_disk(model, model, settings, dtype, context.common.effort or "quick")

    inputs = {"model": model.id} | text_inputs(source)
    if settings.loss != "text":
        inputs["teacher"] = str(known["fingerprint"])
    outcome = run_stage(
        context,
        "align",
        config=config,
        inputs=inputs,
        work=work,
        scratch=("training", MEASURES),
        disk=disk,
        aside=aside_dict(settings),
    )
    if outcome.fresh and outcome.stage is not None:
        show(context, outcome.stage.record["metrics"])
    return outcome


def weights_to_train(
    *, path: str, teacher: str | None, text_share: float, dtype: str, device: str, ranks: Ranks | None
) -> tuple[PreTrainedModel, int, Distillation | None]:
    """A model whose weights ask for gradients, how many numbers those are, and what it is trained towards.

    Args:
        path: Folder of the model, held in float32.
        teacher: Folder of the full model; None: the text is all there is.
        text_share: The text's share of the targets.
        dtype: In which the teacher computes.
        device: Where both are.
        ranks: The processes, each of which is left its part of both; None: this one has them whole.
    """
    # What is cut moves to the device part by part.
    place = device if ranks is None else "cpu"
    network = load_model(path, dtype="float32", device=place)
    trainable = release_weights(network)
    distillation = None
    if ranks is not None:
        from compress.adapters.sharded import shard

        shard(network, ranks)
    if teacher is not None:
        teaching = load_model(teacher, dtype=dtype, device=place)
        if ranks is not None:
            shard(teaching.requires_grad_(False), ranks)
        distillation = Distillation(teacher=teaching, text_share=text_share)
    return network, trainable, distillation


def show(context: Context, metrics: Mapping[str, Any]) -> None:
    """Print the before and after table."""
    before, after = metrics["before"], metrics["after"]
    context.reporter.table(
        "align",
        ("", "before", "after"),
        [("perplexity (validation)", f"{before['perplexity']:.2f}", f"{after['perplexity']:.2f}")],
    )
    context.reporter.out.print(f"perplexity: {after['protocol_line']}", markup=False)
