"""One entry to every solver: reduce, bound, list the core, solve what that leaves open, certify."""

from __future__ import annotations

import importlib
import time
from dataclasses import dataclass
from typing import cast

import numpy as np

from compress.errors import CompressError, UsageError, choose
from compress.solvers.backend import Answer, Backend
from compress.solvers.core import search
from compress.solvers.lagrangian import Relaxation, complete, narrow, relax, sort_twins
from compress.solvers.pareto import Items, merge, reduce
from compress.solvers.problem import Ints, Problem, Solution, Status, relative_gap

SOLVERS: dict[str, str | None] = {
    "highs": "compress.solvers.milp:solve_highs",
    "cbc": "compress.solvers.pulp_cbc:solve_cbc",
    "dynamic": "compress.solvers.dynamic:solve_dynamic",
    "lagrangian": None,  # the bound and the greedy choice that the others start from, and nothing more
}
"""Solver names and where their functions live; imported when asked for."""

WORK = (2_000, 20_000, 50_000)
"""Partial choices per item that the passes over the core look at; the first that gives none up is the last."""
NEGLIGIBLE = 1e-10
"""Relative gap below which no wider pass is worth its time: rounding, and choices that are all alike."""


def solve(
    problem: Problem,
    *,
    solver: str = "highs",
    time_limit: float = 60.0,
    gap: float = 1e-4,
    raw: bool = False,
) -> Solution:
    """Choose one candidate per matrix with the least summed cost within the budget.

    ``highs``, ``cbc`` and ``dynamic`` list what can still matter once the Lagrangian bound and a greedy choice are
    known. That settles most problems, and then they agree on lowest cost, then smallest size, then the
    lexicographically first choice. What it leaves open (a great many choices about as good as the best, and a
    bound further away than ``gap``) goes to HiGHS, CBC or dynamic programming. ``lagrangian`` stops at the bound
    and the greedy choice. The same problem gives the same answer each time, unless ``time_limit`` cuts HiGHS or
    CBC off.

    Args:
        problem: Costs, sizes, budget.
        solver: A key of :data:`SOLVERS`.
        time_limit: Seconds given to HiGHS or CBC.
        gap: Relative gap at which HiGHS or CBC may stop, and below which a choice counts as ``within_gap``.
        raw: Give HiGHS, CBC or dynamic programming all candidates and return what it finds, to compare with.
            Equal groups are merged, and an overrun of the budget by the solver's tolerance is repaired; the
            bound is the better of its own and the Lagrangian one.

    Raises:
        CompressError: Nothing fits in the budget (the message names the smallest reachable size), or a raw solver
            found nothing in time.
        UsageError: There is no such solver, or it has no raw form.
    """
    started = time.perf_counter()
    if solver not in SOLVERS or (raw and SOLVERS[solver] is None):
        known = [name for name, where in SOLVERS.items() if where is not None or not raw]
        raise UsageError(f"There is no {'raw ' if raw else ''}solver {solver!r}.", choose(solver, known))
    merged = merge(problem)
    items = reduce(merged)
    smallest = sum(int(size[0]) for size in items.sizes)
    if smallest > problem.budget:
        raise CompressError(
            f"The budget of {problem.budget} cannot be met: the smallest reachable size is {smallest}.",
            f"Give a budget of {smallest} or more, or offer smaller candidates.",
        )
    limits = _Limits(solver=solver, time_limit=time_limit, gap=gap)
    largest = np.array([cost.size - 1 for cost in items.costs], dtype=np.int64)
    if raw and len(items):
        choices, bound = _raw(merged, items, limits)
    else:
        if items.size(largest) <= problem.budget:
            chosen, bound, proved = items.chosen(largest), items.cost(largest), True
        else:
            chosen, bound, proved = _search(items, limits)
        choices = items.expand(sort_twins(items, chosen))
        bound = problem.cost_of(choices) if proved else bound
    cost = problem.cost_of(choices)
    bound = min(bound, cost)
    distance = relative_gap(cost, bound)
    status: Status = "optimal" if distance == 0 else "within_gap" if distance <= gap else "feasible"
    return Solution(
        choices=choices,
        cost=cost,
        size=problem.size_of(choices),
        lower_bound=bound,
        gap=distance,
        solver=solver,
        seconds=time.perf_counter() - started,
        status=status,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Limits:
    solver: str
    time_limit: float
    gap: float

    def ask(self, items: Items, start: Ints, multiplier: float) -> Answer:
        """What the solver's own function answers."""
        module, function = cast(str, SOLVERS[self.solver]).split(":")
        backend = cast(Backend, getattr(importlib.import_module(module), function))
        return backend(items, start, multiplier, time_limit=self.time_limit, gap=self.gap)


def _raw(merged: Items, items: Items, limits: _Limits) -> tuple[tuple[int, ...], float]:
    """Choices of the solver alone, and the lower bound."""
    relaxation = relax(items)
    answer = limits.ask(merged, relaxation.chosen, relaxation.multiplier)
    if answer.positions is None:
        raise CompressError(
            f"The solver {limits.solver} found no choice within {limits.time_limit:g} seconds.",
            "Give it more time, or let the problem be reduced first.",
        )
    positions = complete(merged, answer.positions, improve=False)
    return merged.expand(positions), max(relaxation.lower_bound, answer.lower_bound)


def _search(items: Items, limits: _Limits) -> tuple[Ints, float, bool]:
    """Candidate per item, lower bound, and whether the choice is proved to be the first of the best."""
    relaxation = relax(items)
    positions = complete(items, items.find(relaxation.chosen))
    best, bound = items.chosen(positions), relaxation.lower_bound
    if SOLVERS[limits.solver] is None:
        return best, bound, relative_gap(items.cost(positions), bound) == 0
    best, bound, proved = _settle(items, relaxation, best, WORK)
    cost = items.cost(items.find(best))
    if proved or relative_gap(cost, bound) <= limits.gap:
        return best, bound, proved
    core = narrow(items, relaxation, items.find(best))
    answer = limits.ask(core, core.find(best), relaxation.multiplier)
    bound = max(bound, answer.lower_bound)
    if answer.positions is None:
        return best, bound, False
    found = core.chosen(complete(core, answer.positions))
    if items.cost(items.find(found)) >= cost:
        return best, bound, False
    best, other, proved = _settle(core, relaxation, found, WORK[-1:])
    return best, max(bound, other), proved


def _settle(
    core: Items, relaxation: Relaxation, best: Ints, works: tuple[int, ...]
) -> tuple[Ints, float, bool]:
    """The same after wider and wider passes over what may be part of a better choice."""
    bound = relaxation.lower_bound
    for work in works:
        core = narrow(core, relaxation, core.find(best))
        upper = core.cost(core.find(best))
        listing = search(core, relaxation, upper, work=work)
        if listing.positions is not None:
            found, cost = core.chosen(listing.positions), core.cost(listing.positions)
            if listing.complete:
                return found, bound, True
            best, upper = (found, cost) if cost < upper else (best, upper)
        bound = max(bound, min(listing.lower_bound, upper))
        # Where all that was given up is dearer, one more pass is short and settles the ties.
        if listing.lower_bound <= upper and relative_gap(upper, bound) <= NEGLIGIBLE:
            break
    return best, bound, False
