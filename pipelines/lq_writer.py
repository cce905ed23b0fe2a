"""From an allocation to an LQ checkpoint: decompose layer by layer, then stream everything into one folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from compress.pipelines.allocate import Allocation, Choice
from compress.pipelines.model_input import ModelInput
from compress.pipelines.settings import QuantizeSettings
from compress.pipelines.stage import Context
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from compress.model.checkpoint import copy_side_files
from compress.model.writer import CheckpointWriter
from compress.quantize.checkpoint import MatrixRecord, lq_config, lq_tensors
from compress.quantize.config import FACTOR_8BIT
from compress.quantize.decompose import decompose


def decompose_layers(
    context: Context, model: ModelInput, allocation: Allocation, settings: QuantizeSettings, folder: Path
) -> list[dict[str, Any]]:
    """Decompose every matrix; one file per finished layer in ``folder``, read back when it is there.

    Returns:
        What became of each matrix, in the allocation's order.
    """
    folder.mkdir(exist_ok=True)
    layers: dict[int, list[Choice]] = {}
    for choice in allocation.choices:
        layers.setdefault(choice.matrix.layer, []).append(choice)
    records: list[dict[str, Any]] = []
    with context.reporter.bar("decompose") as progress:
        for done, (layer, choices) in enumerate(sorted(layers.items()), start=1):
            path = layer_file(folder, layer)
            if not path.is_file():
                _decompose_layer(model, choices, settings, context.common.seed, path)
            with safe_open(path, framework="pt") as file:
                records += json.loads(file.metadata()["matrices"])
            progress(done, len(layers), f"layer {layer}")
    return records


def layer_file(folder: Path, layer: int) -> Path:
    """Where the quantized tensors of one layer lie until the checkpoint is written."""
    return folder / f"{layer:04d}.safetensors"


def _decompose_layer(
    model: ModelInput, choices: list[Choice], settings: QuantizeSettings, seed: int, path: Path
) -> None:
    tensors: dict[str, Tensor] = {}
    records: list[dict[str, Any]] = []
    for choice in choices:
        result = decompose(
            model.checkpoint.read(choice.matrix.tensor),
            choice.config,
            rank=choice.rank,
            iterations=settings.iterations,
            seed=seed,
        )
        tensors |= lq_tensors(choice.matrix.module, result)
        records.append(
            {
                "name": choice.matrix.module,
                "bits": choice.config.bits,
                "scale_bits": choice.config.scale_bits,
                "block_size": choice.config.block_size,
                "group_size": choice.config.group_size,
                "rank": result.rank,
                "stored_bits": result.storage_bits,
                "bits_per_weight": result.storage_bits / choice.matrix.numel,
                "squared_error": result.error,
                "relative_error": (result.error / result.weight_norm) ** 0.5 if result.weight_norm else 0.0,
            }
        )
    temporary = path.with_suffix(".tmp")
    save_file(tensors, temporary, metadata={"matrices": json.dumps(records)})
    temporary.replace(path)


def write_checkpoint(model: ModelInput, allocation: Allocation, layers: Path, folder: Path) -> None:
    """Write the LQ checkpoint: quantized linears from ``layers``, everything else as it was."""
    choices = {choice.matrix.tensor: choice for choice in allocation.choices}
    per_matrix = {
        c.matrix.module: MatrixRecord(
            shape=c.matrix.shape, config=c.config, rank=c.rank, factor_config=FACTOR_8BIT if c.rank else None
        )
        for c in allocation.choices
    }
    config = dict(model.checkpoint.config) | {"quantization_config": lq_config(per_matrix)}
    with CheckpointWriter(folder, config=config) as writer:
        for name in model.checkpoint.names:
            choice = choices.get(name)
            if choice is None:
                writer.add(name, model.checkpoint.read(name))
                continue
            with safe_open(layer_file(layers, choice.matrix.layer), framework="pt") as file:
                prefix = f"{choice.matrix.module}."
                for key in sorted(k for k in file.keys() if k.startswith(prefix)):  # noqa: SIM118
                    writer.add(key, file.get_tensor(key))
        writer.finish()
    copy_side_files(model.checkpoint.path, folder)
