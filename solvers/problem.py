"""The question every solver answers: one candidate for each matrix, all of them under one budget."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from compress.errors import CompressError

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Status = Literal["optimal", "within_gap", "feasible"]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Problem:
    """A multiple-choice knapsack (LQ-LoRA, arXiv 2311.12023, §3.2): least summed cost within the budget.

    Attributes:
        names: One name per matrix, for messages.
        costs: Per matrix ``[C]``: cost of each candidate, any finite number.
        sizes: Per matrix ``[C]``: size of each candidate, integers of zero or more, in the budget's unit.
        budget: Largest allowed sum of the chosen sizes.
        equal_groups: Matrices (by position) that must choose the same candidate index, such as q, k and v
            for a runtime that fuses them.

    Raises:
        ValueError: Lengths, dtypes or groups do not fit together.
        CompressError: A cost is not finite.
    """

    names: tuple[str, ...]
    costs: tuple[Floats, ...]
    sizes: tuple[Ints, ...]
    budget: int
    equal_groups: tuple[tuple[int, ...], ...] = ()

    def __post_init__(self) -> None:
        if not len(self.names) == len(self.costs) == len(self.sizes):
            raise ValueError("names, costs and sizes must have one entry per matrix")
        for name, cost, size in zip(self.names, self.costs, self.sizes, strict=True):
            if cost.ndim != 1 or cost.shape != size.shape or cost.size == 0:
                raise ValueError(f"{name}: costs and sizes must be equally long, non-empty vectors")
            if not np.issubdtype(size.dtype, np.integer) or size.min() < 0:
                raise ValueError(f"{name}: sizes must be integers of zero or more")
            if not np.isfinite(cost).all():
                raise CompressError(
                    f"A candidate for {name} has a cost that is not a finite number.",
                    "Check the weights of that matrix for NaN or infinity.",
                )
        seen: set[int] = set()
        for group in self.equal_groups:
            if not group or not seen.isdisjoint(group) or len(set(group)) != len(group):
                raise ValueError("equal_groups must be non-empty and must not overlap")
            seen.update(group)
            if not all(0 <= member < len(self.names) for member in group):
                raise ValueError("equal_groups names a matrix that does not exist")
            if len({self.costs[member].size for member in group}) != 1:
                raise ValueError("matrices of one equal group must have the same number of candidates")

    def cost_of(self, choices: Sequence[int]) -> float:
        """Summed cost of one candidate index per matrix."""
        return math.fsum(float(cost[c]) for cost, c in zip(self.costs, choices, strict=True))

    def size_of(self, choices: Sequence[int]) -> int:
        """Summed size of one candidate index per matrix."""
        return sum(int(size[c]) for size, c in zip(self.sizes, choices, strict=True))


@dataclass(frozen=True, slots=True, kw_only=True)
class Solution:
    """A choice and its certificate.

    Attributes:
        choices: Candidate index per matrix, in the problem's own numbering.
        cost: Summed cost.
        size: Summed size, at most the budget.
        lower_bound: No choice within the budget costs less.
        gap: ``(cost - lower_bound) / |cost|``; 0 when the choice is proved optimal.
        solver: Name of the solver asked for.
        seconds: Wall time.
        status: ``optimal`` (proved: gap 0), ``within_gap`` (as good as asked), ``feasible`` (see the gap).
    """

    choices: tuple[int, ...]
    cost: float
    size: int
    lower_bound: float
    gap: float
    solver: str
    seconds: float
    status: Status

    def certificate(self) -> dict[str, Any]:
        """What an allocation file records beside the choices."""
        return {
            "solver": self.solver,
            "status": self.status,
            "objective": self.cost,
            "lower_bound": self.lower_bound,
            "gap": self.gap,
            "size": self.size,
            "seconds": self.seconds,
        }


def relative_gap(cost: float, lower_bound: float) -> float:
    """``(cost - lower_bound) / |cost|``, never negative; infinite when only the cost is zero."""
    difference = cost - lower_bound
    if difference <= 0:
        return 0.0
    return difference / abs(cost) if cost else math.inf
