"""The error table: exact at rank 0, never rosy above it, sizes to the bit."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import kendalltau

from compress.errors import CompressError, UsageError
from compress.quantize.blockwise import quantize_dequantize
from compress.quantize.config import FACTOR_8BIT, MENU, QuantConfig
from compress.quantize.decompose import decompose, factor_bits
from compress.quantize.error_table import (
    ErrorTable,
    corrected,
    error_table,
    menu,
    offered_ranks,
    refined,
)
from compress.quantize.rounding_errors import rounding_errors
from compress.solvers.problem import Problem
from compress.solvers.solve import solve
from tests.unit.quantize.test_decompose import squared, trained


def test_menus_nest() -> None:
    quick, standard, paper = (menu(effort) for effort in ("quick", "standard", "paper"))
    assert paper == MENU
    assert set(quick) < set(standard) < set(paper)
    assert {c.bits for c in quick} == {2, 3, 4, 8}
    assert (len(quick), len(standard)) == (12, 48)
    with pytest.raises(UsageError, match="no effort 'fast'"):
        menu("fast")  # type: ignore[arg-type]


def test_ranks_stay_below_half_of_the_smaller_side() -> None:
    assert offered_ranks((64, 576)) == (0, 4, 8, 16)
    assert offered_ranks((6, 6), (4, 2)) == (0, 2)
    assert offered_ranks((576, 576), (32, 8)) == (0, 8, 32)


def test_sizes_are_those_of_the_decompositions() -> None:
    weight = trained((48, 80))
    table = error_table(weight, menu("quick"))
    assert table.bits.dtype == np.int64
    for at in (0, 7, 30, table.bits.size - 1):
        config, rank = table.choice(at)
        assert table.bits.ravel()[at] == decompose(weight, config, rank=rank, iterations=1).storage_bits
    bare = error_table(weight, menu("quick"), factor_config=None)
    assert bare.bits[0, 1] - bare.bits[0, 0] == factor_bits((48, 80), 4, None)


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("shape", [(96, 160), (64, 192), (200, 72)])
def test_estimates_are_not_optimistic_and_not_far_off(shape: tuple[int, int], seed: int) -> None:
    weight = trained(shape, seed)
    table = error_table(weight, menu("quick"))
    for c in (0, 2, 3, 5, 6, 8):  # 2, 3 and 4 bits with blocks of 16 and of 64
        for r, rank in enumerate(table.ranks[1:], start=1):
            found = decompose(weight, table.configs[c], rank=rank, iterations=5).error
            assert 0.93 * found < table.errors[c, r] < 1.5 * found, (table.configs[c], rank)


def test_factors_of_eight_bits_are_not_said_to_repair_eight_bit_codes() -> None:
    weight = trained((96, 160))
    table = error_table(weight, [QuantConfig(bits=8)])
    for r, rank in enumerate(table.ranks):
        found = decompose(weight, table.configs[0], rank=rank, iterations=5).error
        assert 0.93 * found < table.errors[0, r] < 1.5 * found


def test_the_paper_effort_decomposes() -> None:
    weight = trained((48, 80))
    configs = [QuantConfig(bits=2), QuantConfig(bits=3), QuantConfig(bits=3, block_size=16)]
    table = error_table(weight, configs, (0, 4, 8), effort="paper")
    for c in (0, 1):
        for r, rank in enumerate(table.ranks):
            found = decompose(weight, configs[c], rank=rank, iterations=5).error
            assert table.errors[c, r] == pytest.approx(found, rel=1e-4)
    for r, rank in enumerate(table.ranks[1:], start=1):
        u, s, vh = torch.linalg.svd(weight.double(), full_matrices=False)
        rest = weight - ((u[:, :rank] * s[:rank]) @ vh[:rank]).float()
        wide, narrow = (squared(rest - quantize_dequantize(rest, config)) for config in configs[1:])
        assert table.errors[2, r] == pytest.approx(table.errors[1, r] * narrow / wide, rel=0.02)
    assert table.method != error_table(weight, configs, (0, 4)).method


def test_errors_fall_with_the_rank() -> None:
    errors = error_table(trained(), menu("standard"), factor_config=None).errors
    assert (np.diff(errors, axis=1) <= 0).all()


def test_a_rank_is_not_said_to_pay_on_noise() -> None:
    """On white noise the bits of a rank are better spent on codes: the table must not claim otherwise."""
    weight = torch.randn(96, 160, generator=torch.Generator().manual_seed(0))
    table = error_table(weight, menu("quick"))
    plain = [at for at, config in enumerate(table.configs) if config.block_size == 32]
    # Mixtures of these lie on the lines between them.
    sizes, logs = table.bits[plain, 0], np.log(table.errors[plain, 0])
    ranked = [at for at in np.ndindex(*table.errors.shape) if at[1] and table.bits[at] <= sizes[-1]]
    assert len(ranked) > 20
    for at in ranked:
        assert np.log(table.errors[at]) > np.interp(table.bits[at], sizes, logs)


@pytest.mark.parametrize("effort", ["quick", "paper"])
def test_zero_matrices_have_no_error(effort: str) -> None:
    table = error_table(torch.zeros(40, 64), [QuantConfig(bits=2)], effort=effort)  # type: ignore[arg-type]
    assert not table.errors.any()
    assert error_table(torch.zeros(40, 64), MENU, (0,)).skipped == ()


def test_tables_survive_json_and_are_deterministic() -> None:
    weight = trained((40, 50))
    table, again = (error_table(weight, menu("quick"), seed=3) for _ in range(2))
    read = ErrorTable.from_dict(json.loads(json.dumps(table.to_dict())))
    for other in (again, read):
        np.testing.assert_array_equal(other.errors, table.errors)
        np.testing.assert_array_equal(other.bits, table.bits)
        assert (other.configs, other.ranks, other.shape) == (table.configs, table.ranks, (40, 50))
    with pytest.raises(CompressError, match="format version 9"):
        ErrorTable.from_dict({**table.to_dict(), "format_version": 9})


def test_an_empty_menu_is_refused() -> None:
    with pytest.raises(UsageError, match="0 configurations"):
        error_table(trained(), [])


def test_factor_storage_is_part_of_the_estimate() -> None:
    weight = trained((96, 160))
    coarse = QuantConfig(bits=2, block_size=64)
    errors = [
        error_table(weight, [QuantConfig(bits=4, block_size=16)], factor_config=config).errors[0, -1]
        for config in (None, FACTOR_8BIT, coarse)
    ]
    assert errors[0] < errors[1] < errors[2]


def test_estimates_start_from_an_exact_rounding_of_what_the_factors_leave() -> None:
    weight = trained((96, 160), 4)
    configs = menu("standard")
    table = error_table(weight, configs, (0, 8), factor_config=None)
    u, s, vh = torch.linalg.svd(weight.double(), full_matrices=False)
    rest = weight - ((u[:, :8] * s[:8]) @ vh[:8]).float()
    first = rounding_errors(rest, configs)
    start = np.minimum(first, table.errors[:, 0])
    assert (table.errors[:, 1] < 1.01 * start).all()
    assert (table.errors[:, 1] > 0.5 * start).all()
    assert kendalltau(table.errors[:, 1], start).statistic > 0.97


def test_what_is_skipped_is_never_chosen() -> None:
    weights = [trained((48, 128), seed) for seed in range(2)]
    tables = [error_table(weight, MENU, (0, 8), sample=32) for weight in weights]
    for table in tables:
        assert {MENU[at].scale_dtype for at in table.skipped} == {"bfloat16"}
        assert len(table.skipped) == 144
        twin = [MENU.index(replace(MENU[at], scale_dtype="float16")) for at in table.skipped]
        skipped = list(table.skipped)
        np.testing.assert_array_equal(table.bits[skipped], table.bits[twin])
        assert (table.errors[skipped] > table.errors[twin]).all()
        np.testing.assert_allclose(table.errors[skipped], table.errors[twin], rtol=1e-5)
        read = ErrorTable.from_dict(json.loads(json.dumps(table.to_dict())))
        assert (read.skipped, read.sample) == (table.skipped, 32)
    for bits in (2.4, 3.1, 4.3, 6.0):
        found = solve(
            Problem(
                names=("a", "b"),
                costs=tuple(table.errors.ravel() for table in tables),
                sizes=tuple(table.bits.ravel() for table in tables),
                budget=int(bits * 2 * 48 * 128),
            )
        )
        for table, choice in zip(tables, found.choices, strict=True):
            assert table.choice(choice)[0].scale_dtype != "bfloat16"


@given(
    estimates=st.lists(st.floats(1e-3, 1e3), min_size=2, max_size=12),
    factor=st.floats(0.1, 10),
    first=st.integers(0, 11),
    second=st.integers(0, 11),
)
def test_what_all_estimates_get_wrong_alike_is_put_right(
    estimates: list[float], factor: float, first: int, second: int
) -> None:
    errors, size = np.array(estimates), len(estimates)
    first, second = first % size, second % size
    truth = errors * factor
    once = corrected(errors, (), {first: truth[first]})
    np.testing.assert_allclose(once, truth, rtol=1e-12)
    twice = corrected(once, (first,), {second: truth[second]})
    np.testing.assert_allclose(twice, truth, rtol=1e-12)
    zero = corrected(np.array([0.0, 1.0]), (), {0: 2.0})
    assert zero.tolist() == [2.0, 1.0]


def test_sampled_tables_keep_the_order_and_finalists_are_exact() -> None:
    weight = trained((256, 192))
    full = error_table(weight, menu("standard"), (0, 8))
    sampled = error_table(weight, menu("standard"), (0, 8), sample=0.25, seed=5)
    np.testing.assert_allclose(sampled.errors, full.errors, rtol=0.3)
    assert kendalltau(sampled.errors.ravel(), full.errors.ravel()).statistic > 0.96
    assert not np.array_equal(sampled.errors, full.errors)
    picked = [3, 40, 41]
    exact = refined(sampled, weight, picked)
    np.testing.assert_allclose(exact.errors.ravel()[picked], full.errors.ravel()[picked], rtol=2e-3)
    others = np.setdiff1d(np.arange(full.errors.size), picked)
    scale = np.exp(np.log(exact.errors.ravel()[picked] / sampled.errors.ravel()[picked]).mean())
    np.testing.assert_allclose(exact.errors.ravel()[others], scale * sampled.errors.ravel()[others])
    further = refined(exact, weight, [3, 50])
    np.testing.assert_allclose(further.errors.ravel()[[3, 50]], full.errors.ravel()[[3, 50]], rtol=2e-3)
    known = [*picked, 50]
    scale = np.exp(np.log(further.errors.ravel()[known] / sampled.errors.ravel()[known]).mean())
    others = np.setdiff1d(np.arange(full.errors.size), known)
    np.testing.assert_allclose(further.errors.ravel()[others], scale * sampled.errors.ravel()[others])
    assert refined(sampled, weight, []) is sampled
    whole = error_table(weight, menu("standard"), (0, 8), sample=1.0)
    np.testing.assert_allclose(whole.errors, full.errors, rtol=1e-9)


def test_values_that_are_not_finite_are_refused() -> None:
    weight = trained((40, 50))
    weight[3, 7] = torch.nan
    with pytest.raises(CompressError, match="not finite"):
        error_table(weight, menu("quick"))
