"""The error table of every matrix, kept on disk; from a sample of rows where matrices are large, then exact in part."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from torch import Tensor

from compress.engine import largest_first
from compress.pipelines.allocate import Allocation, Choice, factor_format, offered, ranks_of
from compress.pipelines.fisher_files import FisherFiles
from compress.pipelines.hessian_walk import HessianWalk
from compress.pipelines.knowledge import MatrixKnowledge, layer_knowledge
from compress.pipelines.matrices import VOCABULARY, Matrix, layer_name, read_matrix
from compress.pipelines.model_input import ModelInput
from compress.pipelines.settings import QuantizeSettings
from compress.pipelines.stage import Context
from compress.pipelines.workspace import read_json, write_json
from compress.quantize.config import QuantConfig
from compress.quantize.error_table import ErrorTable, error_table, refined
from compress.quantize.fisher_table import fisher_error_table
from compress.quantize.hessian import InputStatistics
from compress.quantize.output_table import ROWS, output_error_table

LARGE = 2048
"""Error tables of matrices with more rows than this come from a sample (objective ``frobenius``)."""
SAMPLE = 256
"""Rows of a sample."""
VOCABULARY_ROWS = 1024
"""Rows of an embedding that predictions are made from: they differ far more than those of a linear."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TableJob:
    """An error table to be computed.

    Attributes:
        matrix: Whose.
        weight: Its weight [out, in].
        settings: The menu and the factors.
        ranks: Offered ones.
        seed: Of randomized parts.
        known: What calibration text told.
    """

    matrix: Matrix
    weight: Tensor
    settings: QuantizeSettings
    ranks: Sequence[int]
    seed: int
    known: MatrixKnowledge


@dataclass(frozen=True, slots=True, kw_only=True)
class ExactJob:
    """Entries of a sampled table to be computed from all rows.

    Attributes:
        matrix: Whose.
        weight: Its weight [out, in].
        settings: As for the table.
        table: The sampled one.
        entries: Positions in the flattened table.
        seed: As for the table.
    """

    matrix: Matrix
    weight: Tensor
    settings: QuantizeSettings
    table: ErrorTable
    entries: Sequence[int]
    seed: int


def build_tables(
    context: Context,
    model: ModelInput,
    matrices: Sequence[Matrix],
    settings: QuantizeSettings,
    fixed_rank: int | None,
    folder: Path,
    walk: HessianWalk | None,
    minds: Mapping[str, Tensor],
    fisher: FisherFiles | None,
) -> list[ErrorTable]:
    """One error table per matrix; finished ones are read back from ``folder``.

    Args:
        context: Seed and reporter.
        model: The model.
        matrices: Its matrices, layer by layer.
        settings: The menu and the factors.
        fixed_rank: The one rank to offer; None: all of them.
        folder: Where finished tables lie.
        walk: Input statistics of the model as it is; None for other objectives than ``hessian``.
        minds: With a walk, what a unit of squared output error costs, [O] by module.
        fisher: Fisher information; None for other objectives than ``fisher``.
    """
    folder.mkdir(exist_ok=True)
    ranks = ranks_of(matrices, fixed_rank, settings.runtime)
    ranks_by_module = {matrix.module: own for matrix, own in zip(matrices, ranks, strict=True)}
    paths = {matrix.module: folder / f"{matrix.module}.json" for matrix in matrices}
    seed, done = context.common.seed, sum(path.is_file() for path in paths.values())
    by_layer = walk is not None or fisher is not None
    layers = (
        [list(group) for _, group in groupby(matrices, key=lambda matrix: matrix.layer)]
        if by_layer
        else [list(matrices)]
    )
    with context.reporter.bar("error tables") as progress:

        def keep(job: TableJob, table: ErrorTable) -> None:
            nonlocal done
            write_json(paths[job.matrix.module], table.to_dict())
            done += 1

        def asked(missing: list[Matrix], known: Mapping[str, MatrixKnowledge]) -> Iterator[TableJob]:
            for matrix in largest_first(missing, lambda matrix: matrix.numel):
                progress(done, len(matrices), layer_name(matrix.layer))
                yield TableJob(
                    matrix=matrix,
                    weight=read_matrix(model, matrix),
                    settings=settings,
                    ranks=ranks_by_module[matrix.module],
                    seed=seed,
                    known=known[matrix.module],
                )

        for group in layers:
            layer = group[0].layer
            missing = [matrix for matrix in group if not paths[matrix.module].is_file()]
            statistics: Mapping[str, InputStatistics] = {}
            if walk is not None and missing:
                statistics = walk.statistics(layer, advance=True)
            elif walk is not None:
                walk.advance(layer)
            known = layer_knowledge(
                context.engine,
                [matrix.module for matrix in missing],
                statistics=statistics,
                minds=minds,
                fisher=fisher.layer(layer) if fisher is not None and missing else {},
            )
            context.engine.run(table_of, asked(missing, known), keep)
            progress(done, len(matrices), layer_name(layer))
    return [ErrorTable.from_dict(read_json(paths[matrix.module])) for matrix in matrices]


