"""The uniform shape: nearest of all, near-ties by damage, sentences."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from compress.errors import CompressError, UsageError
from compress.importance.base import GroupScores, LayerScores
from compress.model.architecture import Architecture
from compress.prune.damage import estimated_damage
from compress.prune.plan import plan_shapes
from compress.prune.shape import NEAR, ShapePlan, choices_of, met_or_missed, plan_of, unit_parameters
from compress.prune.uniform import choose_shape
from compress.structure import LayerShape, full_shape
from tests.unit.prune.common import FUSED, SPECS, architecture
from tests.unit.prune.layouts import (
    MULTIPLES,
    TARGET_SETS,
    UNITS,
    layouts,
    pairs_of,
    random_scores,
    removed,
    smol,
    widths_of,
)


def scores_of(
    arch: Architecture, groups: list[float], channels: list[float], heads: list[float] | None = None
) -> GroupScores:
    layer = LayerScores(
        kv_groups=torch.tensor(groups, dtype=torch.float64),
        channels=torch.tensor(channels, dtype=torch.float64),
        query_heads=torch.tensor(heads or [1.0] * arch.heads, dtype=torch.float64),
    )
    return GroupScores(layers=(layer,) * arch.layers)


def of(plan: ShapePlan) -> tuple[int, int, int]:
    assert plan.uniform is not None
    return plan.uniform.kv_heads, plan.uniform.queries, plan.uniform.channels


@given(layouts(), st.floats(0.02, 0.98), MULTIPLES, TARGET_SETS, UNITS, st.booleans())
@settings(max_examples=100, deadline=None)
def test_the_nearest_shape_of_all(
    arch: Architecture, ratio: float, multiple: int, targets: tuple[str, ...], unit: Any, scored: bool
) -> None:
    options: dict[str, Any] = {"multiple": multiple, "targets": targets, "head_unit": unit}
    units = unit_parameters(arch)
    whole = units.of(full_shape(arch))
    achieved = {
        (kv, q, c): 1 - units.of(LayerShape(kv_heads=kv, queries=q, channels=c)) / whole
        for kv, q in pairs_of(arch, targets, unit)
        for c in widths_of(arch, targets, multiple)
    }
    del achieved[arch.kv_heads, arch.queries_per_group, arch.channels]
    scores = random_scores(arch) if scored else None
    if not achieved or ratio > max(achieved.values()) + NEAR or ratio < min(achieved.values()) / 2:
        with pytest.raises(CompressError):
            choose_shape(arch, ratio, scores=scores, **options)
        return
    plan = choose_shape(arch, ratio, scores=scores, **options)
    best = min(abs(value - ratio) for value in achieved.values())
    assert plan.requested == ratio
    assert plan.achieved == pytest.approx(achieved[of(plan)])
    assert plan.achieved == pytest.approx(removed(arch, plan.shapes))
    assert abs(plan.achieved - ratio) <= best + NEAR + 1e-9
    near = {(s.kv_heads, s.queries, s.channels): s for s in plan.candidates}
    assert plan.candidates[0].layer == plan.uniform
    assert any(abs(s.achieved - ratio) <= best + 1e-12 for s in near.values())
    if scores is not None:
        damages = [estimated_damage(scores, s.layer) for s in plan.candidates]
        assert damages == sorted(damages)
        assert damages == pytest.approx([s.damage for s in plan.candidates])


@given(layouts(), st.floats(0.1, 0.9), st.floats(0.1, 0.9), UNITS)
@settings(max_examples=60, deadline=None)
def test_more_asked_is_more_removed(arch: Architecture, one: float, other: float, unit: Any) -> None:
    low, high = sorted((one, other))
    reach = choices_of(arch, targets=("heads", "mlp"), multiple=1, head_unit=unit).reach()
    if reach is None or low < reach[0] or high > reach[1]:
        return
    for kind in ("uniform", "local", "global"):
        options: dict[str, Any] = {"multiple": 1, "head_unit": unit, "skip_first": 0, "skip_last": 0}
        scores = random_scores(arch)
        less = plan_shapes(kind, arch, low, scores=scores, **options).achieved
        more = plan_shapes(kind, arch, high, scores=scores, **options).achieved
        step = 1 / arch.channels  # at most what one channel, and near-ties, may take it off the request
        assert less <= more + 2 * (NEAR + step)
        assert removed(arch, plan_shapes(kind, arch, low, scores=scores, **options).shapes) == pytest.approx(
            less
        )


def test_unit_parameters_add_up() -> None:
    for linears in (SPECS, FUSED):
        arch = smol(linears=linears)
        units = unit_parameters(arch)
        assert (units.attention(1, arch.queries_per_group), units.channel) == (8 * 64 * 576, 3 * 576)
        assert arch.layers * units.of(full_shape(arch)) == arch.decoder_linear_parameters() == 106_168_320
        assert (units.group, units.query) == (2 * 64 * 576, 2 * 64 * 576)


def test_three_groups_cannot_be_halved_and_the_reason_says_so() -> None:
    plan = choose_shape(smol(), 0.5, multiple=32, head_unit="group")
    assert of(plan) == (2, 3, 672)
    assert plan.achieved == pytest.approx((884_736 / 3 + (1536 - 672) * 1728) / 3_538_944)
    assert plan.reason == (
        "50.5% instead of 50.0%: 2 of 3 KV groups and 672 of 1536 channels stay; "
        "a layer has 3 whole KV groups of 8.3% each; channels come in multiples of 32, 1.6% each."
    )
    assert {s.kv_heads for s in plan.candidates} == {1, 2, 3}


def test_query_heads_go_alone_or_with_their_groups() -> None:
    arch = smol()
    units = {unit: choose_shape(arch, 0.125, targets=["heads"], head_unit=unit) for unit in ("query", "auto")}
    assert of(units["query"]) == (3, 1, 1536)
    assert units["query"].achieved == pytest.approx(2 * 3 * 2 * 64 * 576 / 3_538_944)
    assert units["query"].reason.startswith("Exactly 12.5%")
    auto = choose_shape(arch, 0.16, targets=["heads"])
    assert of(auto) == (1, 2, 1536) or of(auto) == (1, 3, 1536) or of(auto) == (2, 1, 1536)
    short = choose_shape(arch, 0.07, targets=["heads"], head_unit="query")
    assert of(short) == (3, 2, 1536)
    assert "3 of 3 KV groups with 2 of 3 query heads each" in short.reason
    assert "one query head of every KV group is 6.2%" in short.reason
    single = architecture(heads=4, channels=1)
    with pytest.raises(CompressError, match="Nothing of heads"):
        choose_shape(single, 0.1, targets=["heads"], head_unit="query")
    note = choose_shape(architecture(heads=4), 0.1, multiple=7, head_unit="query").reason
    assert "every KV group has one query head only" in note


def test_an_exact_shape_is_called_exact() -> None:
    plan = choose_shape(smol(), 0.5, targets=["mlp"])
    assert (of(plan), plan.achieved) == ((3, 3, 512), 0.5)
    assert plan.reason.startswith("Exactly 50.0% as requested")


def test_a_small_miss_is_told_from_the_request() -> None:
    assert met_or_missed(0.50034, 0.5) == "50.03% instead of 50.00%"
    assert met_or_missed(0.505, 0.5) == "50.5% instead of 50.0%"
    assert met_or_missed(0.50004, 0.5) == "Exactly 50.0% as requested"


def test_near_ties_go_to_the_smallest_damage() -> None:
    arch = smol()
    even = [1.0] * 1536
    spread = [0.001] * 1000 + [1.0] * 536
    heads_matter = choose_shape(arch, 0.5, multiple=32, scores=scores_of(arch, [1.0, 1.0, 1.0], spread))
    assert of(heads_matter) == (3, 3, 512)
    groups = scores_of(arch, [1.0, 0.001, 0.002], even)
    assert of(choose_shape(arch, 0.5, multiple=32, scores=groups))[:2] == (1, 3)
    queries = scores_of(arch, [1.0, 1.0, 1.0], even, [1.0, 0.001, 0.001] * 3)
    assert of(choose_shape(arch, 0.5, multiple=32, scores=queries))[:2] == (3, 1)


def test_damage_is_the_lost_share_of_each_block() -> None:
    arch = architecture(layers=2)
    heads = [1.0, 3.0, 1.0, 1.0, 0.0, 0.0, 1.0, 9.0]
    scores = scores_of(arch, [4.0, 1.0, 3.0, 2.0], [float(c) for c in range(24)], heads)

    def damage(kv_heads: int, queries: int, channels: int) -> float:
        return estimated_damage(scores, LayerShape(kv_heads=kv_heads, queries=queries, channels=channels))

    assert damage(4, 2, 24) == 0
    assert damage(2, 2, 24) == pytest.approx(2 * 3 / 10)
    assert damage(2, 2, 20) == pytest.approx(2 * (3 / 10 + 6 / 276))
    # one head of each group: a quarter of the 4, half of the 1 and of the 3 (no scores: even), a tenth of the 2
    assert damage(4, 1, 24) == pytest.approx(2 * (1 + 0.5 + 1.5 + 0.2) / 10)
    assert damage(2, 1, 24) == pytest.approx(2 * (3 + 1 + 1.5) / 10)
    assert damage(0, 2, 0) == pytest.approx(4)
    moved = scores_of(arch, [2.0, -1.0, 1.0, 0.0], [float(c) - 12 for c in range(24)], heads)
    assert estimated_damage(moved, LayerShape(kv_heads=2, queries=2, channels=20)) == pytest.approx(
        2 * (1 / 6 + 6 / 276)
    )


def test_refused_shapes_are_passed_over() -> None:
    asked: list[LayerShape] = []

    def accepts(shape: LayerShape) -> bool:
        asked.append(shape)
        return shape.kv_heads * shape.queries in (1, 9)

    plan = choose_shape(smol(), 0.5, multiple=32, accepts=accepts)
    assert plan.uniform is not None
    assert {s.kv_heads * s.queries for s in plan.candidates} <= {1, 9}
    assert len(asked) == len({(s.kv_heads, s.queries) for s in asked}) <= 9
    with pytest.raises(CompressError, match="No smaller shape is valid"):
        choose_shape(smol(), 0.5, accepts=lambda shape: False)


@pytest.mark.parametrize("ratio", [0.0, 1.0, -0.5, 1.5, float("nan")])
@pytest.mark.parametrize("kind", ["uniform", "local", "global"])
def test_ratio_outside_the_open_interval(kind: str, ratio: float) -> None:
    with pytest.raises(UsageError, match="not between 0 and 1"):
        plan_shapes(kind, smol(), ratio, scores=random_scores(smol(layers=1)))


def test_unreachable_ratios_name_the_range() -> None:
    with pytest.raises(CompressError, match=r"Pruning heads can remove 8.3% to 16.7% .* not 50.0%"):
        choose_shape(smol(), 0.5, targets=["heads"], head_unit="group")
    with pytest.raises(CompressError, match=r"Pruning heads can remove 6.2% to 20.8% .* not 50.0%"):
        choose_shape(smol(), 0.5, targets=["heads"], head_unit="auto")
    with pytest.raises(CompressError, match=r"can remove 3.1% to 88.5% .* not 97.0%"):
        choose_shape(smol(), 0.97, head_unit="group")
    with pytest.raises(CompressError, match=r"not 1.0%"):
        choose_shape(smol(), 0.01)
    assert of(choose_shape(smol(), 0.1, targets=["heads"], head_unit="group"))[0] == 2
    for kind in ("local", "global"):
        with pytest.raises(CompressError, match=r"can remove .*% to .*% .* not 98.0%"):
            plan_shapes(kind, smol(layers=10), 0.98, scores=random_scores(smol(layers=10)))


def test_targets_that_cannot_be_pruned() -> None:
    reason = "the attention is one fused layer"
    arch = smol(prunable_heads=False, heads_reason=reason)
    plan = choose_shape(arch, 0.4)
    assert of(plan)[:2] == (3, 3)
    assert f"heads cannot be pruned ({reason})" in plan.reason
    with pytest.raises(CompressError, match=f"Nothing of heads can be pruned in this model .{reason}"):
        choose_shape(arch, 0.1, targets=["heads"])
    with pytest.raises(CompressError, match="Nothing of mlp"):
        choose_shape(architecture(), 0.1, targets=["mlp"], multiple=64)
    assert "channels were not asked for" in choose_shape(smol(), 0.1, targets=["heads"]).reason
    assert "not more than one multiple" in choose_shape(architecture(), 0.1, multiple=64).reason
    traced = smol(prunable_heads=False, linears=SPECS[4:])
    assert of(choose_shape(traced, 0.5)) == (3, 3, 768)


@pytest.mark.parametrize("kind", ["uniform", "local", "global"])
def test_wrong_use_is_said(kind: str) -> None:
    arch = smol(layers=4)
    scores = random_scores(arch)
    for targets in ([], ["tails"], ["heads", "tails"]):
        with pytest.raises(UsageError, match="Choose heads, mlp"):
            plan_shapes(kind, arch, 0.5, targets=targets, scores=scores)
    with pytest.raises(UsageError, match="multiples of 0"):
        plan_shapes(kind, arch, 0.5, multiple=0, scores=scores)
    with pytest.raises(UsageError, match="Choose one of: group, query, auto"):
        plan_shapes(kind, arch, 0.5, head_unit="half", scores=scores)  # type: ignore[arg-type]
    uneven = smol(layers=1, layer_shapes=(LayerShape(kv_heads=2, queries=3, channels=64),))
    with pytest.raises(CompressError, match="differ in size already"):
        plan_shapes(kind, uneven, 0.5, scores=scores, skip_last=0)


def test_kinds_nobody_knows_or_that_lack_something() -> None:
    with pytest.raises(UsageError, match="uniform, local, global, allocated"):
        plan_shapes("round", smol(), 0.5)
    with pytest.raises(UsageError, match="measured damage"):
        plan_shapes("allocated", smol(), 0.5)
    with pytest.raises(UsageError, match="need scores"):
        plan_shapes("global", smol(), 0.5)


def test_a_plan_is_uniform_only_when_stock_loaders_could_have_it() -> None:
    arch = architecture(layers=2)
    small, other = (
        LayerShape(kv_heads=2, queries=2, channels=8),
        LayerShape(kv_heads=2, queries=1, channels=8),
    )
    gone = LayerShape(kv_heads=0, queries=2, channels=8)
    assert plan_of(arch, [small, small], 0.5, "").uniform == small
    assert plan_of(arch, [small, other], 0.5, "").uniform is None
    assert plan_of(arch, [gone, gone], 0.5, "").uniform is None
    plan = plan_of(arch, [small, gone], 0.5, "")
    assert plan.achieved == pytest.approx(removed(arch, plan.shapes))
