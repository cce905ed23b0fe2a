"""What a pruning reports of a model: sizes, and what was kept."""

from __future__ import annotations

from typing import Any

from compress.model.checkpoint import Checkpoint
from compress.pipelines.model_input import ModelInput
from compress.structure import StructureMap


def structure_metrics(model: ModelInput, structure: StructureMap) -> dict[str, Any]:
    """What was kept of ``model``, as JSON values."""
    arch, shape = model.architecture, structure.uniform
    return {
        "shape": None
        if shape is None
        else {"kv_heads": shape.kv_heads, "queries": shape.queries, "channels": shape.channels},
        "original": {
            "kv_heads": arch.kv_heads,
            "queries": arch.queries_per_group,
            "channels": arch.channels,
            "layers": arch.layers,
        },
        "kept": {
            "kv_groups": [layer.kv_groups.tolist() for layer in structure.layers],
            "queries_per_layer": [s.queries if s.kv_heads else 0 for s in structure.shapes],
            "channels_kept_per_layer": [len(layer.channels) for layer in structure.layers],
        },
    }


def size_metrics(checkpoint: Checkpoint) -> dict[str, int]:
    """Parameters and bytes of the stored tensors."""
    return {"parameters": checkpoint.parameters, "bytes": checkpoint.bytes}
