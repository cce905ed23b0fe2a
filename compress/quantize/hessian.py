"""The Hessian objective: rounding errors weighed by what a matrix's real inputs make of them (METHODS §3.4).

The squared output error of a matrix, ``||(W - W') X||^2``, is ``tr(E H E^T)`` with ``H = X X^T``. Factored as
``H = L L^T`` it is the plain squared norm of ``E L``, and rounding column after column with error feedback leaves
about ``sum_j d_j ||e_j||^2``, where ``e_j`` is the rounding error of column j alone and ``d_j`` the part of its
input that the columns still to come cannot take over. ``d`` therefore turns the cheap table of plain rounding
errors into an estimate of what error feedback will reach.

Shapes: O out, I in, r rank.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from compress.errors import CompressError


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class InputStatistics:
    """What rounding needs to know about the inputs of a matrix.

    Attributes:
        order: Columns from the strongest input to the weakest, int64 [I]; the order of rounding.
        upper: U [I, I] float32, upper triangular in that order, with ``inverse(H) = U^T U``.
        weights: d [I] float32, in the matrix's own column order.
        gram: H [I, I] float32, damped, in the matrix's own column order.
    """

    order: Tensor
    upper: Tensor
    weights: Tensor
    gram: Tensor

    def whiten(self, error_OI: Tensor) -> Tensor:
        """``E L``: its squared norm is the squared output error; columns in rounding order."""
        result: Tensor = torch.linalg.solve_triangular(
            self.upper, error_OI[:, self.order].float(), upper=True, left=False
        )
        return result

    def unwhiten(self, factor_RI: Tensor) -> Tensor:
        """The inverse of :meth:`whiten` for the right factor of a product."""
        result = torch.empty_like(factor_RI)
        result[:, self.order] = factor_RI @ self.upper
        return result

    def output_error(self, error_OI: Tensor) -> float:
        """``tr(E H E^T)``."""
        return float(torch.linalg.vector_norm(self.whiten(error_OI), dim=1).double().square().sum())


def input_statistics(gram_II: Tensor, *, damping: float = 0.01) -> InputStatistics:
    """Factor the second moment of a matrix's inputs.

    Args:
        gram_II: ``H = X X^T``, summed or averaged over tokens, float64.
        damping: Added to the diagonal, as a share of its mean. Columns that are never fed count as the weakest.

    Raises:
        CompressError: H is not finite.
    """
    diagonal = gram_II.diagonal()
    if not bool(torch.isfinite(gram_II).all()):
        raise CompressError(
            "The inputs of a matrix are not finite on the calibration text.",
            "Use --dtype float32, or another text.",
        )
    mean = diagonal.mean()
    ridge = damping * mean if mean > 0 else torch.ones_like(mean)
    order = torch.argsort(diagonal, descending=True, stable=True)
    damped = gram_II + ridge * torch.eye(len(order), dtype=torch.float64, device=gram_II.device)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped[order][:, order]))
    upper = torch.linalg.cholesky((inverse + inverse.T) / 2, upper=True)
    weights = torch.empty_like(diagonal)
    weights[order] = upper.diagonal().square().reciprocal()
    return InputStatistics(order=order, upper=upper.float(), weights=weights.float(), gram=damped.float())
