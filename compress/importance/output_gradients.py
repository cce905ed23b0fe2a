"""Gradients of the loss at the outputs of decoder linears; no weight ever gets one.

Shapes: B windows of a batch, S tokens, T tokens of a batch, O outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from compress.importance.base import Loss
from compress.importance.modules import decoder_linear, plain_model
from compress.model.architecture import Architecture, LinearSpec
from compress.progress import Progress

Place = tuple[int, LinearSpec]
"""Layer and linear."""


def backward_passes(
    model: nn.Module,
    arch: Architecture,
    roles: Collection[str],
    batches: Sequence[Tensor],
    loss: Loss,
    take: Callable[[Place, Tensor], None],
    *,
    progress: Progress | None = None,
) -> int:
    """Run forward and backward over ``batches`` and hand out the gradient at every output of some linears.

    Args:
        model: A causal language model, plain or PEFT.
        arch: Its architecture.
        roles: Roles of the linears to watch.
        batches: Tokens, int64 [B, S] each.
        loss: Summed next-token loss of a batch.
        take: Given layer and linear, and the gradient [T, O] in float32.
        progress: Called after every batch.

    Returns:
        How many tokens were seen.
    """
    tokens = 0
    with _watching(model, arch, roles, take), torch.enable_grad():
        for done, ids_BS in enumerate(batches, start=1):
            loss(model, ids_BS).backward()
            tokens += ids_BS.numel()
            if progress is not None:
                progress(done, len(batches), "output gradients")
    return tokens


@contextmanager
def _watching(
    model: nn.Module, arch: Architecture, roles: Collection[str], take: Callable[[Place, Tensor], None]
) -> Iterator[None]:
    """Hooks at the outputs; nothing but the embeddings' output asks for a gradient."""

    def hook(place: Place) -> Callable[[nn.Module, Any, tuple[Tensor, ...]], None]:
        def pass_on(_: nn.Module, __: Any, gradients: tuple[Tensor, ...]) -> None:
            take(place, gradients[0].detach().flatten(0, -2).float())

        return pass_on

    def begin(_: nn.Module, __: Any, output: Tensor) -> Tensor:
        return output.requires_grad_(True)

    plain: Any = plain_model(model)
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    model.requires_grad_(False)
    handles = [plain.get_input_embeddings().register_forward_hook(begin)]
    for layer in range(arch.layers):
        for spec in arch.linears_at(layer):
            if spec.role in roles:
                module = decoder_linear(model, arch, layer, spec)
                handles.append(module.register_full_backward_hook(hook((layer, spec))))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
