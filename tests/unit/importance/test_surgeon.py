"""Removal orders against brute force: every unit tried, every remainder refitted by least squares, in float64."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from compress.importance.surgeon import (
    RemovalOrder,
    block_order,
    column_order,
    damage_along,
    damped_inverse,
    remove,
)

DAMPING = 0.03


class Problem:
    """A weight W, inputs X with ``H = X X^T / tokens``, and a root of S that is not square."""

    def __init__(self, columns: int, seed: int, *, outputs: int = 4, tokens: int = 30) -> None:
        generator = torch.Generator().manual_seed(seed)

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        self.weight = draw(outputs, columns)
        inputs = draw(columns, tokens) * (0.3 + draw(columns, 1).abs()) + draw(1, tokens)
        self.gram = inputs @ inputs.T / tokens
        self.root = draw(3, outputs)

    @property
    def ridge(self) -> float:
        return DAMPING * float(self.gram.diagonal().mean())

    @property
    def weight_KC(self) -> Tensor:
        return self.root @ self.weight

    @property
    def inverse(self) -> Tensor:
        return damped_inverse(self.gram, DAMPING)

    def damage(self, gone: list[int]) -> float:
        """``1/2 tr(S dW (H + d I) dW^T)`` of the best dW that is -W in the columns ``gone``.

        By least squares on a design whose gram is ``H + d I``; nothing here inverts H.
        """
        return float(self.damages([gone])[0])

    def damages(self, choices: list[list[int]]) -> Tensor:
        """The damages of several sets of columns."""
        size = len(self.gram)
        design = torch.linalg.cholesky(self.gram + self.ridge * torch.eye(size, dtype=torch.float64)).T
        found = []
        for gone in choices:
            rest = [c for c in range(size) if c not in gone]
            delta = torch.zeros_like(self.weight)
            delta[:, gone] = -self.weight[:, gone]
            if rest:
                target = -(design[:, gone] @ delta[:, gone].T)
                delta[:, rest] = torch.linalg.lstsq(design[:, rest], target).solution.T
            found.append(0.5 * (self.root @ delta @ design.T).square().sum())
        return torch.stack(found)


def greedy(problem: Problem, members: list[list[int]], rounds: list[list[int]] | None = None) -> RemovalOrder:
    """Each time the unit whose loss costs least, all of them tried."""
    gone: list[int] = []
    order: list[int] = []
    damages = [0.0]
    closed: set[int] = set()
    lists = rounds if rounds is not None else []
    while len(order) < len(members):
        if rounds is not None and all(set(units) <= closed | set(order) for units in lists):
            closed = set()
        open_units = [
            unit
            for unit in range(len(members))
            if unit not in order and (rounds is None or unit not in closed)
        ]
        costs = problem.damages([gone + members[unit] for unit in open_units])
        best = open_units[int(costs.argmin())]
        order.append(best)
        gone += members[best]
        damages.append(float(costs.min()))
        for units in lists:
            if best in units:
                closed |= set(units)
    return RemovalOrder(units=torch.tensor(order), damage=torch.tensor(damages, dtype=torch.float64))


def same(found: RemovalOrder, expected: RemovalOrder) -> None:
    assert found.units.tolist() == expected.units.tolist()
    torch.testing.assert_close(found.damage, expected.damage, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("columns", [1, 2, 9])
def test_single_columns_go_in_the_greedy_order(columns: int, seed: int) -> None:
    problem = Problem(columns, seed)
    found = column_order(problem.weight_KC, problem.inverse)
    same(found, greedy(problem, [[c] for c in range(columns)]))
    assert found.damage.dtype == torch.float64


@pytest.mark.parametrize("seed", range(4))
def test_blocks_of_several_columns_go_in_the_greedy_order(seed: int) -> None:
    problem = Problem(10, seed)
    members = [[0, 1], [2, 3, 4], [5], [6, 7], [8, 9]]
    found = block_order(problem.weight_KC, problem.inverse, [torch.tensor(m) for m in members])
    same(found, greedy(problem, members))


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("lists", [[[0, 1], [2, 3], [4, 5]], [[0, 1, 2], [3, 4, 5]], [[0, 3, 5], [1, 2, 4]]])
def test_in_rounds_every_list_loses_one_before_any_loses_the_next(lists: list[list[int]], seed: int) -> None:
    problem = Problem(12, seed)
    members = [[2 * unit, 2 * unit + 1] for unit in range(6)]
    given_lists = [list(units) for units in lists]
    found = block_order(problem.weight_KC, problem.inverse, [torch.tensor(m) for m in members], given_lists)
    same(found, greedy(problem, members, lists))
    assert given_lists == lists  # the caller's lists are left alone
    for start in range(0, 6, len(lists)):
        taken = found.units[start : start + len(lists)].tolist()
        assert sorted(next(i for i, units in enumerate(lists) if unit in units) for unit in taken) == list(
            range(len(lists))
        )


@pytest.mark.parametrize("block", [2, 3, 5, 100])
def test_columns_taken_together_are_charged_exactly(block: int) -> None:
    problem = Problem(11, 7)
    found = column_order(problem.weight_KC, problem.inverse, block=block)
    order = found.units.tolist()
    assert sorted(order) == list(range(11))
    expected = problem.damages([order[:count] for count in range(12)])
    torch.testing.assert_close(found.damage, expected, rtol=1e-8, atol=1e-12)
    first = problem.damages([[c] for c in range(11)]).argsort()[:block]
    assert order[:block] == first.tolist()


@given(st.integers(1, 12), st.integers(0, 999), st.data())
@settings(max_examples=40, deadline=None)
def test_the_damage_of_any_order_is_exact_and_never_falls(
    columns: int, seed: int, data: st.DataObject
) -> None:
    problem = Problem(columns, seed)
    order = data.draw(st.permutations(range(columns)))
    count = data.draw(st.integers(0, columns))
    found = damage_along(problem.weight_KC, problem.inverse, torch.tensor(order[:count], dtype=torch.int64))
    expected = problem.damages([list(order[:n]) for n in range(count + 1)])
    torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-12)
    assert all(later >= earlier for earlier, later in pairwise(found.tolist()))
    greedy_order = column_order(problem.weight_KC, problem.inverse)
    assert all(later >= earlier for earlier, later in pairwise(greedy_order.damage.tolist()))
    along = damage_along(problem.weight_KC, problem.inverse, greedy_order.units)
    torch.testing.assert_close(along, greedy_order.damage, rtol=1e-8, atol=1e-12)


def test_removing_gives_what_the_refitted_rest_is() -> None:
    problem = Problem(8, 3)
    gone, rest = torch.tensor([5, 1, 6]), [0, 2, 3, 4, 7]
    steps, weight, inverse = remove(problem.weight_KC, problem.inverse, gone)
    total = problem.gram + problem.ridge * torch.eye(8, dtype=torch.float64)
    torch.testing.assert_close(inverse, torch.linalg.inv(total[rest][:, rest]), rtol=1e-9, atol=1e-12)
    # W + dW of the rest: the weight that answers to all inputs with the kept ones
    refitted = problem.weight_KC @ total[:, rest] @ torch.linalg.inv(total[rest][:, rest])
    torch.testing.assert_close(weight, refitted, rtol=1e-9, atol=1e-12)
    one_by_one = [problem.damage(gone[:n].tolist()) for n in range(4)]
    torch.testing.assert_close(
        steps, torch.tensor(one_by_one, dtype=torch.float64).diff(), rtol=1e-8, atol=1e-12
    )


def test_the_damped_inverse() -> None:
    problem = Problem(6, 0)
    identity = torch.eye(6, dtype=torch.float64)
    torch.testing.assert_close(
        problem.inverse @ (problem.gram + problem.ridge * identity), identity, rtol=0, atol=1e-10
    )
    single = damped_inverse(problem.gram.float(), DAMPING)
    assert single.dtype == torch.float64
    torch.testing.assert_close(single, problem.inverse, rtol=1e-4, atol=1e-4)


def test_inputs_that_are_all_zero_are_ranked_by_their_weights() -> None:
    problem = Problem(7, 1)
    inverse = damped_inverse(torch.zeros(7, 7), DAMPING)
    torch.testing.assert_close(inverse, torch.eye(7, dtype=torch.float64))
    found = column_order(problem.weight_KC, inverse)
    norms = problem.weight_KC.square().sum(dim=0)
    assert found.units.tolist() == norms.argsort().tolist()
    torch.testing.assert_close(found.damage[-1], 0.5 * norms.sum())


def test_an_input_that_is_always_zero_costs_what_the_damping_says() -> None:
    problem = Problem(6, 2)
    problem.gram[2] = 0
    problem.gram[:, 2] = 0
    found = column_order(problem.weight_KC, problem.inverse)
    expected = greedy(problem, [[c] for c in range(6)])
    same(found, expected)
    assert found.units[0] == 2
    torch.testing.assert_close(found.damage[1], 0.5 * problem.ridge * problem.weight_KC[:, 2].square().sum())
