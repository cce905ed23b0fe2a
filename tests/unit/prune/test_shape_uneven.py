"""Shapes that differ between layers: the local plan of the paper and the global ranking."""

from __future__ import annotations

from itertools import pairwise, product
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from compress.errors import CompressError, UsageError
from compress.importance.base import GroupScores, LayerScores
from compress.model.architecture import Architecture
from compress.prune.local import local_shapes
from compress.prune.ranked import global_shapes, round_channels
from compress.prune.shape import NEAR, choices_of, unit_parameters
from compress.structure import LayerShape, full_shape
from tests.unit.prune.common import architecture
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


@given(
    layouts(most_layers=12),
    st.floats(0.05, 0.9),
    MULTIPLES,
    TARGET_SETS,
    UNITS,
    st.tuples(st.integers(0, 3), st.integers(0, 3)),
    st.booleans(),
)
@settings(max_examples=100, deadline=None)
def test_the_local_plan_meets_the_ratio_of_the_model(
    arch: Architecture,
    ratio: float,
    multiple: int,
    targets: tuple[str, ...],
    unit: Any,
    skipped: tuple[int, int],
    scored: bool,
) -> None:
    first, last = skipped
    units: dict[str, Any] = {"targets": targets, "multiple": multiple, "head_unit": unit}
    scores = random_scores(arch) if scored else None
    options: dict[str, Any] = {"skip_first": first, "skip_last": last, "scores": scores, **units}
    pruned = arch.layers - first - last
    if pruned < 1:
        with pytest.raises(UsageError, match="no layer can be pruned"):
            local_shapes(arch, ratio, **options)
        return
    choices = choices_of(arch, **units)
    reach, part = choices.reach(), pruned / arch.layers
    if reach is None or not reach[0] * part / 2 <= ratio <= reach[1] * part + NEAR:
        with pytest.raises(CompressError, match=r"can remove|Nothing of"):
            local_shapes(arch, ratio, **options)
        return
    plan = local_shapes(arch, ratio, **options)
    whole = full_shape(arch)
    assert all(plan.shapes[i] == whole for i in (*range(first), *range(arch.layers - last, arch.layers)))
    assert plan.achieved == pytest.approx(removed(arch, plan.shapes))
    losses = sorted(
        {
            choices.removed(LayerShape(kv_heads=kv, queries=q, channels=c))
            for kv, q in pairs_of(arch, targets, unit)
            for c in widths_of(arch, targets, multiple)
        }
    )
    # what rounding, and the near-ties, can leave over in one layer; the last pruned layer's stays
    left = max(b - a for a, b in pairwise(losses)) / 2 + NEAR
    if ratio / part <= reach[1] - left:
        assert abs(plan.achieved - ratio) <= left / arch.layers + 1e-9


def test_the_two_conventions_of_the_paper() -> None:
    arch = smol()
    layers = local_shapes(arch, 0.5, ratio_of="layers", head_unit="group", multiple=32)
    assert [s == full_shape(arch) for s in layers.shapes] == [True] * 3 + [False] * 26 + [True]
    assert len(set(layers.shapes[3:29])) == 1
    assert layers.achieved == pytest.approx(26 / 30 * 0.5, abs=0.01)
    assert "26 of 30 layers lose about 50.0% each; the first 3 and the last 1 stay whole" in layers.reason
    assert layers.reason.startswith(f"{layers.achieved:.1%} instead of 50.0%")
    assert "channels come in multiples of 32" in layers.reason
    model = local_shapes(arch, 0.5, multiple=32)
    assert [s == full_shape(arch) for s in model.shapes] == [True] * 3 + [False] * 26 + [True]
    assert model.achieved == pytest.approx(0.5, abs=1e-3)
    assert "lose about 57.7% each" in model.reason
    assert model.uniform is None
    with pytest.raises(UsageError, match="Choose model, layers or parts"):
        local_shapes(arch, 0.5, ratio_of="rows")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="no negative number"):
        local_shapes(arch, 0.5, skip_first=-1)
    with pytest.raises(CompressError, match=r"to 76.7% of the decoder linear parameters, not 85.0%"):
        local_shapes(arch, 0.85, head_unit="group")


