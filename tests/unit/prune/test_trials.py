"""The order in which shapes are tried."""

from __future__ import annotations

import numpy as np
import pytest

from compress.prune.shape import Shape
from compress.prune.trials import next_trial


def shape(attention: float | None, mlp: float | None, channels: int = 1) -> Shape:
    parts = None if attention is None or mlp is None else (attention, mlp)
    return Shape(
        kv_heads=1,
        queries=1,
        channels=channels,
        achieved=0.5,
        damage=None if parts is None else sum(parts),
        parts=parts,
    )


def order(shapes: list[Shape], rises: list[float], count: int) -> list[int]:
    tried: dict[int, float] = {}
    for _ in range(count):
        at = next_trial(shapes, tried)
        assert at not in tried
        tried[at] = rises[at]
    return list(tried)


def test_the_predicted_best_comes_first_then_the_one_that_takes_least_attention() -> None:
    shapes = [shape(0.3, 0.1), shape(0.2, 0.3), shape(0.0, 0.9), shape(0.1, 0.6)]
    assert order(shapes, [1.0, 1.0, 1.0, 1.0], 2) == [0, 2]


@pytest.mark.parametrize("scales", [(6.0, 1.0), (0.2, 1.5), (1.0, 1.0)])
def test_with_true_scales_of_heads_and_channels_the_third_trial_is_the_best_of_all(
    scales: tuple[float, float],
) -> None:
    g = np.random.default_rng(3)
    attention = np.sort(g.uniform(0, 1, 9))
    mlp = np.sort(g.uniform(0, 1, 9))[::-1]
    parts = sorted(zip(attention, mlp, strict=True), key=sum)
    shapes = [shape(float(a), float(m)) for a, m in parts]
    rises = [scales[0] * a + scales[1] * m for a, m in parts]
    found = order(shapes, rises, 3)
    assert min(found, key=lambda at: rises[at]) == int(np.argmin(rises))


def test_without_predictions_they_are_tried_in_turn_and_noise_below_zero_does_no_harm() -> None:
    assert order([shape(None, None)] * 3, [1.0, 2.0, 3.0], 3) == [0, 1, 2]
    shapes = [shape(0.3, 0.1), shape(0.0, 0.9), shape(0.1, 0.6)]
    assert sorted(order(shapes, [-0.01, 0.0, 0.5], 3)) == [0, 1, 2]
