"""From an allocation to an LQ checkpoint: decompose layer by layer, then stream everything into one folder."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from types import MappingProxyType
from typing import Any

from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from compress.durable import replacing
from compress.engine import largest_first
from compress.model.checkpoint import copy_side_files
from compress.model.writer import CheckpointWriter
from compress.pipelines.allocate import Allocation, Choice
from compress.pipelines.fisher_files import FisherFiles
from compress.pipelines.hessian_walk import HessianWalk
from compress.pipelines.knowledge import MatrixKnowledge, layer_knowledge
from compress.pipelines.matrices import VOCABULARY, layer_name, read_matrix
from compress.pipelines.model_input import ModelInput
from compress.pipelines.settings import QuantizeSettings
from compress.pipelines.stage import Context
from compress.quantize.checkpoint import MatrixRecord, lq_config, lq_tensors
from compress.quantize.decompose import Decomposition, decompose
from compress.quantize.fisher_decompose import decompose_fisher
from compress.quantize.hessian import InputStatistics
from compress.quantize.linear import LQLinear
from compress.quantize.output_aware import decompose_outputs


@dataclass(frozen=True, slots=True, kw_only=True)
class MatrixJob:
    """A matrix to be decomposed.

    Attributes:
        choice: What it is given.
        weight: The matrix [out, in].
        settings: Iterations of the alternation (objectives ``fisher`` and ``frobenius``).
        seed: Of randomized parts.
        known: What calibration text told.
        counted: Whether the budget counts it.
    """

    choice: Choice
    weight: Tensor
    settings: QuantizeSettings
    seed: int
    known: MatrixKnowledge
    counted: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Decomposed:
    """What became of a matrix: the tensors that are stored, and its record."""

    tensors: Mapping[str, Tensor]
    record: Mapping[str, Any]


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
    total, parts = len(layers), _LayerParts(folder)
    with context.reporter.bar("decompose") as progress:

        def asked(
            choices: list[Choice], statistics: Mapping[str, InputStatistics] = MappingProxyType({})
        ) -> Iterator[MatrixJob]:
            """The matrices of a layer."""
            layer = choices[0].matrix.layer
            known = layer_knowledge(
                context.engine,
                [choice.matrix.module for choice in choices],
                statistics=statistics,
                minds=minds,
                fisher=fisher.layer(layer) if fisher is not None and layer != VOCABULARY else {},
            )
            parts.begin(choices)
            for choice in largest_first(choices, lambda choice: choice.matrix.numel):
                yield MatrixJob(
                    choice=choice,
                    weight=read_matrix(model, choice.matrix),
                    settings=settings,
                    seed=context.common.seed,
                    known=known[choice.matrix.module],
                    counted=choice in allocation.choices,
                )

        def missing() -> Iterator[list[Choice]]:
            """Layers that are not there yet; a stop that was asked for takes effect in front of one."""
            for at, choices in enumerate(layers):
                layer = choices[0].matrix.layer
                progress(at, total, layer_name(layer))
                if not layer_file(folder, layer).is_file():
                    yield choices
                if walk is not None:
                    walk.advance(layer, read_layer(layer_file(folder, layer), choices))

        if walk is None:
            jobs = (job for choices in missing() for job in asked(choices))
            context.engine.run(decomposed, jobs, parts.keep)
        else:
            for choices in missing():
                statistics = walk.statistics(choices[0].matrix.layer)
                context.engine.run(decomposed, asked(choices, statistics), parts.keep)
        progress(total, total, "")
    records: list[dict[str, Any]] = []
    for choices in layers:
        with safe_open(layer_file(folder, choices[0].matrix.layer), framework="pt") as file:
            records += json.loads(file.metadata()["matrices"])
    return records


class _LayerParts:
    """Collects what became of matrices; a layer's file is written once all of its own are there.

    Args:
        folder: Where the files go.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._layers: dict[int, dict[str, Decomposed | None]] = {}

    def begin(self, choices: list[Choice]) -> None:
        """A layer, with its matrices in the order of the file."""
        self._layers[choices[0].matrix.layer] = dict.fromkeys(choice.matrix.module for choice in choices)

    def keep(self, job: MatrixJob, result: Decomposed) -> None:
        """What a job came to."""
        layer = job.choice.matrix.layer
        parts = self._layers[layer]
        parts[job.choice.matrix.module] = result
        known = [part for part in parts.values() if part is not None]
        if len(known) < len(parts):
            return
        tensors = {name: tensor for part in known for name, tensor in part.tensors.items()}
        records = json.dumps([part.record for part in known])
        with replacing(layer_file(self._folder, layer)) as temporary:
            save_file(tensors, temporary, metadata={"matrices": records})
        del self._layers[layer]


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


def decomposed(job: MatrixJob) -> Decomposed:
    """The matrix of a job as it is stored, and how well that is done."""
    choice, config = job.choice, job.choice.config
    result, own_error = _by_objective(job)
    record = {
        "name": choice.matrix.module,
        "bits": config.bits,
        "scale_bits": config.scale_bits,
        "scale_dtype": config.scale_dtype,
        "block_size": config.block_size,
        "group_size": config.group_size,
        "codebook": config.codebook,
        "rank": result.rank,
        "stored_bits": result.storage_bits,
        "bits_per_weight": result.storage_bits / choice.matrix.numel,
        "squared_error": result.error,
        "relative_error": _root_share(result.error, result.weight_norm),
        **own_error,
        "counted": job.counted,
    }
    return Decomposed(tensors=lq_tensors(choice.matrix.module, result), record=record)


def _by_objective(job: MatrixJob) -> tuple[Decomposition, dict[str, float]]:
    """The decomposition for the objective, and by key what this objective minds and what it met."""
    choice, known = job.choice, job.known
    given: dict[str, Any] = {"rank": choice.rank, "factor_config": choice.factor_config, "seed": job.seed}
    statistics = known.statistics
    if statistics is not None:
        aware = decompose_outputs(job.weight, choice.config, statistics, row_weights=known.minds, **given)
        return aware.decomposition, {
            "relative_output_error": _root_share(aware.output_error, aware.output_norm),
            "dead_inputs": statistics.dead,
            "damping": statistics.damping,
        }
    given["iterations"] = job.settings.iterations
    if known.fisher is not None:
        weighted = decompose_fisher(job.weight, choice.config, known.fisher, **given)
        return weighted.decomposition, {
            "relative_weighted_error": _root_share(weighted.weighted_error, weighted.weighted_norm)
        }
    return decompose(job.weight, choice.config, **given), {}


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
