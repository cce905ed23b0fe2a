"""LoRA-guided importance in C against the formula in float64."""

from __future__ import annotations

import pytest
import torch

from compress.kernels.importance import importance_sums
from compress.kernels.library import library, status, using

pytestmark = pytest.mark.skipif(library() is None, reason="the C library was not built")


@pytest.mark.parametrize("level", status().available[1:])
@pytest.mark.parametrize(
    ("rows", "columns", "rank"), [(1, 1, 1), (5, 31, 3), (66, 300, 8), (130, 256, 4), (7, 513, 16)]
)
@pytest.mark.parametrize("square", [True, False])
def test_sums_are_those_of_the_formula(level: str, rows: int, columns: int, rank: int, square: bool) -> None:
    generator = torch.Generator().manual_seed(rows + rank)
    weight = torch.randn(rows, columns, generator=generator)
    left = torch.randn(rows, 3 * rank, generator=generator)
    right = torch.randn(3 * rank, columns, generator=generator)
    first = left[:, : 2 * rank].double() @ right[: 2 * rank].double()
    merged = weight.double() + left[:, 2 * rank :].double() @ right[2 * rank :].double()
    product = first * merged
    expected = product.square() if square else product.abs()
    before = torch.get_num_threads()
    for over_columns in (False, True):
        found = []
        for threads in (1, 2):
            torch.set_num_threads(threads)
            with using(level):
                found.append(importance_sums(weight, left, right, over_columns=over_columns, square=square))
        assert torch.equal(*found)
        torch.testing.assert_close(
            found[0], expected.sum(0 if over_columns else 1), rtol=2e-5, atol=1e-6 * float(expected.max())
        )
    torch.set_num_threads(before)
