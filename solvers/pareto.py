"""Equal groups merged, dominated candidates dropped: the small problem that solvers work on."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from compress.solvers.problem import Floats, Ints, Problem


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Items:
    """Undominated candidates of every item; an item is one matrix or one merged group.

    A *position* counts within these arrays, a *candidate* is the index in the problem.

    Attributes:
        costs: Per item, strictly falling.
        sizes: Per item, strictly rising.
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

    def keep(self, masks: list[npt.NDArray[np.bool_]]) -> Items:
        """The same items with only the positions where the mask is true."""
        return Items(
            costs=tuple(a[m] for a, m in zip(self.costs, masks, strict=True)),
            sizes=tuple(a[m] for a, m in zip(self.sizes, masks, strict=True)),
            candidates=tuple(a[m] for a, m in zip(self.candidates, masks, strict=True)),
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


def reduce(problem: Problem) -> Items:
    """Merge the equal groups into one item each and drop dominated candidates."""
    grouped = {matrix for group in problem.equal_groups for matrix in group}
    alone = [(matrix,) for matrix in range(len(problem.names)) if matrix not in grouped]
    members = sorted([*(tuple(sorted(group)) for group in problem.equal_groups), *alone])
    costs, sizes, candidates = [], [], []
    for group in members:
        cost: Floats = np.stack([problem.costs[m] for m in group]).sum(axis=0, dtype=np.float64)
        size: Ints = np.stack([problem.sizes[m] for m in group]).sum(axis=0, dtype=np.int64)
        kept = undominated(cost, size)
        costs.append(cost[kept])
        sizes.append(size[kept])
        candidates.append(kept)
    return Items(
        costs=tuple(costs),
        sizes=tuple(sizes),
        candidates=tuple(candidates),
        members=tuple(members),
        budget=problem.budget,
    )
