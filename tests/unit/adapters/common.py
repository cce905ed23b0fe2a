"""A full tiny model, a pruned one, and an adapter with random factors on it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from compress.adapters.adapter_file import INITIAL_FILE, WEIGHTS_FILE
from compress.model.architecture import Architecture, LinearSpec
from compress.model.checkpoint import Checkpoint, checkpoint_architecture
from compress.model.load import load_model
from compress.prune.slice import slice_checkpoint
from compress.structure import LayerStructure, StructureMap, structure_map
from tests.tiny import tiny_checkpoint


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """A full checkpoint, its architecture, what pruning kept, and the pruned folder."""

    full: Checkpoint
    arch: Architecture
    structure: StructureMap
    small: Path

    def linears(self) -> list[tuple[str, int, LinearSpec]]:
        return [
            (self.arch.module_name(i, s), i, s) for i in range(self.arch.layers) for s in self.arch.linears
        ]


def make_pair(kind: str, folder: Path, *, seed: int = 0, heads: bool = True, channels: bool = True) -> Pair:
    """Prune random KV groups and channels of a tiny model; another set in every layer."""
    full = Checkpoint(tiny_checkpoint(kind, folder / "full", seed=seed))
    arch = checkpoint_architecture(full)
    generator = torch.Generator().manual_seed(seed)

    def kept(size: int, count: int) -> Tensor:
        return torch.randperm(size, generator=generator)[:count].sort().values.int()

    groups = max(1, arch.kv_heads // 2) if heads and arch.prunable_heads else arch.kv_heads
    width = arch.channels // 3 if channels else arch.channels
    layers = [
        LayerStructure(kv_groups=kept(arch.kv_heads, groups), channels=kept(arch.channels, width))
        for _ in range(arch.layers)
    ]
    structure = structure_map(arch, layers, base_fingerprint=full.fingerprint())
    slice_checkpoint(full, arch, structure, folder / "small")
    return Pair(full=full, arch=arch, structure=structure, small=folder / "small")


def randomise(model: nn.Module, seed: int = 0) -> None:
    """Random values for everything that is trained."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))


def save_random_adapter(
    base: Path, out: Path, *, seed: int = 1, dtype: torch.dtype | None = None, **config: Any
) -> Path:
    """An adapter of random factors on the model in ``base``, saved by PEFT itself."""
    settings: dict[str, Any] = {"r": 4, "lora_alpha": 6, "target_modules": "all-linear"} | config
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = get_peft_model(
            load_model(base, dtype=torch.float32), LoraConfig(task_type="CAUSAL_LM", **settings)
        )
    randomise(model, seed)
    model.save_pretrained(str(out), save_embedding_layers=False)
    if dtype is not None:
        tensors = load_file(out / WEIGHTS_FILE)
        save_file({n: t.to(dtype) for n, t in tensors.items()}, out / WEIGHTS_FILE, metadata={"format": "pt"})
    return out


def add_initial_factors(adapter: Path, *, seed: int = 7, only: str = "") -> dict[str, Tensor]:
    """Pretend that training started from other random factors in the modules whose name contains ``only``."""
    generator = torch.Generator().manual_seed(seed)
    tensors = load_file(adapter / WEIGHTS_FILE)
    initial = {
        name: torch.randn(tensor.shape, generator=generator, dtype=torch.float32).to(tensor.dtype)
        for name, tensor in tensors.items()
        if only in name
    }
    save_file(initial, adapter / INITIAL_FILE)
    return initial
