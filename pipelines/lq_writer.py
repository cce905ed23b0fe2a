"""From an allocation to an LQ checkpoint: decompose layer by layer, then stream everything into one folder."""

from __future__ import annotations

import json
from collections.abc import Mapping
from itertools import groupby
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from compress.durable import replacing
from compress.model.checkpoint import copy_side_files
from compress.model.writer import CheckpointWriter
from compress.pipelines.allocate import VOCABULARY, Allocation, Choice, layer_name, read_matrix
from compress.pipelines.error_tables import LayerKnowledge
from compress.pipelines.fisher_files import FisherFiles
from compress.pipelines.hessian_walk import HessianWalk
from compress.pipelines.model_input import ModelInput
from compress.pipelines.settings import QuantizeSettings
from compress.pipelines.stage import Context
from compress.quantize.checkpoint import MatrixRecord, lq_config, lq_tensors
from compress.quantize.decompose import Decomposition, decompose
from compress.quantize.fisher_decompose import decompose_fisher
from compress.quantize.linear import LQLinear
from compress.quantize.output_aware import decompose_outputs


def decompose_layers(
    context: Context,
    model: ModelInput,
    allocation: Allocation,
    settings: QuantizeSettings,
    folder: Path,
    walk: HessianWalk | None,
    minds: Mapping[str, Tensor],
    fisher: FisherFiles | None,
) -> list[dict[str, Any]]:
    """Decompose every matrix; one file per finished layer in ``folder``, read back when it is there.

    Args:
        context: Seed and reporter.
        model: The model.
        allocation: What each matrix is given.
        settings: Iterations of the alternation (objectives ``fisher`` and ``frobenius``).
        folder: Where finished layers lie.
        walk: Input statistics, in front of the first layer; each layer is then fed by the quantized ones before
            it. None for other objectives than ``hessian``.
        minds: With a walk, what a unit of squared output error costs, [O] by module.
        fisher: Fisher information; None for other objectives than ``fisher``.

    Returns:
        What became of each matrix, in the allocation's order.
    """
    folder.mkdir(exist_ok=True)
    layers = [
        list(group) for _, group in groupby(allocation.everything, key=lambda choice: choice.matrix.layer)
    ]
    records: list[dict[str, Any]] = []
    with context.reporter.bar("decompose") as progress:
        for done, choices in enumerate(layers, start=1):
            layer = choices[0].matrix.layer
            path = layer_file(folder, layer)
            if not path.is_file():
                known = LayerKnowledge(
                    statistics=walk.statistics(layer) if walk is not None else {},
                    minds=minds,
                    fisher=fisher.layer(layer) if fisher is not None and layer != VOCABULARY else {},
                )
                _decompose_layer(
                    model,
                    choices,
                    settings,
                    context.common.seed,
                    path,
                    known,
                    counted=choices[0] in allocation.choices,
                )
            with safe_open(path, framework="pt") as file:
                records += json.loads(file.metadata()["matrices"])
            if walk is not None:
                walk.advance(layer, read_layer(path, choices))
            progress(done, len(layers), layer_name(layer))
    return records


def read_layer(path: Path, choices: list[Choice]) -> dict[str, Tensor]:
    """The weights [out, in] that a finished layer's file stands for, factors included, by module name."""
    stored = load_file(path)
    weights = {}
    for choice in choices:
        prefix = f"{choice.matrix.module}."
        linear = LQLinear(matrix_record(choice), bias=False)
        linear.load_state_dict({k.removeprefix(prefix): v for k, v in stored.items() if k.startswith(prefix)})
        weights[choice.matrix.module] = linear.dequantized_weight()
    return weights


def matrix_record(choice: Choice) -> MatrixRecord:
    """How a matrix is stored."""
    return MatrixRecord(
        shape=choice.matrix.shape,
        config=choice.config,
        rank=choice.rank,
        factor_config=choice.factor_config if choice.rank else None,
    )


