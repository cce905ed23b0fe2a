"""Lagrangian relaxation: a lower bound in one sort, a good choice by greedy completion, a smaller problem.

With a price ``multiplier`` per unit of size the items separate; the best price gives the optimum of the
linear relaxation (Sinha and Zoltners 1979). A candidate's *reduced cost* is what choosing it adds to that
bound, so a candidate whose reduced cost exceeds the distance between the bound and the best known choice is
part of no better choice.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from compress.solvers.pareto import Items
from compress.solvers.problem import Floats, Ints


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Relaxation:
    """The relaxed optimum: price per unit of size, its bound, candidate per item (within the budget)."""

    multiplier: float
    lower_bound: float
    chosen: Ints


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class HullSteps:
    """Every step up the lower convex hull of an item, steepest first; an item's own steps stay in order.

    Attributes:
        owner: [S] item.
        before: [S] position that the step leaves.
        after: [S] position that it reaches.
        growth: [S] what it adds to the size.
        slope: [S] what it saves per unit of size.
    """

    owner: Ints
    before: Ints
    after: Ints
    growth: Ints
    slope: Floats


def hull_steps(items: Items) -> HullSteps:
    """The steps of all items that the linear relaxation may take."""
    slopes: list[float] = []
    owner: list[int] = []
    before: list[int] = []
    after: list[int] = []
    for i, (cost, size) in enumerate(zip(items.costs, items.sizes, strict=True)):
        corners, steps = _hull(cost, size)
        slopes += steps
        owner += [i] * len(steps)
        before += corners[:-1]
        after += corners[1:]
    growth = [
        int(items.sizes[i][b] - items.sizes[i][a]) for i, a, b in zip(owner, before, after, strict=True)
    ]
    order = np.argsort(-np.array(slopes), kind="stable")
    owners, befores, afters, growths = (
        np.array(values, dtype=np.int64)[order] for values in (owner, before, after, growth)
    )
    return HullSteps(
        owner=owners,
        before=befores,
        after=afters,
        growth=growths,
        slope=np.array(slopes, dtype=np.float64)[order],
    )


def relax(items: Items) -> Relaxation:
    """Solve the linear relaxation exactly; the smallest choice must fit in the budget."""
    steps = hull_steps(items)
    positions = np.zeros(len(items), dtype=np.int64)
    used = items.size(positions) + np.cumsum(steps.growth)
    taken = int(
        np.searchsorted(used, items.budget, side="right")
    )  # the steps before the first that does not fit
    np.maximum.at(positions, steps.owner[:taken], steps.after[:taken])
    chosen, bound = items.chosen(positions), items.cost(positions)
    if taken == used.size:
        return Relaxation(multiplier=0.0, lower_bound=bound, chosen=chosen)
    multiplier = float(steps.slope[taken])
    slack = items.budget - items.size(positions)
    return Relaxation(multiplier=multiplier, lower_bound=bound - multiplier * slack, chosen=chosen)


def reduced_costs(items: Items, relaxation: Relaxation) -> list[Floats]:
    """Per item ``[C]``: what each candidate adds to the lower bound, zero or more."""
    at = items.find(relaxation.chosen)
    pairs = zip(items.costs, items.sizes, at, strict=True)
    # Differences first: costs and priced sizes are much larger than what tells candidates apart.
    return [np.maximum((c - c[p]) + relaxation.multiplier * (s - s[p]), 0.0) for c, s, p in pairs]


def allowance(items: Items, relaxation: Relaxation, cost: float) -> float:
    """How much reduced cost a choice no dearer than ``cost`` may have, with room for rounding."""
    distance = max(cost - relaxation.lower_bound, 0.0)
    return distance * (1 + 1e-9) + rounding_error(items, relaxation, cost)


def rounding_error(items: Items, relaxation: Relaxation, cost: float) -> float:
    """More than sums of costs about ``cost`` can be off."""
    at = items.find(relaxation.chosen)
    return 1e-13 * (abs(cost) + sum(abs(float(c[p])) for c, p in zip(items.costs, at, strict=True)))


def narrow(items: Items, relaxation: Relaxation, positions: Ints) -> Items:
    """The core: only candidates that a choice no dearer than ``positions`` can contain."""
    room = allowance(items, relaxation, items.cost(positions))
    return items.keep([extra <= room for extra in reduced_costs(items, relaxation)])


def complete(items: Items, positions: Ints, *, improve: bool = True) -> Ints:
    """Make a choice fit in the budget; then improve it by single changes and by exchanges of two items.

    Args:
        items: What to choose from, reduced or not.
        positions: The choice; it may exceed the budget, if the smallest does not.
        improve: Whether to go on once it fits.
    """
    positions = positions.copy()
    owner = np.repeat(np.arange(len(items)), [c.size for c in items.costs])
    place = np.concatenate([np.arange(c.size) for c in items.costs])
    cost = np.concatenate(items.costs)
    size = np.concatenate(items.sizes)
    start = np.concatenate(([0], np.cumsum([c.size for c in items.costs])[:-1]))
    while True:
        now = start + positions
        dearer = cost - cost[now][owner]
        larger = size - size[now][owner]
        slack = items.budget - int(size[now].sum())
        smallest_gain = 1e-14 * float(
            np.abs(cost[now]).sum()
        )  # less is rounding, and could go round in circles
        if slack < 0:
            shrinking = np.flatnonzero(larger < 0)
            moves = [int(shrinking[np.argmin(dearer[shrinking] / -larger[shrinking])])]
        else:
            moves = _best_moves(owner, dearer, larger, slack, smallest_gain) if improve else []
        if not moves:
            return positions
        for move in moves:
            positions[owner[move]] = place[move]


def sort_twins(items: Items, chosen: Ints) -> Ints:
    """Give items with identical tables their candidates in rising order; cost and size stay the same."""
    twins: dict[tuple[bytes, bytes, bytes], list[int]] = {}
    for i, table in enumerate(zip(items.costs, items.sizes, items.candidates, strict=True)):
        key = (table[0].tobytes(), table[1].tobytes(), table[2].tobytes())
        twins.setdefault(key, []).append(i)
    result = chosen.copy()
    for group in twins.values():
        result[group] = np.sort(chosen[group])
    return result


def _hull(cost: Floats, size: Ints) -> tuple[list[int], list[float]]:
    """Corners of the lower convex hull and the saving per unit of size between them, strictly falling."""
    costs, sizes = cost.tolist(), size.tolist()
    corners = [0]
    slopes: list[float] = []
    for point in range(1, len(costs)):
        while True:
            slope = (costs[corners[-1]] - costs[point]) / (sizes[point] - sizes[corners[-1]])
            if not slopes or slope < slopes[-1]:
                break
            corners.pop()
            slopes.pop()
        corners.append(point)
        slopes.append(slope)
    return corners, slopes


def _best_moves(
    owner: npt.NDArray[np.intp], dearer: Floats, larger: Ints, slack: int, smallest_gain: float
) -> list[int]:
    """The single change that fits and gains most, else the best exchange of two items, else nothing."""
    gaining = np.flatnonzero(dearer < -smallest_gain)
    fitting = gaining[larger[gaining] <= slack]
    if fitting.size:
        return [int(fitting[np.argmin(dearer[fitting])])]
    giving = np.flatnonzero(larger < 0)
    if not gaining.size or not giving.size:
        return []
    gaining = gaining[np.argsort(larger[gaining], kind="stable")]
    best = np.minimum.accumulate(dearer[gaining])
    reach = np.searchsorted(larger[gaining], slack - larger[giving], side="right") - 1
    giving, reach = giving[reach >= 0], reach[reach >= 0]
    net = dearer[giving] + best[reach]
    for which in np.argsort(net, kind="stable"):
        if net[which] >= -smallest_gain:
            break
        give = int(giving[which])
        take = int(gaining[np.argmin(dearer[gaining[: reach[which] + 1]])])
        if owner[give] != owner[take]:
            return [give, take]
    return []
