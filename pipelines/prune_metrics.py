"""What a pruning reports of a model: sizes, and what was kept."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from compress.model.checkpoint import Checkpoint
from compress.pipelines.model_input import ModelInput
from compress.pipelines.reporter import human_bytes, human_count
from compress.pipelines.stage import Context
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


def show(context: Context, metrics: Mapping[str, Any]) -> None:
    """Print the before and after table."""
    before, after = metrics["before"], metrics["after"]
    if "requested_size" in metrics:
        context.reporter.say(f"prune: {metrics['reason']}")
    context.reporter.table(
        "prune",
        ("", "before", "after"),
        [
            ("parameters", human_count(before["parameters"]), human_count(after["parameters"])),
            ("weight bytes", human_bytes(before["bytes"]), human_bytes(after["bytes"])),
            (
                "perplexity (validation)",
                f"{before['perplexity']:.2f}",
                f"{after['perplexity']:.2f}",
            ),
            (
                "decoder linear parameters removed",
                f"asked {metrics['requested_ratio']:.1%}",
                f"{metrics['achieved_ratio']:.1%}",
            ),
        ],
    )
    if metrics["shape"] is None:
        context.reporter.say(
            "prune: layers differ in size, so this model opens with compress.load_model; other runtimes refuse it."
        )
    context.reporter.out.print(f"perplexity: {after['protocol_line']}", markup=False)
