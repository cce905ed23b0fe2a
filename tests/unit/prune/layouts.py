"""Random head layouts and scores for the tests of shapes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from hypothesis import strategies as st

from compress.importance.base import GroupScores, LayerScores
from compress.model.architecture import Architecture
from compress.prune.counts import kept_linear_parameters
from compress.prune.select import select
from compress.structure import LayerShape, structure_map
from tests.unit.prune.common import FUSED, SPECS, architecture


def smol(**changes: Any) -> Architecture:
    """The sizes of SmolLM2-135M."""
    sizes: dict[str, Any] = {
        "hidden": 576,
        "layers": 30,
        "heads": 9,
        "kv_heads": 3,
        "head_dim": 64,
        "channels": 1536,
        "vocab": 49152,
        "tied": True,
    }
    return architecture(**{**sizes, **changes})


@st.composite
def layouts(draw: st.DrawFn, *, most_layers: int = 4) -> Architecture:
    kv_heads, queries = draw(st.integers(1, 5)), draw(st.integers(1, 4))
    return architecture(
        hidden=draw(st.sampled_from([6, 16])),
        layers=draw(st.integers(1, most_layers)),
        heads=kv_heads * queries,
        kv_heads=kv_heads,
        head_dim=draw(st.sampled_from([2, 4, 8])),
        channels=draw(st.integers(1, 80)),
        linears=draw(st.sampled_from([SPECS, FUSED])),
    )


TARGET_SETS = st.sampled_from([("heads", "mlp"), ("heads",), ("mlp",)])
MULTIPLES = st.sampled_from([1, 4, 7, 16])
UNITS = st.sampled_from(["group", "query", "auto"])


def pairs_of(arch: Architecture, targets: Sequence[str], unit: str) -> Iterator[tuple[int, int]]:
    """Every (KV groups, query heads in each) that may be kept, told apart from the code under test."""
    for kv_heads in range(1, arch.kv_heads + 1):
        for queries in range(1, arch.queries_per_group + 1):
            loses_groups, loses_queries = kv_heads < arch.kv_heads, queries < arch.queries_per_group
            if (loses_groups or loses_queries) and "heads" not in targets:
                continue
            if (loses_groups and unit == "query") or (loses_queries and unit == "group"):
                continue
            yield kv_heads, queries


def widths_of(arch: Architecture, targets: Sequence[str], multiple: int) -> list[int]:
    return [
        c
        for c in range(1, arch.channels + 1)
        if c == arch.channels or ("mlp" in targets and c % multiple == 0)
    ]


def random_scores(arch: Architecture, seed: int = 0) -> GroupScores:
    generator = torch.Generator().manual_seed(seed)

    def draw(size: int) -> torch.Tensor:
        return torch.rand(size, generator=generator, dtype=torch.float64)

    return GroupScores(
        layers=tuple(
            LayerScores(
                kv_groups=draw(arch.kv_heads) * draw(1) * 3,
                channels=draw(arch.channels) * draw(1) * 3,
                query_heads=draw(arch.heads),
            )
            for _ in range(arch.layers)
        )
    )


def removed(arch: Architecture, shapes: Sequence[LayerShape], seed: int = 0) -> float:
    """The removed fraction, recounted from the rows and columns a selection of these shapes keeps."""
    layers = select(arch, random_scores(arch, seed), shapes)
    structure = structure_map(arch, layers, base_fingerprint="")
    assert structure.shapes == tuple(shapes)
    return 1 - kept_linear_parameters(arch, structure) / arch.decoder_linear_parameters()
