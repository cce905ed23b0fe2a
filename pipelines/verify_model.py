"""A model folder against its own config, its structure and the sizes that its stage recorded."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch

from compress.model.architecture import Architecture, expected_shapes
from compress.model.base_record import FILE_NAME as BASE
from compress.model.base_record import BaseRecord
from compress.model.checkpoint import Checkpoint, checkpoint_architecture
from compress.model.config import build_config, meta_shapes, quantization_method
from compress.model.layout import Shapes
from compress.model.uneven import plain_config
from compress.pipelines.verify_target import Finding, Target, Value
from compress.prune.weight_masks import FILE_NAME as MASKS
from compress.prune.weight_masks import WeightMasks
from compress.quantize.checkpoint import QUANT_METHOD, MatrixRecord, read_lq_config
from compress.structure import FILE_NAME, StructureMap


def check_shapes(
    target: Target, checkpoint: Checkpoint, arch: Architecture, matrices: Mapping[str, MatrixRecord]
) -> Iterator[Finding]:
    """Every parameter of the config's model class is stored, with its shape; quantized ones in their parts.

    Args:
        target: Where it lies.
        checkpoint: The model.
        arch: Its architecture.
        matrices: Records of the quantized matrices by module name.
    """
    expected: dict[str, tuple[tuple[int, ...], torch.dtype | None]] = {
        name: (shape, None) for name, shape in parameter_shapes(checkpoint, arch).items()
    }
    faults = []
    for module, record in matrices.items():
        dense, _ = expected.pop(f"{module}.weight", ((), None))
        if dense not in (record.shape, record.shape[::-1]):
            faults.append(
                f"config.json quantizes {module} as {record.shape}, which is not what the model has"
            )
        expected |= {f"{module}.{part}": layout for part, layout in record.layout().items()}
    for name in checkpoint.names:
        module = name.rpartition(".")[0]
        if module in matrices and name not in expected and not name.endswith(".bias"):
            faults.append(f"the tensor {name} is stored, and config.json knows of no such part")
    for name, (shape, dtype) in expected.items():
        if name not in checkpoint:
            faults.append(f"the tensor {name} is missing")
        elif checkpoint.shape(name) != shape or dtype not in (None, checkpoint.dtype(name)):
            found = f"{checkpoint.dtype(name)} {list(checkpoint.shape(name))}"
            wanted = f"{dtype or ''} {list(shape)}".strip()
            faults.append(f"{name} is {found} where config.json asks for {wanted}".replace("torch.", ""))
    yield from (target.differs("shapes", fault) for fault in faults)
    if not faults:
        yield target.ok("shapes", f"{len(expected)} tensors as config.json asks")


def parameter_shapes(checkpoint: Checkpoint, arch: Architecture) -> Shapes:
    """Name and shape of every parameter of the model as if it were dense; branches that are gone are left out."""
    gone = tuple(f"{name}." for name in arch.gone())
    whole = meta_shapes(build_config(plain_config(checkpoint.config)))
    return {n: s for n, s in whole.items() if not n.startswith(gone)} | expected_shapes(arch)


def check_sizes(
    target: Target, checkpoint: Checkpoint, arch: Architecture, matrices: Mapping[str, MatrixRecord]
) -> Iterator[Finding]:
    """Parameters and bytes, the fractions that were removed, and the model before where it is here."""
    after, before = target.metrics.get("after", {}), target.metrics.get("before", {})
    parameters = logical_parameters(checkpoint, matrices)
    values = [
        Value(what="parameters", recorded=after.get("parameters"), found=parameters),
        Value(what="bytes", recorded=after.get("bytes"), found=checkpoint.bytes),
    ]
    source = target.source
    if source is not None:
        dense = Checkpoint(source)
        full = checkpoint_architecture(dense).decoder_linear_parameters()
        values += [
            Value(what="parameters before", recorded=before.get("parameters"), found=dense.parameters),
            Value(what="bytes before", recorded=before.get("bytes"), found=dense.bytes),
        ]
        fractions = {
            "removed_of_all_parameters": 1 - parameters / dense.parameters,
            "removed_bytes": 1 - checkpoint.bytes / dense.bytes,
            "achieved_ratio": 1 - arch.decoder_linear_parameters() / full,
            "file_bits_per_parameter": 8 * checkpoint.bytes / dense.parameters,
        }
        values += [
            Value(what=key, recorded=target.metrics.get(key), found=found, tolerance=1e-9, floor=1e-12)
            for key, found in fractions.items()
        ]
    yield from target.compare("sizes", values, f"{parameters} parameters in {checkpoint.bytes} bytes")


def logical_parameters(checkpoint: Checkpoint, matrices: Mapping[str, MatrixRecord]) -> int:
    """Parameters of the model as if it were dense: a quantized matrix counts with its weights."""
    parts = {f"{module}.{part}" for module, record in matrices.items() for part in record.layout()}
    stored = sum(
        checkpoint.nbytes(name) // checkpoint.dtype(name).itemsize
        for name in checkpoint.names
        if name not in parts
    )
    return stored + sum(record.shape[0] * record.shape[1] for record in matrices.values())


def weights_of(checkpoint: Checkpoint) -> int:
    """Parameters of a model, quantized by us or not."""
    if quantization_method(checkpoint.config) != QUANT_METHOD:
        return checkpoint.parameters
    return logical_parameters(checkpoint, read_lq_config(checkpoint.config["quantization_config"]))


def check_structure(target: Target, arch: Architecture) -> Iterator[Finding]:
    """``structure.safetensors``: the model it is for, the sizes of every layer, and the indices of the record.

    Raises:
        CompressError: The file is missing or broken.
    """
    structure = StructureMap.load(target.path / FILE_NAME)
    cut = target.stage is not None and target.stage.verb == "prune"
    base: str | None = None
    if target.stage is not None and cut:
        base = target.stage.record["inputs"].get("model")
        if target.source is not None:
            structure.check_matches(checkpoint_architecture(Checkpoint(target.source)))
    elif target.source is not None and (target.source / FILE_NAME).is_file():
        before = StructureMap.load(target.source / FILE_NAME)
        base = before.base_fingerprint
        if structure.layers != before.layers:
            yield target.differs(
                "structure", "it keeps other groups or channels than the model it was made of"
            )
    if (target.path / BASE).is_file():
        record = BaseRecord.load(target.path / BASE)
        base = record.fingerprint if base is None else base
        if record.fingerprint != structure.base_fingerprint:
            yield target.differs("structure", f"{BASE} is of another model than {FILE_NAME}")
    kept, shapes = target.metrics.get("kept", {}), structure.shapes
    values = [
        Value(what="layers in config.json", recorded=arch.layers, found=len(structure.layers)),
        Value(what="head width in config.json", recorded=arch.head_dim, found=structure.head_dim),
        Value(what="base_fingerprint", recorded=base, found=structure.base_fingerprint),
        Value(
            what="kept KV groups",
            recorded=kept.get("kv_groups"),
            found=[layer.kv_groups.tolist() for layer in structure.layers],
        ),
        Value(
            what="query heads in every group",
            recorded=kept.get("queries_per_layer"),
            found=[shape.queries if shape.kv_heads else 0 for shape in shapes],
        ),
        Value(
            what="kept channels",
            recorded=kept.get("channels_kept_per_layer"),
            found=[shape.channels for shape in shapes],
        ),
    ]
    values += [
        Value(
            what=f"KV heads, query heads and channels of layer {index} in config.json",
            recorded=_sizes(arch.at(index)),
            found=(shape.kv_heads, shape.kv_heads * shape.queries, shape.channels),
        )
        for index, shape in enumerate(shapes[: arch.layers])
    ]
    summary = f"{len(shapes)} layers of the sizes in config.json, indices as recorded"
    yield from target.compare("structure", values, summary)


def check_masks(target: Target, checkpoint: Checkpoint, arch: Architecture) -> Iterator[Finding]:
    """``masks.safetensors``: as many weights as recorded, every one of them zero unless the model is quantized.

    Raises:
        CompressError: The file is broken.
    """
    masks = WeightMasks.load(target.path / MASKS)
    turned = {
        arch.module_name(layer, spec): spec.transposed
        for layer in range(arch.layers)
        for spec in arch.linears_at(layer)
    }
    dense = quantization_method(checkpoint.config) is None
    faults = 0
    for module in masks.packed:
        mask, name = masks.mask(module), f"{module}.weight"
        if mask is not None and dense and name in checkpoint:
            weight = checkpoint.read(name)
            faults += int(((weight.T if turned.get(module) else weight)[~mask] != 0).sum())
    if faults:
        yield target.differs("masks", f"{faults} weights that were removed are not zero")
        return
    removed = target.metrics.get("masked_weights")
    values = [Value(what="masked_weights", recorded=removed, found=masks.removed)]
    if removed is None:
        yield target.ok("masks", f"{masks.removed} weights removed, {masks.pattern}")
    else:
        yield from target.compare("masks", values, f"{masks.removed} weights are zero, {masks.pattern}")


def _sizes(arch: Architecture) -> tuple[int, int, int]:
    return arch.kv_heads, arch.heads if arch.kv_heads else 0, arch.channels
