from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from compress.errors import UsageError
from compress.prune.schedule import PruningSchedule, cubic_ratio
from compress.structure import LayerShape


def test_cubic_values_worked_by_hand() -> None:
    values = [cubic_ratio(t, 100, initial=0.0, final=0.5) for t in (0, 9, 10, 30, 50, 70, 90, 99)]
    by_hand = [0.0, 0.0, 0.0, 0.5 * (1 - 0.75**3), 0.5 * (1 - 0.5**3), 0.5 * (1 - 0.25**3), 0.5, 0.5]
    assert values == pytest.approx(by_hand)
    assert cubic_ratio(50, 100, initial=0.2, final=0.6, warmup=0.2, cooldown=0.3) == pytest.approx(
        0.6 - 0.4 * (1 - 30 / 50) ** 3
    )


schedules = st.builds(
    PruningSchedule,
    total_steps=st.integers(1, 400),
    warmup=st.sampled_from([0.0, 0.1, 0.3]),
    cooldown=st.sampled_from([0.0, 0.1, 0.5]),
    every=st.none() | st.integers(1, 500),
)


@given(schedules, st.integers(1, 300), st.data())
def test_counts_fall_from_full_to_exactly_the_target(
    schedule: PruningSchedule, full: int, data: st.DataObject
) -> None:
    target = data.draw(st.integers(0, full))
    counts = [schedule.kept(step, full, target) for step in range(schedule.total_steps + 3)]
    assert all(target <= count <= full for count in counts)
    assert counts == sorted(counts, reverse=True)
    last = schedule.total_steps - 1
    assert counts[last:] == [target] * (len(counts) - last)
    assert schedule.due(last)
    if schedule.total_steps > 1:
        warm = [s for s in range(last) if s < schedule.warmup * schedule.total_steps]
        cool = [s for s in range(last) if s >= (1 - schedule.cooldown) * schedule.total_steps]
        assert [counts[s] for s in warm] == [full] * len(warm)
        assert [counts[s] for s in cool] == [target] * len(cool)


@given(st.integers(20, 400))
def test_the_final_mask_is_in_place_when_cool_down_begins(total: int) -> None:
    schedule = PruningSchedule(total_steps=total)
    due = [step for step in range(total) if schedule.due(step)]
    final = [step for step in due if schedule.progress(step) == 1.0]
    assert final[0] - 0.9 * total <= 1 + 1e-6


@pytest.mark.parametrize(
    ("total", "interval"), [(1, 1), (20, 1), (39, 1), (40, 2), (100, 5), (200, 10), (5000, 10)]
)
def test_default_interval(total: int, interval: int) -> None:
    assert PruningSchedule(total_steps=total).interval == interval
    assert PruningSchedule(total_steps=total, every=7).interval == 7


@pytest.mark.parametrize(
    "options",
    [
        {"total_steps": 0},
        {"total_steps": 10, "every": 0},
        {"total_steps": 10, "warmup": -0.1},
        {"total_steps": 10, "warmup": 0.6, "cooldown": 0.5},
    ],
)
def test_impossible_schedules(options: dict[str, float]) -> None:
    with pytest.raises(UsageError):
        PruningSchedule(**options)  # type: ignore[arg-type]


@given(schedules, st.integers(0, 450))
def test_a_layer_shrinks_in_all_its_sizes(schedule: PruningSchedule, step: int) -> None:
    full = LayerShape(kv_heads=8, queries=4, channels=500)
    target = LayerShape(kv_heads=0, queries=3, channels=77)
    shape = schedule.shape(step, full, target)
    assert shape.kv_heads == schedule.kept(step, 8, 0)
    assert shape.queries == schedule.kept(step, 4, 3)
    assert shape.channels == schedule.kept(step, 500, 77)
    assert schedule.shape(schedule.total_steps - 1, full, target) == target
    assert schedule.shape(step, full, full) == full
