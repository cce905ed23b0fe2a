"""Rounding in C against the torch versions, float64, and itself with other threads and levels."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from compress.kernels import rounding
from compress.kernels.library import library, status, using
from compress.kernels.reference import Grid
from compress.quantize.blockwise import compress_scales
from compress.quantize.codebook import sums_by_torch
from compress.quantize.config import QuantConfig
from compress.quantize.descent import codes_by_torch, scales_by_torch
from compress.quantize.hessian import InputStatistics, input_statistics
from compress.quantize.normal_float import normal_float_grid
from compress.quantize.rounding import RANGES, feedback_by_torch, ranges_by_torch

pytestmark = pytest.mark.skipif(library() is None, reason="the C library was not built")

CPU = torch.device("cpu")
SHAPES = ((1, 8, 8), (5, 70, 16), (64, 64, 64), (67, 130, 24), (130, 200, 32))
"""Rows, columns and block size: less than a vector, whole and broken tiles, panels and blocks."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """A matrix with statistics of correlated inputs, its table and scales [O, N]."""

    weight: Tensor
    statistics: InputStatistics
    config: QuantConfig
    grid: Grid
    scales: Tensor


def problem(rows: int, columns: int, block_size: int, bits: int, seed: int = 0) -> Problem:
    """Random; a block of zeros, a constant one, and a row of zeros where there is room for them."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(columns, columns, generator=generator, dtype=torch.float64)
    inputs = mix @ torch.randn(columns, 3 * columns, generator=generator, dtype=torch.float64)
    weight = torch.randn(rows, columns, generator=generator)
    weight[0, :block_size] = 0
    weight[-1, -block_size:] = 0.25
    if rows > 4:
        weight[3] = 0
    config = QuantConfig(bits=bits, block_size=block_size)
    statistics = input_statistics(inputs @ inputs.T / columns)
    grid = normal_float_grid(bits, CPU)
    ranges = ranges_by_torch(weight, config, statistics.weights, grid)
    scales = compress_scales(ranges, config).values(config).view(rows, -1)
    return Problem(weight=weight, statistics=statistics, config=config, grid=grid, scales=scales)


def values(p: Problem, codes: Tensor, scales: Tensor | None = None) -> Tensor:
    spread = (p.scales if scales is None else scales).repeat_interleave(p.config.block_size, 1)
    return p.grid.table[codes.long()] * spread[:, : codes.shape[1]]


def exact_error(p: Problem, codes: Tensor, scales: Tensor | None = None) -> float:
    rest = p.weight.double() - values(p, codes, scales).double()
    return float((rest @ p.statistics.gram.double() * rest).sum())


def by_feedback(p: Problem) -> tuple[Tensor, Tensor]:
    s = p.statistics
    return rounding.feedback(
        p.weight,
        p.scales,
        p.config.block_size,
        p.grid.table,
        steps_II=s.steps(),
        costs_I=s.weights,
        order_I=s.order,
    )


def by_descent(p: Problem, codes: Tensor, passes: int = 2) -> Tensor:
    size, table, gram = p.config.block_size, p.grid.table, p.statistics.gram
    return rounding.improve_codes(p.weight, codes, p.scales, size, table, gram, passes=passes)


def by_scales(p: Problem, codes: Tensor) -> Tensor:
    size, table, gram = p.config.block_size, p.grid.table, p.statistics.gram
    return rounding.improve_scales(p.weight, codes, p.scales, size, table, gram)


