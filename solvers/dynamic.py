"""Dynamic programming over a discretised error axis, as in L-GreCo (arXiv 2210.17357)."""

from __future__ import annotations

import math

import numpy as np

from compress.solvers.backend import Answer
from compress.solvers.pareto import Items
from compress.solvers.problem import Ints

LEVELS = 20_000
"""Grid steps between the cheapest conceivable choice and the known one."""


def solve_dynamic(items: Items, start: Ints, multiplier: float, *, time_limit: float, gap: float) -> Answer:
    """Smallest size for every level of summed cost; the lowest level that fits in the budget is the answer.

    Exact to the grid: costs are rounded down to it, so the level is also a lower bound. The answer is dearer
    than the optimum by at most one grid step per item. ``time_limit`` and ``gap`` do not apply: the work is
    fixed.
    """
    cheapest = math.fsum(float(c.min()) for c in items.costs)
    step = (items.cost(start) - cheapest) / LEVELS
    if step <= 0:
        return Answer(positions=start, lower_bound=cheapest)
    unreachable = np.int64(items.budget + 1)
    smallest = np.full(LEVELS + 1, unreachable, dtype=np.int64)  # by level
    smallest[0] = 0
    picks = np.zeros((len(items), LEVELS + 1), dtype=np.int32)
    weights = [np.floor(np.minimum((c - c.min()) / step, LEVELS + 1)).astype(np.int64) for c in items.costs]
    for i, size in enumerate(items.sizes):
        best = np.full_like(smallest, unreachable)
        for position, weight in enumerate(weights[i].tolist()):
            if weight > LEVELS:
                continue
            reached = np.minimum(smallest[: LEVELS + 1 - weight] + size[position], unreachable)
            part = best[weight:]
            better = reached < part
            part[better] = reached[better]
            picks[i, weight:][better] = position
        smallest = best
    fits = np.flatnonzero(smallest <= items.budget)
    if not fits.size:  # rounding put the known choice itself just past the last level
        return Answer(positions=None, lower_bound=-math.inf)
    level = int(fits[0])
    bound = cheapest + level * step
    positions = np.zeros(len(items), dtype=np.int64)
    for i in range(len(items) - 1, -1, -1):
        positions[i] = picks[i, level]
        level -= int(weights[i][positions[i]])
    return Answer(positions=positions, lower_bound=bound)
