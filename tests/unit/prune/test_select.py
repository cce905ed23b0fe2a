from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from compress.errors import CompressError, UsageError
from compress.importance.base import GroupScores, LayerScores
from compress.model.architecture import Architecture
from compress.prune.counts import kept_linear_parameters, unit_sizes
from compress.prune.select import NEAR, choose_shape, estimated_damage, select
from compress.structure import structure_map
from tests.unit.prune.common import FUSED, SPECS, architecture, random_layers


def smol(**changes: Any) -> Architecture:
    """The sizes of SmolLM2-135M."""
    return architecture(
        hidden=576,
        layers=30,
        heads=9,
        kv_heads=3,
        head_dim=64,
        channels=1536,
        vocab=49152,
        tied=True,
        **changes,
    )


def scores_of(arch: Architecture, groups: list[float], channels: list[float]) -> GroupScores:
    layer = LayerScores(
        kv_groups=torch.tensor(groups, dtype=torch.float64),
        channels=torch.tensor(channels, dtype=torch.float64),
    )
    return GroupScores(layers=(layer,) * arch.layers)


@st.composite
def cases(draw: st.DrawFn) -> tuple[Architecture, float, int, tuple[str, ...]]:
    kv_heads, per_group, hd = draw(st.integers(1, 8)), draw(st.integers(1, 4)), draw(st.sampled_from([4, 8]))
    arch = architecture(
        hidden=16,
        heads=kv_heads * per_group,
        kv_heads=kv_heads,
        head_dim=hd,
        channels=draw(st.integers(1, 80)),
        linears=draw(st.sampled_from([SPECS, FUSED])),
    )
    targets = draw(st.sampled_from([("heads", "mlp"), ("heads",), ("mlp",)]))
    return arch, draw(st.floats(0.02, 0.98)), draw(st.sampled_from([1, 4, 7, 16])), targets


@given(cases())
@settings(max_examples=150, deadline=None)
def test_the_nearest_shape_of_all(case: tuple[Architecture, float, int, tuple[str, ...]]) -> None:
    arch, ratio, multiple, targets = case
    heads = range(1, arch.kv_heads + 1) if "heads" in targets else [arch.kv_heads]
    widths = [c for c in range(1, arch.channels) if c % multiple == 0] if "mlp" in targets else []
    achieved = {}
    for kv in heads:
        for width in [*widths, arch.channels]:
            cut = structure_map(arch, random_layers(arch, kv, width), base_fingerprint="")
            achieved[kv, width] = 1 - kept_linear_parameters(arch, cut) / arch.decoder_linear_parameters()
    del achieved[arch.kv_heads, arch.channels]
    if not achieved or ratio > max(achieved.values()) + NEAR or ratio < min(achieved.values()) / 2:
        with pytest.raises(CompressError):
            choose_shape(arch, ratio, multiple=multiple, targets=targets)
        return
    plan = choose_shape(arch, ratio, multiple=multiple, targets=targets)
    best = min(abs(value - ratio) for value in achieved.values())
    assert plan.achieved == pytest.approx(achieved[plan.kv_heads, plan.channels])
    assert abs(plan.achieved - ratio) <= best + NEAR + 1e-9
    assert plan.requested == ratio
    near = {(s.kv_heads, s.channels) for s in plan.candidates}
    assert (plan.kv_heads, plan.channels) in near
    nearest = {key for key, value in achieved.items() if abs(value - ratio) < best + 1e-12}
    assert nearest & near


def test_unit_sizes_add_up() -> None:
    for linears in (SPECS, FUSED):
        arch = smol(linears=linears)
        group, channel = unit_sizes(arch)
        whole = arch.layers * (group * arch.kv_heads + channel * arch.channels)
        assert whole == arch.decoder_linear_parameters() == 106_168_320


def test_three_groups_cannot_be_halved_and_the_reason_says_so() -> None:
    plan = choose_shape(smol(), 0.5, multiple=32)
    assert plan.kv_heads == 2
    assert plan.channels == 672
    assert plan.achieved == pytest.approx((884_736 / 3 + (1536 - 672) * 1728) / 3_538_944)
    assert plan.reason == (
        "50.5% instead of 50.0%: 2 of 3 KV groups and 672 of 1536 channels stay; "
        "a layer has 3 whole KV groups of 8.3% each; channels come in multiples of 32, 1.6% each."
    )
    assert {s.kv_heads for s in plan.candidates} == {1, 2, 3}


def test_an_exact_shape_is_called_exact() -> None:
    plan = choose_shape(smol(), 0.5, targets=["mlp"])
    assert (plan.kv_heads, plan.channels, plan.achieved) == (3, 512, 0.5)
    assert plan.reason.startswith("Exactly 50.0% as requested")