@given(
    layouts(most_layers=12), st.integers(1, 99), MULTIPLES, TARGET_SETS, st.sampled_from(["auto", "group"])
)
@settings(max_examples=100, deadline=None)
def test_each_part_loses_the_ratio_by_itself(
    arch: Architecture, percent: int, multiple: int, targets: tuple[str, ...], unit: Any
) -> None:
    """Sizes by a search of our own: the most heads and channels whose rows are at most what is to stay.

    A head counts as soon as one of its rows stays, a channel only where it stays whole.
    """
    ratio, width = percent / 100, arch.kv_heads * arch.head_dim
    stays = 100 - percent
    rows = max(n for n in range(width + 1) if 100 * n <= width * stays)
    heads = min(n for n in range(arch.kv_heads + 1) if n * arch.head_dim >= rows)
    channels = max(n for n in range(0, arch.channels + 1, multiple) if 100 * n <= arch.channels * stays)
    if "heads" not in targets or not arch.prunable_heads:
        heads = arch.kv_heads
    if "mlp" not in targets or not arch.prunable_channels or arch.channels <= multiple:
        channels = arch.channels
    options: dict[str, Any] = {
        "ratio_of": "parts", "skip_first": 0, "skip_last": 0,
        "targets": targets, "multiple": multiple, "head_unit": unit,
    }  # fmt: skip
    if not heads or not channels or (heads, channels) == (arch.kv_heads, arch.channels):
        with pytest.raises(CompressError, match=r"of each part keeps|Nothing of"):
            local_shapes(arch, ratio, **options)
        return
    plan = local_shapes(arch, ratio, **options)
    wanted = LayerShape(kv_heads=heads, queries=arch.queries_per_group, channels=channels)
    assert plan.shapes == (wanted,) * arch.layers
    assert plan.achieved == pytest.approx(removed(arch, plan.shapes))
    assert local_shapes(arch, ratio, **options, scores=random_scores(arch)).shapes == plan.shapes


def test_a_ratio_of_the_parts_is_said_and_refused_where_there_is_none() -> None:
    options: dict[str, Any] = {"ratio_of": "parts", "multiple": 1}
    plan = local_shapes(smol(), 0.5, skip_first=4, skip_last=2, **options)
    assert [s == full_shape(smol()) for s in plan.shapes] == [True] * 4 + [False] * 24 + [True] * 2
    assert "in 24 of 30 layers 2 of 3 KV groups and 768 of 1536 channels stay, 50.0% off each" in plan.reason
    assert "the first 4 and the last 2 stay whole" in plan.reason
    with pytest.raises(UsageError, match="counts whole KV groups"):
        local_shapes(smol(), 0.5, **options, head_unit="query")
    assert local_shapes(smol(), 0.5, **options, head_unit="query", targets=("mlp",)).shapes[5].queries == 3
    with pytest.raises(CompressError, match="keeps 3 of 3 KV groups") as refused:
        local_shapes(smol(), 0.1, **options, targets=("heads",))
    assert "larger ratio" in str(refused.value)
    with pytest.raises(CompressError, match="0 of 1536 channels"):
        local_shapes(smol(), 0.99, ratio_of="parts", multiple=64)
    options |= {"skip_first": 0, "skip_last": 0, "accepts": lambda shape: shape.kv_heads == 3}
    with pytest.raises(CompressError, match="does not take 2 of 3 KV groups"):
        local_shapes(smol(), 0.5, **options)
    assert local_shapes(smol(), 0.5, **options, targets=("mlp",)).shapes[0].channels == 768


