"""Speed, gap and repeatability of the solvers on allocations of the size of LLaMA-2-7B and 70B.

``python -m compress.benchmarks.solver [--quick] [--out FILE]``

Sizes are exact: every configuration of the menu, with and without ranks, on the models' own shapes. Costs are the true
rounding errors of random heavy-tailed matrices, mixed and scaled for each matrix of the model under a fixed seed. The
default solver runs five times on each. At one budget HiGHS, CBC and dynamic programming also get all candidates,
nothing reduced ("raw"), to compare objectives with; a relative gap of 1e-4 and the time limit stop the first two.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from compress.benchmarks.model_shapes import architecture
from compress.benchmarks.protocol import Rows
from compress.errors import CompressError
from compress.quantize.config import FACTOR_8BIT, MENU
from compress.quantize.error_table import RANKS, stored_bits
from compress.quantize.rounding_errors import rounding_errors
from compress.solvers.problem import Problem, Solution
from compress.solvers.solve import solve

TAKES = ("minutes", "minutes")
NEEDS = ()

SEED, RUNS = 0, 5
BUDGETS, RAW_BUDGET = (2.25, 2.75, 3.25, 4.25), 2.75
"""Stored bits per weight, factors included."""
FUSED = (("q", "k", "v"), ("gate", "up"))
"""Roles that must choose alike in the fused instances."""
TAILS = (None, 3, 4, 5, 7, 10)
"""Degrees of freedom of Student's t for the sample matrices; None: normal."""
RAW_LIMIT, QUICK_RAW_LIMIT = 60.0, 10.0
"""Seconds for raw HiGHS and CBC."""
RAW_CANDIDATES = {"highs": 600_000, "cbc": 300_000, "dynamic": 300_000}
"""Most candidates in all that go to a raw solver: with more, what comes before the search takes minutes."""
GOALS = {"LLaMA-2-7B": 0.5, "LLaMA-2-70B": 5.0, "gap": 1e-4}
"""Seconds by model, and the relative gap."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One instance: a key of ``model_shapes.CONFIGS``, whether ranks are offered, fused groups, bits per weight."""

    model: str
    ranks: bool
    fused: bool
    bits: float

    @property
    def key(self) -> str:
        """Its name in the results."""
        extras = f"{', ranks' if self.ranks else ''}{', fused' if self.fused else ''}"
        return f"{self.model}{extras}, {self.bits:.2f} bit"


def cases(*, quick: bool) -> list[Case]:
    """Every instance; ``quick``: LLaMA-2-7B at one budget."""
    return [
        Case(model=model, ranks=ranks, fused=fused, bits=bits)
        for model in ("LLaMA-2-7B", "LLaMA-2-70B")[: 1 if quick else 2]
        for ranks in (False, True)
        for fused in (False, True)
        for bits in ((RAW_BUDGET,) if quick else BUDGETS)
    ]


@cache
def sample_errors() -> npt.NDArray[np.float64]:
    """Relative squared rounding errors of the sample matrices for the menu, [S, C]."""
    generator = torch.Generator().manual_seed(SEED)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    errors = []
    for freedom in TAILS:
        weight = noise(256, 1024)
        if freedom is not None:
            weight /= noise(freedom, 256, 1024).square().mean(0).sqrt()
        weight *= torch.exp(0.5 * noise(256, 1) + 0.3 * noise(1, 1024))  # rows and columns differ in scale
        errors.append(rounding_errors(weight, MENU) / float(weight.double().square().sum()))
    return np.stack(errors)


def instance(case: Case) -> Problem:
    """The allocation problem of a case.

    A matrix's errors lie between those of two sample matrices, times its weights and a lognormal sensitivity. Rank r
    leaves ``1 - share (r / 64) ** power`` of them, share and power drawn for each matrix.
    """
    arch, samples, rng = architecture(case.model), sample_errors(), np.random.default_rng(SEED)
    ranks = RANKS if case.ranks else (0,)
    sizes_of = cache(lambda shape: stored_bits(shape, MENU, ranks, FACTOR_8BIT).reshape(-1))
    names: list[str] = []
    costs, sizes, groups, weights = [], [], [], 0
    for layer in range(arch.layers):
        at: dict[str, int] = {}
        for spec in arch.linears_at(layer):
            shape = arch.linear_shape(spec)
            first, second = rng.choice(len(samples), 2, replace=False)
            part, share, power = rng.uniform(), rng.uniform(0.02, 0.35), rng.uniform(0.4, 0.6)
            relative = samples[first] ** part * samples[second] ** (1 - part)
            left = 1 - share * (np.array(ranks) / 64) ** power
            scale = rng.lognormal(sigma=1.0) * shape[0] * shape[1]
            at[spec.role] = len(names)
            names.append(arch.tensor_name(layer, spec))
            costs.append((scale * relative[:, None] * left).reshape(-1))
            sizes.append(sizes_of(shape))
            weights += shape[0] * shape[1]
        groups += [tuple(at[role] for role in roles) for roles in FUSED]
    return Problem(
        names=tuple(names),
        costs=tuple(costs),
        sizes=tuple(sizes),
        budget=int(case.bits * weights),
        equal_groups=tuple(groups) if case.fused else (),
    )


