"""A whole model for the benchmark of the CPU kernels: tokens per second of prefill and decoding, and bytes held.

SmolLM2-135M with every decoder linear in 3-bit NormalFloat without factors, the same in bitsandbytes' NF4, and dense,
all in bfloat16. The embedding, the output matrix and the norms are dense everywhere. Models take turns; each turn
reads a prompt of 512 tokens and decodes greedily after it. Bytes are those of all parameters and buffers after use,
not the resident memory of the process, which all models share here.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Collection
from importlib import import_module
from typing import Any

import torch
from torch import nn

from compress.evaluate.latency import throughput
from compress.evaluate.memory import resident_bytes
from compress.model.load import load_model, resolve
from compress.quantize.config import QuantConfig
from compress.quantize.decompose import decompose
from compress.quantize.linear import LQLinear

PROMPT = 512
NEW = 32
TURNS = 5
GROUP = 64
DTYPE = torch.bfloat16


def _nf3(linear: nn.Linear) -> nn.Module:
    config = QuantConfig(bits=3, block_size=GROUP)
    return LQLinear.from_decomposition(decompose(linear.weight.detach(), config, rank=0), linear.bias)


def _bitsandbytes(linear: nn.Linear) -> nn.Module:
    modules = import_module("bitsandbytes").nn
    sizes = (linear.in_features, linear.out_features)
    made = modules.Linear4bit(*sizes, bias=False, quant_type="nf4", compute_dtype=DTYPE)
    made.weight = modules.Params4bit(
        linear.weight.detach(), quant_type="nf4", blocksize=GROUP, compress_statistics=True, module=made
    )
    layer: nn.Module = made.to("cpu").eval()
    return layer


def replaced(model: nn.Module, make: Callable[[nn.Linear], nn.Module]) -> nn.Module:
    """The model with every linear of its decoder layers made anew; the output matrix stays."""
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and ".layers." in name:
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, make(module))
    return model


def model_case(peers: Collection[str], *, quick: bool) -> dict[str, Any]:
    """Prefill and decoding in turns: tokens per second (median of the turns), and bytes of each model."""
    path = resolve(None)
    made: dict[str, Any] = {"dense": load_model(path, dtype=DTYPE)}
    made["nf3"] = replaced(load_model(path, dtype=DTYPE), _nf3)
    if "bitsandbytes" in peers:
        made["bitsandbytes nf4"] = replaced(load_model(path, dtype=DTYPE), _bitsandbytes)
    return speeds(made, prompt=32 if quick else PROMPT, new=4 if quick else NEW, turns=1 if quick else TURNS)


def speeds(models: dict[str, Any], *, prompt: int, new: int, turns: int) -> dict[str, Any]:
    """What :func:`model_case` measures, of any models with one vocabulary."""
    vocabulary = min(model.config.vocab_size for model in models.values())
    ids = torch.randint(vocabulary, (1, prompt), generator=torch.Generator().manual_seed(0))
    read: dict[str, list[float]] = {name: [] for name in models}
    written: dict[str, list[float]] = {name: [] for name in models}
    for _ in range(turns):
        for name, model in models.items():
            found = throughput(model, ids, decode_tokens=new, repeats=1)
            read[name].append(found.prefill_tokens_per_second)
            written[name].append(found.decode_tokens_per_second)
    return {
        "prompt_tokens": prompt,
        "decode_tokens": new,
        "turns": turns,
        "prefill_tokens_per_second": {name: statistics.median(found) for name, found in read.items()},
        "decode_tokens_per_second": {name: statistics.median(found) for name, found in written.items()},
        "bytes": {name: resident_bytes(model) for name, model in models.items()},
    }
