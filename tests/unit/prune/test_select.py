"""Which units stay: the best, nested, ties to the lower index."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from compress.importance.base import GroupScores, LayerScores
from compress.model.architecture import Architecture
from compress.prune.select import select
from compress.structure import LayerShape, full_shape, kept_heads, structure_map
from tests.unit.prune.common import architecture
from tests.unit.prune.layouts import layouts, random_scores


def coarse_scores(arch: Architecture, seed: int) -> GroupScores:
    """Scores with many ties."""
    generator = torch.Generator().manual_seed(seed)

    def draw(size: int) -> torch.Tensor:
        return torch.randint(0, 3, (size,), generator=generator).double()

    return GroupScores(
        layers=tuple(
            LayerScores(
                kv_groups=draw(arch.kv_heads), channels=draw(arch.channels), query_heads=draw(arch.heads)
            )
            for _ in range(arch.layers)
        )
    )


def best(scores: list[float], allowed: list[int], count: int) -> list[int]:
    return sorted(sorted(allowed, key=lambda unit: (-scores[unit], unit))[:count])


@st.composite
def shapes_within(draw: st.DrawFn, arch: Architecture, least: int = 0) -> tuple[LayerShape, ...]:
    return tuple(
        LayerShape(
            kv_heads=draw(st.integers(least, arch.kv_heads)),
            queries=draw(st.integers(1, arch.queries_per_group)),
            channels=draw(st.integers(least, arch.channels)),
        )
        for _ in range(arch.layers)
    )


@given(layouts(), st.integers(0, 99), st.data())
@settings(max_examples=100, deadline=None)
def test_select_keeps_the_best_with_ties_to_the_lower_index(
    arch: Architecture, seed: int, data: st.DataObject
) -> None:
    scores, shapes = coarse_scores(arch, seed), data.draw(shapes_within(arch))
    found = select(arch, scores, shapes)
    per_group = arch.queries_per_group
    for layer, shape, mine in zip(scores.layers, shapes, found, strict=True):
        groups = best(layer.kv_groups.tolist(), list(range(arch.kv_heads)), shape.kv_heads)
        assert mine.kv_groups.tolist() == groups
        assert mine.channels.tolist() == best(
            layer.channels.tolist(), list(range(arch.channels)), shape.channels
        )
        heads: list[int] = []
        for group in groups:
            inside = list(range(group * per_group, (group + 1) * per_group))
            heads += best(layer.query_heads.tolist(), inside, shape.queries)
        if shape.queries == per_group or not groups:
            assert mine.query_heads is None
        else:
            assert mine.query_heads is not None
            assert mine.query_heads.dtype == torch.int32
        assert kept_heads(arch, mine).tolist() == heads
        assert mine.kv_groups.dtype == mine.channels.dtype == torch.int32
    structure_map(arch, found, base_fingerprint="")  # checks that indices are sorted and heads even


@given(layouts(), st.data())
@settings(max_examples=80, deadline=None)
def test_select_never_resurrects(arch: Architecture, data: st.DataObject) -> None:
    first = select(arch, random_scores(arch, 1), data.draw(shapes_within(arch)))
    shapes = data.draw(shapes_within(arch))
    second = select(arch, random_scores(arch, 2), shapes, alive=first)
    structure_map(arch, second, base_fingerprint="")
    for before, after, shape in zip(first, second, shapes, strict=True):
        assert set(after.kv_groups.tolist()) <= set(before.kv_groups.tolist())
        assert set(after.channels.tolist()) <= set(before.channels.tolist())
        assert set(kept_heads(arch, after).tolist()) <= set(kept_heads(arch, before).tolist())
        assert len(after.kv_groups) == min(shape.kv_heads, len(before.kv_groups))
        assert len(after.channels) == min(shape.channels, len(before.channels))
        if len(after.kv_groups):
            had = len(kept_heads(arch, before)) // len(before.kv_groups)
            assert len(kept_heads(arch, after)) == len(after.kv_groups) * min(shape.queries, had)
    same = select(arch, random_scores(arch, 3), [full_shape(arch)] * arch.layers, alive=second)
    assert same == second


def test_heads_are_ranked_inside_their_group_only() -> None:
    arch = architecture(layers=1)
    scores = GroupScores(
        layers=(
            LayerScores(
                kv_groups=torch.tensor([0.1, 5.0, 4.0, 0.2]).double(),
                channels=torch.arange(24).double(),
                query_heads=torch.tensor([9.0, 9.0, 0.1, 0.2, 0.4, 0.3, 9.0, 9.0]).double(),
            ),
        )
    )
    (layer,) = select(arch, scores, [LayerShape(kv_heads=2, queries=1, channels=3)])
    assert layer.kv_groups.tolist() == [1, 2]
    assert layer.query_heads is not None
    assert layer.query_heads.tolist() == [3, 4]
    assert layer.channels.tolist() == [21, 22, 23]
