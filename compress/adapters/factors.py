"""Low-rank factor arithmetic: tensors in, tensors out. A is [r, in], B is [out, r], the delta is B A."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

SLAB = 1 << 18
"""Numbers that are summed at a time: what a core's cache holds."""


def factor_product(factor_a: Tensor, factor_b: Tensor, scaling: float) -> Tensor:
    """``scaling * B A`` in float32, [out, in]."""
    return (factor_b.float() @ factor_a.float()).mul_(scaling)


def add_rounded(weight: Tensor, delta: Tensor) -> Tensor:
    """``weight + delta`` in the memory of ``weight``: summed in float32, rounded once to its dtype.

    A few rows at a time, so that neither a float32 copy of the weight nor the sums take memory of their own.

    Args:
        weight: [out, in] or any other shape; overwritten.
        delta: float32, of the same shape.
    """
    if weight.dtype == torch.float32:
        return weight.add_(delta)
    if weight.dim() == 0:
        return weight.copy_(weight.float() + delta)
    rows = max(1, SLAB * weight.shape[0] // max(1, weight.numel()))
    for part, change in zip(weight.split(rows), delta.split(rows), strict=True):
        part.copy_(part.float() + change)
    return weight


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


@dataclass(frozen=True, slots=True, kw_only=True)
class Recompressed:
    """Factors A [rank, in] and B [out, rank], ``||B A||_F^2`` before they were cut, and what of it is lost."""

    a: Tensor
    b: Tensor
    norm: float
    lost: float


def recompress(factor_a: Tensor, factor_b: Tensor, rank: int) -> Recompressed:
    """The best rank-``rank`` factors of ``B A``, by QR of both factors and SVD of the r x r core in float64.

    The square root of each singular value goes to either side. Dtype kept.
    """
    left_q, left_r = torch.linalg.qr(factor_b.double())
    right_q, right_r = torch.linalg.qr(factor_a.double().T)
    core = left_r @ right_r.T
    core_u, values, core_vh = torch.linalg.svd(core, full_matrices=False)
    root = values[:rank].sqrt()
    cut_a = root[:, None] * (core_vh[:rank] @ right_q.T)
    cut_b = (left_q @ core_u[:, :rank]) * root
    return Recompressed(
        a=cut_a.to(factor_a.dtype),
        b=cut_b.to(factor_b.dtype),
        norm=float(core.square().sum()),
        lost=float(values[rank:].square().sum()),
    )


def squared_norm(factor_a: Tensor, factor_b: Tensor) -> float:
    """``||B A||_F^2`` in float64, from the factors' r x r triangles."""
    left_r = torch.linalg.qr(factor_b.double(), mode="r").R
    right_r = torch.linalg.qr(factor_a.double().T, mode="r").R
    return float((left_r @ right_r.T).square().sum())