def table_of(job: TableJob) -> ErrorTable:
    """The table that a job asks for."""
    settings, known, weight = job.settings, job.known, job.weight
    configs, factors = offered(settings), factor_format(settings)
    statistics = known.statistics
    if statistics is not None:
        return output_error_table(
            weight,
            configs,
            statistics,
            job.ranks,
            factor_config=factors,
            row_weights=known.minds,
            rows=VOCABULARY_ROWS if job.matrix.layer == VOCABULARY else ROWS,
            seed=job.seed,
        )
    if known.fisher is not None:
        return fisher_error_table(
            weight, configs, known.fisher, job.ranks, factor_config=factors, seed=job.seed
        )
    sample = SAMPLE if job.matrix.shape[0] > LARGE else None
    return error_table(
        weight,
        configs,
        job.ranks,
        effort=settings.menu,
        factor_config=factors,
        seed=job.seed,
        sample=sample,
    )


def exact_tables(
    context: Context,
    model: ModelInput,
    allocation: Allocation,
    tables: Sequence[ErrorTable],
    settings: QuantizeSettings,
    folder: Path,
    turn: int = 1,
) -> list[ErrorTable]:
    """The tables, sampled ones with what an allocation picked from them computed from all rows.

    So is what the best single format costs. Finished ones are read back from ``folder``; those of every turn lie
    beside the sampled ones, from which an interrupted run makes the same choices again.
    """
    paths = {
        choice.matrix.module: folder / f"{choice.matrix.module}.exact-{turn}.json"
        for choice, table in zip(allocation.choices, tables, strict=True)
        if _estimated(allocation, choice, table)
    }
    done = sum(path.is_file() for path in paths.values())

    with context.reporter.bar("exact errors") as progress:

        def keep(job: ExactJob, table: ErrorTable) -> None:
            nonlocal done
            write_json(paths[job.matrix.module], table.to_dict())
            done += 1

        def asked() -> Iterator[ExactJob]:
            sampled = [
                (choice, table)
                for choice, table in zip(allocation.choices, tables, strict=True)
                if choice.matrix.module in paths and not paths[choice.matrix.module].is_file()
            ]
            for choice, table in largest_first(sampled, lambda pair: pair[0].matrix.numel):
                progress(done, len(paths), choice.matrix.module)
                yield ExactJob(
                    matrix=choice.matrix,
                    weight=read_matrix(model, choice.matrix),
                    settings=settings,
                    table=table,
                    entries=_estimated(allocation, choice, table),
                    seed=context.common.seed,
                )

        context.engine.run(exact_of, asked(), keep)
        progress(len(paths), len(paths), "")
    return [
        ErrorTable.from_dict(read_json(paths[choice.matrix.module]))
        if choice.matrix.module in paths
        else table
        for choice, table in zip(allocation.choices, tables, strict=True)
    ]


def exact_of(job: ExactJob) -> ErrorTable:
    """The table with the entries that a job asks for."""
    return refined(
        job.table,
        job.weight,
        job.entries,
        effort=job.settings.menu,
        factor_config=factor_format(job.settings),
        seed=job.seed,
    )


def all_exact(allocation: Allocation, tables: Sequence[ErrorTable]) -> bool:
    """Whether no cost that an allocation counts comes from a sample."""
    return not any(
        _estimated(allocation, choice, table)
        for choice, table in zip(allocation.choices, tables, strict=True)
    )


def _estimated(allocation: Allocation, choice: Choice, table: ErrorTable) -> list[int]:
    """Positions of what an allocation gives one matrix, and of the best single format, that come from a sample."""
    if table.sample is None:
        return []
    entries = {table.position(choice.config, choice.rank)}
    if allocation.plain is not None:
        entries.add(table.position(QuantConfig.from_dict(allocation.plain["config"]), 0))
    return sorted(entries - set(table.exact))
