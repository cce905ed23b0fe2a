"""Plain rounding in C against the torch backend, bit for bit, and the errors of a menu against float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from compress.kernels.blocks import block_maxima, menu_errors, packed_codes, rounded_values
from compress.kernels.library import library, status, using
from compress.kernels.reference import quantize_blocks
from compress.quantize.blockwise import quantize_blockwise, quantize_dequantize, row_blocks
from compress.quantize.config import QuantConfig
from compress.quantize.normal_float import normal_float_grid
from compress.quantize.packing import pack

pytestmark = pytest.mark.skipif(library() is None, reason="the C library was not built")

CPU = torch.device("cpu")
LEVELS = status().available[1:]


def matrix(rows: int, columns: int, seed: int) -> Tensor:
    """Heavy tails, some zero and some constant stretches, a few tiny numbers."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator) * torch.randn(rows, 1, generator=generator).exp()
    weight[torch.rand(rows, columns, generator=generator) > 0.9] = 0
    weight[0] = 0.5
    weight[-1, : columns // 2] = 0
    weight[rows // 2] *= 1e-41  # subnormal: there is no reciprocal of such a scale
    return weight


@pytest.mark.parametrize("level", LEVELS)
@given(
    rows=st.integers(1, 40),
    columns=st.integers(1, 140),
    size=st.sampled_from([8, 16, 24, 64]),
    bits=st.sampled_from([2, 3, 4, 8]),
    seed=st.integers(0, 10_000),
)
def test_codes_and_values_are_those_of_torch(
    level: str, rows: int, columns: int, size: int, bits: int, seed: int
) -> None:
    weight, grid = matrix(rows, columns, seed), normal_float_grid(bits, CPU)
    blocks = row_blocks(weight, size)
    with using(level):
        maxima = block_maxima(weight, size)
        assert torch.equal(maxima.view(-1), blocks.abs().amax(1))
        scales = torch.where(maxima > 0.05, 0.8 * maxima, torch.zeros_like(maxima))
        codes = quantize_blocks(blocks, scales.view(-1), grid)
        assert torch.equal(packed_codes(weight, scales, size, grid.table, bits), pack(codes, bits))
        values = (grid.table[codes.long()] * scales.view(-1, 1)).view(rows, -1)[:, :columns]
        assert torch.equal(rounded_values(weight, scales, size, grid.table), values)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("bad", [torch.inf, -torch.inf, torch.nan])
@pytest.mark.parametrize("column", [0, 15, 16, 36])
def test_what_is_not_finite_shows_in_its_block_alone(level: str, bad: float, column: int) -> None:
    weight = matrix(3, 37, 0)
    weight[1, column] = bad
    with using(level):
        found = block_maxima(weight, 16).isfinite()
    expected = torch.ones(3, 3, dtype=torch.bool)
    expected[1, column // 16] = False
    assert torch.equal(found, expected)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_threads_and_levels_give_the_same_bytes(bits: int) -> None:
    weight, config = matrix(150, 203, bits), QuantConfig(bits=bits, block_size=24)
    found = []
    before = torch.get_num_threads()
    for level in LEVELS:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            with using(level):
                stored = quantize_blockwise(weight, config)
                found.append((*stored.tensors().values(), quantize_dequantize(weight, config)))
                assert torch.equal(found[-1][-1], stored.dequantize())
    torch.set_num_threads(before)
    for other in found[1:]:
        for one, two in zip(found[0], other, strict=True):
            assert torch.equal(one, two)


def exact(weight: Tensor, scales: Tensor, size: int, table: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Sums over the rows of squared errors, weighed, and of errors; entry by entry in float64."""
    wide, spread = weight.double(), scales.repeat_interleave(size, 1)[:, : weight.shape[1]].double()
    entries = spread[..., None] * table.double()
    errors = entries - wide[..., None]
    nearest = errors.gather(2, errors.abs().argmin(2, keepdim=True))[..., 0]
    return (nearest.square() * weights.double()).sum(1), nearest.sum(1)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize(("rows", "columns", "size"), [(1, 5, 8), (70, 90, 16), (64, 128, 64), (9, 77, 24)])
@pytest.mark.parametrize("weighed", [False, True])
def test_errors_of_a_menu_are_exact(level: str, rows: int, columns: int, size: int, weighed: bool) -> None:
    weight = matrix(rows, columns, rows)
    generator = torch.Generator().manual_seed(1)
    weights = torch.rand(rows, columns, generator=generator)
    absmax = block_maxima(weight, size)
    scales = torch.stack([absmax, 0.7 * absmax, torch.zeros_like(absmax)])
    tables = [normal_float_grid(bits, CPU).table for bits in (2, 3, 4, 8)]
    uses = ((0, 1, 2, 3), (3,), (2,))
    with using(level):
        found = menu_errors(weight, weights if weighed else None, size, scales, tables, uses)
    assert set(found) == {(at, table) for at, own in enumerate(uses) for table in own}
    for (at, table), (squares, sums) in found.items():
        counted = weights if weighed else torch.ones_like(weights)
        expected, plain = exact(weight, scales[at], size, tables[table], counted)
        torch.testing.assert_close(squares, expected, rtol=2e-5, atol=1e-12)
        torch.testing.assert_close(sums, plain, rtol=1e-4, atol=1e-4 * float(weight.abs().max()) + 1e-30)


def test_errors_of_a_menu_do_not_depend_on_threads() -> None:
    weight = matrix(200, 96, 3)
    scales, table = block_maxima(weight, 32)[None], normal_float_grid(3, CPU).table
    before, found = torch.get_num_threads(), []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        found.append(menu_errors(weight, None, 32, scales, [table], [[0]])[0, 0])
    torch.set_num_threads(before)
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)
