"""Plain rounding by Triton against the torch backend, bit for bit, and the errors of a menu against float64."""

from __future__ import annotations

import pytest
import torch

from compress.errors import UsageError
from compress.kernels.reference import quantize_blocks
from compress.kernels.triton.launch import runs_on
from compress.quantize.blockwise import row_blocks
from compress.quantize.normal_float import normal_float_grid
from compress.quantize.packing import pack
from tests.unit.kernels.test_blocks import exact, matrix

from .cases import DEVICE, needs_kernels

if runs_on(DEVICE):
    from compress.kernels.triton.blocks import block_maxima, menu_errors, packed_codes, rounded_values

pytestmark = needs_kernels

CPU = torch.device("cpu")


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize(("rows", "columns", "size"), [(37, 140, 24), (9, 128, 64), (1, 5, 8)])
def test_codes_and_values_are_those_of_torch(rows: int, columns: int, size: int, bits: int) -> None:
    weight, grid = matrix(rows, columns, bits), normal_float_grid(bits, CPU)
    blocks = row_blocks(weight, size)
    maxima = block_maxima(weight.to(DEVICE), size)
    assert torch.equal(maxima.view(-1).cpu(), blocks.abs().amax(1))
    scales = torch.where(maxima > 0.05, 0.8 * maxima, torch.zeros_like(maxima)).cpu()
    codes = quantize_blocks(blocks, scales.view(-1), grid)
    given = (weight.to(DEVICE), scales.to(DEVICE), size, grid.table.to(DEVICE))
    assert torch.equal(packed_codes(*given, bits).cpu(), pack(codes, bits))
    values = (grid.table[codes.long()] * scales.view(-1, 1)).view(rows, -1)[:, :columns]
    assert torch.equal(rounded_values(*given).cpu(), values)


def test_midpoints_belong_to_the_lower_entry() -> None:
    table = torch.tensor([-1.0, -0.25, 0.25, 0.5])
    weight = torch.tensor([[-0.625, 0.0, 0.375, 0.3750001, -0.6249999, 1.0, -1.0, 0.5]])
    found = rounded_values(weight.to(DEVICE), torch.ones(1, 1, device=DEVICE), 8, table.to(DEVICE))
    assert found.tolist() == [[-1.0, -0.25, 0.25, 0.5, -0.25, 0.5, -1.0, 0.5]]


@pytest.mark.parametrize("bad", [torch.inf, -torch.inf, torch.nan])
def test_what_is_not_finite_shows_in_its_block_alone(bad: float) -> None:
    weight = matrix(3, 37, 0)
    weight[1, 20] = bad
    found = block_maxima(weight.to(DEVICE), 16).isfinite().cpu()
    expected = torch.ones(3, 3, dtype=torch.bool)
    expected[1, 1] = False
    assert torch.equal(found, expected)


@pytest.mark.parametrize(
    ("rows", "columns", "size", "weighed"), [(1, 5, 8, False), (9, 600, 24, True), (6, 128, 64, False)]
)
def test_errors_of_a_menu_are_exact(rows: int, columns: int, size: int, weighed: bool) -> None:
    weight = matrix(rows, columns, rows)
    weights = torch.rand(rows, columns, generator=torch.Generator().manual_seed(1))
    absmax = row_blocks(weight, size).abs().amax(1).view(rows, -1)
    scales = torch.stack([absmax, 0.7 * absmax, torch.zeros_like(absmax)])
    tables = [normal_float_grid(bits, CPU).table for bits in (2, 3, 4, 8)]
    uses = ((0, 1, 2, 3), (3,), (2,))
    found = menu_errors(
        weight.to(DEVICE),
        weights.to(DEVICE) if weighed else None,
        size,
        scales.to(DEVICE),
        [table.to(DEVICE) for table in tables],
        uses,
    )
    assert set(found) == {(at, table) for at, own in enumerate(uses) for table in own}
    for (at, table), (squares, sums) in found.items():
        counted = weights if weighed else torch.ones_like(weights)
        expected, plain = exact(weight, scales[at], size, tables[table], counted)
        torch.testing.assert_close(squares.cpu(), expected, rtol=2e-5, atol=1e-12)
        torch.testing.assert_close(
            sums.cpu(), plain, rtol=1e-4, atol=1e-4 * float(weight.abs().max()) + 1e-30
        )


def test_sizes_that_do_not_fit_are_refused() -> None:
    weight, table = matrix(3, 40, 0).to(DEVICE), normal_float_grid(4, CPU).table.to(DEVICE)
    with pytest.raises(UsageError, match="got scales as"):
        packed_codes(weight, torch.ones(3, 4, device=DEVICE), 8, table, 4)
    with pytest.raises(UsageError, match="got weights as"):
        block_maxima(weight.double(), 8)
