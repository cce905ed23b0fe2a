"""LoRA-guided importance by Triton against the formula in float64."""

from __future__ import annotations

import pytest
import torch

from compress.errors import UsageError
from compress.kernels.triton.launch import runs_on

from .cases import DEVICE, needs_kernels

if runs_on(DEVICE):
    from compress.kernels.triton.importance import importance_sums

pytestmark = needs_kernels


@pytest.mark.parametrize(("rows", "columns", "rank"), [(1, 1, 1), (5, 70, 3), (66, 100, 9)])
@pytest.mark.parametrize("square", [True, False])
def test_sums_are_those_of_the_formula(rows: int, columns: int, rank: int, square: bool) -> None:
    generator = torch.Generator().manual_seed(rows + rank)
    weight = torch.randn(rows, columns, generator=generator)
    left = torch.randn(rows, 3 * rank, generator=generator)
    right = torch.randn(3 * rank, columns, generator=generator)
    first = left[:, : 2 * rank].double() @ right[: 2 * rank].double()
    product = first * (weight.double() + left[:, 2 * rank :].double() @ right[2 * rank :].double())
    expected = product.square() if square else product.abs()
    given = [tensor.to(DEVICE) for tensor in (weight, left, right)]
    for over_columns in (False, True):
        found = importance_sums(*given, over_columns=over_columns, square=square)
        torch.testing.assert_close(
            found.cpu(), expected.sum(0 if over_columns else 1), rtol=2e-5, atol=1e-6 * float(expected.max())
        )


def test_factors_of_another_size_are_refused() -> None:
    weight, left = torch.ones(4, 6, device=DEVICE), torch.ones(4, 3, device=DEVICE)
    with pytest.raises(UsageError, match="the right factor"):
        importance_sums(weight, left, torch.ones(3, 5, device=DEVICE), over_columns=False, square=True)