@pytest.mark.parametrize("scored", [False, True])
def test_no_layer_gets_a_shape_that_all_cannot_have(scored: bool) -> None:
    """Gemma-2-9B: 12 heads do not divide 3584, which its config class refuses when all layers have 12."""
    arch = architecture(hidden=3584, layers=6, heads=16, kv_heads=8, head_dim=256, channels=14336)
    options: dict[str, Any] = {"targets": ("heads",), "head_unit": "group", "skip_first": 0, "multiple": 128}
    options["scores"] = random_scores(arch, 0) if scored else None

    def accepts(shape: LayerShape) -> bool:
        return arch.hidden % (shape.kv_heads * shape.queries) == 0

    step = unit_parameters(arch).attention(1, 2) / unit_parameters(arch).of(full_shape(arch))
    free = local_shapes(arch, 2 * step, skip_last=0, **options)
    assert {shape.kv_heads for shape in free.shapes} == {6}
    plan = local_shapes(arch, 2 * step, skip_last=0, accepts=accepts, **options)
    assert all(map(accepts, plan.shapes))
    assert plan.achieved == pytest.approx(2 * step, abs=2 * step / arch.layers)
    # where a layer stays whole, the layers differ, and no stock config has to have them
    kept = local_shapes(arch, 2 * step * 5 / 6, skip_last=1, accepts=accepts, **options)
    assert {shape.kv_heads for shape in kept.shapes} == {6, 8}


def test_what_no_layer_can_have_is_refused_without_scores() -> None:
    options: dict[str, Any] = {"ratio_of": "layers", "skip_first": 0, "skip_last": 0}
    with pytest.raises(CompressError, match="No smaller shape is valid"):
        local_shapes(smol(), 0.5, accepts=lambda _: False, **options)


def test_layers_of_a_local_plan_choose_by_their_own_scores() -> None:
    arch = smol(layers=2)
    even, few = torch.ones(1536, dtype=torch.float64), torch.ones(1536, dtype=torch.float64)
    few[512:] = 0.001
    heads = torch.ones(9, dtype=torch.float64)
    one_group = torch.tensor([1.0, 0.001, 0.001], dtype=torch.float64)
    scores = GroupScores(
        layers=(
            LayerScores(kv_groups=one_group, channels=even, query_heads=heads),
            LayerScores(kv_groups=torch.ones(3, dtype=torch.float64), channels=few, query_heads=heads),
        )
    )
    first, second = local_shapes(arch, 0.5, skip_last=0, multiple=32, scores=scores).shapes
    assert (first.kv_heads, second.kv_heads, second.queries) == (1, 3, 3)


@given(layouts(), st.floats(0.02, 0.98), MULTIPLES, TARGET_SETS, UNITS, st.integers(0, 99))
@settings(max_examples=120, deadline=None)
def test_the_global_plan_ends_at_the_nearest_total(
    arch: Architecture, ratio: float, multiple: int, targets: tuple[str, ...], unit: Any, seed: int
) -> None:
    scores = random_scores(arch, seed)
    options: dict[str, Any] = {"multiple": multiple, "targets": targets, "head_unit": unit}
    pairs, widths = list(pairs_of(arch, targets, unit)), widths_of(arch, targets, multiple)
    units = unit_parameters(arch)
    reach = choices_of(arch, **options).reach()
    if reach is None or not reach[0] / arch.layers / 2 <= ratio <= reach[1] + NEAR:
        with pytest.raises(CompressError, match=r"can remove|Nothing of"):
            global_shapes(arch, ratio, scores, **options)
        return
    plan = global_shapes(arch, ratio, scores, **options)
    assert plan.achieved == pytest.approx(removed(arch, plan.shapes))
    for shape in plan.shapes:
        assert (shape.kv_heads, shape.queries) in pairs
        assert shape.channels in widths
    whole = units.of(full_shape(arch)) * arch.layers
    error = (abs(plan.achieved - ratio) - max(0.0, ratio - reach[1])) * whole
    jump = max(
        units.attention(1, arch.queries_per_group) if unit != "query" else 0,
        arch.kv_heads * units.query if unit != "group" and arch.queries_per_group > 1 else 0,
    )  # the most that one step of the heads weighs
    if len(widths) == 1:
        assert error <= jump / 2 + 1
    elif (widths[-1] - widths[0]) * units.channel * arch.layers >= 2 * jump:
        step = max(b - a for a, b in pairwise(widths)) * units.channel
        assert error <= step / 2 + 1


