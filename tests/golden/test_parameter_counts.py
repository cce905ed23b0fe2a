"""LoRAM's published parameter counts (arXiv 2502.13533), by formula and from cut meta tensors."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from compress.model.architecture import Architecture, architecture_of
from compress.prune.counts import (
    kept_linear_parameters,
    published_kept,
    published_parameters,
    published_quantized_reduction,
)
from compress.structure import LayerStructure, full_layer, kept_columns, kept_rows, structure_map

CONFIGS: dict[str, dict[str, int]] = {
    "llama-2-13b": {
        "hidden_size": 5120,
        "num_hidden_layers": 40,
        "num_attention_heads": 40,
        "num_key_value_heads": 40,
        "intermediate_size": 13824,
        "vocab_size": 32000,
    },
    "llama-2-70b": {
        "hidden_size": 8192,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "intermediate_size": 28672,
        "vocab_size": 32000,
    },
}
CONFIGS["llama-3.1-70b"] = {**CONFIGS["llama-2-70b"], "vocab_size": 128256}

ROWS = [
    ("llama-2-13b", 13_015_864_320, 0.65, 14, 4838, 6_005_662_720, 2.17, None),
    ("llama-2-70b", 68_976_648_192, 0.65, 3, 10035, 28_099_436_544, 2.45, 9.82),
    ("llama-2-70b", 68_976_648_192, 0.75, 2, 7168, 21_488_738_304, 3.21, 12.84),
    ("llama-2-70b", 68_976_648_192, 0.85, 2, 4300, 16_272_924_672, 4.24, 16.95),
    ("llama-2-70b", 68_976_648_192, 0.95, 1, 1433, 9_662_226_432, 7.14, 28.56),
    ("llama-3.1-70b", 70_553_706_496, 0.85, 2, 4300, 17_849_982_976, 3.95, 15.81),
]


@cache
def meta_model(name: str) -> Any:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(LlamaConfig(**CONFIGS[name], tie_word_embeddings=False))


def arch_of(name: str) -> Architecture:
    model = meta_model(name)
    return architecture_of(model.config.to_dict(), list(model.state_dict()))


@pytest.mark.parametrize(("name", "full", "ratio", "kv", "ffn", "pruned", "reduction", "quantized"), ROWS)
def test_published_row(
    name: str,
    full: int,
    ratio: float,
    kv: int,
    ffn: int,
    pruned: int,
    reduction: float,
    quantized: float | None,
) -> None:
    arch = arch_of(name)
    assert published_kept(arch, ratio) == (kv, ffn)
    assert published_parameters(arch, ratio) == pruned
    assert round(full / pruned, 2) == reduction
    if quantized is not None:
        assert round(published_quantized_reduction(full, pruned), 2) == quantized


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row[0]}-{row[2]}")
def test_cutting_meta_tensors_gives_the_published_count(row: tuple[Any, ...]) -> None:
    name, full, _, kv, ffn, pruned = row[:6]
    arch, model = arch_of(name), meta_model(name)
    cut = LayerStructure(
        kv_groups=torch.arange(kv, dtype=torch.int32), channels=torch.arange(ffn, dtype=torch.int32)
    )
    whole = full_layer(arch)
    layers = [cut if 4 <= index < arch.layers - 2 else whole for index in range(arch.layers)]
    specs = {arch.tensor_name(i, spec): (i, spec) for i in range(arch.layers) for spec in arch.linears}
    before = after = linears = 0
    for key, parameter in model.named_parameters():
        before += parameter.numel()
        if key not in specs:
            after += parameter.numel()
            continue
        index, spec = specs.pop(key)
        rows, columns = kept_rows(arch, spec, layers[index]), kept_columns(arch, spec, layers[index])
        part = parameter if rows is None else parameter[rows.to("meta")]
        part = part if columns is None else part[:, columns.to("meta")]
        after += part.numel()
        linears += part.numel()
    assert not specs
    assert (before, after) == (full, pruned)
    structure = structure_map(arch, layers, base_fingerprint="")
    assert structure.uniform is None
    assert kept_linear_parameters(arch, structure) == linears


def test_nothing_pruned_is_the_full_count() -> None:
    for name, full in {(row[0], row[1]) for row in ROWS}:
        arch = arch_of(name)
        assert published_parameters(arch, 0.5, skip_first=arch.layers, skip_last=0) == full
        assert published_parameters(arch, 0.0) == full


def test_ratios_are_decimals() -> None:
    arch = arch_of("llama-2-13b")
    assert published_kept(arch, 0.9) == (4, 1382)  # 1 - 0.9 in floats would floor 40 * 0.1 to 3
