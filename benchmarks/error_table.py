"""The error table against LQ-LoRA's own way of making it, and what it is good for.

``python -m compress.benchmarks.error_table [--quick] [--out FILE]``

The plain way (arXiv 2311.12023, METHODS §3.1): for each of the 432 configurations, alternate between a randomized SVD
and rounding, until the error rises or the rounds are over. Here it has the library's own fast rounding and SVD. The
paper allows 100 rounds; ours are counted to 5 and to 10.
Speed: one 4096 x 4096 matrix, rank 64, in turns, in processor seconds of one thread (other work on the machine counts
less then). A few configurations of every width are decomposed and stand for the 108 of that width: the plain figure
is extrapolated. Order: Kendall's tau between the table and the decompositions over all 432 entries of smaller
matrices with the same share of rank; beside it, tau between two decompositions that differ in the seed of their SVDs
alone: the noise in what the table is held against. Allocation: the true cost of what the table picks for 28 matrices,
against the cost of what the true errors pick; by the whole table, by that of a sample of rows, and by that of a sample
with what was chosen computed from all rows and chosen anew ("settled"), which is what ``quantize`` does.
"""

from __future__ import annotations

import argparse
import math
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from scipy.stats import kendalltau

from compress.benchmarks.protocol import Rows
from compress.kernels.library import status
from compress.model.checkpoint import Checkpoint, checkpoint_architecture
from compress.model.load import EMBEDDED, resolve
from compress.pipelines.quantize import TURNS
from compress.quantize.blockwise import quantize_dequantize
from compress.quantize.config import MENU, QuantConfig
from compress.quantize.decompose import squared_norm
from compress.quantize.error_table import ErrorTable, corrected, error_table
from compress.quantize.lowrank import low_rank_factors
from compress.quantize.rounding_errors import rounding_errors
from compress.solvers.pareto import undominated
from compress.solvers.problem import Problem
from compress.solvers.solve import solve

TAKES = ("hours", "minutes")
NEEDS = ()

RANK_SHARE = 64
"""The smaller side of a matrix over its rank: 4096 / 64."""
ROUNDS = (5, 10)
SAMPLE = 1 / 16
LEAST_ROWS = 128
BUDGETS = (2.25, 2.75, 3.25, 4.25)
"""Stored bits per weight, factors apart."""
WIDTHS = sorted({config.bits for config in MENU})
GOALS = {"speedup": 100.0, "speedup_sampled": 500.0, "tau": 0.99, "cost": 0.005}

Floats = npt.NDArray[np.float64]


