"""What a solver's own file provides: a function from items to an answer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from compress.solvers.pareto import Items
from compress.solvers.problem import Ints


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Answer:
    """What a solver found.

    Attributes:
        positions: Position per item, None when it found nothing; the caller repairs a small overrun of the budget.
        lower_bound: What is proved about the cost of every choice, or -inf.
    """

    positions: Ints | None
    lower_bound: float


class Backend(Protocol):
    """Solve what the exact pass left open, or (raw) the whole problem."""

    def __call__(
        self, items: Items, start: Ints, multiplier: float, *, time_limit: float, gap: float
    ) -> Answer:
        """Return the best choice found and a bound.

        Args:
            items: At least one. The core: the candidates that matter, two or more for one item or more. Raw: all
                candidates, in any order.
            start: A known choice that fits in the budget.
            multiplier: Lagrangian price of one unit of size.
            time_limit: Seconds.
            gap: Relative gap at which the search may stop.
        """
        ...
