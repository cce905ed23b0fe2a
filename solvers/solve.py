"""One entry to every solver: reduce, bound, solve the core, settle ties, certify."""

from __future__ import annotations

import importlib
import time
from typing import cast

import numpy as np

from compress.errors import CompressError, UsageError
from compress.solvers.backend import Backend
from compress.solvers.core import search
from compress.solvers.lagrangian import Relaxation, complete, narrow, relax, sort_twins
from compress.solvers.pareto import Items, reduce
from compress.solvers.problem import Ints, Problem, Solution, Status, relative_gap

SOLVERS: dict[str, str | None] = {
    "highs": "compress.solvers.milp:solve_highs",
    "cbc": "compress.solvers.pulp_cbc:solve_cbc",
    "dynamic": "compress.solvers.dynamic:solve_dynamic",
    "lagrangian": None,  # the bound and the greedy choice that every solver starts from, and nothing more
}
"""Solver names and where their functions live; imported when asked for."""

BEAM_WORK, PROOF_WORK = 20_000, 300_000
"""Partial choices per item in the last passes: a narrow one that improves the choice, then the exact one."""


def solve(
    problem: Problem, *, solver: str = "highs", time_limit: float = 60.0, gap: float = 1e-4
) -> Solution:
    """Choose one candidate per matrix with the least summed cost within the budget.

    ``highs``, ``cbc`` and ``dynamic`` end with an exact pass over what can still matter; unless it gives up
    (a great many choices as good as the best) they agree on lowest cost, then smallest size, then the
    lexicographically first choice. ``lagrangian`` stops at the bound and the greedy choice. The same problem
    gives the same answer each time, unless ``time_limit`` cuts a solver off and the exact pass gives up.

    Args:
        problem: Costs, sizes, budget.
        solver: A key of :data:`SOLVERS`.
        time_limit: Seconds given to HiGHS or CBC.
        gap: Relative gap at which HiGHS or CBC may stop, and below which a choice counts as ``within_gap``.

    Raises:
        CompressError: Nothing fits in the budget; the message names the smallest reachable size.
        UsageError: There is no such solver.
    """
    started = time.perf_counter()
    if solver not in SOLVERS:
        raise UsageError(f"There is no solver {solver!r}.", f"Choose one of: {', '.join(SOLVERS)}.")
    items = reduce(problem)
    smallest = sum(int(size[0]) for size in items.sizes)
    if smallest > problem.budget:
        raise CompressError(
            f"The budget of {problem.budget} cannot be met: the smallest reachable size is {smallest}.",
            f"Give a budget of {smallest} or more, or offer smaller candidates.",
        )
    largest = np.array([cost.size - 1 for cost in items.costs], dtype=np.int64)
    if items.size(largest) <= problem.budget:
        chosen, bound = items.chosen(largest), items.cost(largest)
        proved = True
    else:
        chosen, bound, proved = _search(items, solver, time_limit, gap)
    choices = items.expand(sort_twins(items, chosen))
    cost = problem.cost_of(choices)
    bound = cost if proved else min(bound, cost)
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


def _search(items: Items, solver: str, time_limit: float, gap: float) -> tuple[Ints, float, bool]:
    """Candidate per item, lower bound, and whether the choice is proved to be the first of the best."""
    relaxation = relax(items)
    bound = relaxation.lower_bound
    best = items.chosen(complete(items, items.find(relaxation.chosen)))
    where = SOLVERS[solver]
    if where is None:
        return best, bound, relative_gap(items.cost(items.find(best)), bound) == 0
    core = narrow(items, relaxation, items.find(best))
    if relative_gap(core.cost(core.find(best)), bound) > 0:
        module, function = where.split(":")
        backend = cast(Backend, getattr(importlib.import_module(module), function))
        answer = backend(core, core.find(best), relaxation.multiplier, time_limit=time_limit, gap=gap)
        bound = max(bound, answer.lower_bound)
        best = _better(core, best, core.chosen(complete(core, answer.positions)))
    return _settle(core, relaxation, best, bound)


def _settle(core: Items, relaxation: Relaxation, best: Ints, bound: float) -> tuple[Ints, float, bool]:
    for work in (BEAM_WORK, PROOF_WORK):
        core = narrow(core, relaxation, core.find(best))
        upper = core.cost(core.find(best))
        listing = search(core, relaxation, upper, work=work, beam=work == BEAM_WORK)
        if listing.positions is not None and listing.complete:
            return core.chosen(listing.positions), bound, True
        if listing.positions is not None:
            best = _better(core, best, core.chosen(listing.positions))
    return best, bound, False


def _better(core: Items, known: Ints, other: Ints) -> Ints:
    return other if core.cost(core.find(other)) < core.cost(core.find(known)) else known
