"""Physical removal: write the small checkpoint, tensor by tensor."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from compress.errors import CompressError
from compress.model.architecture import Architecture, LinearSpec, resized_config
from compress.model.checkpoint import Checkpoint, CheckpointWriter, copy_side_files, require_dense
from compress.model.family import family_of
from compress.model.uneven_config import refuse_uneven, uneven_config
from compress.progress import Progress
from compress.structure import (
    FILE_NAME,
    LayerStructure,
    StructureMap,
    full_layer,
    kept_columns,
    kept_rows,
    structure_map,
)

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
    biases: Mapping[str, torch.Tensor] | None = None,
    progress: Progress | None = None,
) -> None:
    """Write the pruned model into the folder ``target``, with ``structure.safetensors`` beside it.

    Rows of q, k, v, gate and up (with their biases) and columns of o and down are cut, a branch that keeps nothing is
    left out; everything else is copied. Where all layers have one shape, the result is a plain checkpoint of smaller
    sizes; else it opens with `load_model` alone. One tensor is in memory at a time. A failure leaves ``target``
    incomplete: write into a folder that is renamed when done.

    Args:
        source: The full model.
        arch: Its architecture.
        structure: What is kept.
        target: A fresh folder.
        deltas: LoRA deltas to fold into the weights.
        biases: Module name of an o or down -> what is added to its outputs, [out]. Where the linear has no bias yet,
            it and all that share its config entry get one. Those of a branch that is gone go with it.
        progress: Called after every tensor of the source.

    Raises:
        CompressError: The model is stored quantized or is uneven already, the structure is of another model, or
            transformers has no such sizes or biases for the family. Nothing is written then.
        ValueError: ``biases`` names another module or has another shape.
    """
    require_dense(source, allow_lq=False)
    refuse_uneven(arch)
    structure.check_matches(arch)
    plan = _plan_biases(source, arch, structure, biases or {})
    config, gone = _config(plan, structure)
    places = {
        arch.tensor_name(layer, spec, kind): (layer, spec, kind)
        for layer in range(arch.layers)
        for spec in arch.linears
        for kind in ("weight", "bias")
    }
    with CheckpointWriter(target, config=config) as writer:
        for done, name in enumerate(source.names, start=1):
            if not name.startswith(gone):
                tensor = source.read(name)
                if name in places:
                    index, spec, kind = places[name]
                    layer, module = structure.layers[index], arch.module_name(index, spec)
                    if kind == "bias":
                        rows = kept_rows(arch, spec, layer)
                        tensor = _added(tensor if rows is None else tensor[rows], plan.added.get(module))
                    else:
                        delta = deltas(module) if deltas is not None else None
                        tensor = slice_weight(tensor, arch, spec, layer, delta_OI=delta)
                        if module in plan.created:
                            rows_left = tensor.shape[1 if spec.transposed else 0]
                            zeros = torch.zeros(rows_left, dtype=tensor.dtype)
                            writer.add(f"{module}.bias", _added(zeros, plan.added.get(module)))
                writer.add(name, tensor)
            if progress is not None:
                progress(done, len(source.names), name)
        writer.finish()
    copy_side_files(source.path, target)
    structure.save(target / FILE_NAME)


def with_biases(
    source: Checkpoint, arch: Architecture, roles: Collection[str]
) -> tuple[dict[str, Any], Architecture]:
    """Config and architecture of the model once the outputs of these roles have biases; no weight is read.

    Raises:
        CompressError: The family's configuration has no such biases.
    """
    whole = structure_map(arch, [full_layer(arch)] * arch.layers, base_fingerprint="")
    modules = [arch.module_name(0, spec) for spec in arch.linears if spec.role in roles]
    plan = _plan_biases(source, arch, whole, dict.fromkeys(modules, torch.zeros(arch.hidden)))
    return plan.config, plan.arch


@dataclass(frozen=True, slots=True, kw_only=True)
class _BiasPlan:
    """The model with every bias it will have, the biases to add, and the modules that had none before."""

    config: dict[str, Any]
    arch: Architecture
    added: dict[str, torch.Tensor]
    created: frozenset[str]


def _plan_biases(
    source: Checkpoint, arch: Architecture, structure: StructureMap, biases: Mapping[str, torch.Tensor]
) -> _BiasPlan:
    outputs = {
        arch.module_name(index, spec): (spec, layer)
        for index, layer in enumerate(structure.layers)
        for spec in arch.linears
        if spec.role in ("o", "down")
    }
    added: dict[str, torch.Tensor] = {}
    missing: dict[LinearSpec, None] = {}
    for module, bias in biases.items():
        if module not in outputs or tuple(bias.shape) != (arch.hidden,):
            raise ValueError(f"no bias of shape {tuple(bias.shape)} can be added to {module!r}")
        spec, layer = outputs[module]
        columns = kept_columns(arch, spec, layer)
        if columns is None or len(columns):
            added[module] = bias
            if not spec.bias:
                missing[spec] = None
    family = family_of(arch.family)
    declared = (
        {p.name: p.bias for p in family.linears if isinstance(p.bias, str)} if family is not None else {}
    )
    without = [spec.name for spec in missing if spec.name not in declared]
    if without:
        raise CompressError(
            f"The repair adds biases, and transformers gives a {arch.family} model none at {' and '.join(without)}.",
            "Use --repair refit or --repair none.",
        )
    keys = {declared[spec.name] for spec in missing}
    new = [spec for spec in arch.linears if declared.get(spec.name) in keys and not spec.bias]
    return _BiasPlan(
        config={**source.config, **dict.fromkeys(keys, True)},
        arch=replace(
            arch,
            linears=tuple(replace(spec, bias=True) if spec in new else spec for spec in arch.linears),
        ),
        added=added,
        created=frozenset(arch.module_name(index, spec) for index in range(arch.layers) for spec in new),
    )


def _config(plan: _BiasPlan, structure: StructureMap) -> tuple[dict[str, Any], tuple[str, ...]]:
    """The config of the pruned model, and the prefixes of the tensors that it has no more."""
    shape = structure.uniform
    if shape is None:
        shapes = structure.shapes
        config = uneven_config(plan.config, plan.arch, shapes)
        return config, tuple(f"{name}." for name in replace(plan.arch, layer_shapes=shapes).gone())
    heads = shape.kv_heads * shape.queries
    config = resized_config(
        plan.config, plan.arch, heads=heads, kv_heads=shape.kv_heads, channels=shape.channels
    )
    return config, ()


def _added(tensor: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """``tensor`` plus ``bias``, summed in float32 (or wider) and rounded once."""
    if bias is None:
        return tensor
    wide = torch.promote_types(tensor.dtype, torch.float32)
    return (tensor.to(wide) + bias.detach().to("cpu", wide)).to(tensor.dtype)


def _cut(
    weight_OI: torch.Tensor, arch: Architecture, spec: LinearSpec, layer: LayerStructure
) -> torch.Tensor:
    rows, columns = kept_rows(arch, spec, layer), kept_columns(arch, spec, layer)
    if rows is not None:
        weight_OI = weight_OI[rows.to(weight_OI.device)]
    if columns is not None:
        weight_OI = weight_OI[:, columns.to(weight_OI.device)]
    return weight_OI
