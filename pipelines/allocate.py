"""Bits and ranks for every matrix: what is offered, one budget, the solver's choice and its certificate."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from compress.errors import CompressError, UsageError, choose
from compress.pipelines.matrices import VOCABULARY, Matrix, fused_groups
from compress.pipelines.model_input import ModelInput
from compress.pipelines.settings import QuantizeSettings
from compress.pipelines.workspace import FORMAT_VERSION
from compress.quantize.config import FACTOR_8BIT, QuantConfig
from compress.quantize.decompose import factor_bits
from compress.quantize.error_table import RANKS, ErrorTable, menu, offered_ranks
from compress.quantize.output_table import learned_menu
from compress.solvers.budget import Budget
from compress.solvers.problem import Problem
from compress.solvers.solve import SOLVERS, solve

COSTS = {
    "fisher": "squared error of the weights, weighed by the Fisher information",
    "frobenius": "squared error of the weights",
    "hessian": "predicted rise of the loss, nats per token",
}
"""What the choice for each objective costs, and the allocation sums."""

HEADER_BYTES_PER_MATRIX = 1100
"""Upper bound of what a quantized matrix adds to the JSON header of its file: up to ten tensors."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """What one matrix is given."""

    matrix: Matrix
    config: QuantConfig
    rank: int
    factor_config: QuantConfig | None
    """How the factors are stored; None: in 16 bits."""
    bits: int
    expected_cost: float | None = None
    """Of what the objective counts; None for what was not chosen."""
    squared_norm: float | None = None

    def to_dict(self, *, counted: bool) -> dict[str, Any]:
        """Its entry in ``allocation.json``; ``counted``: it is part of the budget in bits."""
        return {
            "name": self.matrix.module,
            "shape": list(self.matrix.shape),
            **self.config.to_dict(),
            "rank": self.rank,
            "stored_bits": self.bits,
            "bits_per_weight": self.bits / self.matrix.numel,
            "expected_cost": self.expected_cost,
            "squared_norm": self.squared_norm,
            "counted": counted,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Allocation:
    """A choice for every matrix, with the solver's certificate.

    ``choices`` are the solver's; ``uncounted`` is what has one format whatever the budget in bits.
    """

    choices: tuple[Choice, ...]
    uncounted: tuple[Choice, ...] = ()
    budget: Budget
    includes: str
    limit_bits: int
    certificate: Mapping[str, Any]
    plain: Mapping[str, Any] | None
    objective: str

    @property
    def bits_per_weight(self) -> float:
        """Stored bits per weight of what the solver chose for, factors and all scales included."""
        return sum(c.bits for c in self.choices) / sum(c.matrix.numel for c in self.choices)

    @property
    def everything(self) -> tuple[Choice, ...]:
        """All choices, layer by layer."""
        return (*self.uncounted, *self.choices)

    def to_dict(self) -> dict[str, Any]:
        """``allocation.json``; how long solving took is left to ``stage.json``: equal choices are equal bytes."""
        return {
            "format_version": FORMAT_VERSION,
            "budget": {"text": self.budget.text, "kind": self.budget.kind, "value": self.budget.value},
            "budget_includes": self.includes,
            "cost": COSTS[self.objective],
            "limit_bits": self.limit_bits,
            "bits_per_weight": self.bits_per_weight,
            "certificate": {key: value for key, value in self.certificate.items() if key != "seconds"},
            "plain_rounding": None if self.plain is None else dict(self.plain),
            "matrices": [c.to_dict(counted=c in self.choices) for c in self.everything],
        }


def offered(settings: QuantizeSettings) -> tuple[QuantConfig, ...]:
    """The configurations to choose from."""
    return learned_menu(settings.menu) if settings.objective == "hessian" else menu(settings.menu)


def factor_format(settings: QuantizeSettings) -> QuantConfig | None:
    """How the factors are stored; None: in 16 bits."""
    return FACTOR_8BIT if settings.factors == "8bit" else None


def ranks_for(matrix: Matrix, fixed: int | None) -> tuple[int, ...]:
    """Ranks a matrix may take by itself: the menu, or the fixed one, at most the largest below half its smaller side.

    Embeddings and output matrices have none: rounding leaves noise, and of noise as narrow as a hidden size a rank
    takes away less than the bits it costs.
    """
    if matrix.layer == VOCABULARY:
        return (0,)
    if fixed is None:
        return offered_ranks(matrix.shape, RANKS)
    return (min(fixed, (min(matrix.shape) - 1) // 2),)


def ranks_of(matrices: Sequence[Matrix], fixed: int | None, runtime: str) -> list[tuple[int, ...]]:
    """Ranks each of the matrices may take; what ``runtime`` fuses has one rank, so only what all of it may take."""
    ranks = [ranks_for(matrix, fixed) for matrix in matrices]
    for group in fused_groups(matrices) if runtime == "vllm" else ():
        offers = [ranks[member] for member in group]
        common = (
            (min(offers)[0],) if fixed is not None else tuple(sorted(set.intersection(*map(set, offers))))
        )
        for member in group:
            ranks[member] = common
    return ranks


def narrow(matrices: Sequence[Matrix], fixed: int | None, runtime: str) -> dict[str, int]:
    """The largest rank of every decoder matrix that cannot take the fixed one, by module."""
    ranks = ranks_of(matrices, fixed, runtime)
    return {
        matrix.module: own[0]
        for matrix, own in zip(matrices, ranks, strict=True)
        if fixed is not None and matrix.layer != VOCABULARY and own[0] < fixed
    }


def parse_rank(text: str) -> int | None:
    """``auto`` (None: the solver chooses) or a fixed rank.

    Raises:
        UsageError: Neither.
    """
    if text == "auto":
        return None
    if not text.isascii() or not text.isdigit():
        raise UsageError(f"--rank {text!r} is not understood.", "Give auto or a number such as 16.")
    return int(text)


def limit_in_bits(
    budget: Budget,
    model: ModelInput,
    matrices: Sequence[Matrix],
    settings: QuantizeSettings,
    fixed_rank: int | None,
    uncounted: Sequence[Choice] = (),
) -> int:
    """The budget as stored bits of the matrices that are chosen for.

    Args:
        budget: As given.
        model: The model.
        matrices: Those to choose for.
        settings: What is offered and counted.
        fixed_rank: The one rank to offer; None: all of them.
        uncounted: Other matrices that are quantized; only a budget in bytes sees them.

    Raises:
        UsageError: The budget lies above what the model takes now.
        CompressError: It lies below the smallest the menu can reach.
    """
    numel = sum(matrix.numel for matrix in matrices)
    dense = sum(model.checkpoint.nbytes(matrix.tensor) for matrix in matrices)
    fixed = sum(model.checkpoint.nbytes(c.matrix.tensor) - math.ceil(c.bits / 8) for c in uncounted)
    headers = HEADER_BYTES_PER_MATRIX * (len(matrices) + len(uncounted)) + 100_000
    rest = model.checkpoint.bytes - dense - fixed + headers
    if budget.kind == "bits":
        limit, own = math.floor(budget.value * numel), f"{8 * dense / numel:.3g}bit"
        too_much = budget.value >= 8 * dense / numel
    else:
        limit, own = math.floor(8 * (budget.value - rest)), f"{model.checkpoint.bytes / 1e6:.1f}MB"
        too_much = budget.value >= model.checkpoint.bytes
    if too_much:
        raise UsageError(
            f"The budget {budget.text} is not below what the model takes now ({own}).",
            "Give a smaller budget.",
        )
    smallest = 0
    for matrix, ranks in zip(matrices, ranks_of(matrices, fixed_rank, settings.runtime), strict=True):
        least = min(config.storage_bits(matrix.shape) for config in offered(settings))
        rank = ranks[0] if settings.budget_includes == "factors" else 0
        smallest += least + factor_bits(matrix.shape, rank, factor_format(settings))
    if limit < smallest:
        least_text = (
            f"{math.ceil(1000 * smallest / numel) / 1000:.3f}bit"
            if budget.kind == "bits"
            else f"{math.ceil((smallest / 8 + rest) / 1e5) / 10:.1f}MB"
        )
        other = ", or prune the model first."
        if (
            fixed_rank and settings.budget_includes == "factors"
        ):  # pruned matrices would give factors a larger share
            other = ", a lower --rank or --rank auto, or leave the factors out (--budget-includes none)."
        elif budget.kind == "bytes" and settings.embeddings != "menu":
            other = ", or let the embeddings be quantized too (--embeddings menu)."
        raise CompressError(
            f"The budget {budget.text} is below the smallest this model can be stored in ({least_text}).",
            f"Give {least_text} or more{other}",
        )
    return limit


def problem_of(
    matrices: Sequence[Matrix],
    tables: Sequence[ErrorTable],
    limit_bits: int,
    settings: QuantizeSettings,
    fixed_rank: int | None,
) -> tuple[Problem, list[list[int]]]:
    """The solver's question, and the position in its table of each candidate of every matrix."""
    groups = fused_groups(matrices) if settings.runtime == "vllm" else ()
    allowed = ranks_of(matrices, fixed_rank, settings.runtime)
    candidates: list[list[int]] = []
    sizes = []
    for matrix, table, ranks in zip(matrices, tables, allowed, strict=True):
        candidates.append([i for i in range(table.errors.size) if table.choice(i)[1] in ranks])
        if settings.budget_includes == "factors":
            sizes.append(table.bits.reshape(-1)[candidates[-1]])
        else:
            bare = [table.choice(i)[0].storage_bits(matrix.shape) for i in candidates[-1]]
            sizes.append(np.asarray(bare, dtype=np.int64))
    problem = Problem(
        names=tuple(matrix.module for matrix in matrices),
        costs=tuple(t.errors.reshape(-1)[c] for t, c in zip(tables, candidates, strict=True)),
        sizes=tuple(sizes),
        budget=limit_bits,
        equal_groups=groups,
    )
    return problem, candidates