def test_heads_at_the_border_are_left_where_channels_cannot_make_up_for_them() -> None:
    arch = architecture(hidden=16, heads=2, kv_heads=2, head_dim=8, channels=22)
    units = unit_parameters(arch)
    whole = units.of(full_shape(arch)) * arch.layers
    ratio = 0.6 * units.attention(1, 1) / whole  # nearer to one head than to none
    cheap_heads = GroupScores(
        layers=tuple(
            LayerScores(
                kv_groups=s.kv_groups * torch.tensor([1.0, 1e-9]),
                channels=s.channels + 1,
                query_heads=s.query_heads,
            )
            for s in random_scores(arch).layers
        )
    )
    plan = global_shapes(arch, ratio, cheap_heads, multiple=1)
    assert abs(plan.achieved - ratio) * whole <= units.channel / 2 + 1
    assert plan.achieved == pytest.approx(removed(arch, plan.shapes))


def attention(groups: list[float], heads: list[float]) -> LayerScores:
    return LayerScores(
        kv_groups=torch.tensor(groups, dtype=torch.float64),
        channels=torch.ones(1, dtype=torch.float64),
        query_heads=torch.tensor(heads, dtype=torch.float64),
    )


def test_a_step_is_ranked_no_lower_than_the_one_it_builds_on() -> None:
    arch = architecture(layers=2, hidden=16, heads=4, kv_heads=2, head_dim=4, channels=1)
    head = 2 * 4 * 16
    # one head of each group of the first layer costs 0.3 a head, its weak group after that 0.25 only; the weak
    # group of the second layer costs 0.27 and goes before both
    first, second = attention([1, 10], [0.5, 0.5, 0.01, 0.99]), attention([0.81, 10], [1, 1, 1, 1])
    whole = unit_parameters(arch).of(full_shape(arch)) * 2
    shapes = global_shapes(
        arch, 2.6 * head / whole, GroupScores(layers=(first, second)), targets=["heads"]
    ).shapes
    assert [(s.kv_heads, s.queries) for s in shapes] == [(2, 2), (1, 2)]


def test_scores_below_zero_are_compared_between_layers() -> None:
    arch = architecture(layers=2, hidden=16, heads=2, kv_heads=2, head_dim=4, channels=1)
    scores = GroupScores(layers=(attention([-1.0, -0.8], [1, 1]), attention([-3.0, -2.8], [1, 1])))
    shapes = global_shapes(arch, 0.2, scores, targets=["heads"]).shapes
    assert [s.kv_heads for s in shapes] == [2, 1]


def test_heads_alone_take_a_smaller_step_where_a_larger_one_does_not_fit() -> None:
    sizes = {"hidden": 16, "heads": 16, "kv_heads": 4, "head_dim": 4, "channels": 1}
    head = 2 * 4 * 16  # weights of one query head, and of k and v of one group: a group has 5 of them
    first, second = attention([0.01, 1, 1, 1], [1.0] * 16), attention([0.02, 1, 1, 1], [1.0] * 16)
    third = attention([1, 1, 1, 1], [1, 1, 1, 0.1] * 4)
    # 5 heads, then 5 more, would be the order; 7.4 are asked for, and 4 come after that
    for layers, expected in (((first, second, third), 9), ((first, second), 5)):
        arch = architecture(**sizes, layers=len(layers))
        whole = unit_parameters(arch).of(full_shape(arch)) * len(layers)
        plan = global_shapes(arch, 7.4 * head / whole, GroupScores(layers=layers), targets=["heads"])
        assert plan.achieved == pytest.approx(expected * head / whole)
        assert (plan.shapes[0].kv_heads, plan.shapes[0].queries) == (3, 4)
        assert (plan.shapes[1].kv_heads, plan.shapes[1].queries) == (4, 4)


