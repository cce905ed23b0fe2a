"""``compress plan``: sizes and training memory of a model and of what LoRAM makes of it, from its config alone."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch

from compress.errors import UsageError
from compress.evaluate.training_memory import TrainingMemory, training_memory
from compress.model.architecture import architecture_of
from compress.model.config import build_config, meta_shapes
from compress.model.load import EMBEDDED, resolve_config
from compress.pipelines.reporter import Reporter, human_bytes
from compress.pipelines.settings import PlanSettings
from compress.prune.loram_size import SmallSize, small_size
from compress.quantize.config import QuantConfig
from compress.solvers.budget import parse_budget

NF4 = QuantConfig(bits=4)
"""The base of QLoRAM: 4.127 bits a weight with both levels of scales."""


def plan(reporter: Reporter, settings: PlanSettings) -> dict[str, Any]:
    """Print and return the sizes; see ``compress plan --help``. No weight is read.

    Raises:
        UsageError: A ratio, a number or a memory size that cannot be.
        CompressError: There is no such model, or it is no dense decoder that is understood.
    """
    name = settings.model or EMBEDDED
    config = resolve_config(settings.model)
    arch = architecture_of(config)
    parameters = sum(math.prod(shape) for shape in meta_shapes(build_config(config)).values())
    device = _device_bytes(settings)
    ratios = parse_ratios(settings.ratios) if settings.loram else []
    skips = {"skip_first": settings.skip_first, "skip_last": settings.skip_last}
    sizes = [small_size(arch, parameters, ratio, **skips) for ratio in (0.0, *ratios)]
    rows = [row_of(size, settings, device) for size in sizes]
    show(reporter, name, settings, rows, device)
    return {"model": name, "parameters": parameters, "device_bytes": device, "rows": rows}


def parse_ratios(text: str) -> list[float]:
    """``"0.65,0.85"`` as numbers.

    Raises:
        UsageError: One of them is no number.
    """
    try:
        return [float(part) for part in text.split(",")]
    except ValueError as error:
        raise UsageError(
            f"--ratios {text!r} is not understood.", "Give fractions such as 0.65,0.85."
        ) from error


def row_of(size: SmallSize, settings: PlanSettings, device: int | None) -> dict[str, Any]:
    """Sizes and training memory of one model, as JSON values."""
    nf4 = NF4.nominal_bits
    memory: dict[str, TrainingMemory] = {
        label: training_memory(
            size.arch,
            size.weight_bytes(bits),
            quantized=bits != 16,
            rank=settings.rank,
            batch=settings.micro_batch,
            sequence=settings.sequence,
        )
        for label, bits in (("16bit", 16.0), ("nf4", nf4))
    }
    return {
        "ratio": size.ratio,
        "whole_layers": size.whole_layers,
        "parameters": size.parameters,
        "reduction": size.reduction,
        "paper_reduction": size.paper_reduction,
        "stored_bits_per_parameter": size.stored_bits(nf4),
        "stored_reduction": size.stored_reduction(nf4),
        "bytes": {"16bit": size.weight_bytes(16.0), "nf4": size.weight_bytes(nf4)},
        "training": {label: {**asdict(part), "total": part.total} for label, part in memory.items()},
        "fits": None if device is None else {label: part.total <= device for label, part in memory.items()},
    }


def show(
    reporter: Reporter,
    name: str,
    settings: PlanSettings,
    rows: list[dict[str, Any]],
    device: int | None,
) -> None:
    """Print both tables."""
    reporter.table(
        f"sizes of {name}",
        ("pruned", "parameters", "smaller", "Q, paper", "Q, stored", "Q bits/param", "16 bit", "NF4"),
        [
            (
                _label(row),
                f"{row['parameters']:,}",
                f"{row['reduction']:.2f}x",
                f"{row['paper_reduction']:.2f}x",
                f"{row['stored_reduction']:.2f}x",
                f"{row['stored_bits_per_parameter']:.3f}",
                human_bytes(row["bytes"]["16bit"]),
                human_bytes(row["bytes"]["nf4"]),
            )
            for row in rows
        ],
    )
    reporter.table(
        f"training memory, rank {settings.rank}, {settings.micro_batch} x {settings.sequence} tokens",
        (
            "base",
            "weights",
            "adapters",
            "gradients",
            "optimizer",
            "activations",
            "workspace",
            "total",
            "fits",
        ),
        [
            _memory_row(f"{_label(row)}, {label}", row["training"][label], row["fits"], label)
            for row in rows
            for label in ("16bit", "nf4")
        ],
    )
    reporter.out.print(
        "Q, paper: every parameter at 4 bits, nothing else counted. Q, stored: decoder matrices at "
        f"{NF4.nominal_bits:.3f} bits with their scales, all else in 16 bits.",
        markup=False,
    )
    known = "is not known: give --memory" if device is None else f"is {human_bytes(device)}"
    reporter.out.print(f"Memory is counted, not measured; the device's {known}.", markup=False)


def _memory_row(
    label: str, memory: Mapping[str, float], fits: Mapping[str, bool] | None, kind: str
) -> tuple[str, ...]:
    parts = ("weights", "adapters", "gradients", "optimizer", "activations", "workspace", "total")
    verdict = "?" if fits is None else "yes" if fits[kind] else "no"
    return (label, *(human_bytes(memory[part]) for part in parts), verdict)


def _label(row: Mapping[str, Any]) -> str:
    return f"{row['ratio']:.2f}" if row["ratio"] else "full"


def _device_bytes(settings: PlanSettings) -> int | None:
    """Memory of the device that was named, or of the first CUDA device; None where neither is known."""
    if settings.memory is not None:
        budget = parse_budget(settings.memory)
        if budget.kind != "bytes":
            raise UsageError(f"--memory {settings.memory} is no memory size.", "Give bytes, such as 24GiB.")
        return int(budget.value)
    return torch.cuda.get_device_properties(0).total_memory if torch.cuda.is_available() else None