def layer_file(folder: Path, layer: int) -> Path:
    """Where the quantized tensors of one layer lie until the checkpoint is written."""
    return folder / ("vocabulary.safetensors" if layer == VOCABULARY else f"{layer:04d}.safetensors")


def _decompose_layer(
    model: ModelInput,
    choices: list[Choice],
    settings: QuantizeSettings,
    seed: int,
    path: Path,
    known: LayerKnowledge,
    *,
    counted: bool,
) -> None:
    tensors: dict[str, Tensor] = {}
    records: list[dict[str, Any]] = []
    for choice in choices:
        result, own_error = _decomposed(read_matrix(model, choice.matrix), choice, settings, seed, known)
        tensors |= lq_tensors(choice.matrix.module, result)
        records.append(
            {
                "name": choice.matrix.module,
                "bits": choice.config.bits,
                "scale_bits": choice.config.scale_bits,
                "block_size": choice.config.block_size,
                "group_size": choice.config.group_size,
                "codebook": choice.config.codebook,
                "rank": result.rank,
                "stored_bits": result.storage_bits,
                "bits_per_weight": result.storage_bits / choice.matrix.numel,
                "squared_error": result.error,
                "relative_error": _root_share(result.error, result.weight_norm),
                **own_error,
                "counted": counted,
            }
        )
    with replacing(path) as temporary:
        save_file(tensors, temporary, metadata={"matrices": json.dumps(records)})


def _decomposed(
    weight: Tensor, choice: Choice, settings: QuantizeSettings, seed: int, known: LayerKnowledge
) -> tuple[Decomposition, dict[str, float]]:
    """The decomposition for the objective, and the relative error that this objective minds, by its key."""
    module, config, rank = choice.matrix.module, choice.config, choice.rank
    if module in known.statistics:
        aware = decompose_outputs(
            weight,
            config,
            known.statistics[module],
            rank=rank,
            factor_config=choice.factor_config,
            row_weights=known.minds.get(module),
            seed=seed,
        )
        return aware.decomposition, {
            "relative_output_error": _root_share(aware.output_error, aware.output_norm)
        }
    if module in known.fisher:
        weighted = decompose_fisher(
            weight,
            config,
            known.fisher[module],
            rank=rank,
            factor_config=choice.factor_config,
            iterations=settings.iterations,
            seed=seed,
        )
        return weighted.decomposition, {
            "relative_weighted_error": _root_share(weighted.weighted_error, weighted.weighted_norm)
        }
    plain = decompose(
        weight,
        config,
        rank=rank,
        factor_config=choice.factor_config,
        iterations=settings.iterations,
        seed=seed,
    )
    return plain, {}


def _root_share(error: float, norm: float) -> float:
    return float((error / norm) ** 0.5) if norm else 0.0


def write_checkpoint(model: ModelInput, allocation: Allocation, layers: Path, folder: Path) -> None:
    """Write the LQ checkpoint: quantized linears from ``layers``, everything else as it was."""
    choices = {choice.matrix.tensor: choice for choice in allocation.everything}
    per_matrix = {choice.matrix.module: matrix_record(choice) for choice in allocation.everything}
    arch = model.architecture
    doubled = arch.lm_head if arch.tied and arch.embedding in choices else None
    config = dict(model.checkpoint.config) | {"quantization_config": lq_config(per_matrix)}
    with CheckpointWriter(folder, config=config) as writer:
        for name in model.checkpoint.names:
            choice = choices.get(name)
            if name == doubled:  # some checkpoints store a tied output matrix too
                continue
            if choice is None:
                writer.add(name, model.checkpoint.read(name))
                continue
            with safe_open(layer_file(layers, choice.matrix.layer), framework="pt") as file:
                prefix = f"{choice.matrix.module}."
                for key in sorted(k for k in file.keys() if k.startswith(prefix)):  # noqa: SIM118
                    writer.add(key, file.get_tensor(key))
        writer.finish()
    copy_side_files(model.checkpoint.path, folder)