def by_ranges(p: Problem) -> Tensor:
    weights = p.statistics.weights
    return rounding.searched_ranges(p.weight, p.config.block_size, weights, p.grid.table, RANGES)


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("level", status().available[1:])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("shape", SHAPES)
def test_every_operation_is_that_of_torch(level: str, bits: int, shape: tuple[int, int, int]) -> None:
    p = problem(*shape, bits, seed=bits)
    size, gram = p.config.block_size, p.statistics.gram
    with using(level):
        codes, errors = by_feedback(p)
        expected, expected_errors = feedback_by_torch(p.weight, p.scales, size, p.grid, p.statistics)
        # A near-tie broken the other way takes the rest of its row along another path.
        assert int((codes != expected).any(1).sum()) <= 1 + shape[0] // 20
        torch.testing.assert_close(errors.sum(), expected_errors.sum(), rtol=2e-2, atol=1e-6)
        assert float(errors.sum()) == pytest.approx(exact_error(p, codes), rel=1e-3, abs=1e-6)
        moved = by_descent(p, expected)
        wanted = codes_by_torch(p.weight, expected, p.scales.T, size, p.grid, gram, passes=2)
        assert int((moved != wanted).any(1).sum()) <= 1 + shape[0] // 20
        assert exact_error(p, moved) <= exact_error(p, expected) * (1 + 1e-5) + 1e-9
        found = by_scales(p, expected)
        torch.testing.assert_close(
            found.T, scales_by_torch(p.weight, expected, p.scales.T, size, p.grid, gram), rtol=1e-3, atol=1e-4
        )
        assert exact_error(p, expected, found) <= exact_error(p, expected) * (1 + 1e-5) + 1e-9
        if bits < 8:
            ranges = ranges_by_torch(p.weight, p.config, p.statistics.weights, p.grid)
            assert float((by_ranges(p).view(-1) == ranges).double().mean()) >= 0.98


def test_in_sum_nothing_is_lost_against_torch() -> None:
    ours = theirs = 0.0
    for seed in range(40):
        p = problem(32, 72, 24, (2, 3, 4)[seed % 3], seed=seed)
        size, gram = p.config.block_size, p.statistics.gram
        ours += exact_error(p, by_descent(p, by_feedback(p)[0]))
        codes, _ = feedback_by_torch(p.weight, p.scales, size, p.grid, p.statistics)
        theirs += exact_error(p, codes_by_torch(p.weight, codes, p.scales.T, size, p.grid, gram, passes=2))
    assert ours <= theirs * (1 + 1e-4)


def everything(p: Problem) -> list[Tensor]:
    codes, errors = by_feedback(p)
    blocks = p.weight.reshape(-1, 10)
    sums = rounding.entry_sums(blocks, blocks.abs().amax(1), torch.rand(3, 10), p.grid.table)
    return [codes, errors, by_descent(p, codes), by_scales(p, codes), by_ranges(p), *sums]


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_threads_change_nothing_and_neither_do_wider_vectors(bits: int) -> None:
    p = problem(300, 130, 16, bits, seed=1)
    torch.manual_seed(0)
    expected = everything(p)
    levels = [level for level in status().available if level in ("avx2", "avx512")] or ["scalar"]
    for level in levels:
        for count in (1, 2, 3):
            with using(level), threads(count):
                torch.manual_seed(0)
                for one, other in zip(expected, everything(p), strict=True):
                    assert torch.equal(one, other), (level, count)


@pytest.mark.parametrize("level", status().available[1:])
@given(
    count=st.integers(1, 40),
    size=st.sampled_from([1, 8, 16, 24]),
    period=st.integers(1, 5),
    seed=st.integers(0, 10_000),
)
def test_sums_of_entries_are_those_of_torch(
    level: str, count: int, size: int, period: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    blocks = torch.randn(count, size, generator=generator)
    scales = blocks.abs().amax(1) * (torch.rand(count, generator=generator) > 0.2)
    weights = torch.rand(period, size, generator=generator)
    table = torch.sort(torch.rand(16, generator=generator) * 2 - 1).values
    with using(level):
        found = rounding.entry_sums(blocks, scales, weights, table)
    for one, other in zip(found, sums_by_torch(blocks, scales, weights, table), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("level", status().available[1:])
def test_tables_too_dense_for_cells_are_searched(level: str) -> None:
    table = torch.cat([torch.linspace(-1, 0.2, 20), 0.2 + 1e-5 * torch.arange(1, 20), torch.tensor([1.0])])
    blocks = torch.cat([table, (table[1:] + table[:-1]) / 2]).clamp(-1, 1)[None]
    with using(level):
        mass, _ = rounding.entry_sums(blocks, torch.ones(1), torch.ones(blocks.shape), table)
    middles = ((table[1:].double() + table[:-1].double()) / 2).float()
    expected = torch.bucketize(blocks[0], middles).bincount(minlength=len(table)).double()
    assert torch.equal(mass, expected)
