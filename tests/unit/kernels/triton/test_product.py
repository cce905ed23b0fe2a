"""Products by the Triton kernels against float64 products of the weights that the plain tensors define."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from compress.errors import UsageError
from compress.kernels.packed import Geometry
from compress.kernels.triton.choice import Choice, Slices, Tiles
from compress.kernels.triton.launch import TYPES, even, on_its_device, runs_on
from tests.unit.kernels.native import Case, random_case, random_input

from .cases import DEVICE, assert_near, needs_kernels, placed

if runs_on(DEVICE):
    from compress.kernels.triton.dense import dequantize, dequantize_into
    from compress.kernels.triton.product import product, product_transposed
    from compress.kernels.triton.rows import picked_rows

pytestmark = needs_kernels

WIDTHS = (2, 3, 4, 8)
ONE_STEP = Tiles(rows=64, chunks=8)
"""Everything in one program's tile."""
SPLIT = Tiles(rows=32, chunks=2, splits=2)
SLICED = Slices(nbytes=1 << 14)


def check(case: Case, dtype: torch.dtype, tokens: int, choice: Choice, rank: int) -> None:
    """Both directions, against products of the weights rounded to the type of the input."""
    rows, columns = case.exact.shape
    matrix, weights = placed(case.matrix), case.weights.to(dtype).double()
    left, right = (
        random_input(rank, rows, dtype=dtype, seed=2),
        random_input(rank, columns, dtype=dtype, seed=3),
    )
    factors = (left.to(DEVICE), right.to(DEVICE)) if rank else None
    for transposed in (False, True):
        terms = weights if transposed else weights.T
        first, second = (left.double(), right.double()) if transposed else (right.double(), left.double())
        x = random_input(tokens, len(terms), dtype=dtype)
        wide, inner = x.double(), x.double() @ first.T
        plain, low = wide @ terms, inner @ second
        inner_sizes = wide.abs() @ first.abs().T
        sizes = wide.abs() @ terms.abs() + inner_sizes @ second.abs()
        sliced = isinstance(choice, Slices) and dtype != torch.float32
        if transposed:
            found = product_transposed(x.to(DEVICE), matrix, factors, choice=choice)
        else:
            found, sums = product(x.to(DEVICE), matrix, factors, choice=choice)
            assert (sums.dtype, tuple(sums.shape)) == (torch.float32, (tokens, rank))
            bound = 2e-6 * inner_sizes + (2**-8 * inner.abs() if sliced else 0)
            assert bool(((sums.cpu().double() - inner).abs() <= bound + 1e-12).all())
        assert found.dtype == dtype
        # slices round the product before the low-rank part comes to it, and that part's first half
        assert_near(
            found, plain + low, sizes, rounded=plain.abs() + inner.abs() @ second.abs() if sliced else None
        )


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("choice", [ONE_STEP, SPLIT, SLICED], ids=("one step", "split", "slices"))
def test_products_of_blocks_that_fit_no_step(bits: int, choice: Choice) -> None:
    case = random_case(
        37, 153, bits=bits, block_size=24, scale_bits={2: 4, 3: 8, 4: 3, 8: 2}[bits], group_size=7
    )
    dtype = {2: torch.float32, 3: torch.bfloat16, 4: torch.float16, 8: torch.bfloat16}[bits]
    check(case, dtype, 3, choice, 5)


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("dtype", TYPES)
def test_scales_that_follow_the_dot_product(bits: int, dtype: torch.dtype) -> None:
    case = random_case(37, 150, bits=bits, block_size=64, table_type=dtype)
    matrix, x = placed(case.matrix), random_input(3, 150, dtype=dtype)
    found, _ = product(x.to(DEVICE), matrix, None, choice=Tiles(rows=64, chunks=2))
    assert_near(found, x.double() @ case.exact.T, x.double().abs() @ case.exact.abs().T)


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize(("block_size", "dtype"), [(64, torch.float32), (16, torch.bfloat16)])
def test_sizes_that_tiles_cut_without_a_rest(bits: int, block_size: int, dtype: torch.dtype) -> None:
    # no mask is left in the kernels, and groups of a power of two take no division
    case = random_case(
        64, 128, bits=bits, block_size=block_size, scale_bits={2: 3, 3: 2, 4: 8, 8: 4}[bits], group_size=16
    )
    assert even(case.matrix.geometry, 32, 2)
    check(case, dtype, 3, Tiles(rows=32, chunks=2, splits=2), 5)


def test_what_is_cut_without_a_rest() -> None:
    sizes = {"bits": 4, "scale_bits": 8, "group_size": 16}
    whole = Geometry(rows=64, columns=128, block_size=32, **sizes)
    assert even(whole, 64, 4)
    assert not even(whole, 128, 4)
    assert not even(whole, 64, 8)
    assert not even(replace(whole, columns=120), 8, 1)
    assert not even(
        Geometry(rows=64, columns=64, block_size=48, **sizes), 64, 1
    )  # blocks reach beyond the last column


def test_tokens_and_ranks_of_more_than_one_tile() -> None:
    case = random_case(20, 100, bits=4, block_size=40)
    check(case, torch.bfloat16, 19, Tiles(rows=32, chunks=2, tokens=16, splits=2, ranks=16), 21)


def test_one_program_for_a_row_and_a_column() -> None:
    case = random_case(1, 8, bits=2, block_size=8)
    check(case, torch.float32, 1, Tiles(rows=16, chunks=1, splits=4), 1)


