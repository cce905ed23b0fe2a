"""The problem as a mixed-integer program, solved by HiGHS through ``scipy.optimize.milp``."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array

from compress.solvers.backend import Answer
from compress.solvers.pareto import Items
from compress.solvers.problem import Floats, Ints
from compress.solvers.quiet import native_output_discarded

FEASIBILITY_TOLERANCE = 1e-6
"""HiGHS and CBC accept a constraint missed by this much."""
DUAL_TOLERANCE, CUTOFF_TOLERANCE = 1e-7, 1e-6
"""HiGHS accepts reduced costs below zero by the one, and drops branches within the other of its best choice."""
COST_RANGE = 1024.0
"""Largest cost in a program: what the tolerances above, which are absolute, are small against."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class BinaryProgram:
    """Minimise ``cost @ x`` with one 1 per item and ``size @ x <= room``; sizes lie in [0, 1].

    Each item's smallest cost and size are taken out and the rest is scaled, so that the solver's absolute
    tolerances mean the same for every model.
    """

    cost: Floats  # [N]
    size: Floats  # [N]
    room: float
    item: Ints  # [N] the item of each variable
    cost_offset: float
    cost_scale: float
    size_scale: float

    def positions(self, x: Floats, items: Items) -> Ints:
        """The largest variable of every item."""
        ends = np.cumsum([c.size for c in items.costs])[:-1]
        return np.array([int(np.argmax(part)) for part in np.split(x, ends)], dtype=np.int64)


def binary_program(items: Items) -> BinaryProgram:
    """Conditioned coefficients of the program for ``items``."""
    cost = np.concatenate([c - c.min() for c in items.costs])
    size = np.concatenate([s - s.min() for s in items.sizes])
    # Powers of two, so that whole numbers arrive exact.
    size_scale = 2.0 ** math.frexp(float(size.max()))[1]
    cost_scale = 2.0 ** math.frexp(float(cost.max()))[1] / COST_RANGE
    return BinaryProgram(
        cost=cost / cost_scale,
        size=size / size_scale,
        room=(items.budget - sum(int(s.min()) for s in items.sizes)) / size_scale,
        item=np.repeat(np.arange(len(items)), [c.size for c in items.costs]).astype(np.int64),
        cost_offset=float(sum(c.min() for c in items.costs)),
        cost_scale=cost_scale,
        size_scale=size_scale,
    )


def solve_highs(items: Items, start: Ints, multiplier: float, *, time_limit: float, gap: float) -> Answer:
    """Best choice HiGHS finds within ``time_limit`` seconds or a relative gap ``gap``.

    It may overrun the budget by the solver's tolerance, which the caller repairs.
    """
    program = binary_program(items)
    variables = program.cost.size
    one_each = csr_array(
        (np.ones(variables), (program.item, np.arange(variables))), shape=(len(items), variables)
    )
    with native_output_discarded():
        result = milp(
            program.cost,
            integrality=np.ones(variables),
            bounds=Bounds(0, 1),
            constraints=[
                LinearConstraint(one_each, 1, 1),
                LinearConstraint(program.size[None, :], -np.inf, program.room),
            ],
            options={"time_limit": time_limit, "mip_rel_gap": gap},
        )
    bound = -np.inf
    if result.mip_dual_bound is not None:
        # The bound is that of a budget larger by the tolerance; its price turns it into one of ours.
        tolerated = multiplier * FEASIBILITY_TOLERANCE * program.size_scale
        # And it may be too high: by one reduced cost per item, as one variable of each is 1, and by the cutoff.
        tolerated += program.cost_scale * (len(items) * DUAL_TOLERANCE + CUTOFF_TOLERANCE)
        bound = program.cost_offset + program.cost_scale * float(result.mip_dual_bound) - tolerated
    positions = None if result.x is None else program.positions(result.x, items)
    return Answer(positions=positions, lower_bound=bound)
