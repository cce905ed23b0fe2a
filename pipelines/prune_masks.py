"""``compress prune --shape semi`` and ``unstructured``: single weights become zero, every matrix keeps its size."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from compress.data.sources import default_source
from compress.errors import CompressError, UsageError
from compress.importance.input_norms import input_norms
from compress.kept import NOTHING_KEPT, Kept
from compress.model.architecture import LinearSpec
from compress.model.checkpoint import Checkpoint, CheckpointWriter, copy_side_files, require_dense
from compress.model.layout import ATTENTION_ROLES
from compress.model.uneven_config import refuse_uneven
from compress.pipelines.measure import (
    MEASURES,
    calibration_windows,
    measured_once,
    validation_perplexity,
    validation_windows,
)
from compress.pipelines.model_input import ModelInput, current, device_and_dtype
from compress.pipelines.prove import record_and_score
from compress.pipelines.prune_goal import DEFAULT_RATIO, parse_targets
from compress.pipelines.prune_metrics import size_metrics, structure_metrics
from compress.pipelines.prune_place import BATCH
from compress.pipelines.reopen import check_reopens
from compress.pipelines.settings import PruneSettings
from compress.pipelines.small_files import write_base
from compress.pipelines.stage import Context, Outcome, run_stage
from compress.pipelines.text import text_inputs
from compress.pipelines.ways import choose_way
from compress.pipelines.ways_of_stages import thin_count
from compress.progress import Progress
from compress.prune.local import pruned_layers
from compress.prune.sparsify import Pattern, keep_pattern, keep_share, parse_pattern, weight_scores
from compress.prune.weight_masks import FILE_NAME as MASKS
from compress.prune.weight_masks import WeightMasks, pack_bits, unpack_bits
from compress.structure import FILE_NAME as STRUCTURE
from compress.structure import full_layer, structure_map

MASKED = ("semi", "unstructured")
"""Shapes that keep every matrix's size."""
CRITERIA = ("wanda", "magnitude")
"""Criteria that score single weights."""
SCORING, THINNED = "scoring", "thinned"
"""Sub-folders of unfinished work: the norms of the inputs, and the masks found so far."""