def measure(problem: Problem, *, raw_limit: float | None) -> dict[str, Any]:
    """Five runs of the default solver; with a limit in seconds also the raw solvers."""
    load, runs, processor = os.getloadavg()[0], [], []
    for _ in range(RUNS):
        began = time.process_time()
        runs.append(solve(problem))
        processor.append(time.process_time() - began)
    found, candidates = runs[0], sum(cost.size for cost in problem.costs)
    raw: dict[str, dict[str, Any]] = {}
    if raw_limit is not None:
        names = [name for name, most in RAW_CANDIDATES.items() if candidates <= most]
        raw = {name: raw_run(problem, name, raw_limit) for name in names}
    best = max(
        [found.lower_bound, *(other["lower_bound"] for other in raw.values() if "lower_bound" in other)]
    )
    cheapest = min([found.cost, *(other["objective"] for other in raw.values() if "objective" in other)])
    return {
        "matrices": len(problem.costs),
        "candidates": problem.costs[0].size,
        "seconds": statistics.median(run.seconds for run in runs),
        "seconds_all": [run.seconds for run in runs],
        "processor_seconds": statistics.median(processor),
        "load_before": load,
        **figures(found),
        "choices_sha256": [digest(run) for run in runs],
        "identical": len({digest(run) for run in runs}) == 1,
        "above_best_bound": found.cost / best - 1,
        "above_best_objective": found.cost / cheapest - 1,
        "bounds_hold": best <= cheapest * (1 + 1e-12),  # no proved bound lies above what someone found
        "raw": raw,
    }


def figures(solution: Solution) -> dict[str, Any]:
    """Objective, lower bound, gap, status."""
    return {
        "objective": solution.cost,
        "lower_bound": solution.lower_bound,
        "gap": solution.gap,
        "status": solution.status,
    }


def digest(solution: Solution) -> str:
    """SHA-256 of the choices."""
    return hashlib.sha256(json.dumps(solution.choices).encode()).hexdigest()


def raw_run(problem: Problem, solver: str, limit: float) -> dict[str, Any]:
    """One run of a solver on the problem as it is; the bound is the better of its own (HiGHS) and the Lagrangian."""
    began = time.perf_counter()
    try:
        solution = solve(problem, solver=solver, time_limit=limit, raw=True)
    except CompressError as error:  # nothing found in time is a result here
        return {"seconds": time.perf_counter() - began, "failure": error.cause}
    return {"seconds": solution.seconds, **figures(solution)}


def table(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """The rows as aligned text, the goals and what misses them last."""
    head = (
        "instance",
        "matrices x candidates",
        "seconds",
        "gap",
        "above best bound",
        "5 runs",
        "raw: seconds, above ours",
    )
    lines = []
    for key, row in rows.items():
        raw = [
            f"{name} {other['seconds']:.1f} s "
            + (
                f"{other['objective'] / row['objective'] - 1:+.1e}"
                if "objective" in other
                else "nothing found"
            )
            for name, other in row["raw"].items()
        ]
        lines.append(
            (
                key,
                f"{row['matrices']} x {row['candidates']}",
                f"{row['seconds']:.2f}",
                f"{row['gap']:.1e}",
                f"{row['above_best_bound']:.1e}",
                "same" if row["identical"] else "differ",
                "; ".join(raw),
            )
        )
    widths = [max(map(len, column)) for column in zip(head, *lines, strict=True)]
    text = [
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in (head, *lines)
    ]
    missed = [key for key, row in rows.items() if not reached(key, row)]
    return "\n".join(
        [
            *text,
            f"goals: {GOALS['LLaMA-2-7B']:g} s and {GOALS['LLaMA-2-70B']:g} s, gap and distance to the best bound "
            f"and to every raw solver {GOALS['gap']:.0e}, five runs alike, "
            "no bound above an objective",
            f"missed: {'; '.join(missed) or 'none'}",
        ]
    )


def reached(key: str, row: Mapping[str, Any]) -> bool:
    """Whether a row meets its goals."""
    distances = (row["gap"], row["above_best_bound"], row["above_best_objective"])
    in_time = row["seconds"] <= GOALS[key.partition(",")[0]]
    return bool(row["identical"] and row["bounds_hold"]) and in_time and max(distances) <= GOALS["gap"]


def main() -> int:
    """Command line; the table is printed last."""
    parser = argparse.ArgumentParser(
        prog="python -m compress.benchmarks.solver", description=__doc__.splitlines()[0]
    )
    parser.add_argument(
        "--quick", action="store_true", help="LLaMA-2-7B at one budget, a shorter limit for the raw solvers"
    )
    parser.add_argument(
        "--out", type=Path, help="JSON file of the figures; one that is there is gone on with"
    )
    arguments = parser.parse_args()
    limit = QUICK_RAW_LIMIT if arguments.quick else RAW_LIMIT
    identity = {
        "benchmark": "solver",
        "quick": arguments.quick,
        "seed": SEED,
        "raw_limit": limit,
        "raw_gap": 1e-4,
        "budgets_include": "factors",
        "libraries": {name: importlib.metadata.version(name) for name in ("numpy", "scipy", "pulp")},
        "goals": GOALS,
    }
    with tempfile.TemporaryDirectory() as folder:
        rows = Rows(arguments.out or Path(folder) / "solver.json", identity)
        for case in cases(quick=arguments.quick):
            if not rows.has(case.key):
                compared = case.bits == RAW_BUDGET and not (arguments.quick and case.ranks)
                raw_limit = limit if compared else None
                rows.put(case.key, measure(instance(case), raw_limit=raw_limit))
    print(table(rows.rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
