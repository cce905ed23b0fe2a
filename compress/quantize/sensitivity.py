"""How much the loss minds an error at each output of each matrix: diagonals of the loss's Fisher information there.

With ``g`` the gradient of the summed loss at a matrix's output and ``x`` its input, an error E of the weights raises
the loss by about ``1/2 tr(S E H E^T)`` nats per token, ``S`` being the mean of ``g g^T`` and ``H`` that of ``x x^T``
over tokens (the Kronecker-factored approximation of the loss's curvature). The diagonal of S makes errors of different
rows, matrices and layers comparable: one unit, nats.

Shapes: O outputs, T tokens of a batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from compress.importance.base import Loss
from compress.importance.modules import plain_model
from compress.importance.output_gradients import backward_passes
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

    That of the embedding's rows [D] is there too, under the embedding's name.

    Args:
        model: A causal language model in evaluation mode.
        arch: Its architecture.
        batches: Tokens, int64 [B, S] each.
        loss: Summed next-token loss of a batch.
        progress: Called after every batch.
    """
    sums: dict[str, Tensor] = {}

    def add(name: str, gradient_TO: Tensor) -> None:
        part = gradient_TO.float().square().sum(dim=0).double()
        sums[name] = sums[name] + part if name in sums else part

    def watch(_: nn.Module, __: Any, output: Tensor) -> None:
        output.requires_grad_(True)
        output.register_hook(lambda gradient: add(arch.embedding_module, gradient.flatten(0, -2)))

    plain: Any = plain_model(model)
    handle = plain.get_input_embeddings().register_forward_hook(watch)
    roles = {spec.role for spec in arch.linears}
    try:
        tokens = backward_passes(
            model,
            arch,
            roles,
            batches,
            loss,
            lambda place, gradient_TO: add(arch.module_name(*place), gradient_TO),
            progress=progress,
        )
    finally:
        handle.remove()
    return {name: total / tokens for name, total in sums.items()}
