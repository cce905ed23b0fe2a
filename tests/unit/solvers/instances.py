"""Small and large allocation problems, and the answer by trying everything."""

from __future__ import annotations

import itertools
from fractions import Fraction

import numpy as np
from hypothesis import strategies as st

from compress.solvers.problem import Problem


def problem(
    costs: list[list[float]],
    sizes: list[list[int]],
    budget: int,
    groups: tuple[tuple[int, ...], ...] = (),
) -> Problem:
    return Problem(
        names=tuple(f"matrix {i}" for i in range(len(costs))),
        costs=tuple(np.array(c, dtype=np.float64) for c in costs),
        sizes=tuple(np.array(s, dtype=np.int64) for s in sizes),
        budget=budget,
        equal_groups=groups,
    )


def brute_force(p: Problem) -> tuple[int, ...] | None:
    """First choice by (exact cost, size, choice), or None when nothing fits."""
    best: tuple[Fraction, int, tuple[int, ...]] | None = None
    for choice in itertools.product(*(range(c.size) for c in p.costs)):
        if any(len({choice[m] for m in group}) > 1 for group in p.equal_groups):
            continue
        size = sum(int(s[c]) for s, c in zip(p.sizes, choice, strict=True))
        if size > p.budget:
            continue
        cost = sum((Fraction(float(v[c])) for v, c in zip(p.costs, choice, strict=True)), Fraction(0))
        if best is None or (cost, size, choice) < best:
            best = (cost, size, choice)
    return None if best is None else best[2]


@st.composite
def problems(draw: st.DrawFn, *, largest_cost: int = 12, whole: bool = True) -> Problem:
    """Up to 5 matrices of up to 5 candidates, many ties (whole costs), sometimes one equal group."""
    number = (
        st.integers(0, largest_cost).map(float)
        if whole
        else st.floats(0, 1e6, allow_subnormal=False, width=32)
    )
    counts = draw(st.lists(st.integers(1, 5), min_size=1, max_size=5))
    groups: tuple[tuple[int, ...], ...] = ()
    if len(counts) >= 3 and draw(st.booleans()):
        counts[2] = counts[0]
        groups = ((0, 2),)
    unit = draw(st.sampled_from([1, 7, 1_000_003]))
    costs = [draw(st.lists(number, min_size=n, max_size=n)) for n in counts]
    sizes = [[unit * s for s in draw(st.lists(st.integers(0, 12), min_size=n, max_size=n))] for n in counts]
    span = sum(max(s) for s in sizes)
    return problem(costs, sizes, draw(st.integers(0, span + unit)), groups)


@st.composite
def trade_offs(draw: st.DrawFn, *, units: tuple[int, ...] = (1, 7, 1_000_003)) -> Problem:
    """Like :func:`problems`, but larger is better and the budget lies between smallest and best."""
    counts = draw(st.lists(st.integers(2, 5), min_size=2, max_size=5))
    groups: tuple[tuple[int, ...], ...] = ()
    if len(counts) >= 3 and draw(st.booleans()):
        counts[2] = counts[0]
        groups = ((0, 2),)
    unit = draw(st.sampled_from(units))
    sizes = [
        sorted(unit * s for s in draw(st.sets(st.integers(0, 12), min_size=n, max_size=n))) for n in counts
    ]
    costs = [
        sorted(map(float, draw(st.lists(st.integers(0, 12), min_size=n, max_size=n))), reverse=True)
        for n in counts
    ]
    costs[0][0] += 1
    smallest = sum(s[0] for s in sizes)
    best = sum(s[c.index(c[-1])] for c, s in zip(costs, sizes, strict=True))
    return problem(costs, sizes, draw(st.integers(smallest, best - 1)), groups)


def model_like(matrices: int, candidates: int, *, seed: int, bits: float = 2.75) -> Problem:
    """Error tables as a transformer gives them: few shapes, many bit rates and ranks, falling errors."""
    g = np.random.default_rng(seed)
    costs, sizes, weights = [], [], 0
    for _ in range(matrices):
        count = int(g.choice([576 * 576, 192 * 576, 576 * 768]))
        rate = g.uniform(2.05, 8.5, candidates)
        rank = g.choice([0, 4, 8, 16, 32], candidates)
        rate[0], rank[0] = 2.05, 0  # so that every budget from 2.1 bits can be met
        sizes.append((rate * count).astype(np.int64) + rank * 8 * 1344 + 32)
        scale = float(g.lognormal()) * count / 1e3
        noise = np.exp(0.05 * g.normal(size=candidates))
        costs.append(scale * 4.0**-rate * (1 - 0.02 * np.sqrt(rank)) * noise)
        weights += count
    return Problem(
        names=tuple(f"layers.{i}" for i in range(matrices)),
        costs=tuple(costs),
        sizes=tuple(sizes),
        budget=int(bits * weights),
    )