def test_near_ties_go_to_the_smallest_damage() -> None:
    arch = smol()
    even = [1.0] * 1536
    spread = [0.001] * 1000 + [1.0] * 536
    heads_matter = choose_shape(arch, 0.5, multiple=32, scores=scores_of(arch, [1.0, 1.0, 1.0], spread))
    assert (heads_matter.kv_heads, heads_matter.channels) == (3, 512)
    channels_matter = choose_shape(arch, 0.5, multiple=32, scores=scores_of(arch, [1.0, 0.001, 0.002], even))
    assert channels_matter.kv_heads == 1
    damages = [shape.damage for shape in channels_matter.candidates]
    assert damages == sorted(damages, key=lambda value: value or 0)
    for shape in channels_matter.candidates:
        assert shape.damage == pytest.approx(
            estimated_damage(scores_of(arch, [1.0, 0.001, 0.002], even), shape.kv_heads, shape.channels)
        )


def test_damage_is_the_lost_share_of_each_block() -> None:
    arch = architecture(layers=2)
    scores = scores_of(arch, [4.0, 1.0, 3.0, 2.0], [float(c) for c in range(24)])
    assert estimated_damage(scores, 4, 24) == 0
    assert estimated_damage(scores, 2, 24) == pytest.approx(2 * 3 / 10)
    assert estimated_damage(scores, 2, 20) == pytest.approx(2 * (3 / 10 + 6 / 276))


def test_refused_shapes_are_passed_over() -> None:
    asked: list[tuple[int, int]] = []

    def accepts(kv_heads: int, channels: int) -> bool:
        asked.append((kv_heads, channels))
        return kv_heads in (1, 3)

    plan = choose_shape(smol(), 0.5, multiple=32, accepts=accepts)
    assert plan.kv_heads in (1, 3)
    assert {s.kv_heads for s in plan.candidates} == {1, 3}
    assert len(asked) < 10
    with pytest.raises(CompressError, match="No smaller shape is valid"):
        choose_shape(smol(), 0.5, accepts=lambda kv_heads, channels: False)


@pytest.mark.parametrize("ratio", [0.0, 1.0, -0.5, 1.5, float("nan")])
def test_ratio_outside_the_open_interval(ratio: float) -> None:
    with pytest.raises(UsageError, match="not between 0 and 1"):
        choose_shape(smol(), ratio)


def test_unreachable_ratios_name_the_range() -> None:
    with pytest.raises(CompressError, match=r"Pruning heads can remove 8.3% to 16.7% .* not 50.0%"):
        choose_shape(smol(), 0.5, targets=["heads"])
    with pytest.raises(CompressError, match=r"can remove 3.1% to 88.5% .* not 97.0%"):
        choose_shape(smol(), 0.97)
    with pytest.raises(CompressError, match=r"not 1.0%"):
        choose_shape(smol(), 0.01)
    assert choose_shape(smol(), 0.1, targets=["heads"]).kv_heads == 2


def test_targets_that_cannot_be_pruned() -> None:
    reason = "the attention is one fused layer"
    arch = smol(prunable_heads=False, heads_reason=reason)
    plan = choose_shape(arch, 0.4)
    assert plan.kv_heads == 3
    assert f"heads cannot be pruned ({reason})" in plan.reason
    with pytest.raises(CompressError, match=f"Nothing of heads can be pruned in this model .{reason}"):
        choose_shape(arch, 0.1, targets=["heads"])
    with pytest.raises(CompressError, match="Nothing of mlp"):
        choose_shape(architecture(), 0.1, targets=["mlp"], multiple=64)
    assert "channels were not asked for" in choose_shape(smol(), 0.1, targets=["heads"]).reason
    for targets in ([], ["tails"], ["heads", "tails"]):
        with pytest.raises(UsageError, match="Choose heads, mlp"):
            choose_shape(smol(), 0.5, targets=targets)
    with pytest.raises(UsageError):
        choose_shape(smol(), 0.5, multiple=0)


@given(st.lists(st.integers(0, 3), min_size=4, max_size=4), st.integers(1, 4), st.integers(1, 24))
def test_select_keeps_the_best_with_ties_to_the_lower_index(
    groups: list[int], kv_heads: int, channels: int
) -> None:
    arch = architecture(layers=1)
    scores = scores_of(arch, [float(g) for g in groups], [float(c % 5) for c in range(24)])
    (layer,) = select(arch, scores, kv_heads, channels)
    assert layer.kv_groups.tolist() == sorted(sorted(range(4), key=lambda g: (-groups[g], g))[:kv_heads])
    assert layer.channels.tolist() == sorted(sorted(range(24), key=lambda c: (-(c % 5), c))[:channels])
    assert layer.kv_groups.dtype == torch.int32


def test_select_never_resurrects() -> None:
    arch = architecture(layers=1)
    first = select(arch, scores_of(arch, [1, 2, 3, 4], list(range(24))), 2, 12)
    reversed_scores = scores_of(arch, [4, 3, 2, 1], list(range(24, 0, -1)))
    (second,) = select(arch, reversed_scores, 1, 6, alive=first)
    assert second.kv_groups.tolist() == [2]
    assert second.channels.tolist() == list(range(12, 18))
    (same,) = select(arch, reversed_scores, 4, 24, alive=first)
    assert same == first[0]
