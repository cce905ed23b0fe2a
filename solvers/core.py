"""The last pass of every exact solver: list all choices as good as the best known one and take the first.

After :func:`compress.solvers.lagrangian.narrow` few candidates are left, and partial choices that exceed the
allowance, cannot meet the budget, or are dominated by another (Pisinger 1995) disappear as they arise. What
survives settles the optimum *and* its ties: lowest cost, then smallest size, then the lexicographically
first choice.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from compress.solvers.lagrangian import Relaxation, allowance, reduced_costs
from compress.solvers.pareto import Items
from compress.solvers.problem import Floats, Ints


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Listing:
    """The best positions met, and whether nothing was left out (then they are optimal)."""

    positions: Ints | None
    complete: bool


@dataclass(slots=True)
class _States:
    cost: Ints  # on the integer grid
    size: Ints
    extra: Floats  # reduced cost
    rank: Ints  # lexicographic rank of the partial choice

    def take(self, which: npt.NDArray[np.intp]) -> _States:
        return _States(self.cost[which], self.size[which], self.extra[which], self.rank[which])


def search(core: Items, relaxation: Relaxation, upper: float, *, work: int, beam: bool) -> Listing:
    """The first among the best choices that cost no more than ``upper``.

    Costs are compared as integers: multiples of a power of two so small that 2**52 of them cover all costs of
    the core. Equal costs stay equal whatever the order of summation.

    Args:
        core: Narrowed items.
        relaxation: The relaxation that narrowed them.
        upper: Cost of a known choice.
        work: Partial choices looked at per item.
        beam: When there are more, go on with the most promising; otherwise give up.
    """
    room = allowance(core, relaxation, upper)
    grid = _integer_costs(core)
    extras = reduced_costs(core, relaxation)
    smallest_rest = _suffix_sums([int(s.min()) for s in core.sizes])
    largest_rest = _suffix_sums([int(s.max()) for s in core.sizes])
    zero = np.zeros(1, dtype=np.int64)
    states = _States(zero, zero, np.zeros(1), zero)
    trail: list[tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]]] = []
    complete = True
    for i in range(len(core)):
        count = core.sizes[i].size
        lexical = np.argsort(np.argsort(core.candidates[i]))
        grown = _States(
            (states.cost[:, None] + grid[i]).ravel(),
            (states.size[:, None] + core.sizes[i]).ravel(),
            (states.extra[:, None] + extras[i]).ravel(),
            (states.rank[:, None] * count + lexical).ravel(),
        )
        unused = np.maximum(core.budget - grown.size - largest_rest[i + 1], 0)
        kept = np.flatnonzero(
            (grown.size + smallest_rest[i + 1] <= core.budget)
            & (grown.extra + relaxation.multiplier * unused <= room)
        )
        kept = kept[_undominated(grown.take(kept))]
        width = max(work // core.sizes[min(i + 1, len(core) - 1)].size, 1)
        if kept.size > width:
            if not beam:
                return Listing(positions=None, complete=False)
            complete = False
            kept = np.sort(kept[np.argsort(grown.extra[kept], kind="stable")[:width]])
            kept = kept[np.argsort(grown.size[kept], kind="stable")]
        if not kept.size:
            return Listing(positions=None, complete=False)
        states = grown.take(kept)
        states.rank = np.argsort(np.argsort(states.rank))
        trail.append(((kept // count).astype(np.int32), (kept % count).astype(np.int32)))
    positions = np.zeros(len(core), dtype=np.int64)
    state = int(np.argmin(states.cost))  # costs fall strictly as sizes rise: the minimum is unique
    for i in range(len(core) - 1, -1, -1):
        parents, picks = trail[i]
        positions[i] = picks[state]
        state = int(parents[state])
    return Listing(positions=positions, complete=complete)


def _undominated(states: _States) -> npt.NDArray[np.intp]:
    order = np.lexsort((states.rank, states.cost, states.size))
    cost = states.cost[order]
    if not cost.size:
        return order
    before = np.concatenate(([np.iinfo(np.int64).max], np.minimum.accumulate(cost)[:-1]))
    kept: npt.NDArray[np.intp] = order[cost < before]
    return kept


def _integer_costs(core: Items) -> list[Ints]:
    shifted = [cost - cost.min() for cost in core.costs]
    span = sum(float(cost.max()) for cost in shifted)
    exponent = 52 - math.frexp(span)[1] if span > 0 else 0
    return [np.rint(np.ldexp(cost, exponent)).astype(np.int64) for cost in shifted]


def _suffix_sums(values: list[int]) -> list[int]:
    sums = [0]
    for value in reversed(values):
        sums.append(sums[-1] + value)
    return sums[::-1]
