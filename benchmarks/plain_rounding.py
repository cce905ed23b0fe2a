"""The baseline every quantization is held against: one configuration for all matrices, no factors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from compress.data.sources import default_source
from compress.model.checkpoint import Checkpoint, checkpoint_architecture
from compress.model.load import load_model
from compress.pipelines.measure import validation_perplexity, validation_windows
from compress.pipelines.model_input import device_and_dtype
from compress.pipelines.reporter import Reporter
from compress.pipelines.settings import Common
from compress.pipelines.stage import Context
from compress.pipelines.workspace import Workspace
from compress.quantize.blockwise import quantize_dequantize
from compress.quantize.config import QuantConfig


def plain_rounding_perplexity(
    model: Path, config: QuantConfig, run: Path, *, effort: str, data: str | None = None
) -> dict[str, Any]:
    """Round every decoder linear of ``model`` with ``config`` and measure on the stages' validation windows.

    Args:
        model: A dense checkpoint.
        config: The one configuration.
        run: Workspace folder; nothing is written there.
        effort: Decides the number of windows, as in the stages.
        data: Text source, as ``--data``.

    Returns:
        ``perplexity`` with its protocol, and ``stored_bits_per_weight``.
    """
    common = Common(run=run, effort=effort, data=data)
    context = Context(common=common, workspace=Workspace(run), reporter=Reporter())
    device, dtype = device_and_dtype(common)
    arch = checkpoint_architecture(Checkpoint(model))
    network = load_model(model, dtype=dtype, device=device)
    bits = weights = 0
    for layer in range(arch.layers):
        for linear in arch.linears:
            weight = network.get_parameter(arch.tensor_name(layer, linear))
            with torch.no_grad():
                weight.copy_(quantize_dequantize(weight, config))
            bits += config.storage_bits(tuple(weight.shape))
            weights += weight.numel()
    windows = validation_windows(context, model, data or default_source())
    return {
        **validation_perplexity(context, network, windows, f"plain NF{config.bits}"),
        "config": config.to_dict(),
        "stored_bits_per_weight": bits / weights,
    }