@given(st.integers(1, 4), st.data())
@settings(max_examples=80, deadline=None)
def test_rounded_channels_have_the_nearest_sum_of_all(layers: int, data: st.DataObject) -> None:
    multiple, count = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 5))
    widths = [multiple * n for n in range(1, count + 1)]
    wanted = data.draw(st.lists(st.floats(widths[0], widths[-1]), min_size=layers, max_size=layers))
    total = data.draw(st.one_of(st.just(sum(wanted)), st.floats(0, 1.2 * layers * widths[-1])))
    found = round_channels(wanted, widths, total)
    assert all(width in widths for width in found)
    nearest = min(abs(sum(c) - total) for c in product(widths, repeat=layers))
    assert abs(sum(found) - total) == pytest.approx(nearest)
    if total == sum(wanted):  # nobody is moved by more than the one step that rounding takes
        assert all(abs(a - b) <= multiple for a, b in zip(found, wanted, strict=True))


def test_the_least_score_per_parameter_goes_wherever_it_is() -> None:
    arch = architecture(layers=3, channels=32)
    scores = random_scores(arch)
    poor = scores.layers[1]
    scores = GroupScores(
        layers=(
            scores.layers[0],
            LayerScores(
                kv_groups=poor.kv_groups * 1e-3, channels=poor.channels * 1e-3, query_heads=poor.query_heads
            ),
            scores.layers[2],
        )
    )
    plan = global_shapes(arch, 0.25, scores, multiple=4)
    kept = [unit_parameters(arch).of(shape) for shape in plan.shapes]
    assert kept[1] < min(kept[0], kept[2])
    assert plan.shapes[1].channels == 4
    assert plan.shapes[0] == plan.shapes[2] == full_shape(arch)
    assert "layers keep 2 to 4 of 4 KV groups with 1 to 2 query heads and 4 to 32 of 32" in plan.reason
    assert plan.uniform is None
    assert plan.shapes == global_shapes(arch, 0.25, scores, multiple=4).shapes


def test_global_ranks_groups_and_channels_as_plain_sorting_does() -> None:
    arch = architecture(layers=3, heads=4, channels=20)
    scores = random_scores(arch, 5)
    units = unit_parameters(arch)
    kinds = {
        "heads": (units.attention(1, 1), [layer.kv_groups.tolist() for layer in scores.layers]),
        "mlp": (units.channel, [layer.channels.tolist() for layer in scores.layers]),
    }
    ranked = []
    for kind, (weight, values) in kinds.items():
        mean = sum(map(sum, values)) / (3 * len(values[0]))
        for layer, row in enumerate(values):
            ranked += [(value / mean, kind, layer, weight) for value in sorted(row)[:-1]]
    ranked.sort()
    whole = units.of(full_shape(arch)) * arch.layers
    for count in range(1, len(ranked)):
        gone = ranked[:count]
        plan = global_shapes(arch, sum(u[3] for u in gone) / whole, scores, multiple=1)
        for layer, shape in enumerate(plan.shapes):
            assert shape.kv_heads == 4 - sum(u[1:3] == ("heads", layer) for u in gone)
            assert shape.channels == 20 - sum(u[1:3] == ("mlp", layer) for u in gone)


def test_standardised_scores_rank_as_their_values_say() -> None:
    arch = architecture(layers=2, channels=16)
    scores = random_scores(arch, 3)
    lower = GroupScores(
        layers=tuple(
            LayerScores(
                kv_groups=layer.kv_groups - 10, channels=layer.channels - 10, query_heads=layer.query_heads
            )
            for layer in scores.layers
        )
    )
    shapes = global_shapes(arch, 0.2, lower, multiple=1, targets=["mlp"]).shapes
    kept = [shape.channels for shape in shapes]
    values = sorted((float(value), layer) for layer, s in enumerate(scores.layers) for value in s.channels)[
        : 32 - sum(kept)
    ]
    assert kept == [16 - sum(layer == index for _, layer in values) for index in range(2)]
