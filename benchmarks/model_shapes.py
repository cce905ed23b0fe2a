"""Exact sizes of pruned LLaMA-2 models at the papers' ratios, without weights; exits with 1 on a mismatch.

``python -m compress.benchmarks.model_shapes [--quick] [--out FILE]``

The 13B and 70B rows are LoRAM's (arXiv 2502.13533): the first four and last two layers stay whole, and every published
count must come out exactly. The 7B rows prune all layers alike, at the ratios of LoRAPrune (arXiv 2305.18403).
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

from compress.benchmarks.protocol import Rows
from compress.model.architecture import Architecture, architecture_of
from compress.model.config import build_config, meta_model
from compress.prune.counts import (
    kept_linear_parameters,
    published_kept,
    published_parameters,
)
from compress.prune.loram_size import small_size
from compress.quantize.config import QuantConfig
from compress.structure import LayerStructure, full_layer, structure_map

TAKES = ("seconds", "seconds")
NEEDS = ()

_LLAMA: dict[str, Any] = {"model_type": "llama", "vocab_size": 32000, "tie_word_embeddings": False}
_LLAMA_70B: dict[str, Any] = {
    **_LLAMA,
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "LLaMA-2-7B": {
        **_LLAMA,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
    },
    "LLaMA-2-13B": {
        **_LLAMA,
        "hidden_size": 5120,
        "intermediate_size": 13824,
        "num_hidden_layers": 40,
        "num_attention_heads": 40,
        "num_key_value_heads": 40,
    },
    "LLaMA-2-70B": _LLAMA_70B,
    "LLaMA-3.1-70B": {**_LLAMA_70B, "vocab_size": 128256},
}
"""The sizes of the published models, as their config.json has them."""

NF4 = QuantConfig(bits=4)


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One row of the table.

    Attributes:
        model: A key of `CONFIGS`.
        ratio: Pruning ratio of a pruned layer.
        skip_first: Layers at the start that stay whole.
        skip_last: Layers at the end that stay whole.
        published: The published number of parameters; None where no paper gives one.
    """

    model: str
    ratio: float
    skip_first: int = 0
    skip_last: int = 0
    published: int | None = None


def _loram(model: str, ratio: float, published: int) -> Case:
    return Case(model=model, ratio=ratio, skip_first=4, skip_last=2, published=published)


CASES = (
    Case(model="LLaMA-2-7B", ratio=0.2),
    Case(model="LLaMA-2-7B", ratio=0.5),
    _loram("LLaMA-2-13B", 0.65, 6_005_662_720),
    _loram("LLaMA-2-70B", 0.65, 28_099_436_544),
    _loram("LLaMA-2-70B", 0.75, 21_488_738_304),
    _loram("LLaMA-2-70B", 0.85, 16_272_924_672),
    _loram("LLaMA-2-70B", 0.95, 9_662_226_432),
    _loram("LLaMA-3.1-70B", 0.85, 17_849_982_976),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """What a pruned model has.

    Attributes:
        model: Name of the model.
        ratio: Requested ratio of a pruned layer.
        kv_heads: Key/value heads that a pruned layer keeps.
        heads: Query heads it keeps.
        channels: MLP channels it keeps.
        whole_layers: Layers that are not pruned.
        linear_parameters: Decoder linear weights that are kept, counted from the indices of a structure.
        linear_ratio: Fraction of the decoder linear weights that is removed.
        parameters: All parameters, by the formula behind LoRAM's tables.
        parameters_before: Those of the full model.
        reduction: Before / after.
        published: The published number; None where there is none.
        agrees: Whether formula, structure and (where there is one) published number are the same.
        quantized_reduction: The paper's convention: every parameter at 4 instead of 16 bits.
        stored_reduction: The linears at NF4's stored bits, all else in 16 bits.
        bf16_bytes: Bytes of the weights in bfloat16.
    """

    model: str
    ratio: float
    kv_heads: int
    heads: int
    channels: int
    whole_layers: int
    linear_parameters: int
    linear_ratio: float
    parameters: int
    parameters_before: int
    reduction: float
    published: int | None
    agrees: bool
    quantized_reduction: float
    stored_reduction: float
    bf16_bytes: int


@cache
def architecture(model: str) -> Architecture:
    """The architecture of a model of `CONFIGS`, from its shapes alone."""
    config = build_config(CONFIGS[model])
    return architecture_of(config.to_dict(), list(meta_model(config).state_dict()))


def row_of(case: Case) -> Row:
    """Count one case three times: by the published formula, by `small_size`, from the kept indices of every layer."""
    arch = architecture(case.model)
    skips = {"skip_first": case.skip_first, "skip_last": case.skip_last}
    before = published_parameters(arch, 0.0, **skips)
    size = small_size(arch, before, case.ratio, **skips)
    kv_heads, channels = published_kept(arch, case.ratio)
    cut = LayerStructure(
        kv_groups=torch.arange(kv_heads, dtype=torch.int32),
        channels=torch.arange(channels, dtype=torch.int32),
    )
    pruned = range(case.skip_first, arch.layers - case.skip_last)
    layers = [cut if layer in pruned else full_layer(arch) for layer in range(arch.layers)]
    linears = kept_linear_parameters(arch, structure_map(arch, layers, base_fingerprint=""))
    after = published_parameters(arch, case.ratio, **skips)
    return Row(
        model=case.model,
        ratio=case.ratio,
        kv_heads=kv_heads,
        heads=kv_heads * arch.queries_per_group,
        channels=channels,
        whole_layers=arch.layers - len(pruned),
        linear_parameters=linears,
        linear_ratio=1 - linears / arch.decoder_linear_parameters(),
        parameters=after,
        parameters_before=before,
        reduction=size.reduction,
        published=case.published,
        agrees=(after, linears) == (size.parameters, size.linears) and case.published in (None, after),
        quantized_reduction=size.paper_reduction,
        stored_reduction=size.stored_reduction(NF4.nominal_bits),
        bf16_bytes=2 * after,
    )


def table(rows: list[Row]) -> str:
    """The rows as aligned text."""
    head = (
        "model",
        "ratio",
        "kv/q heads",
        "channels",
        "whole layers",
        "linears removed",
        "parameters",
        "smaller",
        "Q (paper)",
        "Q (stored)",
        "published",
    )
    lines = [
        (
            row.model,
            f"{row.ratio:.2f}",
            f"{row.kv_heads}/{row.heads}",
            str(row.channels),
            str(row.whole_layers),
            f"{row.linear_ratio:.4f}",
            f"{row.parameters:,}",
            f"{row.reduction:.2f}x",
            f"{row.quantized_reduction:.2f}x",
            f"{row.stored_reduction:.2f}x",
            ("" if row.published is None else "same" if row.agrees else f"{row.published:,}"),
        )
        for row in rows
    ]
    widths = [max(map(len, column)) for column in zip(head, *lines, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in (head, *lines)
    )


def main() -> int:
    """Command line; the table is printed last."""
    parser = argparse.ArgumentParser(
        prog="python -m compress.benchmarks.model_shapes", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--quick", action="store_true", help="the 7B rows only")
    parser.add_argument("--out", type=Path, help="write the rows as JSON to this file")
    arguments = parser.parse_args()
    cases = [case for case in CASES if not arguments.quick or case.model == "LLaMA-2-7B"]
    rows = [row_of(case) for case in cases]
    if arguments.out is not None:
        record = Rows(arguments.out, {"benchmark": "model_shapes", "quick": arguments.quick})
        for row in rows:
            record.put(f"{row.model} {row.ratio:.2f}", asdict(row))
    print(table(rows))
    return 0 if all(row.agrees for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