def thin(context: Context, settings: PruneSettings) -> Outcome:
    """Set single weights of the chain's model to zero; see ``compress prune --help``.

    Raises:
        UsageError: A criterion that scores groups, a size or a ratio that the pattern does not have, no layer left.
        CompressError: The ratio cannot be reached, or rows cannot be divided by the pattern.
    """
    targets = parse_targets(settings.targets)
    check_settings(settings)
    model = current(context, "prune")
    require_dense(model.checkpoint, allow_lq=False)
    refuse_uneven(model.architecture)
    chosen = thinned_linears(model, settings, targets)
    share = share_of(model, settings, chosen)
    device, dtype = device_and_dtype(context.common)
    source = context.common.data or default_source()
    config: dict[str, Any] = {
        "shape": settings.shape,
        "criterion": settings.criterion,
        "targets": settings.targets,
        "skip_last": settings.skip_last,
        "calibration_tokens": settings.calibration_tokens,
        "data": source,
        "seed": context.common.seed,
        "dtype": str(dtype).removeprefix("torch."),
    }
    if settings.skip_first is not None:
        config["skip_first"] = settings.skip_first
    if isinstance(share, Pattern):
        config["pattern"] = str(share)
    else:
        config |= {"ratio": settings.ratio or DEFAULT_RATIO, "ratio_of": settings.ratio_of}

    way = choose_way(context, "prune", model, device, dtype, thin_count(model, settings), source=source)

    def work(folder: Path) -> Mapping[str, Any]:
        arch = model.architecture
        validation = validation_windows(context, model.path, source)
        open_full = partial(way.open, model.path, dtype=dtype, device=device)
        norms: Mapping[str, Tensor] = {}
        protocol: dict[str, Any] = {}
        if settings.criterion == "wanda":
            windows = calibration_windows(context, model.path, source, tokens=settings.calibration_tokens)
            protocol = {"data_protocol": dict(windows.protocol), "scoring_tokens": windows.ids.numel()}

            def score() -> Mapping[str, Tensor]:
                with context.reporter.bar("score (wanda)") as progress:
                    return input_norms(open_full(), arch, windows.ids, batch=BATCH, progress=progress)

            norms = Kept(folder / SCORING).tensors("norms", score)
        with context.reporter.bar("thin") as progress:
            masks = write_thinned(
                model, chosen, share, norms, folder, kept=Kept(folder / THINNED), progress=progress
            )
        whole = structure_map(arch, [full_layer(arch)] * arch.layers, base_fingerprint=model.id)
        whole.save(folder / STRUCTURE)
        write_base(context, model, folder)
        before = measured_once(
            folder / MEASURES / "before.json",
            lambda: validation_perplexity(context, open_full(), validation, "the model"),
        )
        after = record_and_score(
            context,
            folder,
            arch.vocab,
            validation,
            "the thinned model",
            dtype=dtype,
            device=device,
            way=way,
            into=folder / MEASURES / "after.json",
        )
        total = arch.decoder_linear_parameters()
        return {
            "before": size_metrics(model.checkpoint) | before,
            "after": size_metrics(Checkpoint(folder)) | after,
            "masked_weights": masks.removed,
            "masked_ratio": masks.removed / total,
            "reason": f"{masks.removed / total:.2%} of the decoder linear weights are zero: {masks.pattern} "
            f"in {len(masks.packed)} of {len(_linears(model))} matrices.",
            "criterion": settings.criterion,
            "skipped_steps": 0,
            "reopened_relative_error": check_reopens(folder, way=way),
            **structure_metrics(model, whole),
            **protocol,
        }

    def disk() -> float:
        from compress.pipelines.disk import thin_disk

        return thin_disk(model)

    inputs = {"model": model.id} | text_inputs(source)
    outcome = run_stage(
        context,
        "prune",
        config=config,
        inputs=inputs,
        work=work,
        scratch=(SCORING, THINNED, MEASURES),
        disk=disk,
    )
    if outcome.fresh and outcome.stage is not None:
        show(context, outcome.stage.record["metrics"])
    return outcome


def check_settings(settings: PruneSettings) -> None:
    """Refuse settings that single weights do not have.

    Raises:
        UsageError: They contradict the shape.
    """
    if settings.criterion not in CRITERIA:
        raise UsageError(
            f"The criterion {settings.criterion} scores groups, and --shape {settings.shape} drops single weights.",
            f"Give --criterion {' or '.join(CRITERIA)}.",
        )
    for name in ("params", "size"):
        if getattr(settings, name) is not None:
            raise UsageError(
                f"--shape {settings.shape} leaves the sizes as they are, so --{name} cannot be reached.",
                "Give --ratio or --pattern, or another --shape.",
            )
    if settings.criterion_options.strip():
        raise UsageError(
            f"--criterion-options are about the scores of groups, and --shape {settings.shape} scores single weights.",
            "Leave them out.",
        )
    if settings.recompute:
        raise UsageError(
            f"--recompute is about backward passes, which --shape {settings.shape} does without.",
            "Leave it out.",
        )
    if settings.ratio_of == "parts":
        raise UsageError(
            f"--ratio-of parts counts heads and channels, and --shape {settings.shape} drops single weights.",
            "Give --ratio-of model or layers.",
        )
    if settings.shape == "semi" and settings.ratio is not None:
        raise UsageError("With --shape semi the pattern decides how much goes.", "Leave out --ratio.")


def thinned_linears(
    model: ModelInput, settings: PruneSettings, targets: tuple[str, ...]
) -> dict[str, LinearSpec]:
    """Module name -> linear, of those that lose weights."""
    arch = model.architecture
    return {
        arch.module_name(layer, spec): spec
        for layer in pruned_layers(arch.layers, settings.skip_first, settings.skip_last)
        for spec in arch.linears
        if ("heads" if spec.role in ATTENTION_ROLES else "mlp") in targets
    }


