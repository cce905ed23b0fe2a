"""The mean of what pruned inputs of o and down added, as biases (FLAP, arXiv 2312.11983 §3).

Shapes: N windows, S tokens, O output rows, C input columns.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from compress.importance.modules import decoder_linear
from compress.importance.moments import OUTPUTS, require_finite
from compress.model.architecture import Architecture
from compress.model.layerwise import LayerWalk, gathered_sums
from compress.progress import Progress
from compress.structure import StructureMap, kept_columns


@torch.no_grad()
def mean_inputs(
    model: nn.Module,
    arch: Architecture,
    ids_NS: Tensor,
    *,
    batch: int = 4,
    progress: Progress | None = None,
) -> dict[str, Tensor]:
    """Mean input of every o and down: all that :func:`mean_biases` needs for any structure.

    Args:
        model: The full model; left as it is.
        arch: Its architecture.
        ids_NS: Calibration tokens, int64 [N, S].
        batch: Windows per forward pass; an incomplete last batch is left out.
        progress: Called after every layer.

    Returns:
        Module name -> mean over the tokens, float64 [in] on the CPU.

    Raises:
        CompressError: There are fewer windows than one batch, or the activations are not finite.
    """
    walk = LayerWalk(model, arch, ids_NS, batch=batch)
    found: dict[str, Tensor] = {}
    for index, layer in enumerate(walk.layers):
        outputs = [spec for spec in arch.linears_at(index) if spec.role in OUTPUTS]
        with gathered_sums(layer, outputs) as sums:
            walk.advance(index)
        for spec in outputs:
            name = arch.module_name(index, spec)
            require_finite(sums[spec].total, f"The inputs of {name}")
            found[name] = (sums[spec].total / sums[spec].tokens).cpu()
        if progress is not None:
            progress(index + 1, arch.layers, f"layer {index}")
    return found


def mean_biases(
    weight_of: Callable[[str], Tensor],
    arch: Architecture,
    structure: StructureMap,
    means: Mapping[str, Tensor],
) -> dict[str, Tensor]:
    """Biases of o and down that stand for the mean of what the removed inputs added; no model is run.

    Args:
        weight_of: Module name -> its weight [out, in].
        arch: The architecture of the full model.
        structure: What is kept.
        means: What :func:`mean_inputs` returned.

    Returns:
        Module name -> ``W_removed mean(x_removed)`` [out] in float32, for matrices that lose columns.
    """
    found: dict[str, Tensor] = {}
    for index, layer in enumerate(structure.layers):
        for spec in arch.linears_at(index):
            columns = kept_columns(arch, spec, layer) if spec.role in OUTPUTS else None
            if columns is None:
                continue
            name = arch.module_name(index, spec)
            gone_C = means[name].double().clone()
            gone_C[columns] = 0
            found[name] = (weight_of(name).double() @ gone_C).float()
    return found


@contextmanager
def added_biases(model: nn.Module, arch: Architecture, biases: Mapping[str, Tensor]) -> Iterator[None]:
    """The model with ``biases`` (module name of an o or down -> [out]) on top of its own for a while.

    Enter before :class:`~compress.prune.mask.GroupMasks`: it also silences what is added to a branch that is gone,
    which a model that is cut does not have either.
    """

    def hook(bias_O: Tensor) -> Callable[[nn.Module, tuple[Any, ...], Tensor], Tensor]:
        def add(_: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
            return output + bias_O.to(output)

        return add

    handles = []
    try:
        for index in range(arch.layers):
            for spec in arch.linears_at(index):
                bias = biases.get(arch.module_name(index, spec))
                if bias is not None:
                    module = decoder_linear(model, arch, index, spec)
                    handles.append(module.register_forward_hook(hook(bias)))
        yield
    finally:
        for handle in handles:
            handle.remove()
