"""How much the loss minds an error at each output of each matrix: diagonals of the loss's Fisher information there.

With ``g`` the gradient of the summed loss at a matrix's output and ``x`` its input, an error E of the weights raises
the loss by about ``1/2 tr(S E H E^T)`` nats per token, ``S`` being the mean of ``g g^T`` and ``H`` that of ``x x^T``
over tokens (the Kronecker-factored approximation of the loss's curvature). The diagonal of S makes errors of different
rows, matrices and layers comparable: one unit, nats.

Shapes: O outputs, T tokens of a batch.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from compress.importance.base import Loss
from compress.importance.output_gradients import Place, backward_passes
from compress.model.architecture import Architecture
from compress.progress import Progress


def output_sensitivities(
    model: nn.Module,
    arch: Architecture,
    batches: Sequence[Tensor],
    loss: Loss,
    *,
    progress: Progress | None = None,
) -> dict[str, Tensor]:
    """Diagonal of S of every decoder linear by module name, float64 [O]: mean squared gradient per token.

    Args:
        model: A causal language model in evaluation mode.
        arch: Its architecture.
        batches: Tokens, int64 [B, S] each.
        loss: Summed next-token loss of a batch.
        progress: Called after every batch.
    """
    sums: dict[str, Tensor] = {}

    def take(place: Place, gradient_TO: Tensor) -> None:
        name = arch.module_name(*place)
        part = gradient_TO.square().sum(dim=0).double()
        sums[name] = sums[name] + part if name in sums else part

    roles = {spec.role for spec in arch.linears}
    tokens = backward_passes(model, arch, roles, batches, loss, take, progress=progress)
    return {name: total / tokens for name, total in sums.items()}