def share_of(model: ModelInput, settings: PruneSettings, chosen: Mapping[str, LinearSpec]) -> Pattern | float:
    """The pattern, or the share of every thinned row that goes.

    Raises:
        UsageError: The pattern cannot be read.
        CompressError: The chosen matrices are too few for the ratio, or rows cannot be divided by the pattern.
    """
    arch = model.architecture
    if settings.shape == "semi":
        pattern = parse_pattern(settings.pattern)
        for spec in chosen.values():
            into = arch.linear_shape(spec)[1]
            if into % pattern.of:
                raise CompressError(
                    f"Rows of {into} weights ({spec.name}) cannot be divided into groups of {pattern.of}.",
                    "Give another --pattern, or --shape unstructured.",
                )
        return pattern
    ratio = DEFAULT_RATIO if settings.ratio is None else settings.ratio
    if settings.ratio_of == "layers":
        return ratio
    part = sum(math.prod(arch.linear_shape(spec)) for spec in chosen.values())
    share = ratio * arch.decoder_linear_parameters() / part
    if share >= 1:
        most = part / arch.decoder_linear_parameters()
        raise CompressError(
            f"A ratio of {ratio:g} of the whole cannot come from matrices that hold {most:.1%} of it.",
            "Skip fewer layers, name more --targets, or give --ratio-of layers.",
        )
    return share


def write_thinned(
    model: ModelInput,
    chosen: Mapping[str, LinearSpec],
    share: Pattern | float,
    norms: Mapping[str, Tensor],
    folder: Path,
    *,
    kept: Kept = NOTHING_KEPT,
    progress: Progress | None = None,
) -> WeightMasks:
    """Write the model with its zeros, and the masks beside it; one tensor is in memory at a time.

    Args:
        model: The full model.
        chosen: What loses weights.
        share: How much of it.
        norms: L2 norms of the inputs by module, for Wanda's scores; empty: magnitude.
        folder: Where to write.
        kept: Has the masks that an interrupted run of the same request has found.
        progress: Called after every tensor.
    """
    packed: dict[str, Tensor] = {}
    columns: dict[str, int] = {}
    with CheckpointWriter(folder, config=model.checkpoint.config) as writer:
        for done, name in enumerate(model.checkpoint.names, start=1):
            tensor, module = model.checkpoint.read(name), name.removesuffix(".weight")
            if module in chosen and name.endswith(".weight"):
                weight_OI = tensor.T if chosen[module].transposed else tensor
                find = partial(_mask, weight_OI, norms.get(module), share)
                packed[module], columns[module] = kept.tensors(module, find)["mask"], weight_OI.shape[1]
                mask_OI = unpack_bits(packed[module], columns[module])
                tensor = tensor * (mask_OI.T if chosen[module].transposed else mask_OI)
            writer.add(name, tensor)
            if progress is not None:
                progress(done, len(model.checkpoint.names), name)
        writer.finish()
    copy_side_files(model.checkpoint.path, folder)
    pattern = str(share) if isinstance(share, Pattern) else "unstructured"
    masks = WeightMasks(pattern=pattern, packed=packed, columns=columns)
    masks.save(folder / MASKS)
    return masks


def _mask(weight_OI: Tensor, norm_I: Tensor | None, share: Pattern | float) -> dict[str, Tensor]:
    """Which weights of one matrix stay, packed by ``pack_bits``."""
    scores = weight_scores(weight_OI, norm_I)
    found = keep_pattern(scores, share) if isinstance(share, Pattern) else keep_share(scores, share)
    return {"mask": pack_bits(found)}


def _linears(model: ModelInput) -> list[LinearSpec]:
    arch = model.architecture
    return [spec for layer in range(arch.layers) for spec in arch.linears_at(layer)]


def show(context: Context, metrics: Mapping[str, Any]) -> None:
    """Print the before and after table."""
    before, after = metrics["before"], metrics["after"]
    context.reporter.say(f"prune: {metrics['reason']}")
    context.reporter.table(
        "prune",
        ("", "before", "after"),
        [
            ("perplexity (validation)", f"{before['perplexity']:.2f}", f"{after['perplexity']:.2f}"),
            ("decoder linear weights that are zero", "", f"{metrics['masked_ratio']:.1%}"),
        ],
    )
    context.reporter.out.print(f"perplexity: {after['protocol_line']}", markup=False)
