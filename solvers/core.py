"""The last pass of every exact solver: list all choices as good as the best known one and take the first.

Items are taken up one after the other, those whose candidates differ most in size first. A partial choice goes
when it is dominated by another (Pisinger 1995), or when its cost and the linear relaxation of the items still
to come exceed the known choice. What survives settles the optimum *and* its ties: lowest cost, then smallest
size, then the lexicographically first choice.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from compress.solvers.lagrangian import Relaxation, allowance, hull_steps, reduced_costs, rounding_error
from compress.solvers.pareto import Items
from compress.solvers.problem import Floats, Ints

Places = npt.NDArray[np.intp]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Listing:
    """What a search found.

    Attributes:
        positions: The best choice met; None when all were given up.
        complete: Nothing was given up: the positions are optimal, and the first among the optimal.
        lower_bound: What was given up costs no less; infinite when nothing was.
    """

    positions: Ints | None
    complete: bool
    lower_bound: float


@dataclass(slots=True)
class _States:
    cost: Ints  # on the integer grid
    size: Ints  # above the smallest
    extra: Floats  # reduced cost
    key: npt.NDArray[Any]  # the picks as one integer of any length, in lexicographic order


def search(core: Items, relaxation: Relaxation, upper: float, *, work: int) -> Listing:
    """The first among the best choices that cost no more than ``upper``.

    Costs are compared as integers: multiples of a power of two so small that 2**52 of them cover all costs of
    the core. Equal costs stay equal whatever the order of summation.

    Args:
        core: Narrowed items.
        relaxation: The relaxation that narrowed them.
        upper: Cost of a known choice.
        work: Partial choices to look at per item; when there are more, the least promising are given up.
    """
    room = allowance(core, relaxation, upper)
    given_up = math.inf
    spread = np.array([int(size[-1] - size[0]) for size in core.sizes], dtype=np.int64)
    order = [int(i) for i in np.argsort(-spread, kind="stable") if core.sizes[i].size > 1]
    outlook = _Outlook(core, relaxation, order)
    grid, keys = _integer_costs(core), _Keys(core)
    free = core.budget - sum(int(size[0]) for size in core.sizes)
    zero = np.zeros(1, dtype=np.int64)
    states = _States(cost=zero, size=zero, extra=np.zeros(1), key=np.zeros(1, dtype=object))
    for depth, item in enumerate(order):
        count = core.sizes[item].size
        cost = (states.cost[:, None] + grid[item]).ravel()
        size = (states.size[:, None] + (core.sizes[item] - core.sizes[item][0])).ravel()
        extra = (states.extra[:, None] + outlook.extras[item]).ravel()
        total = extra + outlook.least(depth + 1, free - size)
        kept: Places = np.flatnonzero((size <= free) & (total <= room))

        def key(
            of: Places, item: int = item, count: int = count, known: _States = states
        ) -> npt.NDArray[Any]:
            joined: npt.NDArray[Any] = known.key[of // count] + keys.parts[item][of % count]
            return joined

        # Ties matter only as long as nothing is given up.
        kept = _undominated(kept, cost[kept], size[kept], key if given_up == math.inf else None)
        following = core.sizes[order[depth + 1]].size if depth + 1 < len(order) else 1
        width = max(work // following, 1)
        if kept.size > width:
            ranked = np.argsort(total[kept], kind="stable")
            given_up = min(given_up, float(total[kept[ranked[width]]]))
            kept = kept[np.sort(ranked[:width])]
        states = _States(cost=cost[kept], size=size[kept], extra=extra[kept], key=key(kept))
    bound = relaxation.lower_bound + given_up - rounding_error(core, relaxation, upper)
    if not states.cost.size:
        return Listing(positions=None, complete=False, lower_bound=bound)
    first = states.key[np.argmin(states.cost)]  # costs fall strictly as sizes rise: the minimum is unique
    return Listing(positions=keys.positions(first), complete=given_up == math.inf, lower_bound=bound)


class _Outlook:
    """The linear relaxation of the items that a partial choice leaves open, for any room left to them."""

    def __init__(self, core: Items, relaxation: Relaxation, order: list[int]) -> None:
        self.extras = reduced_costs(core, relaxation)
        self._multiplier = relaxation.multiplier
        depth = np.full(len(core), -1)
        depth[order] = np.arange(len(order))
        steps = hull_steps(core)
        self._depth = depth[steps.owner]
        self._growth = steps.growth.astype(np.float64)
        before, after = (
            np.array([self.extras[i][p] for i, p in zip(steps.owner, at, strict=True)])
            for at in (steps.before, steps.after)
        )
        self._change = after - before
        smallest = [float(self.extras[i][0]) for i in order]
        self._start = np.concatenate((np.cumsum(smallest[::-1])[::-1], [0.0]))

    def least(self, depth: int, slack: Ints) -> Floats:
        """Least reduced cost of the items from ``depth`` on that fill ``slack`` above their smallest sizes."""
        open_ = self._depth >= depth
        sizes = np.concatenate(([0.0], np.cumsum(self._growth[open_])))
        extras = np.concatenate(([0.0], np.cumsum(self._change[open_]))) + self._start[depth]
        unused = np.maximum(slack - sizes[-1], 0.0)
        least: Floats = np.interp(slack, sizes, np.maximum(extras, 0.0)) + self._multiplier * unused
        return least


class _Keys:
    """A choice as one integer, so that the lexicographically first has the smallest."""

    def __init__(self, core: Items) -> None:
        self._order = [np.argsort(candidates) for candidates in core.candidates]
        self._bits = [(order.size - 1).bit_length() for order in self._order]
        self.parts: list[npt.NDArray[Any]] = []
        shift = sum(self._bits)
        for order, bits in zip(self._order, self._bits, strict=True):
            shift -= bits
            self.parts.append(np.array([int(r) << shift for r in np.argsort(order)], dtype=object))

    def positions(self, key: int) -> Ints:
        """Position per item."""
        result = np.zeros(len(self._order), dtype=np.int64)
        for i in range(len(self._order) - 1, -1, -1):
            result[i] = self._order[i][key & ((1 << self._bits[i]) - 1)]
            key >>= self._bits[i]
        return result


def _undominated(
    among: Places, cost: Ints, size: Ints, key: Callable[[Places], npt.NDArray[Any]] | None
) -> Places:
    """Those of ``among`` with none as small and as cheap; of equals the one with the smallest key; by size."""
    order = np.lexsort((cost, size))
    cost, size, among = cost[order], size[order], among[order]
    if not among.size:
        return among
    before = np.concatenate(([np.iinfo(np.int64).max], np.minimum.accumulate(cost)[:-1]))
    best = cost < before
    kept = among[best]
    if key is None:
        return kept
    group = np.cumsum(best) - 1
    rivals = np.flatnonzero(~best & (cost == cost[best][group]) & (size == size[best][group]))
    if rivals.size:
        first = dict(zip(group[rivals].tolist(), key(kept[group[rivals]]), strict=True))
        for rival, at, value in zip(rivals, group[rivals].tolist(), key(among[rivals]), strict=True):
            if value < first[at]:
                first[at], kept[at] = value, among[rival]
    return kept


def _integer_costs(core: Items) -> list[Ints]:
    shifted = [cost - cost.min() for cost in core.costs]
    span = sum(float(cost.max()) for cost in shifted)
    exponent = 52 - math.frexp(span)[1] if span > 0 else 0
    return [np.rint(np.ldexp(cost, exponent)).astype(np.int64) for cost in shifted]
