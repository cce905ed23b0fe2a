"""The steps below the solvers: pruning, relaxation, completion, narrowing, the budget's text."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog

from compress.errors import UsageError
from compress.solvers.budget import parse_budget
from compress.solvers.core import search
from compress.solvers.dynamic import LEVELS, solve_dynamic
from compress.solvers.lagrangian import complete, narrow, reduced_costs, relax
from compress.solvers.milp import solve_highs
from compress.solvers.pareto import Items, merge, reduce, undominated
from compress.solvers.problem import Problem, relative_gap
from compress.solvers.pulp_cbc import solve_cbc
from tests.unit.solvers.instances import brute_force, model_like, problem, trade_offs


@given(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), min_size=1, max_size=12))
def test_undominated_matches_the_definition(points: list[tuple[int, int]]) -> None:
    costs = np.array([c for c, _ in points], dtype=np.float64)
    sizes = np.array([s for _, s in points], dtype=np.int64)
    expected = [
        i
        for i, (c, s) in enumerate(points)
        if not any(
            oc <= c and os <= s and ((oc, os) != (c, s) or j < i)
            for j, (oc, os) in enumerate(points)
            if j != i
        )
    ]
    kept = undominated(costs, sizes)
    assert sorted(kept.tolist()) == expected
    assert (np.diff(sizes[kept]) > 0).all()
    assert (np.diff(costs[kept]) < 0).all()


def _needs_choosing(p: Problem) -> Items | None:
    items = reduce(merge(p))
    last = np.array([c.size - 1 for c in items.costs])
    first = np.zeros(len(items), dtype=np.int64)
    return items if items.size(first) <= p.budget < items.size(last) else None


@settings(max_examples=80, deadline=None)
@given(trade_offs())
def test_relaxation_equals_the_linear_program(p: Problem) -> None:
    items = _needs_choosing(p)
    assume(items is not None)  # merged groups may leave nothing to choose
    assert items is not None
    cost, size = np.concatenate(items.costs), np.concatenate(items.sizes).astype(np.float64)
    one_each = np.zeros((len(items), cost.size))
    one_each[np.repeat(np.arange(len(items)), [c.size for c in items.costs]), np.arange(cost.size)] = 1
    scale = size.max()
    program = linprog(
        cost,
        A_ub=size[None] / scale,
        b_ub=[p.budget / scale],
        A_eq=one_each,
        b_eq=np.ones(len(items)),
        method="highs",
    )
    relaxation = relax(items)
    assert relaxation.lower_bound == pytest.approx(program.fun, rel=1e-6, abs=1e-5)
    assert items.size(items.find(relaxation.chosen)) <= p.budget
    assert all((extra >= 0).all() for extra in reduced_costs(items, relaxation))


@settings(max_examples=80, deadline=None)
@given(trade_offs())
def test_narrowing_keeps_every_optimum(p: Problem) -> None:
    items, expected = _needs_choosing(p), brute_force(p)
    assume(items is not None and expected is not None)
    assert items is not None
    assert expected is not None
    relaxation = relax(items)
    core = narrow(items, relaxation, complete(items, items.find(relaxation.chosen)))
    for i, group in enumerate(items.members):
        assert expected[group[0]] in core.candidates[i]


def test_narrowing_is_worth_it() -> None:
    items = reduce(merge(model_like(210, 100, seed=0)))
    relaxation = relax(items)
    core = narrow(items, relaxation, complete(items, items.find(relaxation.chosen)))
    assert sum(c.size for c in core.costs) < 0.1 * sum(c.size for c in items.costs)


def test_completion_repairs_a_choice_over_the_budget() -> None:
    p = model_like(30, 20, seed=4)
    items = reduce(merge(p))
    over = np.array([c.size - 1 for c in items.costs])
    assert items.size(over) > p.budget
    repaired = complete(items, over)
    assert items.size(repaired) <= p.budget
    bound = relax(items).lower_bound
    assert bound <= items.cost(repaired) <= 1.05 * bound


def test_completion_exchanges_two_items() -> None:
    # Nothing fits on top of (large, small); giving up the first pays for a better second.
    items = reduce(merge(problem([[5.0, 4.0], [9.0, 1.0]], [[1, 3], [1, 3]], 4)))
    assert complete(items, np.array([1, 0])).tolist() == [0, 1]


@pytest.mark.parametrize(("name", "examples"), [("highs", 80), ("cbc", 30)])
def test_integer_programs_find_the_optimum_by_themselves(name: str, examples: int) -> None:
    @settings(max_examples=examples, deadline=None, suppress_health_check=list(HealthCheck))
    @given(trade_offs(units=(1, 7)))  # with larger ones a solver's tolerance may overrun the budget
    def check(p: Problem) -> None:
        items, expected = _needs_choosing(p), brute_force(p)
        assume(items is not None and expected is not None)
        assert items is not None
        assert expected is not None
        solver = {"highs": solve_highs, "cbc": solve_cbc}[name]
        start = np.zeros(len(items), dtype=np.int64)
        answer = solver(items, start, relax(items).multiplier, time_limit=60, gap=0.0)
        assert answer.positions is not None
        assert items.size(answer.positions) <= p.budget
        assert items.cost(answer.positions) == p.cost_of(expected)
        assert answer.lower_bound <= p.cost_of(expected) + 1e-9

    check()


def test_highs_bound_is_tight() -> None:
    items = reduce(merge(model_like(30, 20, seed=2)))
    relaxation = relax(items)
    start = complete(items, items.find(relaxation.chosen))
    answer = solve_highs(items, start, relaxation.multiplier, time_limit=60, gap=1e-4)
    assert answer.positions is not None
    cost = items.cost(complete(items, answer.positions))
    assert relaxation.lower_bound <= answer.lower_bound <= cost <= answer.lower_bound * (1 + 1e-3)


@pytest.mark.parametrize("worst", [1.0, 1e3, 1e5, 1e7])
@pytest.mark.parametrize(("matrices", "seed"), [(40, 0), (100, 0), (100, 2)])
def test_the_bound_of_highs_holds_whatever_its_tolerances(worst: float, matrices: int, seed: int) -> None:
    p = model_like(matrices, 60 if matrices == 100 else 30, seed=seed)
    relaxation = relax(reduce(merge(p)))
    # The relaxed choice uses up the budget: it is optimal, and no bound may lie above it.
    optimum = p.cost_of(relaxation.chosen.tolist())
    budget = p.size_of(relaxation.chosen.tolist())
    hopeless = p.costs[0].copy()
    hopeless[np.argmax(hopeless)] *= (
        worst  # sets the scale of the program, and with it that of absolute tolerances
    )
    merged = merge(Problem(names=p.names, costs=(hopeless, *p.costs[1:]), sizes=p.sizes, budget=budget))
    tight = relax(reduce(merged))
    answer = solve_highs(merged, tight.chosen, tight.multiplier, time_limit=60, gap=1e-4)
    assert answer.lower_bound <= optimum
    assert answer.lower_bound >= optimum * (1 - 1e-2 * max(1.0, worst / 1e6))


@settings(max_examples=50, deadline=None)
@given(trade_offs())
def test_dynamic_programming_is_exact_to_its_grid(p: Problem) -> None:
    items, expected = _needs_choosing(p), brute_force(p)
    assume(items is not None and expected is not None)
    assert items is not None
    assert expected is not None
    start = np.zeros(len(items), dtype=np.int64)
    answer = solve_dynamic(items, start, 0.0, time_limit=60, gap=0.0)
    grid = (items.cost(start) - sum(float(c.min()) for c in items.costs)) / LEVELS
    optimum = p.cost_of(expected)
    assert answer.positions is not None
    assert items.size(answer.positions) <= p.budget
    assert answer.lower_bound - 1e-9 <= optimum <= items.cost(answer.positions)
    assert items.cost(answer.positions) <= optimum + len(items) * grid


def test_the_exact_pass_says_when_it_gave_up() -> None:
    items = reduce(merge(model_like(60, 60, seed=11)))
    relaxation = relax(items)
    start = complete(items, items.find(relaxation.chosen))
    core = narrow(items, relaxation, start)
    upper = items.cost(start)
    whole = search(core, relaxation, upper, work=10**6)
    assert whole.complete
    assert whole.positions is not None
    optimum = core.cost(whole.positions)
    assert optimum <= upper
    bounds = []
    for work in (4, 8, 16):
        part = search(core, relaxation, upper, work=work)
        assert not part.complete
        known = upper if part.positions is None else core.cost(part.positions)
        bounds.append(min(part.lower_bound, known))
        assert bounds[-1] <= optimum <= known <= upper * (1 + 1e-9)
    assert max(bounds) > relaxation.lower_bound  # what was given up is known to be dearer


@settings(max_examples=150, deadline=None)
@given(trade_offs(), st.integers(1, 12))
def test_a_search_that_gives_up_bounds_the_optimum(p: Problem, work: int) -> None:
    items, expected = _needs_choosing(p), brute_force(p)
    assume(items is not None and expected is not None)
    assert items is not None
    assert expected is not None
    relaxation = relax(items)
    start = complete(items, items.find(relaxation.chosen))
    core = narrow(items, relaxation, start)
    upper, optimum = items.cost(start), p.cost_of(expected)
    found = search(core, relaxation, upper, work=work)
    best = upper if found.positions is None else min(upper, core.cost(found.positions))
    assert min(found.lower_bound, best) <= optimum + 1e-9
    if found.positions is not None:
        assert core.size(found.positions) <= p.budget
        assert core.cost(found.positions) >= optimum - 1e-9
        if found.complete:
            assert core.expand(core.chosen(found.positions)) == expected


def test_ties_are_settled_in_the_order_of_the_matrices_whatever_order_is_searched() -> None:
    # The second matrix differs most in size and is taken up first; (0, 1) and (1, 0) cost and weigh the same.
    p = problem([[6.0, 2.0, 0.0], [8.0, 4.0, 0.0]], [[0, 4, 8], [0, 4, 90]], 4)
    items = reduce(merge(p))
    relaxation = relax(items)
    found = search(items, relaxation, 1e3, work=100)
    assert found.positions is not None
    assert found.positions.tolist() == [0, 1]
    assert brute_force(p) == (0, 1)


def test_relative_gap() -> None:
    assert relative_gap(10.0, 9.0) == pytest.approx(0.1)
    assert relative_gap(0.0, 0.0) == 0
    assert relative_gap(1.0, 1.0 + 1e-16) == 0
    assert relative_gap(0.0, -1.0) == float("inf")
    assert relative_gap(-10.0, -11.0) == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("text", "kind", "value"),
    [
        ("2.75bit", "bits", 2.75),
        ("2.75bits", "bits", 2.75),
        ("3bit", "bits", 3.0),
        (" 3 BIT ", "bits", 3.0),
        (".5bit", "bits", 0.5),
        ("90MB", "bytes", 90e6),
        ("90mb", "bytes", 90e6),
        ("90MiB", "bytes", 90 * 2**20),
        ("0.5GiB", "bytes", 2**29),
        ("3.2gib", "bytes", 3.2 * 2**30),
        ("7kB", "bytes", 7e3),
        ("1TB", "bytes", 1e12),
        ("1TiB", "bytes", 2**40),
    ],
)
def test_budgets(text: str, kind: str, value: float) -> None:
    budget = parse_budget(text)
    assert (budget.kind, budget.value, budget.text) == (kind, value, text)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "bit",
        "3",
        "3b",
        "3B",
        "3bytes",
        "0bit",
        "0.0GB",
        "-3bit",
        "-90MB",
        "nanbit",
        "infMB",
        "1e3MB",
        "1,5bit",
        "2.75 bit per weight",
        "३bit",
        "3bit\n4bit",
        "9" * 400 + "bit",
        "1.2.3bit",
    ],
)
def test_budgets_that_are_none(text: str) -> None:
    with pytest.raises(UsageError, match="budget") as caught:
        parse_budget(text)
    assert caught.value.exit_code == 2
    assert "2.75bit" in caught.value.remedy
