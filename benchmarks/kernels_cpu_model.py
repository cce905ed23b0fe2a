"""A whole model for the benchmark of the CPU kernels: tokens per second of prefill and decoding, and bytes held.

SmolLM2-135M with every decoder linear in 3-bit NormalFloat without factors, the same in bitsandbytes' NF4, and dense,
all in bfloat16. The embedding, the output matrix and the norms are dense everywhere. Models take turns; each turn
reads a prompt of 512 tokens and decodes greedily after it. Bytes are those of all parameters and buffers after use.

Resident memory is measured in processes of their own: by how much it has grown from before a model was loaded to after
it has read a prompt and decoded; nothing of a checkpoint stays mapped.
"""

from __future__ import annotations

import ctypes
import gc
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Collection
from importlib import import_module
from typing import Any

import torch
from torch import nn

from compress.benchmarks.kernels_cpu_cases import add_peers
from compress.benchmarks.process_memory import memory_of
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


MODELS: dict[str, Callable[[nn.Linear], nn.Module] | None] = {
    "dense": None,
    "nf3": _nf3,
    "bitsandbytes nf4": _bitsandbytes,
}
"""What becomes of a decoder's linears, by the name of a model."""


def made(name: str) -> Any:
    """One of :data:`MODELS`, with every tensor in memory of its own."""
    model = load_model(resolve(None), dtype=DTYPE)
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    make = MODELS[name]
    return model if make is None else replaced(model, make)


def here(peers: Collection[str]) -> list[str]:
    """The models that can be made."""
    return [name for name in MODELS if name.split()[0] in ("dense", "nf3", *peers)]


def model_case(peers: Collection[str], *, quick: bool) -> dict[str, Any]:
    """Prefill and decoding in turns: tokens per second (median of the turns), and bytes of each model."""
    models = {name: made(name) for name in here(peers)}
    return speeds(
        models, prompt=32 if quick else PROMPT, new=4 if quick else NEW, turns=1 if quick else TURNS
    )


def memory_case(peers: Collection[str]) -> dict[str, int]:
    """By how many bytes a process that has nothing else to do grows with each model, by its name."""
    found = {}
    for name in here(peers):
        command = [sys.executable, "-P", "-c", f"from {__name__} import print_grown; print_grown({name!r})"]
        found[name] = int(
            subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1]
        )
    return found


def print_grown(name: str) -> None:
    """What a process of :func:`memory_case` does: how many bytes it grows by with one of :data:`MODELS`."""
    add_peers()
    print(grown_by(lambda: made(name)))


def grown_by(make: Callable[[], Any], *, prompt: int = PROMPT, new: int = NEW) -> int:
    """Resident bytes of this process after a model was made, read and wrote, over those before."""
    before = _resident()
    model = make()
    throughput(model, torch.zeros(1, prompt, dtype=torch.int64), decode_tokens=new, repeats=1)
    return _resident() - before


def _resident() -> int:
    gc.collect()
    if sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)  # what was freed is nobody's
    return memory_of(os.getpid())[0]


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
