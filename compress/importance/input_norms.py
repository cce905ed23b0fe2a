"""How large the inputs of every decoder linear are on calibration text."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from compress.importance.activations import Moments
from compress.importance.modules import decoder_linear, plain_model
from compress.model.architecture import Architecture
from compress.progress import Progress


@torch.no_grad()
def input_norms(
    model: nn.Module, arch: Architecture, ids_NS: Tensor, *, batch: int, progress: Progress | None = None
) -> dict[str, Tensor]:
    """Module name -> L2 norm of each of its input features over all tokens, float64 [in].

    Args:
        model: In eval mode.
        arch: Its architecture.
        ids_NS: Calibration tokens, int64 [N, S].
        batch: Windows per pass.
        progress: Called after each pass.
    """
    found: dict[str, Moments] = {}
    handles = []
    body: Any = plain_model(model)
    device = next(model.parameters()).device
    try:
        for layer in range(arch.layers):
            for spec in arch.linears_at(layer):
                moments = found.setdefault(arch.module_name(layer, spec), Moments())
                linear = decoder_linear(model, arch, layer, spec)
                handles.append(linear.register_forward_pre_hook(_adding(moments)))
        parts = ids_NS.split(batch)
        for done, ids_BS in enumerate(parts, start=1):
            body.get_decoder()(input_ids=ids_BS.to(device), use_cache=False)
            if progress is not None:
                progress(done, len(parts), "score")
    finally:
        for handle in handles:
            handle.remove()
    return {name: moments.norm for name, moments in found.items()}


def _adding(moments: Moments) -> Callable[[nn.Module, tuple[Any, ...]], None]:
    def add(_: nn.Module, inputs: tuple[Any, ...]) -> None:
        moments.add(inputs[0].flatten(0, -2))

    return add