def test_no_tokens() -> None:
    case = random_case(5, 40)
    matrix = placed(case.matrix)
    for choice in (ONE_STEP, SLICED):
        y, inner = product(random_input(0, 40).to(DEVICE), matrix, None, choice=choice)
        assert (y.shape, inner.shape) == ((0, 5), (0, 0))
        assert product_transposed(random_input(0, 5).to(DEVICE), matrix, None, choice=choice).shape == (0, 40)


@pytest.mark.parametrize("bits", WIDTHS)
def test_dequantize_is_the_definition_bit_for_bit(bits: int) -> None:
    sizes: dict[str, Any] = {"bits": bits, "scale_bits": {2: 8, 3: 2, 4: 4, 8: 3}[bits], "group_size": 7}
    for rows, columns, block_size in ((37, 153, 24), (20, 300, 64)):
        case = random_case(rows, columns, block_size=block_size, **sizes)
        matrix = placed(case.matrix)
        for dtype in TYPES:
            assert torch.equal(
                dequantize(matrix, dtype, 3, rows - 2).cpu(), case.weights[3 : rows - 2].to(dtype)
            )
        part = torch.empty(rows - 5, columns - 64, device=DEVICE)
        dequantize_into(part, matrix, 5, 64)
        assert torch.equal(part.cpu(), case.weights[5:, 64:])


@pytest.mark.parametrize("bits", WIDTHS)
def test_rows_are_picked_bit_for_bit(bits: int) -> None:
    case = random_case(37, 153, bits=bits, block_size=24, scale_bits=bits, group_size=7)
    index = torch.tensor([[36, 0, 16], [5, 5, -1], [15, 37, 20]])
    found = picked_rows(placed(case.matrix), index.to(DEVICE)).cpu()
    known = (index >= 0) & (index < 37)
    assert torch.equal(found[known], case.weights[index[known]])
    assert bool(found[~known].isnan().all())
    with pytest.raises(UsageError, match="got the row numbers as"):
        picked_rows(placed(case.matrix), index.int().to(DEVICE))


def test_constant_and_zero_blocks() -> None:
    case = random_case(20, 64, bits=3, block_size=32, zero_blocks=True)
    assert bool((case.exact.view(20, 2, 32).abs().amax(2) == 0).any())
    check(case, torch.float32, 2, Tiles(rows=32, chunks=2), 0)
    matrix = placed(case.matrix)
    matrix.codes.fill_(-1)  # every code is the last one
    last = case.matrix.table[-1]
    blocks = dequantize(matrix).cpu().view(20, 2, 32)
    assert torch.equal(blocks, blocks[:, :, :1].expand(-1, -1, 32))
    assert float(last) != 0


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # of numpy, in the interpreter
@pytest.mark.parametrize("choice", [Tiles(rows=32, chunks=1), Tiles(rows=32, chunks=2), SLICED])
def test_values_that_are_not_finite(choice: Choice) -> None:
    case = random_case(20, 64, bits=4, block_size=32)
    x = random_input(3, 64)
    x[0, 3], x[0, 40], x[1, 63], x[2, 5] = torch.inf, -torch.inf, torch.nan, torch.inf
    exact = x.double() @ case.exact.T
    found = product(x.to(DEVICE), placed(case.matrix), None, choice=choice)[0].cpu()
    assert torch.equal(found.isnan(), exact.isnan())
    assert torch.equal(found[2].double(), exact[2])


def test_results_do_not_change_from_call_to_call() -> None:
    case = random_case(40, 256, bits=4, block_size=32)
    matrix, x = placed(case.matrix), random_input(2, 256).to(DEVICE)
    factors = (random_input(4, 40, seed=2).to(DEVICE), random_input(4, 256, seed=3).to(DEVICE))
    tiles = Tiles(rows=64, chunks=2, splits=3)
    assert torch.equal(
        product(x, matrix, factors, choice=tiles)[0], product(x, matrix, factors, choice=tiles)[0]
    )


@pytest.mark.skipif(torch.cuda.device_count() == 1, reason="the second device is not there")
def test_kernels_are_launched_on_the_device_of_the_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    entered: list[torch.device] = []

    def device(wanted: torch.device) -> AbstractContextManager[None]:
        entered.append(wanted)
        return nullcontext()

    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    matrix = random_case(1, 8).matrix
    with FakeTensorMode():
        for index in (0, 1):
            x = torch.empty(2, device=torch.device("cuda", index))
            assert on_its_device(lambda a, b: b)(3, x) is x
    on_its_device(lambda a: a)(replace(matrix, codes=x))
    assert entered == [torch.device("cuda", 1)] * 2


def test_sizes_and_types_that_do_not_fit_are_refused() -> None:
    case = random_case(37, 53)
    matrix = placed(case.matrix)
    x, left, right = (t.to(DEVICE) for t in (random_input(3, 53), random_input(4, 37), random_input(4, 53)))
    for wrong in (x[:, :-1], x.double()):
        with pytest.raises(UsageError, match="got x as"):
            product(wrong, matrix, None)
    with pytest.raises(UsageError, match="got L1 as"):
        product(x, matrix, (right, right))
    with pytest.raises(UsageError, match="got L2 as"):
        product(x, matrix, (left, right.bfloat16()))
    with pytest.raises(UsageError, match="got the gradient as"):
        product_transposed(x, matrix, None)
    with pytest.raises(UsageError, match="Rows 30 to 38"):
        dequantize(matrix, start=30, stop=38)
    with pytest.raises(UsageError, match=r"do not make torch\.float64"):
        dequantize(matrix, torch.float64)
