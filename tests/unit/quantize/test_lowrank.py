"""Randomized SVD against LAPACK's."""

from __future__ import annotations

import pytest
import torch

from compress.errors import UsageError
from compress.quantize.lowrank import low_rank_factors, truncated_svd


def decaying(shape: tuple[int, int], seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    size = min(shape)
    u, _ = torch.linalg.qr(torch.randn(shape[0], size, generator=generator))
    v, _ = torch.linalg.qr(torch.randn(shape[1], size, generator=generator))
    matrix: torch.Tensor = (u * torch.logspace(0, -3, size)) @ v.T
    return matrix


@pytest.mark.parametrize(("shape", "rank"), [((90, 60), 5), ((60, 90), 8), ((30, 200), 29), ((12, 9), 9)])
def test_leading_triplets_equal_the_full_svd(shape: tuple[int, int], rank: int) -> None:
    matrix = decaying(shape)
    u, s, vh = truncated_svd(matrix, rank, seed=3)
    exact = torch.linalg.svdvals(matrix.double())
    torch.testing.assert_close(s.double(), exact[:rank], rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(u.T @ u, torch.eye(rank), rtol=0, atol=1e-5)
    torch.testing.assert_close(vh @ vh.T, torch.eye(rank), rtol=0, atol=1e-5)
    left_over = (matrix - u * s @ vh).square().sum().item()
    assert left_over <= 1.001 * exact[rank:].square().sum().item() + 1e-10


def test_flat_spectra_are_nearly_as_good_as_exact() -> None:
    noise = torch.randn(160, 120, generator=torch.Generator().manual_seed(0))
    left, right = low_rank_factors(noise, 16, seed=0)
    best = torch.linalg.svdvals(noise)[16:].square().sum()
    assert (noise - left @ right).square().sum() < 1.02 * best


def test_factors_share_the_singular_values() -> None:
    left, right = low_rank_factors(decaying((40, 70)), 6, seed=0)
    assert (left.shape, right.shape) == ((40, 6), (6, 70))
    torch.testing.assert_close(left.square().sum(0), right.square().sum(1), rtol=1e-4, atol=1e-6)


def test_the_seed_decides_and_the_global_generator_does_not() -> None:
    noise = torch.randn(100, 100, generator=torch.Generator().manual_seed(0))
    state = torch.get_rng_state()
    first = low_rank_factors(noise, 4, seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(3)
    again, other = low_rank_factors(noise, 4, seed=1), low_rank_factors(noise, 4, seed=2)
    assert torch.equal(first[0], again[0])
    assert not torch.equal(first[0], other[0])


def test_zero_matrices_have_zero_factors() -> None:
    left, right = low_rank_factors(torch.zeros(50, 60), 4, seed=0)
    assert torch.equal(left @ right, torch.zeros(50, 60))


@pytest.mark.parametrize("rank", [0, -1, 10])
def test_a_rank_out_of_range_is_refused(rank: int) -> None:
    with pytest.raises(UsageError, match="1 to 9"):
        truncated_svd(torch.zeros(12, 9), rank, seed=0)