def heavy_tailed(shape: tuple[int, int], seed: int) -> torch.Tensor:
    """Student's t of 5 degrees, rows of unequal size, some loud columns, and a decaying low-rank part."""
    generator = torch.Generator().manual_seed(seed)

    def noise(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=generator)

    side = min(shape)
    low = (noise(shape[0], side) * torch.logspace(0, -1.5, side)) @ noise(side, shape[1])
    tails = sum(noise(*shape).square() for _ in range(5)) / 5
    weight = low / low.std() + noise(*shape) / torch.sqrt(torch.as_tensor(tails))
    weight *= torch.exp(0.3 * noise(shape[0], 1))
    weight[:, torch.randperm(shape[1], generator=generator)[: shape[1] // 40]] *= 3
    return 0.02 * weight


def plain_loop(
    weight: torch.Tensor, config: QuantConfig, rank: int, rounds: int, seed: int
) -> tuple[list[float], list[float]]:
    """Errors of the iterates and seconds until each, until the error rises or ``rounds`` are done."""
    began = time.process_time()
    quantized = torch.zeros_like(weight)
    errors: list[float] = []
    seconds: list[float] = []
    for step in range(rounds):
        left, right = low_rank_factors(weight - quantized, rank, seed=seed + step)
        product = left @ right
        quantized = quantize_dequantize(weight - product, config)
        errors.append(squared_norm(weight - product - quantized))
        seconds.append(time.process_time() - began)
        if step and errors[-1] >= errors[-2]:
            break
    return errors, seconds


def table_of(weight: torch.Tensor, rank: int, sample: float | None) -> ErrorTable:
    """Ours: ranks 0 and ``rank`` for the whole menu, factors in 16 bits."""
    return error_table(weight, MENU, (rank,), effort="standard", factor_config=None, sample=sample)


def rank_for(shape: tuple[int, int]) -> int:
    """The rank that has the same share of the matrix as 64 of 4096 x 4096."""
    return max(2, round(min(shape) / RANK_SHARE))


def rows_for(shape: tuple[int, int]) -> int:
    """Sampled rows of a matrix; a small one needs a larger share."""
    return max(round(SAMPLE * shape[0]), LEAST_ROWS)


def measure_speed(side: int, turns: int) -> dict[str, Any]:
    """Seconds of one table, whole and sampled, and of the plain loop for one configuration of each width per turn."""
    shape = (side, side)
    weight, rank = heavy_tailed(shape, 0), rank_for(shape)
    per_width = len(MENU) // len(WIDTHS)
    seconds: dict[str, list[float]] = {"table": [], "sampled": []}
    plain: dict[int, list[float]] = {rounds: [] for rounds in ROUNDS}
    checked: dict[int, dict[int, float]] = {rounds: {} for rounds in ROUNDS}
    table = table_of(weight, rank, rows_for(shape))  # a first call sets libraries and look-up tables up
    for turn in range(turns):
        for name, sample in (("table", None), ("sampled", rows_for(shape))):
            began = time.process_time()
            found = table_of(weight, rank, sample)
            seconds[name].append(time.process_time() - began)
            table = found if sample is None else table
        totals = dict.fromkeys(ROUNDS, 0.0)
        for place, width in enumerate(WIDTHS):
            members = [at for at, config in enumerate(MENU) if config.bits == width]
            at = members[(41 * turn + 31 * place + 53) % per_width]  # all kinds of scales and block sizes
            errors, until = plain_loop(weight, MENU[at], rank, max(ROUNDS), 0)
            for rounds in ROUNDS:
                done = min(rounds, len(errors))
                checked[rounds][at] = min(errors[:done])
                totals[rounds] += until[done - 1] * per_width
        for rounds in ROUNDS:
            plain[rounds].append(totals[rounds])
    return {
        "shape": list(shape),
        "rank": rank,
        "configurations": len(MENU),
        "computed": len(MENU) - len(table.skipped),
        "sampled_rows": rows_for(shape),
        "threads": torch.get_num_threads(),
        "turns": turns,
        "seconds": {name: _spread(values) for name, values in seconds.items()},
        "plain_seconds_extrapolated": {str(rounds): _spread(values) for rounds, values in plain.items()},
        "plain_configurations_timed": turns * len(WIDTHS),
        "speedup": {
            f"{name}, {rounds} rounds": _spread([p / s for p, s in zip(plain[rounds], values, strict=True)])
            for name, values in seconds.items()
            for rounds in ROUNDS
        },
        "table_over_decomposed": {
            str(rounds): {
                _name(MENU[at]): float(table.errors[at, -1]) / error
                for at, error in sorted(checked[rounds].items())
            }
            for rounds in ROUNDS
        },
        "tau_of_these": {
            str(rounds): float(
                kendalltau([table.errors[at, -1] for at in found], list(found.values())).statistic
            )
            for rounds, found in checked.items()
        },
    }


def _name(config: QuantConfig) -> str:
    return f"({config.bits}, {config.scale_bits}, {config.scale_dtype}, {config.block_size}, {config.group_size})"


def _spread(values: Sequence[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "least": min(values), "largest": max(values)}


def decomposed(
    weight: torch.Tensor, rank: int, rounds: int, seed: int, configs: Sequence[QuantConfig] | None = None
) -> Floats:
    """Least error of the plain loop for every configuration (None: the menu), [C]."""
    return np.array([min(plain_loop(weight, config, rank, rounds, seed)[0]) for config in configs or MENU])


def measure_order(weight: torch.Tensor, rounds: int, *, again: bool) -> dict[str, Any]:
    """Tau of the table, whole and sampled, with the decompositions, and of these with another seed's if ``again``."""
    shape = (weight.shape[0], weight.shape[1])
    rank = rank_for(shape)
    exact = decomposed(weight, rank, rounds, 0)
    left, right = low_rank_factors(weight, rank, seed=0)
    whole, sampled = (table_of(weight, rank, sample).errors[:, -1] for sample in (None, rows_for(shape)))
    sizes = np.array([config.storage_bits(shape) for config in MENU], dtype=np.int64)
    matter = undominated(exact, sizes)
    fine = [at for at, config in enumerate(MENU) if config.scale_dtype == "float16"]
    found: dict[str, Any] = {
        "shape": list(shape),
        "rank": rank,
        "rounds": rounds,
        "sampled_rows": rows_for(shape),
        "tau": _tau(whole, exact),
        "tau_sampled": _tau(sampled, exact),
        "tau_of_float16_alone": _tau(whole[fine], exact[fine]),
        "tau_of_the_undominated": _tau(whole[matter], exact[matter]),
        "undominated": len(matter),
        "tau_sampled_with_whole": _tau(sampled, whole),
        "tau_of_the_first_rounding": _tau(rounding_errors(weight - left @ right, MENU), exact),
        "ratio": {"mean": float((whole / exact).mean()), "spread": float((whole / exact).std())},
    }
    if again:
        other = decomposed(weight, rank, rounds, 1000)
        found["tau_of_decompositions_with_other_seeds"] = _tau(other, exact)
        found["tau_with_the_mean_of_both"] = _tau(whole, (exact + other) / 2)
    return found


def _tau(one: Floats, other: Floats) -> float:
    return float(kendalltau(one, other).statistic)


def model_matrix(columns: int) -> torch.Tensor:
    """The up projection of the embedded model's middle layer, its first ``columns`` columns."""
    path = resolve(None)
    arch = checkpoint_architecture(Checkpoint(path))
    layer = arch.layers // 2
    name = next(
        arch.tensor_name(layer, spec) for spec in arch.linears_at(layer) if spec.role in ("up", "gate_up")
    )
    return Checkpoint(path).read(name).float()[:, :columns]


def measure_allocation(layers: int, hidden: int, rounds: int) -> dict[str, Any]:
    """The true cost of the table's choices over that of the best, less 1, for several budgets."""
    shapes = [
        *((hidden, hidden), (hidden // 2, hidden), (hidden // 2, hidden), (hidden, hidden)),
        *((2 * hidden, hidden), (2 * hidden, hidden), (hidden, 2 * hidden)),
    ] * layers
    weights = [heavy_tailed(shape, 100 + at) * 1.1 ** (at % 5) for at, shape in enumerate(shapes)]
    exact = [
        decomposed(weight, rank_for(shape), rounds, 0) for weight, shape in zip(weights, shapes, strict=True)
    ]
    sizes = tuple(np.array([c.storage_bits(shape) for c in MENU], dtype=np.int64) for shape in shapes)
    names = tuple(str(at) for at in range(len(shapes)))
    weights_in_all = sum(weight.numel() for weight in weights)
    found: dict[str, Any] = {"matrices": len(shapes), "hidden": hidden, "rounds": rounds}
    whole, sampled = (
        [
            table_of(weight, rank_for(shape), rows_for(shape) // 2 if sample else None).errors[:, -1]
            for weight, shape in zip(weights, shapes, strict=True)
        ]
        for sample in (False, True)
    )

    def chosen(costs: Sequence[Floats], bits: float) -> tuple[int, ...]:
        budget = math.floor(bits * weights_in_all)
        return solve(Problem(names=names, costs=tuple(costs), sizes=sizes, budget=budget)).choices

    def refined(bits: float) -> tuple[int, ...]:
        return settled(lambda costs: chosen(costs, bits), sampled, whole)

    def excess_of(choose: Callable[[float], tuple[int, ...]]) -> dict[str, float]:
        excess = {}
        for bits in BUDGETS:
            ours, best = (
                math.fsum(float(errors[c]) for errors, c in zip(exact, choices, strict=True))
                for choices in (choose(bits), chosen(exact, bits))
            )
            excess[f"{bits} bits"] = ours / best - 1
        return excess

    return found | {
        "excess_cost_table": excess_of(lambda bits: chosen(whole, bits)),
        "excess_cost_sampled": excess_of(lambda bits: chosen(sampled, bits)),
        "excess_cost_settled": excess_of(refined),
    }


def settled(
    choose: Callable[[Sequence[Floats]], tuple[int, ...]], sampled: Sequence[Floats], whole: Sequence[Floats]
) -> tuple[int, ...]:
    """What ``quantize`` does with sampled tables: what is chosen is computed from all rows, and chosen anew.

    Args:
        choose: Costs of every matrix -> position of the choice for each.
        sampled: Costs from a sample.
        whole: The same from all rows.
    """
    costs: list[Floats] = list(sampled)
    known: list[set[int]] = [set() for _ in sampled]
    choices = choose(costs)
    for _ in range(TURNS):
        if all(at in before for at, before in zip(choices, known, strict=True)):
            break
        costs = [
            corrected(cost, before, {at: float(full[at])})
            for cost, before, full, at in zip(costs, known, whole, choices, strict=True)
        ]
        for at, before in zip(choices, known, strict=True):
            before.add(at)
        choices = choose(costs)
    return choices


def benchmark(rows: Rows, *, quick: bool) -> None:
    """Take the measurements that ``rows`` lacks."""
    rounds = ROUNDS[0]
    measurements = {
        "speed": lambda: measure_speed(1024 if quick else 4096, 1 if quick else 3),
        "order, heavy-tailed": lambda: measure_order(
            heavy_tailed((256, 256) if quick else (1024, 1024), 0), rounds, again=True
        ),
        "order, embedded model": lambda: measure_order(
            model_matrix(192 if quick else 576), rounds, again=False
        ),
        "allocation": lambda: measure_allocation(1 if quick else 4, 128 if quick else 192, rounds),
    }
    for key, measure in measurements.items():
        if not rows.has(key):
            load, began = os.getloadavg()[0], time.process_time()
            found = measure()
            rows.put(key, {**found, "load_before": load, "seconds_in_all": time.process_time() - began})


def report(rows: dict[str, dict[str, Any]]) -> str:
    """The figures as lines of text, the goals under them."""
    lines = []
    for key, row in rows.items():
        if key == "speed":
            lines += [
                f"speed, {name}: {ratio['median']:.0f}x ({ratio['least']:.0f} to {ratio['largest']:.0f})"
                for name, ratio in row["speedup"].items()
            ]
        elif key == "allocation":
            lines += [
                f"allocation, {kind}, {bits}: {excess:.2%} above the best"
                for kind in ("table", "sampled", "settled")
                for bits, excess in row[f"excess_cost_{kind}"].items()
            ]
        else:
            other = row.get("tau_of_decompositions_with_other_seeds")
            beside = "" if other is None else f"; decompositions of two seeds {other:.4f}"
            lines.append(f"{key}: tau {row['tau']:.4f}, sampled {row['tau_sampled']:.4f}{beside}")
    goals = (
        f"{GOALS['speedup']:.0f}x, sampled {GOALS['speedup_sampled']:.0f}x, tau {GOALS['tau']}, "
        f"cost within {GOALS['cost']:.1%}"
    )
    return "\n".join([*lines, f"goals: {goals}"])


def main() -> int:
    """Command line; the figures are printed last, the goals under them."""
    parser = argparse.ArgumentParser(
        prog="python -m compress.benchmarks.error_table", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--quick", action="store_true", help="small matrices, one turn")
    parser.add_argument(
        "--out", type=Path, help="JSON file of the figures; one that is there is gone on with"
    )
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    identity = {
        "benchmark": "error table",
        "model": EMBEDDED,
        "quick": arguments.quick,
        "rounds": list(ROUNDS),
        "kernels": status().level,
        "goals": GOALS,
    }
    with tempfile.TemporaryDirectory() as folder:
        rows = Rows(arguments.out or Path(folder) / "error-table.json", identity)
        benchmark(rows, quick=arguments.quick)
    print(report(rows.rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
