"""Random structures whose layers differ: sizes, query heads and branches that are gone."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from compress.model.architecture import Architecture, LayerShape
from compress.model.checkpoint import Checkpoint, checkpoint_architecture
from compress.prune.slice import slice_checkpoint
from compress.structure import LayerStructure, StructureMap, structure_map
from tests.tiny import tiny_checkpoint

IDS = torch.randint(4, 128, (2, 24), generator=torch.Generator().manual_seed(11))


def draw(size: int, count: int, generator: torch.Generator) -> Tensor:
    return torch.randperm(size, generator=generator)[:count].sort().values.int()


def layer_of(arch: Architecture, shape: LayerShape, generator: torch.Generator) -> LayerStructure:
    """Random groups, query heads in each of them, and channels; every group has other heads."""
    groups = draw(arch.kv_heads, shape.kv_heads, generator)
    per_group = arch.queries_per_group
    heads = [group * per_group + draw(per_group, shape.queries, generator) for group in groups.tolist()]
    return LayerStructure(
        kv_groups=groups,
        channels=draw(arch.channels, shape.channels, generator),
        query_heads=torch.cat(heads).int() if heads else groups.clone(),
    )


def structure_of(arch: Architecture, shapes: list[LayerShape], seed: int = 0) -> StructureMap:
    generator = torch.Generator().manual_seed(seed)
    layers = [layer_of(arch, shape, generator) for shape in shapes]
    return structure_map(arch, layers, base_fingerprint="")


def lopsided(arch: Architecture) -> list[LayerShape]:
    """No attention in the first layer, no MLP in the last, other sizes in each."""
    heads = arch.kv_heads if not arch.prunable_heads else max(1, arch.kv_heads // 2)
    queries = arch.queries_per_group if not arch.prunable_heads else max(1, arch.queries_per_group // 2)
    shapes = [
        LayerShape(kv_heads=heads, queries=queries, channels=arch.channels // 2 - 8 * layer)
        for layer in range(arch.layers)
    ]
    first = 0 if arch.prunable_heads else heads
    shapes[0] = LayerShape(kv_heads=first, queries=arch.queries_per_group, channels=arch.channels // 3)
    shapes[-1] = LayerShape(kv_heads=heads, queries=queries, channels=0)
    return shapes


@dataclass(frozen=True, slots=True, kw_only=True)
class Uneven:
    """A full tiny model and the uneven one cut from it."""

    full: Checkpoint
    arch: Architecture
    structure: StructureMap
    small: Checkpoint
    small_arch: Architecture


def make_uneven(kind: str, folder: Path, seed: int = 0) -> Uneven:
    full = Checkpoint(tiny_checkpoint(kind, folder / "full", seed=seed))
    arch = checkpoint_architecture(full)
    structure = structure_of(arch, lopsided(arch), seed)
    slice_checkpoint(full, arch, structure, folder / "small")
    small = Checkpoint(folder / "small")
    return Uneven(
        full=full,
        arch=arch,
        structure=structure,
        small=small,
        small_arch=checkpoint_architecture(small),
    )


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())
