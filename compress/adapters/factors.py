"""Low-rank factor arithmetic: tensors in, tensors out. A is [r, in], B is [out, r], the delta is B A."""

from __future__ import annotations

import torch
from torch import Tensor


def factor_product(factor_a: Tensor, factor_b: Tensor, scaling: float) -> Tensor:
    """``scaling * B A`` in float32, [out, in]."""
    return torch.mul(factor_b.float() @ factor_a.float(), scaling)


def scatter_rows(small: Tensor, kept: Tensor | None, size: int) -> Tensor:
    """Rows of ``small`` [n, ...] at ``kept`` [n] of a zero tensor [size, ...]; ``small`` itself for None."""
    if kept is None:
        return small
    full = small.new_zeros((size, *small.shape[1:]))
    full[kept] = small
    return full


def difference_factors(
    factor_a: Tensor, factor_b: Tensor, initial_a: Tensor, initial_b: Tensor
) -> tuple[Tensor, Tensor]:
    """Factors of ``B A - B0 A0`` in A's and B's dtype: ``[A; A0]`` [r + r0, in] and ``[B, -B0]`` [out, r + r0]."""
    return (
        torch.cat([factor_a, initial_a.to(factor_a.dtype)], dim=0),
        torch.cat([factor_b, -initial_b.to(factor_b.dtype)], dim=1),
    )


def recompress(factor_a: Tensor, factor_b: Tensor, rank: int) -> tuple[Tensor, Tensor, float]:
    """The best rank-``rank`` factors of ``B A``, by QR of both factors and SVD of the r x r core in float64.

    The square root of each singular value goes to either side. Dtype kept.

    Returns:
        A [rank, in], B [out, rank], and the squared Frobenius norm of what was cut off.
    """
    left_q, left_r = torch.linalg.qr(factor_b.double())
    right_q, right_r = torch.linalg.qr(factor_a.double().T)
    core_u, values, core_vh = torch.linalg.svd(left_r @ right_r.T, full_matrices=False)
    root = values[:rank].sqrt()
    cut_a = root[:, None] * (core_vh[:rank] @ right_q.T)
    cut_b = (left_q @ core_u[:, :rank]) * root
    return cut_a.to(factor_a.dtype), cut_b.to(factor_b.dtype), float(values[rank:].square().sum())


def squared_norm(factor_a: Tensor, factor_b: Tensor) -> float:
    """``||B A||_F^2`` in float64, from the factors' r x r triangles."""
    left_r = torch.linalg.qr(factor_b.double(), mode="r").R
    right_r = torch.linalg.qr(factor_a.double().T, mode="r").R
    return float((left_r @ right_r.T).square().sum())
