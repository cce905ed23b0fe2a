"""What a solver's own file provides: a function from items to an answer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from compress.solvers.pareto import Items
from compress.solvers.problem import Ints


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Answer:
    """Position per item (the caller repairs a small overrun of the budget) and a proved bound, or -inf."""

    positions: Ints
    lower_bound: float


class Backend(Protocol):
    """Solve the core.

    Args:
        items: The core: every item has the candidates that matter, one item or more has two.
        start: A choice that fits in the budget, returned when nothing better is found.
        multiplier: Lagrangian price of one unit of size.
        time_limit: Seconds.
        gap: Relative gap at which the search may stop.
    """

    def __call__(
        self, items: Items, start: Ints, multiplier: float, *, time_limit: float, gap: float
    ) -> Answer:
        """Return the best choice found and a bound."""
        ...
