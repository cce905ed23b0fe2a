"""The Hessian objective: rounding errors weighed by what a matrix's real inputs make of them (METHODS §3.4).

The squared output error of a matrix, ``||(W - W') X||^2``, is ``tr(E H E^T)`` with ``H = X X^T``. Factored as
``H = M M^T`` it is the plain squared norm of ``E M``, and rounding column after column with error feedback leaves
about ``sum_j d_j ||e_j||^2``, where ``e_j`` is the rounding error of column j alone and ``d_j`` the part of its
input that the columns still to come cannot take over: ``M_jj^2``. ``d`` therefore turns the cheap table of plain
rounding errors into an estimate of what error feedback will reach.

Shapes: O out, I in, r rank.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from compress.errors import CompressError

DAMPING, MOST_DAMPING = 0.01, 10.0
"""What is added to the diagonal of H, as a share of its mean: at first, and at most."""
_STRIPE = 384
"""Columns of a whitened matrix that are computed at once, from the rows of the factor that are not zero there."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class InputStatistics:
    """What rounding needs to know about the inputs of a matrix.

    Attributes:
        order: Columns from the strongest input to the weakest, int64 [I]; the order of rounding.
        root: M [I, I] float32, upper triangular in that order, with ``H = M M^T``.
        weights: d [I] float32, the squares of M's diagonal, in the matrix's own column order.
        gram: H [I, I] float32, damped, in the matrix's own column order.
        dead: Columns that no input ever reached.
        damping: What was added to the diagonal of H, as a share of its mean.
    """

    order: Tensor
    root: Tensor
    weights: Tensor
    gram: Tensor
    dead: int
    damping: float

    def steps(self) -> Tensor:
        """What a unit of one column's error adds to every later column under feedback, negated: float32 [I, I].

        With ``U`` the inverse of M (``inverse(H) = U^T U``), its rows over their diagonal.
        """
        unit = self.root / self.root.diagonal()
        identity = torch.eye(len(unit), device=unit.device)
        steps: Tensor = torch.linalg.solve_triangular(unit, identity, upper=True, unitriangular=True)
        return steps

    def whiten(self, error_OI: Tensor) -> Tensor:
        """``E M``: its squared norm is the squared output error; columns in rounding order."""
        error = error_OI[:, self.order].float()
        white = torch.empty_like(error)
        for start in range(0, len(self.order), _STRIPE):
            stop = start + _STRIPE
            torch.mm(error[:, :stop], self.root[:stop, start:stop], out=white[:, start:stop])
        return white

    def unwhiten(self, factor_RI: Tensor) -> Tensor:
        """The inverse of :meth:`whiten` for the right factor of a product."""
        result = torch.empty_like(factor_RI)
        result[:, self.order] = torch.linalg.solve_triangular(self.root, factor_RI, upper=True, left=False)
        return result

    def output_error(self, error_OI: Tensor) -> float:
        """``tr(E H E^T)``."""
        return float(torch.linalg.vector_norm(self.whiten(error_OI), dim=1).double().square().sum())


def input_statistics(gram_II: Tensor, *, damping: float = DAMPING) -> InputStatistics:
    """Factor the second moment of a matrix's inputs.

    Args:
        gram_II: ``H = X X^T``, summed or averaged over tokens, float64.
        damping: Added to the diagonal, as a share of its mean; ten times as much as often as H is singular all the
            same. Columns that are never fed count as the weakest.

    Raises:
        CompressError: H is not finite, or no second moment.
    """
    diagonal = gram_II.diagonal()
    if not bool(torch.isfinite(gram_II).all()):
        raise CompressError(
            "The inputs of a matrix are not finite on the calibration text.",
            "Use --dtype float32, or another text.",
        )
    mean = diagonal.mean()
    scale = mean if mean > 0 else torch.ones_like(mean) / damping
    order = torch.argsort(diagonal, descending=True, stable=True)
    backwards = order.flip(0)  # with the columns reversed a lower factor is an upper one
    while True:
        damped = gram_II.clone()
        damped.diagonal().add_(damping * scale)
        lower, failed = torch.linalg.cholesky_ex(damped[backwards][:, backwards])
        if not bool(failed):
            break
        damping *= 10
        if damping > MOST_DAMPING:
            raise CompressError(
                "The second moment of a matrix's inputs is not positive, whatever is added to its diagonal.",
                "Use --dtype float32, or another text.",
            )
    root = lower.flip(0, 1)
    weights = torch.empty_like(diagonal)
    weights[order] = root.diagonal().square()
    return InputStatistics(
        order=order,
        root=root.float().contiguous(),
        weights=weights.float(),
        gram=damped.float(),
        dead=int((diagonal == 0).sum()),
        damping=damping,
    )
