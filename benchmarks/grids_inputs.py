"""What the benchmark of grids works on: matrices, second moments of their inputs, and weights off their source's grid.

Shapes: O out, I in.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from compress.durable import replacing
from compress.model.architecture import LinearSpec
from compress.model.checkpoint import Checkpoint, checkpoint_architecture
from compress.model.layerwise import LayerWalk, gathered_grams
from compress.model.load import load_model
from compress.pipelines.identity import digest
from compress.pipelines.matrices import SHARED_INPUT

SOURCE_BLOCK, SOURCE_STEPS = 32, 15
"""Q4_1, the format of the embedded model's file: blocks of 32 along a row, sixteen levels from smallest to largest."""
ON_GRID = 0.05
"""Largest distance from a level, in steps, for a matrix to count as on the grid; the checkpoint made of the file is in
bfloat16, whose own rounding moves a weight by up to 0.03 steps."""


Moments = dict[str, Tensor]
"""Linear -> mean ``x x^T`` of its inputs, float64 [I, I]."""


def known_moments(model: Path, layers: Sequence[int], ids_NS: Tensor, work: Path) -> Moments:
    """:func:`input_moments`, kept in the folder ``work`` for a run that was interrupted."""
    content = hashlib.sha256(ids_NS.numpy().tobytes()).hexdigest()
    identity = {"model": Checkpoint(model).fingerprint(), "layers": list(layers), "tokens": content}
    file = work / f"moments-{digest(identity)[:16]}.safetensors"
    if not file.is_file():
        work.mkdir(parents=True, exist_ok=True)
        with replacing(file) as temporary:
            save_file(input_moments(model, layers, ids_NS), temporary)
    found: Moments = load_file(file)
    return found


def input_moments(model: Path, layers: Iterable[int], ids_NS: Tensor) -> Moments:
    """All of :func:`decoder_moments` by ``layer.linear``."""
    return {
        f"{layer}.{name}": gram
        for layer, grams in decoder_moments(model, layers, ids_NS)
        for name, gram in grams.items()
    }


def decoder_moments(model: Path, layers: Iterable[int], ids_NS: Tensor) -> Iterator[tuple[int, Moments]]:
    """Second moments of the inputs of every linear of some layers, in the dense model: layer, and moments by linear.

    Args:
        model: Its folder; it is run in float32.
        layers: Which.
        ids_NS: Calibration tokens, int64 [N, S].
    """
    wanted = set(layers)
    arch = checkpoint_architecture(Checkpoint(model))
    with torch.no_grad():
        walk = LayerWalk(load_model(model, dtype=torch.float32), arch, ids_NS, batch=1)
    for layer in range(max(wanted) + 1):
        first: dict[str, LinearSpec] = {}
        for spec in arch.linears_at(layer) if layer in wanted else ():
            first.setdefault(SHARED_INPUT.get(spec.role, spec.name), spec)
        with gathered_grams(walk.layers[layer], dict.fromkeys(first.values())) as grams, torch.no_grad():
            walk.advance(layer)
        if layer in wanted:
            yield (
                layer,
                {
                    spec.name: grams[first[SHARED_INPUT.get(spec.role, spec.name)]] / ids_NS.numel()
                    for spec in arch.linears_at(layer)
                },
            )


def weights_of(model: Path, layers: Iterable[int]) -> Iterator[tuple[str, Tensor]]:
    """Every linear of some layers: ``layer.linear`` and its weight, float32 [O, I]."""
    checkpoint = Checkpoint(model)
    arch = checkpoint_architecture(checkpoint)
    for layer in layers:
        for spec in arch.linears_at(layer):
            weight = checkpoint.read(arch.tensor_name(layer, spec)).float()
            yield f"{layer}.{spec.name}", (weight.t() if spec.transposed else weight).contiguous()


def source_steps(weight_OI: Tensor) -> Tensor | None:
    """The step of each weight's block on the grid of Q4_1, [O, I]; None for a matrix that is not on such a grid."""
    if weight_OI.shape[1] % SOURCE_BLOCK:
        return None
    blocks = weight_OI.double().view(len(weight_OI), -1, SOURCE_BLOCK)
    low = blocks.amin(2, keepdim=True)
    steps = (blocks.amax(2, keepdim=True) - low) / SOURCE_STEPS
    levels = (blocks - low) / torch.where(steps > 0, steps, 1.0)
    if float((levels - levels.round()).abs().max()) > ON_GRID:
        return None
    return steps.expand_as(blocks).reshape(weight_OI.shape).float()


def off_the_grid(weight_OI: Tensor, steps_OI: Tensor, seed: int) -> Tensor:
    """The matrix with what rounding to a grid may have taken from it: evenly spread within half a step of each weight.

    Args:
        weight_OI: On the grid.
        steps_OI: From :func:`source_steps`.
        seed: Of what is drawn.
    """
    generator = torch.Generator().manual_seed(seed)
    return weight_OI + steps_OI * (torch.rand(weight_OI.shape, generator=generator) - 0.5)
