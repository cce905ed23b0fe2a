"""Rank-r factors of a matrix by randomized SVD from an explicit seed."""

from __future__ import annotations

import torch

from compress.errors import UsageError

_OVERSAMPLING = 10


def truncated_svd(
    matrix: torch.Tensor, rank: int, *, seed: int, power_iterations: int = 2
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The leading singular triplets (Halko, Martinsson and Tropp, arXiv 0909.4061, algorithm 4.4).

    The subspace has ``rank + 10`` dimensions; where that is no smaller than the matrix the SVD is exact.

    Args:
        matrix: float32 [O, I].
        rank: r, from 1 to min(O, I).
        seed: Of the random test matrix, drawn on the CPU so that devices agree.
        power_iterations: Passes that sharpen the subspace; METHODS fixes two for decompositions.

    Returns:
        U [O, r], singular values [r] descending, V^T [r, I], float32.

    Raises:
        UsageError: The rank is out of range.
    """
    rows, columns = matrix.shape
    if not 1 <= rank <= min(rows, columns):
        raise UsageError(
            f"Rank {rank} is not possible for a matrix of {rows} x {columns}.",
            f"Choose a rank from 1 to {min(rows, columns)}.",
        )
    width = rank + _OVERSAMPLING
    if width >= min(rows, columns):
        u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
        return u[:, :rank], s[:rank], vh[:rank]
    generator = torch.Generator().manual_seed(seed)
    test = torch.randn(columns, width, generator=generator).to(matrix.device)
    q, _ = torch.linalg.qr(matrix @ test)
    for _ in range(power_iterations):
        z, _ = torch.linalg.qr(matrix.T @ q)
        q, _ = torch.linalg.qr(matrix @ z)
    # SVD of the tall (matrix^T q) by way of its small triangular factor: [I, w] = Z R, R = A S B^T.
    z, r = torch.linalg.qr(matrix.T @ q)
    a, s, bh = torch.linalg.svd(r)
    return (q @ bh.mT)[:, :rank], s[:rank], (z @ a).mT[:rank].contiguous()


def low_rank_factors(
    matrix: torch.Tensor, rank: int, *, seed: int, power_iterations: int = 2
) -> tuple[torch.Tensor, torch.Tensor]:
    """L1 [O, r] and L2 [r, I] with ``L1 @ L2`` near ``matrix``; each takes the root of the singular values.

    Raises:
        UsageError: The rank is out of range.
    """
    u, s, vh = truncated_svd(matrix, rank, seed=seed, power_iterations=power_iterations)
    root = s.sqrt()
    return u * root, root[:, None] * vh
