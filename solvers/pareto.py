"""Equal groups merged, dominated candidates dropped: the small problem that solvers work on."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from compress.solvers.problem import Floats, Ints, Problem


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Items:
    """Candidates of every item; an item is one matrix or one merged group.

    A *position* counts within these arrays, a *candidate* is the index in the problem.

    Attributes:
        costs: Per item, once reduced strictly falling.
        sizes: Per item, once reduced strictly rising.
        candidates: Per item, the candidate index of each position.
        members: Per item, the matrices it stands for; items are in order of their first matrix.
        budget: Largest allowed summed size.
    """

    costs: tuple[Floats, ...]
    sizes: tuple[Ints, ...]
    candidates: tuple[Ints, ...]
    members: tuple[tuple[int, ...], ...]
    budget: int

    def __len__(self) -> int:
        return len(self.costs)

    def cost(self, positions: Ints) -> float:
        """Summed cost."""
        return math.fsum(cost[p] for cost, p in zip(self.costs, positions, strict=True))

    def size(self, positions: Ints) -> int:
        """Summed size, exact."""
        return sum(int(size[p]) for size, p in zip(self.sizes, positions, strict=True))

    def chosen(self, positions: Ints) -> Ints:
        """Candidate index per item."""
        return np.array([c[p] for c, p in zip(self.candidates, positions, strict=True)], dtype=np.int64)

    def find(self, chosen: Ints) -> Ints:
        """Positions of the given candidates, the inverse of :meth:`chosen`."""
        pairs = zip(self.candidates, chosen, strict=True)
        return np.array([np.flatnonzero(have == want)[0] for have, want in pairs], dtype=np.int64)

    def keep(self, kept: Sequence[npt.NDArray[np.bool_] | Ints]) -> Items:
        """The same items with only some positions, given as a mask or in order."""
        return Items(
            costs=tuple(a[k] for a, k in zip(self.costs, kept, strict=True)),
            sizes=tuple(a[k] for a, k in zip(self.sizes, kept, strict=True)),
            candidates=tuple(a[k] for a, k in zip(self.candidates, kept, strict=True)),
            members=self.members,
            budget=self.budget,
        )

    def expand(self, chosen: Ints) -> tuple[int, ...]:
        """Candidate index per matrix from candidate index per item."""
        choices = {matrix: int(c) for group, c in zip(self.members, chosen, strict=True) for matrix in group}
        return tuple(choices[matrix] for matrix in range(len(choices)))


def undominated(costs: Floats, sizes: Ints) -> Ints:
    """Indices of the candidates worth choosing, by rising size and falling cost.

    A candidate is dropped when another is no larger and no dearer and better in one of the two, or equal in
    both and listed earlier. Whoever minimises (cost, size, choice) in this order loses nothing.
    """
    order = np.lexsort((np.arange(costs.size), costs, sizes))  # by size, then cost, then index
    sorted_costs = costs[order]
    cheapest_before = np.concatenate(([np.inf], np.minimum.accumulate(sorted_costs)[:-1]))
    return order[sorted_costs < cheapest_before].astype(np.int64)


def merge(problem: Problem) -> Items:
    """Merge the equal groups into one item each; every candidate stays, in the problem's order."""
    grouped = {matrix for group in problem.equal_groups for matrix in group}
    alone = [(matrix,) for matrix in range(len(problem.names)) if matrix not in grouped]
    members = sorted([*(tuple(sorted(group)) for group in problem.equal_groups), *alone])
    costs: list[Floats] = [np.sum([problem.costs[m] for m in group], 0, np.float64) for group in members]
    sizes: list[Ints] = [np.sum([problem.sizes[m] for m in group], 0, np.int64) for group in members]
    return Items(
        costs=tuple(costs),
        sizes=tuple(sizes),
        candidates=tuple(np.arange(cost.size, dtype=np.int64) for cost in costs),
        members=tuple(members),
        budget=problem.budget,
    )


def reduce(merged: Items) -> Items:
    """Drop dominated candidates and sort the others by rising size."""
    return merged.keep([undominated(*table) for table in zip(merged.costs, merged.sizes, strict=True)])
