"""Predicted costs against what rounding reaches, and the menu."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from compress.quantize.config import MENU, QuantConfig
from compress.quantize.output_aware import decompose_outputs
from compress.quantize.output_table import learned_menu, output_error_table
from tests.unit.quantize.test_output_aware import case

CONFIGS = [
    QuantConfig(bits=b, scale_bits=b0, block_size=s, codebook=c)  # type: ignore[arg-type]
    for b, b0, s, c in [
        (2, 4, 16, "learned"),
        (2, 8, 64, "normal"),
        (3, 4, 32, "learned"),
        (3, 8, 64, "normal"),
        (4, 4, 16, "learned"),
        (4, 8, 64, "normal"),
    ]
]


def test_table_predicts_what_rounding_reaches() -> None:
    weight, _, statistics = case(rows=96, columns=128, seed=7)
    table = output_error_table(weight, CONFIGS, statistics, ranks=(0, 8))
    for at, config in enumerate(CONFIGS):
        for rank_at, rank in enumerate(table.ranks):
            found = decompose_outputs(weight, config, statistics, rank=rank)
            assert 0.5 < table.errors[at, rank_at] / found.output_error < 2.0
            assert table.bits[at, rank_at] == found.decomposition.storage_bits
            assert table.weight_norm == pytest.approx(found.output_norm)


def test_rows_the_loss_does_not_mind_cost_nothing() -> None:
    weight, _, statistics = case(rows=32, columns=48, seed=3)
    minds = torch.zeros(32)
    minds[8:16] = 2.0
    table = output_error_table(weight, CONFIGS[:3], statistics, ranks=(0,), row_weights=minds, rows=32)
    alone = output_error_table(weight[8:16], CONFIGS[:3], statistics, ranks=(0,), rows=8)
    assert table.weight_norm == pytest.approx(2 * alone.weight_norm, rel=1e-4)
    # tables are fitted to all rows here and to eight there
    np.testing.assert_allclose(table.errors, 2 * alone.errors, rtol=0.25)


@pytest.mark.parametrize("rows", [8, 24])
def test_a_sample_of_rows_stands_for_all(rows: int) -> None:
    weight, _, statistics = case(rows=160, columns=64, seed=5)
    weight *= torch.logspace(-1, 1, 160)[:, None]
    every = output_error_table(weight, CONFIGS, statistics, ranks=(0,), rows=160)
    some = output_error_table(weight, CONFIGS, statistics, ranks=(0,), rows=rows)
    np.testing.assert_allclose(some.errors, every.errors, rtol=0.5 if rows == 8 else 0.35)
    order, expected = np.argsort(some.errors[:, 0]), np.argsort(every.errors[:, 0])
    assert list(order) == list(expected)


def test_zero_matrices_cost_nothing() -> None:
    _, _, statistics = case(rows=8, columns=48)
    table = output_error_table(torch.zeros(8, 48), CONFIGS, statistics, ranks=(0, 4))
    assert float(np.abs(table.errors).max()) == 0
    assert table.weight_norm == 0


def test_menus_grow_with_the_effort() -> None:
    quick, standard = learned_menu("quick"), learned_menu("standard")
    assert set(quick) < set(standard)
    assert len(set(quick)) == len(quick) == 19
    assert learned_menu("paper") == MENU
