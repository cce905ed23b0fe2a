"""The error table under Fisher information: exact at rank 0, near what decomposition reaches above it."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from compress.errors import UsageError
from compress.quantize.blockwise import quantize_blockwise
from compress.quantize.config import FACTOR_8BIT, MENU, QuantConfig
from compress.quantize.error_table import ErrorTable, error_table, menu
from compress.quantize.fisher import Fisher
from compress.quantize.fisher_decompose import decompose_fisher
from compress.quantize.fisher_table import fisher_error_table
from tests.unit.quantize.test_decompose import trained
from tests.unit.quantize.test_fisher import information, weighted


@pytest.mark.parametrize("shape", [(37, 53), (64, 128), (2, 5)])
@pytest.mark.parametrize("whole", [True, False])
def test_rank_zero_is_exact_for_the_whole_menu(shape: tuple[int, int], whole: bool) -> None:
    weight, full = trained(shape), information(shape)
    fisher = Fisher.of(full, examples=2)
    if not whole:
        full = fisher.rows[:, None] * fisher.columns / fisher.columns.sum()
        fisher = fisher.summed()
    table = fisher_error_table(weight, MENU, fisher, (0,))
    assert table.errors.shape == (432, 1)
    for at in range(0, 432, 11):
        expected = weighted(full, weight - quantize_blockwise(weight, MENU[at]).dequantize())
        assert table.errors[at, 0] == pytest.approx(expected, rel=1e-4)
    assert table.weight_norm == pytest.approx(weighted(full, weight), rel=1e-5)


@pytest.mark.parametrize("whole", [True, False])
def test_learned_tables_are_measured_too(whole: bool) -> None:
    weight, full = trained((40, 72)), information((40, 72))
    fisher = Fisher.of(full, examples=2) if whole else Fisher.of(full, examples=2).summed()
    configs = [
        QuantConfig(bits=b, block_size=32, codebook=codebook)  # type: ignore[arg-type]
        for b, codebook in ((3, "learned"), (3, "normal"), (2, "learned"))
    ]
    table = fisher_error_table(weight, configs, fisher, (0,))
    for at, config in enumerate(configs):
        error = weight - quantize_blockwise(weight, config).dequantize()
        assert table.errors[at, 0] == pytest.approx(fisher.cost(error), rel=1e-4)
    assert table.errors[0, 0] != table.errors[1, 0]
    only = fisher_error_table(weight, configs[:1], fisher, (0,))
    np.testing.assert_array_equal(only.errors, table.errors[:1])


@pytest.mark.parametrize("shape", [(96, 160), (64, 192), (200, 72)])
@pytest.mark.parametrize("skew", [0.3, 1.0])
def test_estimates_are_near_what_is_found(shape: tuple[int, int], skew: float) -> None:
    weight = trained(shape, seed=1)
    fisher = Fisher.of(information(shape, seed=1, skew=skew), examples=2)
    table = fisher_error_table(weight, menu("quick"), fisher, (4, 8, 16))
    ratios = []
    for c in (0, 2, 3, 5, 6, 8, 9, 11):  # all widths, with blocks of 16 and of 64
        for r, rank in enumerate(table.ranks):
            found = decompose_fisher(weight, table.configs[c], fisher, rank=rank, iterations=5)
            assert table.bits[c, r] == found.decomposition.storage_bits
            ratios.append(table.errors[c, r] / found.weighted_error)
    above = [ratio for ratio, rank in zip(ratios, table.ranks * 8, strict=True) if rank]
    assert 0.7 < min(above) <= max(above) < 1.7
    assert 0.97 < float(np.median(above)) < 1.25


def test_uniform_information_gives_the_table_of_plain_errors() -> None:
    weight = trained()
    found = fisher_error_table(weight, menu("quick"), Fisher.uniform((96, 160)))
    plain = error_table(weight, menu("quick"))
    np.testing.assert_allclose(found.errors[:, 0], plain.errors[:, 0], rtol=1e-4)
    np.testing.assert_allclose(found.errors, plain.errors, rtol=0.35)
    np.testing.assert_array_equal(found.bits, plain.bits)
    assert found.method != plain.method


def test_factors_help_and_their_storage_counts() -> None:
    weight, fisher = trained(), Fisher.of(information((96, 160)), examples=2)
    errors = fisher_error_table(weight, menu("standard"), fisher, factor_config=None).errors
    assert (errors[:, 1:] < errors[:, :1]).all()
    assert (errors[:, -1] < 0.2 * errors[:, 0]).all()
    coarse = QuantConfig(bits=2, block_size=64)
    stored = [
        fisher_error_table(weight, [QuantConfig(bits=8)], fisher, factor_config=config).errors[0, -1]
        for config in (None, FACTOR_8BIT, coarse)
    ]
    assert stored[0] < stored[1] <= stored[2]


def test_nothing_costs_nothing() -> None:
    fisher = Fisher.of(information((40, 64)), examples=2)
    for weight, weights in (
        (torch.zeros(40, 64), fisher),
        (trained((40, 64)), Fisher.of(torch.zeros(40, 64), examples=2)),
    ):
        table = fisher_error_table(weight, menu("quick"), weights)
        assert not table.errors.any()
        assert table.weight_norm == 0


def test_tables_survive_json_and_are_deterministic() -> None:
    weight, fisher = trained((40, 50)), Fisher.of(information((40, 50)), examples=2)
    table, again = (fisher_error_table(weight, menu("quick"), fisher, seed=3) for _ in range(2))
    read = ErrorTable.from_dict(json.loads(json.dumps(table.to_dict())))
    for other in (again, read):
        np.testing.assert_array_equal(other.errors, table.errors)
        assert other.method == table.method


def test_an_empty_menu_and_another_shape_are_refused() -> None:
    fisher = Fisher.of(information((40, 50)), examples=2)
    with pytest.raises(UsageError, match="without configurations"):
        fisher_error_table(trained((40, 50)), [], fisher)
    with pytest.raises(UsageError, match="cannot weigh"):
        fisher_error_table(trained((50, 40)), menu("quick"), fisher)
