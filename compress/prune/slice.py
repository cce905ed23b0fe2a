"""Physical removal: write the small checkpoint, tensor by tensor."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from compress.errors import CompressError
from compress.model.architecture import Architecture, LinearSpec, resized_config
from compress.model.checkpoint import Checkpoint, CheckpointWriter, copy_side_files, require_dense
from compress.progress import Progress
from compress.structure import FILE_NAME, LayerStructure, StructureMap, kept_columns, kept_rows

Deltas = Callable[[str], torch.Tensor | None]
"""Module name ("model.layers.0.self_attn.q_proj") -> its LoRA delta ``s B A`` [out, in], or None."""


def slice_weight(
    weight: torch.Tensor,
    arch: Architecture,
    spec: LinearSpec,
    layer: LayerStructure,
    *,
    delta_OI: torch.Tensor | None = None,
) -> torch.Tensor:
    """The kept part of a stored weight plus that of ``delta_OI``, in the stored orientation and dtype.

    The sum is formed in float32 (float64 for float64 weights) and rounded once.

    Args:
        weight: As stored: [out, in], or [in, out] where ``spec.transposed``.
        arch: Architecture of the full model.
        spec: The linear.
        layer: What its layer keeps.
        delta_OI: Added to the weight; full size.
    """
    part = _cut(weight.t() if spec.transposed else weight, arch, spec, layer)
    if delta_OI is not None:
        wide = torch.promote_types(weight.dtype, torch.float32)
        part = (part.to(wide) + _cut(delta_OI, arch, spec, layer).to(part.device, wide)).to(weight.dtype)
    return (part.t() if spec.transposed else part).contiguous()


def slice_checkpoint(
    source: Checkpoint,
    arch: Architecture,
    structure: StructureMap,
    target: Path,
    *,
    deltas: Deltas | None = None,
    progress: Progress | None = None,
) -> None:
    """Write the pruned model into the folder ``target``, with ``structure.safetensors`` beside it.

    Rows of q, k, v, gate and up (with their biases) and columns of o and down are cut; everything else is
    copied. One tensor is in memory at a time. A failure leaves ``target`` incomplete: write into a folder
    that is renamed when done.

    Args:
        source: The full model.
        arch: Its architecture.
        structure: Uniform over the layers, so that stock loaders accept the result.
        target: A fresh folder.
        deltas: LoRA deltas to fold into the weights.
        progress: Called after every tensor.

    Raises:
        CompressError: The model is stored quantized, or the structure is of another model or differs in size
            between layers.
    """
    require_dense(source, allow_lq=False)
    structure.check_matches(arch)
    if structure.uniform is None:
        raise CompressError(
            "The layers keep different numbers of groups, which a stock configuration cannot describe.",
            "Prune with a uniform shape.",
        )
    kv_heads, channels = structure.uniform
    config = resized_config(
        source.config, arch, heads=kv_heads * arch.queries_per_group, kv_heads=kv_heads, channels=channels
    )
    places = {
        arch.tensor_name(layer, spec, kind): (layer, spec, kind)
        for layer in range(arch.layers)
        for spec in arch.linears
        for kind in ("weight", "bias")
    }
    with CheckpointWriter(target, config=config) as writer:
        for done, name in enumerate(source.names, start=1):
            tensor = source.read(name)
            if name in places:
                index, spec, kind = places[name]
                layer = structure.layers[index]
                if kind == "bias":
                    rows = kept_rows(arch, spec, layer)
                    tensor = tensor if rows is None else tensor[rows]
                else:
                    delta = deltas(arch.module_name(index, spec)) if deltas is not None else None
                    tensor = slice_weight(tensor, arch, spec, layer, delta_OI=delta)
            writer.add(name, tensor)
            if progress is not None:
                progress(done, len(source.names), name)
        writer.finish()
    copy_side_files(source.path, target)
    structure.save(target / FILE_NAME)


def _cut(
    weight_OI: torch.Tensor, arch: Architecture, spec: LinearSpec, layer: LayerStructure
) -> torch.Tensor:
    rows, columns = kept_rows(arch, spec, layer), kept_columns(arch, spec, layer)
    if rows is not None:
        weight_OI = weight_OI[rows.to(weight_OI.device)]
    if columns is not None:
        weight_OI = weight_OI[:, columns.to(weight_OI.device)]
    return weight_OI