def allocate(
    matrices: Sequence[Matrix],
    tables: Sequence[ErrorTable],
    budget: Budget,
    limit_bits: int,
    settings: QuantizeSettings,
    fixed_rank: int | None,
    *,
    plain: QuantConfig | None = None,
    uncounted: Sequence[Choice] = (),
) -> Allocation:
    """Solve for the choice with the least summed cost within the limit.

    The cost is the squared error of the weights (``frobenius``), the same weighed by the Fisher information
    (``fisher``; both LQ-LoRA's), or the rise of the loss that the errors of the outputs predict (``hessian``), which
    has one meaning in every layer.

    Args:
        matrices: The matrices.
        tables: Their error tables.
        budget: As given.
        limit_bits: The budget in bits.
        settings: The objective, what the budget includes, the solver.
        fixed_rank: The one rank to offer; None: all of them.
        plain: The single format to compare with (objective ``frobenius``); None: the best one.
        uncounted: Matrices that are quantized without a choice.
    """
    problem, candidates = problem_of(matrices, tables, limit_bits, settings, fixed_rank)
    solution = solve(problem, solver=settings.solver)
    choices = []
    for matrix, table, options, picked in zip(matrices, tables, candidates, solution.choices, strict=True):
        index = options[picked]
        config, rank = table.choice(index)
        choices.append(
            Choice(
                matrix=matrix,
                config=config,
                rank=rank,
                factor_config=factor_format(settings),
                bits=int(table.bits.reshape(-1)[index]),
                expected_cost=float(table.errors.reshape(-1)[index]),
                squared_norm=table.weight_norm,
            )
        )
    compared = None
    if settings.objective == "frobenius":
        compared = plain_rounding(matrices, tables, limit_bits, plain)
    return Allocation(
        choices=tuple(choices),
        uncounted=tuple(uncounted),
        budget=budget,
        includes=settings.budget_includes,
        limit_bits=limit_bits,
        certificate=solution.certificate(),
        plain=compared,
        objective=settings.objective,
    )


def plain_rounding(
    matrices: Sequence[Matrix],
    tables: Sequence[ErrorTable],
    limit_bits: int,
    only: QuantConfig | None = None,
) -> dict[str, Any] | None:
    """The best single configuration, or the ``only`` one, for all matrices, no factors, within the same limit.

    None when none fits.
    """
    best: dict[str, Any] | None = None
    for at, config in enumerate(tables[0].configs):
        if only is not None and config != only:
            continue
        bits = sum(config.storage_bits(matrix.shape) for matrix in matrices)
        error = sum(float(table.errors[at, 0]) for table in tables)
        if bits <= limit_bits and (best is None or error < best["squared_error"]):
            best = {"config": config.to_dict(), "stored_bits": bits, "squared_error": error}
    return best


def check_solver(name: str) -> None:
    """Refuse a solver nobody knows, before any work.

    Raises:
        UsageError: There is no such solver.
    """
    if name not in SOLVERS:
        raise UsageError(f"There is no solver {name!r}.", choose(name, SOLVERS))
