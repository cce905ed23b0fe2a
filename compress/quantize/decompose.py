"""W = Q + L1 L2: quantized weights plus low-rank factors (LQ-LoRA, arXiv 2311.12023, §3.1)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from compress.errors import UsageError
from compress.quantize.blockwise import QuantizedTensor, quantize_blockwise
from compress.quantize.config import FACTOR_8BIT, QuantConfig
from compress.quantize.lowrank import low_rank_factors

DENSE_FACTOR_DTYPE = torch.float16
"""How factors are stored when they are not quantized."""

Factor = QuantizedTensor | torch.Tensor


def store_factor(factor: torch.Tensor, config: QuantConfig | None) -> Factor:
    """A factor as it is stored: quantized with ``config``, or 16-bit when that is None."""
    if config is None:
        return factor.to(DENSE_FACTOR_DTYPE).contiguous()
    return quantize_blockwise(factor, config)


def read_factor(factor: Factor) -> torch.Tensor:
    """A stored factor in float32."""
    return factor.float() if isinstance(factor, torch.Tensor) else factor.dequantize()


def factor_bits(shape: tuple[int, int], rank: int, config: QuantConfig | None) -> int:
    """Stored bits of the factors of a matrix [out, in]: L1 as [r, out] and L2 as [r, in]; 0 for rank 0."""
    if rank == 0:
        return 0
    if config is None:
        return rank * sum(shape) * DENSE_FACTOR_DTYPE.itemsize * 8
    return sum(config.storage_bits((rank, size)) for size in shape)


@dataclass(frozen=True, slots=True, kw_only=True)
class Decomposition:
    """A matrix [O, I] as Q + L1 L2, everything in the form it is stored in.

    Attributes:
        quantized: Q.
        factor_out: L1 transposed, [r, O]; None for rank 0.
        factor_in: L2, [r, I]; None for rank 0.
        rank: r.
        error: Squared Frobenius norm of W - Q - L1 L2 with the stored factors.
        weight_norm: Squared Frobenius norm of W.
        iterates: Squared errors with exact factors after each step: rounding, factors, rounding, ...
    """

    quantized: QuantizedTensor
    factor_out: Factor | None
    factor_in: Factor | None
    rank: int
    error: float
    weight_norm: float
    iterates: tuple[float, ...]

    @property
    def storage_bits(self) -> int:
        """Stored bits of Q and the factors."""
        bits = self.quantized.storage_bits
        for factor in (self.factor_out, self.factor_in):
            if factor is not None:
                if isinstance(factor, torch.Tensor):
                    bits += factor.numel() * factor.itemsize * 8
                else:
                    bits += factor.storage_bits
        return bits

    def factors(self) -> tuple[torch.Tensor, torch.Tensor] | None:
        """(L1 [O, r], L2 [r, I]) as stored, in float32; None for rank 0."""
        if self.factor_out is None or self.factor_in is None:
            return None
        return read_factor(self.factor_out).T, read_factor(self.factor_in)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Q + L1 L2 [O, I], computed in float32, then cast."""
        weight = self.quantized.dequantize()
        factors = self.factors()
        return (weight if factors is None else weight + factors[0] @ factors[1]).to(dtype)


def squared_norm(matrix: torch.Tensor) -> float:
    """Squared Frobenius norm, accumulated in float64 over the rows."""
    return float(torch.linalg.vector_norm(matrix, dim=1).double().square().sum())


def _plain(weight: torch.Tensor, config: QuantConfig) -> Decomposition:
    quantized = quantize_blockwise(weight, config)
    error = squared_norm(weight - quantized.dequantize())
    return Decomposition(
        quantized=quantized,
        factor_out=None,
        factor_in=None,
        rank=0,
        error=error,
        weight_norm=squared_norm(weight),
        iterates=(error,),
    )


def decompose(
    weight: torch.Tensor,
    config: QuantConfig,
    *,
    rank: int,
    factor_config: QuantConfig | None = FACTOR_8BIT,
    iterations: int = 10,
    seed: int = 0,
) -> Decomposition:
    """Split a matrix into quantized weights and low-rank factors by alternating between the two.

    Starts from the factors of W itself, then rounds what they leave and fits what the rounding leaves, until
    the error rises or ``iterations`` are done; the best pair is kept. The factors are then stored, and Q is
    rounded once more against the stored ones where that lowers the error.

    Args:
        weight: [O, I], any floating type; computed in float32.
        config: Of Q.
        rank: r; 0 is plain rounding.
        factor_config: How the factors are stored; None keeps them in 16 bits.
        iterations: At most this many rounds; 5 to 10 suffice.
        seed: Of the randomized SVDs.

    Raises:
        UsageError: The rank or the iterations are out of range, or the tensor is not a floating-point matrix.
        CompressError: A weight is not finite.
    """
    if iterations < 1:
        raise UsageError(f"A decomposition of {iterations} iterations is empty.", "Ask for at least one.")
    wide = weight.detach().float()
    plain = _plain(wide, config)
    if rank == 0:
        return plain
    left, right = low_rank_factors(wide, rank, seed=seed)
    best = (math.inf, plain.quantized, left, right)
    iterates: list[float] = []
    for step in range(1, iterations + 1):
        quantized = quantize_blockwise(wide - left @ right, config)
        rest = wide - quantized.dequantize()
        iterates.append(squared_norm(rest - left @ right))
        left, right = low_rank_factors(rest, rank, seed=seed + step)
        iterates.append(squared_norm(rest - left @ right))
        if iterates[-1] >= best[0]:
            break
        best = (iterates[-1], quantized, left, right)
    _, quantized, left, right = best
    factor_out, factor_in = store_factor(left.T, factor_config), store_factor(right, factor_config)
    product = read_factor(factor_out).T @ read_factor(factor_in)
    error = squared_norm(wide - quantized.dequantize() - product)
    again = quantize_blockwise(wide - product, config)
    error_again = squared_norm(wide - again.dequantize() - product)
    if error_again < error:
        quantized, error = again, error_again
    return Decomposition(
        quantized=quantized,
        factor_out=factor_out,
        factor_in=factor_in,
        rank=rank,
        error=error,
        weight_norm=plain.weight_norm,
        iterates=tuple(iterates),
    )
