"""The torch kernels against bucketize, plain loops and dense products."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from compress.errors import UsageError
from compress.kernels.dispatch import backend
from compress.kernels.reference import PackedMatrix, dequantize, make_grid, quantize_blocks, round_to_grid
from compress.quantize.normal_float import normal_float_table
from compress.quantize.packing import pack

WIDTHS = (2, 3, 4, 8)


def midpoints(table: torch.Tensor) -> torch.Tensor:
    return ((table.double()[1:] + table.double()[:-1]) / 2).float()


def packed(
    bits: int, rows: int, columns: int, block_size: int, seed: int = 0
) -> tuple[PackedMatrix, torch.Tensor]:
    """A random packed matrix and its weights by the definition."""
    generator = torch.Generator().manual_seed(seed)
    blocks = -(-columns // block_size)
    codes = torch.randint(2**bits, (rows, blocks * block_size), generator=generator)
    scales = torch.rand(rows, blocks, generator=generator)
    table = normal_float_table(bits)
    matrix = PackedMatrix(
        codes=pack(codes.to(torch.uint8), bits),
        scales=scales,
        table=table,
        bits=bits,
        block_size=block_size,
        rows=rows,
        columns=columns,
    )
    return matrix, (table[codes] * scales.repeat_interleave(block_size, 1))[:, :columns]


@pytest.mark.parametrize("bits", WIDTHS)
def test_rounding_equals_bucketize_at_and_around_every_midpoint(bits: int) -> None:
    table = normal_float_table(bits)
    middle = midpoints(table)
    up, down = torch.tensor(torch.inf), torch.tensor(-torch.inf)
    x = torch.cat([middle, middle.nextafter(up), middle.nextafter(down), table, torch.tensor([-7.0, 7.0])])
    assert torch.equal(round_to_grid(x, make_grid(table)).long(), torch.bucketize(x, middle))


@given(st.lists(st.floats(-2, 2, width=32), min_size=1, max_size=50), st.sampled_from(WIDTHS))
def test_rounding_equals_bucketize_everywhere(values: list[float], bits: int) -> None:
    table = normal_float_table(bits)
    x = torch.tensor(values)
    assert torch.equal(round_to_grid(x, make_grid(table)).long(), torch.bucketize(x, midpoints(table)))


@given(st.sets(st.integers(-1000, 1000), min_size=2, max_size=200))
def test_any_sorted_table_can_be_indexed(entries: set[int]) -> None:
    table = torch.tensor(sorted(entries)) / 1000
    x = torch.linspace(-1, 1, 5001)
    assert torch.equal(round_to_grid(x, make_grid(table)).long(), torch.bucketize(x, midpoints(table)))


def test_a_table_with_equal_entries_is_refused() -> None:
    with pytest.raises(UsageError, match="nearly equal"):
        make_grid(torch.tensor([-1.0, 0.5, 0.5, 0.5, 1.0]))


def test_blocks_of_scale_zero_get_the_code_of_zero() -> None:
    grid = make_grid(normal_float_table(3))
    codes = quantize_blocks(torch.ones(2, 8), torch.tensor([0.0, 1.0]), grid)
    assert codes.tolist() == [[3] * 8, [7] * 8]


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize(
    ("rows", "columns", "block_size"), [(5, 64, 16), (37, 53, 64), (3, 5, 8), (900, 330, 32)]
)
def test_dequantize_equals_the_definition(bits: int, rows: int, columns: int, block_size: int) -> None:
    matrix, weights = packed(bits, rows, columns, block_size)
    assert torch.equal(dequantize(matrix), weights)
    assert torch.equal(dequantize(matrix, torch.bfloat16), weights.bfloat16())
    assert torch.equal(dequantize(matrix, torch.float16, 1, 3), weights[1:3].half())
    assert dequantize(matrix).is_contiguous()


@pytest.mark.parametrize("bits", WIDTHS)
def test_products_equal_dense_ones(bits: int) -> None:
    matrix, weights = packed(bits, 37, 53, 16)
    generator = torch.Generator().manual_seed(1)
    x, grad = torch.randn(2, 7, 53, generator=generator), torch.randn(2, 7, 37, generator=generator)
    left, right = torch.randn(37, 4, generator=generator), torch.randn(4, 53, generator=generator)
    full = (weights + left @ right).double()
    kernels = backend()
    for factors, dense in ((None, weights.double()), ((left, right), full)):
        torch.testing.assert_close(
            kernels.matmul(x, matrix, factors).double(), x.double() @ dense.T, rtol=1e-5, atol=1e-4
        )
        torch.testing.assert_close(
            kernels.matmul_transposed(grad, matrix, factors).double(),
            grad.double() @ dense,
            rtol=1e-5,
            atol=1e-4,
        )


def test_an_unknown_backend_is_refused_with_the_known_ones() -> None:
    with pytest.raises(UsageError, match=r"'cuda'.*torch"):
        backend("cuda")
