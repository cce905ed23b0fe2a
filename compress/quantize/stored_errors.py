"""Errors of a matrix as it is stored, in float64: the reference that recorded errors are checked against.

Nothing is shared with the decompositions but the stored form: the output error is taken from the second moment of the
inputs itself, where these go through its float32 root.

Shapes: O out, I in.
"""

from __future__ import annotations

import torch
from torch import Tensor

from compress.errors import CompressError
from compress.quantize.blockwise import quantize_blockwise
from compress.quantize.config import QuantConfig
from compress.quantize.hessian import DAMPING, MOST_DAMPING
from compress.quantize.linear import LQLinear

_ROWS = 512
"""Rows that are multiplied at once."""


def stored_error(weight_OI: Tensor, layer: LQLinear) -> Tensor:
    """``E = W - Q - L1 L2`` with what the layer stores, float64 [O, I]."""
    error_OI = weight_OI.double() - layer.quantized().dequantize().double()
    factors = layer.factors()
    return error_OI if factors is None else error_OI - factors[0].double() @ factors[1].double()


def rounding_error(weight_OI: Tensor, config: QuantConfig) -> float:
    """``||W - Q||_F^2`` of plain rounding.

    Raises:
        CompressError: A weight is not finite.
    """
    rounded_OI = quantize_blockwise(weight_OI.float(), config).dequantize()
    return float((weight_OI.double() - rounded_OI.double()).square().sum())


def least_damping(gram_II: Tensor) -> float:
    """What has to be added to the diagonal of H, as a share of its mean: ``DAMPING``, or as many tenfold as it takes.

    Args:
        gram_II: H, float64.

    Raises:
        CompressError: H is not positive definite, whatever is added.
    """
    damping = DAMPING
    while damping <= MOST_DAMPING:
        damped_II = gram_II.clone()
        damped_II.diagonal().add_(damping * _mean(gram_II))
        if not bool(torch.linalg.cholesky_ex(damped_II)[1]):
            return damping
        damping *= 10
    raise CompressError(
        "The second moment of a matrix's inputs is not positive, whatever is added to its diagonal.",
        "Use the text and the dtype of the stage.",
    )


def output_error(error_OI: Tensor, gram_II: Tensor, damping: float) -> float:
    """``tr(E H E^T)`` with ``damping`` times the mean of H's diagonal added to it.

    Args:
        error_OI: E, float64.
        gram_II: H, float64, without damping.
        damping: As a share; where no input was ever other than zero, its hundredfold is what is added.
    """
    total = torch.zeros((), dtype=torch.float64)
    for rows in error_OI.split(_ROWS):
        total += (rows @ gram_II).mul_(rows).sum()
    return float(total + damping * _mean(gram_II) * error_OI.square().sum())


def weighted_error(error_OI: Tensor, fisher_OI: Tensor) -> float:
    """``sum F E^2``."""
    return float((fisher_OI.double() * error_OI.double().square()).sum())


def _mean(gram_II: Tensor) -> float:
    mean = float(gram_II.diagonal().mean())
    return mean if mean > 0 else 1 / DAMPING
