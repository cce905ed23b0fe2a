"""``compress plan --loram``: sizes and training memory of a model and of the small models LoRAM trains on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from compress.errors import UsageError
from compress.evaluate.training_memory import TrainingMemory, training_memory
from compress.model.architecture import Architecture
from compress.pipelines.phase import AGAIN
from compress.pipelines.reporter import Reporter, human_bytes
from compress.pipelines.settings import PlanSettings
from compress.prune.loram_size import SmallSize, small_size
from compress.quantize.config import QuantConfig

NF4 = QuantConfig(bits=4)
"""The base of QLoRAM: 4.127 bits a weight with both levels of scales."""


MICRO_BATCH, SEQUENCE, RANK = 2, 512, 8
"""What the memory of training is counted for where nothing is asked: LoRAM's own settings."""


def loram_rows(
    arch: Architecture, parameters: int, settings: PlanSettings, *, room: int | None, itemsize: int
) -> list[dict[str, Any]]:
    """The full model and, with ``--loram``, a small one for each ratio, as JSON values.

    Args:
        arch: Of the full model.
        parameters: Its parameters.
        settings: What is asked.
        room: Bytes that training may take, on the device or else the host; None: not known.
        itemsize: Bytes of a number in the computation, in which what is not quantized is held too.

    Raises:
        UsageError: A ratio that cannot be.
    """
    ratios = parse_ratios(settings.ratios) if settings.loram else []
    skips = {"skip_first": settings.skip_first, "skip_last": settings.skip_last}
    sizes = [small_size(arch, parameters, ratio, **skips) for ratio in (0.0, *ratios)]
    return [row_of(size, settings, room=room, itemsize=itemsize) for size in sizes]


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


def dense_label(itemsize: int) -> str:
    """What a base is called that is not quantized."""
    return f"{8 * itemsize}bit"


def row_of(size: SmallSize, settings: PlanSettings, *, room: int | None, itemsize: int) -> dict[str, Any]:
    """Sizes and training memory of one model, as JSON values."""
    nf4, dense = NF4.nominal_bits, 8.0 * itemsize
    memory: dict[str, TrainingMemory] = {
        label: training_memory(
            size.arch,
            size.weight_bytes(bits, others=dense),
            quantized=bits != dense,
            rank=settings.train_rank or RANK,
            batch=settings.micro_batch or MICRO_BATCH,
            sequence=settings.sequence or SEQUENCE,
            itemsize=itemsize,
            recompute=settings.recompute,
        )
        for label, bits in ((dense_label(itemsize), dense), ("nf4", nf4))
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
        "fits": None if room is None else {label: part.total <= room for label, part in memory.items()},
    }


def show_loram(reporter: Reporter, settings: PlanSettings, rows: list[dict[str, Any]]) -> None:
    """Print sizes and training memory."""
    reporter.table(
        "small models of LoRAM",
        ("pruned", "parameters", "smaller", "Q, paper", "Q, stored", "Q bits/param"),
        [
            (
                _label(row),
                f"{row['parameters']:,}",
                f"{row['reduction']:.2f}x",
                f"{row['paper_reduction']:.2f}x",
                f"{row['stored_reduction']:.2f}x",
                f"{row['stored_bits_per_parameter']:.3f}",
            )
            for row in rows
        ],
    )
    tokens = f"{settings.micro_batch or MICRO_BATCH} x {settings.sequence or SEQUENCE} tokens"
    reporter.table(
        f"training memory, rank {settings.train_rank or RANK}, {tokens}{AGAIN if settings.recompute else ''}",
        ("base", "weights", "adapters", "activations", "workspace", "total", "fits"),
        [
            _memory_row(f"{_label(row)}, {label}", row["training"][label], row["fits"], label)
            for row in rows
            for label in row["training"]
        ],
    )
    reporter.out.print(
        "Q, paper: every parameter at 4 bits, nothing else counted. Q, stored: decoder matrices at "
        f"{NF4.nominal_bits:.3f} bits with their scales, all else in 16 bits. Adapters: with gradients and moments.",
        markup=False,
    )


def _memory_row(
    label: str, memory: Mapping[str, float], fits: Mapping[str, bool] | None, kind: str
) -> tuple[str, ...]:
    adapters = memory["adapters"] + memory["gradients"] + memory["optimizer"]
    parts = (memory["weights"], adapters, memory["activations"], memory["workspace"], memory["total"])
    verdict = "?" if fits is None else "yes" if fits[kind] else "no"
    return (label, *map(human_bytes, parts), verdict)


def _label(row: Mapping[str, Any]) -> str:
    return f"{row['ratio']:.2f}" if row["ratio"] else "full"
