"""The C kernels against float64 products of the weights that the plain tensors define, on every level here."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from compress.errors import UsageError
from compress.kernels.library import library, status, using
from compress.kernels.native_product import (
    DENSE_FROM,
    NARROW_FROM,
    TYPES,
    dequantize,
    dequantize_into,
    product,
    product_transposed,
)
from compress.kernels.packed import untile
from tests.unit.kernels.native import LEVEL_BF16, multiplied, random_case, random_input

pytestmark = pytest.mark.skipif(library() is None, reason="the C library was not built")

WIDTHS = (2, 3, 4, 8)
LEVELS = status().available[1:]
SHAPES = ((1, 8, 8), (5, 300, 24), (37, 53, 16), (64, 256, 64), (50, 131, 32))
ROUNDING = {torch.float32: 2e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}
"""Largest relative error of a result: a rounding to its type, and in float32 that of the sums."""


@pytest.fixture(params=LEVELS, autouse=True)
def level(request: pytest.FixtureRequest) -> Iterator[str]:
    with using(request.param):
        yield request.param


def assert_near(found: torch.Tensor, exact: torch.Tensor, magnitudes: torch.Tensor) -> None:
    """Equal but for a rounding to the type of ``found`` and float32 sums of terms of these magnitudes."""
    error = (found.double() - exact).abs()
    bound = ROUNDING[found.dtype] * exact.abs() + ROUNDING[torch.float32] * magnitudes + 1e-12
    if found.dtype == torch.float16:
        bound += 2**-25  # its subnormal numbers
    assert bool((error <= bound).all()), float((error - bound).max())


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("scale_bits", WIDTHS)
@pytest.mark.parametrize(("rows", "columns", "block_size"), SHAPES)
def test_dequantize_is_the_definition_bit_for_bit(
    bits: int, scale_bits: int, rows: int, columns: int, block_size: int
) -> None:
    sizes = {"bits": bits, "scale_bits": scale_bits, "block_size": block_size, "group_size": 7}
    case = random_case(rows, columns, **sizes)
    for dtype in TYPES:
        assert torch.equal(dequantize(case.matrix, dtype), case.weights.to(dtype))
    part = slice(rows // 3, rows - rows // 4)
    found = dequantize(case.matrix, torch.bfloat16, part.start, part.stop)
    assert torch.equal(found, case.weights[part].bfloat16())
    for first, last in ((0, min(columns, 17)), (32, min(columns, 96)), (64, columns)):
        for dtype in TYPES if first < last else ():
            some = torch.empty(rows - part.start, last - first, dtype=dtype)
            dequantize_into(some, case.matrix, part.start, first)
            assert torch.equal(some, case.weights[part.start :, first:last].to(dtype))


@pytest.mark.parametrize("dtype", list(TYPES))
@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize(("rows", "columns", "block_size"), SHAPES)
def test_products_for_every_number_of_tokens(
    dtype: torch.dtype, bits: int, rows: int, columns: int, block_size: int, level: str
) -> None:
    case = random_case(rows, columns, bits=bits, block_size=block_size)
    left, right = random_input(3, rows, dtype=dtype, seed=2), random_input(3, columns, dtype=dtype, seed=3)
    for tokens in (*range(1, 15), 24, 31, 45, max(DENSE_FROM.values()), NARROW_FROM):
        x = random_input(tokens, columns, dtype=dtype)
        weights = multiplied(case, level, dtype, tokens)
        plain, none = product(x, case.matrix, None)
        magnitudes = x.double().abs() @ weights.abs().T
        exact = x.double() @ weights.T
        assert none.shape == (tokens, 0)
        assert_near(plain, exact, magnitudes)
        y, inner = product(x, case.matrix, (left, right))
        low = x.double() @ right.double().T
        low_magnitudes = x.double().abs() @ right.double().abs().T
        assert_near(inner, low, low_magnitudes)
        magnitudes += low_magnitudes @ left.double().abs()
        if level == LEVEL_BF16 and dtype == torch.bfloat16 and tokens >= NARROW_FROM:  # low is rounded there
            magnitudes += low.abs() @ left.double().abs() * ROUNDING[dtype] / ROUNDING[torch.float32]
        assert_near(y, exact + low @ left.double(), magnitudes)


@pytest.mark.parametrize("bits", WIDTHS)
def test_the_gradient_in_the_input(bits: int, level: str) -> None:
    for rows, columns, block_size in SHAPES:
        case = random_case(rows, columns, bits=bits, block_size=block_size)
        left, right = random_input(3, rows, seed=2), random_input(3, columns, seed=3)
        for dtype in TYPES:
            grad = random_input(9, rows, dtype=dtype)
            wide = grad.double()
            found = product_transposed(grad, case.matrix, None)
            weights = multiplied(case, level, dtype, NARROW_FROM)
            assert_near(found, wide @ weights, wide.abs() @ weights.abs())
        full = case.exact + left.double().T @ right.double()
        magnitudes = wide.abs() @ (case.exact.abs() + left.double().abs().T @ right.double().abs())
        assert_near(product_transposed(grad.float(), case.matrix, (left, right)), wide @ full, magnitudes)


def test_threads_change_no_bit(level: str) -> None:
    case = random_case(200, 520, bits=3, block_size=40)
    factors = (random_input(5, 200, seed=2), random_input(5, 520, seed=3))
    for tokens in (1, 5, DENSE_FROM[level] - 1):
        x = random_input(tokens, 520)
        one, _ = product(x, case.matrix, factors)
        torch.set_num_threads(2)
        two, _ = product(x, case.matrix, factors)
        torch.set_num_threads(1)
        assert torch.equal(one, two)


@pytest.mark.parametrize("tokens", [1, 5, 20, max(DENSE_FROM.values())])
def test_blocks_of_zeros_and_values_that_are_not_finite(tokens: int) -> None:
    case = random_case(40, 150, bits=4, zero_blocks=True)
    x = random_input(tokens, 150)
    x[0, 3], x[0, 70] = torch.inf, -torch.inf
    x[-1, 149] = torch.nan
    exact = x.double() @ case.exact.T
    found, _ = product(x, case.matrix, None)
    finite = exact.isfinite()
    assert torch.equal(found.isnan(), exact.isnan())
    assert torch.equal(found[~finite & ~exact.isnan()].double(), exact[~finite & ~exact.isnan()])
    assert_near(found[finite], exact[finite], torch.full_like(exact[finite], 300.0))
    x[:, 3], x[:, 70], x[:, 149] = torch.inf, 0.0, 0.0
    exact = x.double() @ case.exact.T
    found, _ = product(x, case.matrix, None)
    assert bool(exact.isinf().any())
    assert torch.equal(found.double(), exact) or torch.equal(
        found.nan_to_num(0.5), exact.float().nan_to_num(0.5)
    )


def test_sizes_and_types_that_do_not_fit_are_refused() -> None:
    case = random_case(37, 53)
    x, left, right = random_input(3, 53), random_input(4, 37), random_input(4, 53)
    for wrong in (x[:, :-1], x.double(), random_input(3, 54)):
        with pytest.raises(UsageError, match="got x as"):
            product(wrong, case.matrix, None)
    with pytest.raises(UsageError, match="got L1 as"):
        product(x, case.matrix, (right, right))
    with pytest.raises(UsageError, match="got L2 as"):
        product(x, case.matrix, (left, right.bfloat16()))
    with pytest.raises(UsageError, match="got the gradient as"):
        product_transposed(x, case.matrix, None)
    with pytest.raises(UsageError, match="Rows 30 to 38"):
        dequantize(case.matrix, start=30, stop=38)
    with pytest.raises(UsageError, match=r"do not make torch\.float64"):
        dequantize(case.matrix, torch.float64)
    geometry = replace(case.matrix.geometry, rows=64)
    with pytest.raises(UsageError, match="got codes as"):
        untile(geometry, case.matrix.codes, case.matrix.scale_codes)


def test_one_group_may_be_larger_than_any_matrix() -> None:
    case = random_case(20, 64, group_size=2**40)
    assert torch.equal(dequantize(case.matrix), case.weights)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])  # the level is the same for all
@given(
    rows=st.integers(1, 70),
    columns=st.integers(1, 200),
    bits=st.sampled_from(WIDTHS),
    scale_bits=st.sampled_from(WIDTHS),
    block_size=st.sampled_from((8, 16, 24, 32, 64, 136)),
    group_size=st.sampled_from((1, 3, 16, 256)),
    tokens=st.integers(0, 30),
    rank=st.integers(0, 4),
    zero_blocks=st.booleans(),
    threads=st.integers(1, 2),
)
def test_any_shape(
    rows: int,
    columns: int,
    bits: int,
    scale_bits: int,
    block_size: int,
    group_size: int,
    tokens: int,
    rank: int,
    zero_blocks: bool,
    threads: int,
) -> None:
    case = random_case(
        rows,
        columns,
        bits=bits,
        scale_bits=scale_bits,
        block_size=block_size,
        group_size=group_size,
        zero_blocks=zero_blocks,
    )
    torch.set_num_threads(threads)
    x = random_input(tokens, columns)
    left, right = random_input(rank, rows, seed=2), random_input(rank, columns, seed=3)
    found, _ = product(x, case.matrix, (left, right) if rank else None)
    low, wide = left.double().T @ right.double(), x.double()
    low_sizes = left.double().abs().T @ right.double().abs()
    assert_near(found, wide @ (case.exact + low).T, wide.abs() @ (case.exact.abs() + low_sizes).T)
    assert torch.equal(dequantize(case.matrix), case.weights)
