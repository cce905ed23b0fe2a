"""Q + L1 L2 for the least Fisher-weighted error: LQ-LoRA's data-aware decomposition (arXiv 2311.12023 §3.4).

The low-rank step is the SVD of ``D_row (W - Q) D_col``, un-scaled; rounding knows nothing of F, as in the paper.
Neither step need lower ``sum F E^2``, so every pair is measured by it and the best is kept.

Shapes: O out, I in, r rank.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from compress.errors import UsageError
from compress.quantize.blockwise import QuantizedTensor, quantize_blockwise
from compress.quantize.config import FACTOR_8BIT, QuantConfig
from compress.quantize.decompose import Decomposition, read_factor, squared_norm, store_factor
from compress.quantize.fisher import Fisher
from compress.quantize.lowrank import low_rank_factors


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightedDecomposition:
    """A decomposition and what it costs.

    Attributes:
        decomposition: Q and the stored factors; its errors are unweighted.
        weighted_error: ``sum F E^2`` with ``E = W - Q - L1 L2`` and the stored factors.
        weighted_norm: ``sum F W^2``.
        iterates: Weighted errors after each step, one for each of ``decomposition.iterates``.
    """

    decomposition: Decomposition
    weighted_error: float
    weighted_norm: float
    iterates: tuple[float, ...]


def weighted_factors(
    matrix_OI: Tensor, rank: int, fisher: Fisher, *, seed: int, power_iterations: int = 2
) -> tuple[Tensor, Tensor]:
    """L1 [O, r] and L2 [r, I] with the least ``||D_row (M - L1 L2) D_col||``; leading ranks are nested.

    Raises:
        UsageError: The rank is out of range.
    """
    rows, columns = fisher.scale_rows()[:, None], fisher.scale_columns()
    scaled = rows * matrix_OI * columns
    left, right = low_rank_factors(scaled, rank, seed=seed, power_iterations=power_iterations)
    return left / rows, right / columns


def decompose_fisher(
    weight: Tensor,
    config: QuantConfig,
    fisher: Fisher,
    *,
    rank: int,
    factor_config: QuantConfig | None = FACTOR_8BIT,
    iterations: int = 10,
    seed: int = 0,
) -> WeightedDecomposition:
    """Split a matrix into quantized weights and low-rank factors for the least weighted error.

    Starts from the factors of W itself, then rounds what they leave and fits what the rounding leaves, until the
    weighted error rises or ``iterations`` are done. Factors count as they are stored all along: fitted to a
    weighted matrix and un-scaled, they can be hard to round. The best pair of all is kept, whichever step made it.

    Args:
        weight: [O, I], any floating type; computed in float32.
        config: Of Q.
        fisher: Of the matrix.
        rank: r; 0 is plain rounding.
        factor_config: How the factors are stored; None keeps them in 16 bits.
        iterations: At most this many rounds.
        seed: Of the randomized SVDs.

    Returns:
        The decomposition; its ``iterates`` are those of the stored form.

    Raises:
        UsageError: The rank or the iterations are out of range, the tensor is not a floating-point matrix, or F
            has another shape.
        CompressError: A weight is not finite.
    """
    wide = weight.detach().float()
    _check(iterations)
    errors, pair = _Errors(fisher), _Pair(quantize_blockwise(wide, config), None)
    if rank == 0:
        errors.least(wide - pair.quantized.dequantize())
        return errors.result(wide, pair)
    kept = _Stored(*weighted_factors(wide, rank, fisher, seed=seed), factor_config)
    for step in range(1, iterations + 1):
        quantized = quantize_blockwise(wide - kept.product, config)
        rest = wide - quantized.dequantize()
        if rounded := errors.least(rest - kept.product):
            pair = _Pair(quantized, kept)
        kept = _Stored(*weighted_factors(rest, rank, fisher, seed=seed + step), factor_config)
        if fitted := errors.least(rest - kept.product):
            pair = _Pair(quantized, kept)
        if not (rounded or fitted):
            break
    return errors.result(wide, pair)


def lq_lora(
    weight: Tensor,
    config: QuantConfig,
    rank: int,
    iterations: int,
    fisher: Fisher | None = None,
    *,
    factor_config: QuantConfig | None = None,
    seed: int = 0,
) -> WeightedDecomposition:
    """The paper's algorithm and nothing of ours, to compare with (arXiv 2311.12023, METHODS §3.1 and §3.4).

    A round fits the factors to ``W - Q``, from ``Q = 0`` on, and rounds what they leave. It ends when the error
    rises; the best round is kept. Q stays as it was rounded against the exact factors.

    Args:
        weight: [O, I], any floating type; computed in float32.
        config: Of Q.
        rank: r; 0 is plain rounding.
        iterations: At most this many rounds; the paper has 100.
        fisher: Of the matrix, for the data-aware version; None: errors are squared Frobenius norms.
        factor_config: How the factors are stored; None: 16 bits. The paper's compression mode has
            ``FACTOR_8BIT`` once they are trained.
        seed: Of the randomized SVDs.

    Returns:
        The decomposition; ``iterates`` has one error for each round, with exact factors.

    Raises:
        UsageError: As :func:`decompose_fisher`.
        CompressError: A weight is not finite.
    """
    wide = weight.detach().float()
    _check(iterations)
    best = quantize_blockwise(wide, config)
    if fisher is None:
        fisher = Fisher.uniform(best.shape, device=wide.device)
    errors = _Errors(fisher)
    if rank == 0:
        errors.least(wide - best.dequantize())
        return errors.result(wide, _Pair(best, None))
    factors = best_factors = weighted_factors(wide, rank, fisher, seed=seed)
    rest = wide
    for step in range(iterations):
        if step > 0:
            factors = weighted_factors(rest, rank, fisher, seed=seed + step)
        product = factors[0] @ factors[1]
        quantized = quantize_blockwise(wide - product, config)
        rest = wide - quantized.dequantize()
        if not errors.least(rest - product):
            break
        best, best_factors = quantized, factors
    return errors.result(wide, _Pair(best, _Stored(*best_factors, factor_config)))


def _check(iterations: int) -> None:
    if iterations < 1:
        raise UsageError(f"A decomposition of {iterations} iterations is empty.", "Ask for at least one.")


class _Stored:
    """Factors L1 [O, r] and L2 [r, I] as they are stored, and the product [O, I] of what is stored."""

    def __init__(self, left: Tensor, right: Tensor, config: QuantConfig | None) -> None:
        self.rank = len(right)
        self.factor_out, self.factor_in = store_factor(left.T, config), store_factor(right, config)
        self.product = read_factor(self.factor_out).T @ read_factor(self.factor_in)


@dataclass(frozen=True, slots=True)
class _Pair:
    quantized: QuantizedTensor
    factors: _Stored | None


class _Errors:
    """Errors of one iterate after the other, weighted and not."""

    def __init__(self, fisher: Fisher) -> None:
        self._fisher = fisher
        self._weighted: list[float] = []
        self._plain: list[float] = []

    def least(self, error_OI: Tensor) -> bool:
        """Note an iterate; whether its weighted error is below all before it."""
        cost = self._fisher.cost(error_OI)
        found = cost < min(self._weighted, default=math.inf)
        self._weighted.append(cost)
        self._plain.append(squared_norm(error_OI))
        return found

    def result(self, wide: Tensor, pair: _Pair) -> WeightedDecomposition:
        """The decomposition that ``pair`` is, with all that was noted."""
        kept, error = pair.factors, wide - pair.quantized.dequantize()
        if kept is not None:
            error -= kept.product
        return WeightedDecomposition(
            decomposition=Decomposition(
                quantized=pair.quantized,
                factor_out=None if kept is None else kept.factor_out,
                factor_in=None if kept is None else kept.factor_in,
                rank=0 if kept is None else kept.rank,
                error=squared_norm(error),
                weight_norm=squared_norm(wide),
                iterates=tuple(self._plain),
            ),
            weighted_error=self._fisher.cost(error),
            weighted_norm=self._fisher.cost(wide),
            iterates=tuple(self._weighted),
        )
