"""The same mixed-integer program, solved by CBC through PuLP."""

from __future__ import annotations

import math
import os
import shutil

import numpy as np
import pulp

from compress.errors import CompressError
from compress.solvers.backend import Answer
from compress.solvers.milp import binary_program
from compress.solvers.pareto import Items
from compress.solvers.problem import Ints


def solve_cbc(items: Items, start: Ints, multiplier: float, *, time_limit: float, gap: float) -> Answer:
    """Best choice CBC finds within ``time_limit`` seconds or a relative gap ``gap``; PuLP passes no bound on.

    Raises:
        CompressError: There is no CBC executable.
    """
    program = binary_program(items)
    model = pulp.LpProblem("allocation", pulp.LpMinimize)
    choose = [model.add_variable(f"x{n}", cat=pulp.LpBinary) for n in range(program.cost.size)]
    model.setObjective(pulp.LpAffineExpression(zip(choose, program.cost.tolist(), strict=True)))
    first = 0
    for cost in items.costs:
        model.addConstraint(pulp.lpSum(choose[first : first + cost.size]) == 1)
        first += cost.size
    model.addConstraint(
        pulp.LpAffineExpression(zip(choose, program.size.tolist(), strict=True)) <= program.room
    )
    # Without "threads": CBC is serial then; with threads=1 it has a worker, and sometimes waits 10 s to be woken.
    command = pulp.COIN_CMD(
        path=_executable(),
        msg=False,
        timeLimit=time_limit,
        gapRel=gap,
        options=["preprocess off"],  # CBC 2.10's loses optima of small knapsacks
    )
    model.solve(command)
    values = np.array([variable.value() or 0.0 for variable in choose])
    found = model.sol_status in (pulp.LpSolutionOptimal, pulp.LpSolutionIntegerFeasible)
    positions = program.positions(values, items) if found else None
    return Answer(positions=positions, lower_bound=-math.inf)


def _executable() -> str:
    """CBC as shipped inside PuLP 3, else the one on the PATH."""
    bundled = getattr(pulp, "PULP_CBC_CMD", None)
    if bundled is not None and os.access(bundled.pulp_cbc_path, os.X_OK):
        return str(bundled.pulp_cbc_path)
    found = shutil.which("cbc")
    if found is None:
        raise CompressError(
            "The solver cbc needs the CBC program, and there is none on this machine.",
            "Install it (package coinor-cbc), or choose the solver highs.",
        )
    return found
