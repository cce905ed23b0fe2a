"""Models that the quantization benchmark needs and no verb makes: uniform, trained factors stored, off the grid."""

from __future__ import annotations

import math
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from compress.adapters.train import FitConfig, fit
from compress.benchmarks.protocol import calibration
from compress.model.checkpoint import Checkpoint, copy_side_files
from compress.model.load import load_model, load_tokenizer
from compress.model.quiet import quiet_transformers
from compress.pipelines.allocate import Allocation, Choice, limit_in_bits
from compress.pipelines.error_tables import build_tables
from compress.pipelines.fisher_files import FisherFiles
from compress.pipelines.hessian_walk import HessianWalk
from compress.pipelines.identity import digest
from compress.pipelines.lq_writer import decompose_layers, write_checkpoint
from compress.pipelines.matrices import Matrix, matrices_of
from compress.pipelines.model_input import current, device_and_dtype
from compress.pipelines.quantize import known_sensitivities
from compress.pipelines.settings import QuantizeSettings
from compress.pipelines.stage import Context, Outcome, run_stage, settings_dict
from compress.pipelines.workspace import read_json, write_json
from compress.quantize.config import QuantConfig
from compress.quantize.error_table import ErrorTable
from compress.solvers.budget import Budget, parse_budget

MOVING: dict[str, Any] = {"steps": 200, "micro_batch": 2, "lr": 3e-4, "warmup_steps": 20, "seed": 7}
"""How a model is moved off its grid: AdamW on every parameter."""


def quantize_uniformly(context: Context, settings: QuantizeSettings, config: QuantConfig | None) -> Outcome:
    """The stage ``quantize`` with one configuration for all matrices and no factors, by the pipeline's own parts.

    Args:
        context: Common options, workspace and reporter.
        settings: Objective, menu, budget and calibration.
        config: The configuration; None: of those that fit in the budget, the one with the least summed cost.

    Raises:
        CompressError: Nothing fits in the budget.
    """
    model = current(context, "quantize")
    matrices, budget = matrices_of(model), parse_budget(settings.budget)
    limit = limit_in_bits(budget, model, matrices, settings, 0)
    device, dtype = device_and_dtype(context.common)
    source = str(context.common.data)

    def walk() -> HessianWalk | None:
        if settings.objective != "hessian":
            return None
        return HessianWalk(context, model, settings, source, device, dtype)

    def work(folder: Path) -> Mapping[str, Any]:
        minds, _ = known_sensitivities(context, model, settings, source, device, dtype, folder / "tables")
        fisher = None
        if settings.objective == "fisher":
            fisher = FisherFiles(context, model, settings, source, device, dtype, folder / "fisher")
        chosen = config
        if chosen is None:
            tables = build_tables(
                context, model, matrices, settings, 0, folder / "tables", walk(), minds, fisher
            )
            chosen = best_for_all(matrices, tables, limit)
        allocation = same_for_all(matrices, chosen, budget, limit, settings)
        records = decompose_layers(
            context, model, allocation, settings, folder / "layers", walk(), minds, fisher
        )
        write_checkpoint(model, allocation, folder / "layers", folder)
        for scratch in ("layers", "tables", "fisher"):
            shutil.rmtree(folder / scratch, ignore_errors=True)
        return {
            "stored_bits_per_weight": allocation.bits_per_weight,
            "configuration": chosen.to_dict(),
            "squared_error": sum(record["squared_error"] for record in records),
            "matrices": records,
        }

    about = {"data": source, "dtype": str(dtype).removeprefix("torch."), "uniform": True}
    about["configuration"] = None if config is None else config.to_dict()
    return run_stage(
        context, "quantize", config=settings_dict(settings) | about, inputs={"model": model.id}, work=work
    )


def best_for_all(matrices: Sequence[Matrix], tables: Sequence[ErrorTable], limit: int) -> QuantConfig:
    """The configuration with the least summed cost of those that fit in ``limit`` stored bits without factors."""
    configs = tables[0].configs
    fitting = [
        at
        for at, config in enumerate(configs)
        if sum(config.storage_bits(matrix.shape) for matrix in matrices) <= limit
    ]
    return configs[min(fitting, key=lambda at: math.fsum(float(table.errors[at, 0]) for table in tables))]


def same_for_all(
    matrices: Sequence[Matrix], config: QuantConfig, budget: Budget, limit: int, settings: QuantizeSettings
) -> Allocation:
    """``config`` for every matrix, without factors; what it was predicted to cost is left out."""
    return Allocation(
        choices=tuple(
            Choice(
                matrix=matrix,
                config=config,
                rank=0,
                factor_config=None,
                bits=config.storage_bits(matrix.shape),
                expected_cost=0.0,
                squared_norm=0.0,
            )
            for matrix in matrices
        ),
        budget=budget,
        includes=settings.budget_includes,
        limit_bits=limit,
        certificate={},
        plain=None,
        objective=settings.objective,
    )


def moved_model(
    model: Path, source: str, work: Path, *, length: int, device: str = "cpu", **given: Any
) -> Path:
    """A copy of ``model`` whose weights have left the grid they were once rounded to, by training all of them.

    Made once: a folder in ``work`` whose name follows from the model, the text and the settings. ``moved.json`` in it
    says how far the decoder's weights went.

    Args:
        model: Dense checkpoint; the copy is stored in its dtype.
        source: Text source; its training split is read.
        work: Where the copy lies.
        length: Tokens of a training window.
        device: Where it is trained.
        given: In place of what :data:`MOVING` says.
    """
    settings, before = {**MOVING, **given}, Checkpoint(model)
    identity = {"model": before.fingerprint(), "source": source, "length": length, **settings}
    folder = work / f"moved-{digest(identity)[:16]}"
    if (folder / "moved.json").is_file() and read_json(folder / "moved.json")["identity"] == identity:
        return folder
    tokens = settings["steps"] * settings["micro_batch"] * length
    windows = calibration(load_tokenizer(model), source, tokens, settings["seed"], length=length)
    network = load_model(model, dtype=torch.float32, device=device).requires_grad_(True)
    result = fit(network, windows, FitConfig(**settings))
    partial = folder.with_suffix(".partial")
    shutil.rmtree(partial, ignore_errors=True)
    shutil.rmtree(folder, ignore_errors=True)
    with quiet_transformers():
        network.to(before.dtype(before.names[0])).save_pretrained(partial)
    copy_side_files(model, partial)
    about = {"identity": identity, "losses": list(result.losses), "relative_change": _change(before, partial)}
    write_json(partial / "moved.json", about)
    partial.rename(folder)
    return folder


def _change(before: Checkpoint, moved: Path) -> float:
    """Frobenius norm of what changed in all weights, relative to theirs."""
    after, difference, total = Checkpoint(moved), 0.0, 0.0
    for name in after.names:
        old = before.read(name).double()
        difference += float((after.read(name).double() - old).square().sum())
        total += float(old.square().sum())
    return math.sqrt(difference / total)
