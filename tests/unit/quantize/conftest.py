"""A tiny LQ checkpoint, written without the pipeline, and its dense twin."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from compress.quantize.checkpoint import lq_config, lq_tensors, record_of
from compress.quantize.config import FACTOR_8BIT, QuantConfig
from compress.quantize.decompose import decompose
from tests.tiny import tiny_checkpoint

LINEARS = ("_proj", "c_attn", "c_fc", "c_proj")


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """An LQ checkpoint and a dense checkpoint with the same weights."""

    quantized: Path
    dense: Path
    tensors: dict[str, torch.Tensor]


@contextmanager
def quiet() -> Iterator[None]:
    """No progress bars or load reports in the test's output."""
    transformers.logging.disable_progress_bar()
    yield
    transformers.logging.enable_progress_bar()


def write_pair(kind: str, folder: Path) -> Pair:
    """Quantize every second to all kinds of widths and ranks; the first linear of all stays dense."""
    with quiet():
        dense = tiny_checkpoint(kind, folder / "dense")
    quantized = Path(shutil.copytree(dense, folder / "quantized"))
    stored, plain, records = {}, {}, {}
    count = 0
    for name, tensor in load_file(dense / "model.safetensors").items():
        stored[name] = plain[name] = tensor
        if tensor.dim() != 2 or not name.endswith(".weight") or not any(part in name for part in LINEARS):
            continue
        count += 1
        if count == 1:
            continue
        result = decompose(
            tensor.T if kind == "gpt2" else tensor,
            QuantConfig(bits=(2, 3, 4, 8)[count % 4], scale_dtype="float16", block_size=16),
            rank=(0, 3, 5)[count % 3],
            factor_config=(FACTOR_8BIT, None)[count % 2],
            iterations=2,
        )
        module = name.removesuffix(".weight")
        records[module] = record_of(result)
        del stored[name]
        stored |= lq_tensors(module, result)
        full = result.dequantize()
        plain[name] = full.T.contiguous() if kind == "gpt2" else full
    save_file(stored, quantized / "model.safetensors", metadata={"format": "pt"})
    save_file(plain, dense / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((quantized / "config.json").read_text())
    config["quantization_config"] = lq_config(records)
    (quantized / "config.json").write_text(json.dumps(config))
    return Pair(quantized=quantized, dense=dense, tensors=stored)


@pytest.fixture(scope="session")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """A Qwen2: grouped queries and biases."""
    return write_pair("qwen2", tmp_path_factory.mktemp("qwen2"))


def load(path: Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """Open a checkpoint as any user would."""
    with quiet():
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(path, dtype=dtype)
    return model
