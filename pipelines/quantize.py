"""``compress quantize``: every decoder matrix as quantized + low-rank, bits and ranks chosen under one budget."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from compress.data.sources import default_source
from compress.durable import replacing
from compress.model.checkpoint import Checkpoint, require_dense
from compress.pipelines.allocate import (
    Allocation,
    Choice,
    allocate,
    check_solver,
    limit_in_bits,
    narrow,
    parse_rank,
)
from compress.pipelines.engines import require_processors
from compress.pipelines.error_tables import all_exact, build_tables, exact_tables
from compress.pipelines.fisher_files import FisherFiles
from compress.pipelines.hessian_walk import TABLE_TOKENS, HessianWalk, sensitivities
from compress.pipelines.lq_writer import decompose_layers, write_checkpoint
from compress.pipelines.matrices import left_dense_of, matrices_of
from compress.pipelines.measure import known_perplexity, measured_once, validation_windows
from compress.pipelines.model_input import ModelInput, current, device_and_dtype
from compress.pipelines.prove import record_and_score
from compress.pipelines.quantize_tables import show, show_left_out, singular_hessians
from compress.pipelines.reopen import check_reopens
from compress.pipelines.settings import QuantizeSettings
from compress.pipelines.small_files import carry
from compress.pipelines.stage import Context, Outcome, run_stage, settings_dict
from compress.pipelines.text import text_inputs
from compress.pipelines.tradeoff import tradeoff
from compress.pipelines.vocabulary import (
    eight_bit_choices,
    load_moments,
    save_moments,
    vocabulary_matrices,
)
from compress.pipelines.way import WHOLE, Way
from compress.pipelines.ways import choose_way
from compress.pipelines.ways_of_stages import quantize_count
from compress.pipelines.workspace import read_json, write_json
from compress.quantize.config import QuantConfig
from compress.quantize.vocabulary import MatrixMoments
from compress.solvers.budget import parse_budget

SENSITIVITIES = "sensitivities.safetensors"
MOMENTS = "vocabulary.safetensors"
TURNS = 8
"""At most so often costs from a sample that were chosen are computed from all rows, and the choice made again."""


def quantize(context: Context, settings: QuantizeSettings) -> Outcome:
    """Quantize the chain's current model; see ``compress quantize --help``.

    Raises:
        UsageError: A budget that is not understood or lies above the model's own size; an unknown solver,
            or rank.
        CompressError: The budget lies below the smallest size the menu can reach, the model is quantized already, or
            its embeddings are of a kind that cannot be.
    """
    budget = parse_budget(settings.budget)
    fixed_rank = parse_rank(settings.rank)
    check_solver(settings.solver)
    model = current(context, "quantize")
    require_dense(model.checkpoint, allow_lq=False)
    matrices = matrices_of(model)
    uncounted: list[Choice] = []
    if settings.embeddings == "menu":
        matrices = [*vocabulary_matrices(model), *matrices]
    elif settings.embeddings == "8bit":
        uncounted = eight_bit_choices(vocabulary_matrices(model))
    limit = limit_in_bits(budget, model, matrices, settings, fixed_rank, uncounted)
    left_dense = left_dense_of(model)
    lower_ranks = narrow(matrices, fixed_rank, settings.runtime)
    show_left_out(context, left_dense, lower_ranks, fixed_rank)
    device, dtype = device_and_dtype(context.common)
    require_processors(context.common, device)
    source = context.common.data or default_source()
    config = settings_dict(settings) | {
        "data": source,
        "seed": context.common.seed,
        "dtype": str(dtype).removeprefix("torch."),
    }

    way = choose_way(
        context,
        "quantize",
        model,
        device,
        dtype,
        quantize_count(context, model, settings),
        source=source,
        workers=torch.get_num_threads() if device == "cpu" else 1,
    )
    context = replace(context, engine=context.engine.at_most(way.workers))

    def work(folder: Path) -> Mapping[str, Any]:
        validation = validation_windows(context, model.path, source)

        def walk(most: int | None = None) -> HessianWalk | None:
            if settings.objective != "hessian":
                return None
            return HessianWalk(
                context, model, settings, source, device, dtype, moments=moments, most=most, way=way
            )

        minds, moments = known_sensitivities(
            context, model, settings, source, device, dtype, folder / "tables", way
        )
        fisher = None
        if settings.objective == "fisher":
            fisher = FisherFiles(context, model, settings, source, device, dtype, folder / "fisher")
        tables = build_tables(
            context,
            model,
            matrices,
            settings,
            fixed_rank,
            folder / "tables",
            walk(TABLE_TOKENS),
            minds,
            fisher,
        )
        allocation = allocate(matrices, tables, budget, limit, settings, fixed_rank, uncounted=uncounted)
        for turn in range(1, TURNS + 1):
            if all_exact(allocation, tables):
                break
            tables = exact_tables(context, model, allocation, tables, settings, folder / "tables", turn)
            known = allocation.plain
            plain = None if known is None else QuantConfig.from_dict(known["config"])
            allocation = allocate(
                matrices, tables, budget, limit, settings, fixed_rank, plain=plain, uncounted=uncounted
            )
        record_allocation(allocation, folder)
        feed = walk()
        calibrated = feed or fisher
        calibration = None if calibrated is None else calibrated.calibration
        records = decompose_layers(
            context, model, allocation, settings, folder / "layers", feed, minds, fisher
        )
        del feed, calibrated  # and with it the model
        write_checkpoint(model, allocation, folder / "layers", folder)
        carry(model.path, folder)
        before = measured_once(
            folder / "tables" / "before.json",
            lambda: known_perplexity(context, model, validation, dtype, device, way),
        )
        after = record_and_score(
            context,
            folder,
            model.architecture.vocab,
            validation,
            "the quantized model",
            dtype=dtype,
            device=device,
            way=way,
            into=folder / "layers" / "after.json",
        )
        reopened = check_reopens(folder, needs_compress=True, way=way)
        small = Checkpoint(folder)
        numel = sum(matrix.numel for matrix in matrices)
        dense = sum(model.checkpoint.nbytes(matrix.tensor) for matrix in matrices)
        return {
            "before": {
                "parameters": model.checkpoint.parameters,
                "bytes": model.checkpoint.bytes,
                "bits_per_weight": 8 * dense / numel,
                **before,
            },
            "after": {
                "parameters": model.checkpoint.parameters,
                "bytes": small.bytes,
                "bits_per_weight": allocation.bits_per_weight,
                **after,
            },
            "stored_bits_per_weight": allocation.bits_per_weight,
            "file_bits_per_parameter": 8 * small.bytes / model.checkpoint.parameters,
            "budget": {"text": budget.text, "kind": budget.kind, "value": budget.value},
            "allocation": dict(allocation.certificate),
            "plain_rounding": allocation.plain,
            "tradeoff": tradeoff(matrices, tables, settings, fixed_rank),
            "squared_error": sum(record["squared_error"] for record in records),
            "calibration": calibration,
            "matrices": records,
            "singular": singular_hessians(records),
            "left_dense": left_dense,
            "lower_ranks": lower_ranks,
            "reopened_relative_error": reopened,
        }

    def disk() -> float:
        from compress.pipelines.disk import quantize_disk

        return quantize_disk(model, settings, dtype, context.common.effort or "quick")

    outcome = run_stage(
        context,
        "quantize",
        config=config,
        inputs={"model": model.id} | text_inputs(source),
        work=work,
        scratch=("layers", "tables", "fisher"),
        disk=disk,
    )
    if outcome.fresh and outcome.stage is not None:
        show(
            context,
            outcome.stage.record["metrics"],
            embeddings=settings.embeddings == "menu",
            counted_apart=settings.budget_includes == "none",
        )
    return outcome


def known_sensitivities(
    context: Context,
    model: ModelInput,
    settings: QuantizeSettings,
    source: str,
    device: str,
    dtype: Any,
    folder: Path,
    way: Way = WHOLE,
) -> tuple[dict[str, Tensor], dict[str, MatrixMoments]]:
    """What the loss minds, by module, kept in ``folder``; nothing for other objectives than ``hessian``.

    And, where embeddings are chosen for, the moments of the embedding and the output matrix.
    """
    if settings.objective != "hessian":
        return {}, {}
    folder.mkdir(exist_ok=True)
    path = folder / SENSITIVITIES
    if not path.is_file():
        found, moments = sensitivities(context, model, settings, source, device, dtype, way)
        if moments:
            save_moments(moments, folder / MOMENTS)
        with replacing(path) as temporary:
            save_file(found, temporary)
    known: dict[str, Tensor] = load_file(path)
    return known, load_moments(folder / MOMENTS)


def record_allocation(allocation: Allocation, folder: Path) -> None:
    """Write ``allocation.json``; layers that an interrupted run made for other choices are dropped."""
    layers, content = folder / "layers", allocation.to_dict()
    known = layers / "allocation.json"
    if known.is_file() and read_json(known)["matrices"] != content["matrices"]:
        shutil.rmtree(layers)
    layers.mkdir(exist_ok=True)
    for path in (known, folder / known.name):
        write_json(path, content)
