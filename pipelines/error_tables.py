"""The error table of every matrix, kept on disk; from a sample of rows where matrices are large, then exact in part."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from torch import Tensor

from compress.pipelines.allocate import (
    VOCABULARY,
    Allocation,
    Matrix,
    factor_format,
    layer_name,
    offered,
    read_matrix,
)
from compress.pipelines.fisher_files import FisherFiles
from compress.pipelines.hessian_walk import HessianWalk
from compress.pipelines.model_input import ModelInput
from compress.pipelines.settings import QuantizeSettings
from compress.pipelines.stage import Context
from compress.pipelines.workspace import read_json, write_json
from compress.quantize.config import QuantConfig
from compress.quantize.error_table import RANKS, ErrorTable, error_table, refined
from compress.quantize.fisher import Fisher
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
class LayerKnowledge:
    """What calibration text told of one layer, by module name; all empty for ``frobenius``.

    Attributes:
        statistics: Of the inputs (``hessian``).
        minds: What a unit of squared output error costs, [O] (``hessian``).
        fisher: Fisher information (``fisher``).
    """

    statistics: Mapping[str, InputStatistics]
    minds: Mapping[str, Tensor]
    fisher: Mapping[str, Fisher]


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
    ranks = RANKS if fixed_rank is None else (fixed_rank,)
    tables: list[ErrorTable] = []
    with context.reporter.bar("error tables") as progress:
        for layer, members in groupby(matrices, key=lambda matrix: matrix.layer):
            group = list(members)
            paths = {matrix.module: folder / f"{matrix.module}.json" for matrix in group}
            missing = [matrix for matrix in group if not paths[matrix.module].is_file()]
            statistics: Mapping[str, InputStatistics] = {}
            if walk is not None and missing:
                statistics = walk.statistics(layer, advance=True)
            elif walk is not None:
                walk.advance(layer)
            known = LayerKnowledge(
                statistics=statistics,
                minds=minds,
                fisher=fisher.layer(layer) if fisher is not None and missing else {},
            )
            for matrix in missing:
                weight = read_matrix(model, matrix)
                own_ranks = (0,) if matrix.layer == VOCABULARY else ranks
                table = _table(weight, matrix, settings, own_ranks, context.common.seed, known)
                write_json(paths[matrix.module], table.to_dict())
            tables += [ErrorTable.from_dict(read_json(paths[matrix.module])) for matrix in group]
            progress(len(tables), len(matrices), layer_name(layer))
    return tables


def _table(
    weight: Tensor,
    matrix: Matrix,
    settings: QuantizeSettings,
    ranks: Sequence[int],
    seed: int,
    known: LayerKnowledge,
) -> ErrorTable:
    configs, factors, module = offered(settings), factor_format(settings), matrix.module
    if module in known.statistics:
        statistics, minds = known.statistics[module], known.minds.get(module)
        return output_error_table(
            weight,
            configs,
            statistics,
            ranks,
            factor_config=factors,
            row_weights=minds,
            rows=VOCABULARY_ROWS if matrix.layer == VOCABULARY else ROWS,
            seed=seed,
        )
    if module in known.fisher:
        fisher = known.fisher[module]
        return fisher_error_table(weight, configs, fisher, ranks, factor_config=factors, seed=seed)
    sample = SAMPLE if matrix.shape[0] > LARGE else None
    return error_table(
        weight, configs, ranks, effort=settings.menu, factor_config=factors, seed=seed, sample=sample
    )


def exact_tables(
    context: Context,
    model: ModelInput,
    allocation: Allocation,
    tables: Sequence[ErrorTable],
    settings: QuantizeSettings,
    folder: Path,
) -> list[ErrorTable]:
    """The tables, sampled ones with what an allocation picked from them computed from all rows.

    So is what the best single format costs. Finished ones are read back from ``folder``; they lie beside the sampled
    ones, from which an interrupted run makes the same choice again.
    """
    found: list[ErrorTable] = []
    with context.reporter.bar("exact errors") as progress:
        for choice, table in zip(allocation.choices, tables, strict=True):
            path = folder / f"{choice.matrix.module}.exact.json"
            if table.sample is not None and not path.is_file():
                entries = [_entry(table, choice.config, choice.rank)]
                if allocation.plain is not None:
                    entries.append(_entry(table, QuantConfig.from_dict(allocation.plain["config"]), 0))
                exact = refined(
                    table,
                    read_matrix(model, choice.matrix),
                    entries,
                    effort=settings.menu,
                    factor_config=factor_format(settings),
                    seed=context.common.seed,
                )
                write_json(path, exact.to_dict())
            found.append(table if table.sample is None else ErrorTable.from_dict(read_json(path)))
            progress(len(found), len(tables), choice.matrix.module)
    return found


def _entry(table: ErrorTable, config: QuantConfig, rank: int) -> int:
    """The position in the flattened table."""
    return table.configs.index(config) * len(table.ranks) + table.ranks.index(rank)
