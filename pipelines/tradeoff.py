"""What other budgets would cost with the same error tables: the curve beside an allocation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from compress.pipelines.allocate import COSTS, problem_of
from compress.pipelines.matrices import Matrix
from compress.pipelines.settings import QuantizeSettings
from compress.quantize.error_table import ErrorTable
from compress.solvers.pareto import merge, reduce
from compress.solvers.solve import solve

STEP = 0.25
"""Bits per weight between two budgets."""


def tradeoff(
    matrices: Sequence[Matrix],
    tables: Sequence[ErrorTable],
    settings: QuantizeSettings,
    fixed_rank: int | None,
) -> dict[str, Any]:
    """Least cost found under budgets a quarter of a bit apart, from the smallest possible to all one could use.

    Each point is a real allocation, from the solver ``lagrangian``; what it takes is below its budget.

    Returns:
        ``cost``: what is counted, in words; ``points``: ``bits_per_weight`` and ``cost`` of each, both of the
        allocation found. The bits are all that is stored, also where the budget leaves the factors out.
    """
    weights = sum(matrix.numel for matrix in matrices)
    problem, candidates = problem_of(matrices, tables, 0, settings, fixed_rank)
    items = reduce(merge(problem))  # by rising size: the first candidates are the smallest, the last the best
    smallest, largest = (sum(int(sizes[end]) for sizes in items.sizes) for end in (0, -1))
    step = round(STEP * weights)
    points = []
    for budget in [*range(smallest, largest, step), largest]:
        found = solve(replace(problem, budget=budget), solver="lagrangian")
        stored = sum(
            int(table.bits.reshape(-1)[options[picked]])
            for table, options, picked in zip(tables, candidates, found.choices, strict=True)
        )
        points.append({"bits_per_weight": stored / weights, "cost": found.cost})
    return {"cost": COSTS[settings.objective], "points": points}
