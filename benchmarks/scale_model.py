"""Checkpoints of a published shape with random weights, and adapters for them, made tensor by tensor."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from transformers import PreTrainedTokenizerFast

from compress.adapters.adapter_file import write_adapter
from compress.adapters.initial_factors import PREFIX
from compress.model.checkpoint import Checkpoint, CheckpointWriter, checkpoint_architecture
from compress.model.config import build_config
from compress.model.planned import headers_of
from compress.model.tensor_file import DTYPES

SPREAD = 0.02
"""Standard deviation of the weights; norms are ones."""
SHARD_BYTES = 1 << 30


def write_random_model(folder: Path, config: Mapping[str, Any], *, seed: int = 0) -> Path:
    """A bf16 checkpoint in shards with a byte tokenizer; one tensor is in memory at a time. The same under one seed.

    Args:
        folder: Written unless it holds a whole checkpoint.
        config: The content of config.json.
        seed: Of the weights.
    """
    if (folder / "config.json").is_file() and any(folder.glob("*.safetensors")):
        return folder
    shape_only = folder.parent / f"{folder.name}-config"
    shape_only.mkdir(parents=True, exist_ok=True)
    build_config(config).save_pretrained(shape_only)
    planned, _ = headers_of(str(shape_only))
    with CheckpointWriter(
        folder, config={**planned.config, "dtype": "bfloat16"}, max_shard_bytes=SHARD_BYTES
    ) as writer:
        for number, name in enumerate(planned.names):
            shape = planned.shape(name)
            if len(shape) == 1:
                tensor = torch.ones(shape, dtype=DTYPES["BF16"])
            else:
                generator = torch.Generator().manual_seed(seed * 1_000_003 + number)
                tensor = torch.empty(shape, dtype=DTYPES["BF16"]).normal_(0.0, SPREAD, generator=generator)
            writer.add(name, tensor)
    write_byte_tokenizer(folder)
    return folder


def write_byte_tokenizer(folder: Path) -> None:
    """A tokenizer of single bytes, as the file format has it."""
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2}
    vocab |= {f"<0x{byte:02X}>": 3 + byte for byte in range(256)}
    content = {
        "version": "1.0",
        "added_tokens": [],
        "model": {
            "type": "BPE",
            "vocab": vocab,
            "merges": [],
            "unk_token": "<unk>",
            "byte_fallback": True,
        },
        "decoder": {"type": "ByteFallback"},
    }
    file = folder / "tokenizer.json"
    file.write_text(json.dumps(content), encoding="utf-8")
    PreTrainedTokenizerFast(
        tokenizer_file=str(file), unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    ).save_pretrained(folder)


def write_random_adapter(folder: Path, small: Path, *, rank: int = 8, seed: int = 0) -> Path:
    """A LoRA with random factors on every decoder linear of the model in ``small``, as PEFT would save it."""
    arch = checkpoint_architecture(Checkpoint(small))
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for layer in range(arch.layers):
        for spec in arch.linears_at(layer):
            out, into = arch.at(layer).linear_shape(spec)
            name = f"{PREFIX}{arch.module_name(layer, spec)}"
            tensors[f"{name}.lora_A.weight"] = torch.randn(rank, into, generator=generator) * SPREAD
            tensors[f"{name}.lora_B.weight"] = torch.randn(out, rank, generator=generator) * SPREAD
    config = LoraConfig(
        r=rank,
        lora_alpha=2 * rank,
        target_modules=sorted({spec.name.rpartition(".")[2] for spec in arch.linears}),
        base_model_name_or_path=small.name,
        task_type="CAUSAL_LM",
    )
    return write_adapter(folder, config.to_dict(), tensors)
