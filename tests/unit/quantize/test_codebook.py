"""Learned look-up tables against plain float64 Lloyd iterations and brute force."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from compress.errors import UsageError
from compress.kernels.reference import make_grid, round_to_grid
from compress.quantize.blockwise import quantize_blockwise, quantize_dequantize
from compress.quantize.codebook import SMALLEST_STEP, fitted_grid, lloyd
from compress.quantize.config import QuantConfig
from compress.quantize.normal_float import normal_float_grid

CPU = torch.device("cpu")


def weighted_error(x: Tensor, weights: Tensor, table: Tensor) -> float:
    """Squared error of rounding to the nearest entry, by comparison with all of them, float64."""
    nearest = (x.double()[:, None] - table.double()).abs().min(1).values
    return float((weights.double() * nearest.square()).sum())


def plain_lloyd(x: Tensor, weights: Tensor, table: Tensor, iterations: int) -> Tensor:
    """Lloyd's algorithm one entry at a time, float64."""
    table = table.double().clone()
    for _ in range(iterations):
        codes = (x.double()[:, None] - table).abs().argmin(1)
        for at in range(len(table)):
            mine = codes == at
            if bool(mine.any()) and float(weights[mine].sum()) > 0:
                table[at] = (weights[mine] * x[mine]).double().sum() / weights[mine].double().sum()
    return table


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_lloyd_equals_the_plain_algorithm(bits: int) -> None:
    generator = torch.Generator().manual_seed(bits)
    x = torch.rand(500, generator=generator) * 2 - 1
    weights = torch.rand(500, generator=generator)
    start = normal_float_grid(bits, CPU)
    found = lloyd(x[None], torch.ones(1), weights[None], start, iterations=4)
    torch.testing.assert_close(found.double(), plain_lloyd(x, weights, start.table, 4), rtol=1e-4, atol=1e-5)


@given(seed=st.integers(0, 10_000), bits=st.sampled_from([2, 3, 4]), count=st.integers(1, 300))
def test_lloyd_never_raises_the_error(seed: int, bits: int, count: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, generator=generator).clamp(-1, 1)
    weights = torch.rand(count, generator=generator)
    start = normal_float_grid(bits, CPU)
    table = lloyd(x[None], torch.ones(1), weights[None], start)
    assert weighted_error(x, weights, table) <= weighted_error(x, weights, start.table) * (1 + 1e-5) + 1e-9
    assert float(table.diff().min()) >= min(SMALLEST_STEP, float(start.table.diff().min()))


def test_entries_that_nothing_is_rounded_to_stay() -> None:
    start = normal_float_grid(3, CPU)
    found = lloyd(torch.tensor([[0.9, 0.95]]), torch.ones(1), torch.ones(1, 2), start)
    assert torch.equal(found[:-1], start.table[:-1])
    assert float(found[-1]) == pytest.approx(0.925)


def test_a_fitted_table_spans_one_and_the_scales_make_up_for_it() -> None:
    generator = torch.Generator().manual_seed(0)
    blocks = torch.randn(40, 16, generator=generator)
    blocks[3] = 0
    scales = blocks.abs().amax(1)
    start = normal_float_grid(3, CPU)
    grid, factor = fitted_grid(blocks, scales, torch.ones(1, blocks.shape[1]), start)
    assert float(grid.table.abs().max()) == pytest.approx(1.0)
    used = scales > 0
    x = (blocks[used] / scales[used, None]).reshape(-1)
    weights = scales[used, None].square().expand(-1, 16).reshape(-1)
    assert weighted_error(x, weights, grid.table * factor) < weighted_error(x, weights, start.table)


def test_blocks_of_zeros_leave_the_table_alone() -> None:
    start = normal_float_grid(2, CPU)
    grid, factor = fitted_grid(torch.zeros(3, 8), torch.zeros(3), torch.ones(1, 8), start)
    assert grid is start
    assert factor == 1.0


@given(
    seed=st.integers(0, 10_000),
    bits=st.sampled_from([2, 3, 4]),
    rows=st.integers(1, 12),
    columns=st.integers(1, 70),
)
def test_quantization_with_a_learned_table_stores_what_it_decodes(
    seed: int, bits: int, rows: int, columns: int
) -> None:
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    config = QuantConfig(bits=bits, block_size=16, group_size=16, codebook="learned")
    found = quantize_blockwise(weight, config)
    assert found.table is not None
    assert sum(t.numel() * t.itemsize for t in found.tensors().values()) * 8 == config.storage_bits(
        (rows, columns)
    )
    decoded = found.dequantize()
    assert torch.equal(decoded, quantize_dequantize(weight, config))
    scales = found.packed().scales.repeat_interleave(16, dim=1)[:, :columns]
    codes = round_to_grid(torch.where(scales > 0, weight / scales, 0.0), make_grid(found.table)).long()
    torch.testing.assert_close(decoded, found.table[codes] * scales)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_a_learned_table_has_the_smaller_error(bits: int) -> None:
    weight = torch.randn(64, 256, generator=torch.Generator().manual_seed(bits))
    errors = [
        float(
            (weight - quantize_dequantize(weight, QuantConfig(bits=bits, codebook=codebook))).square().sum()
        )
        for codebook in ("normal", "learned")
    ]
    assert errors[1] < 0.97 * errors[0]


def test_wide_codes_have_no_learned_table() -> None:
    with pytest.raises(UsageError, match="learned codebook of 8 bits"):
        QuantConfig(bits=8, codebook="learned")
    with pytest.raises(UsageError, match="codebook is 'best'"):
        QuantConfig(bits=3, codebook="best")  # type: ignore[arg-type]
