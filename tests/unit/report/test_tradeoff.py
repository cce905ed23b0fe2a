"""The curve of cost against bits: what is drawn, and when nothing is."""

from __future__ import annotations

from typing import Any

import pytest

from compress.report.tradeoff import tradeoff_figure


def metrics(points: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "stored_bits_per_weight": 2.75,
        "allocation": {"objective": 0.4},
        "tradeoff": {"cost": "predicted <rise>", "points": points},
    }


def test_every_budget_is_a_dot_and_the_model_is_marked() -> None:
    points = [{"bits_per_weight": 2.0 + n / 4, "cost": 2.0**-n} for n in range(5)]
    drawn = str(tradeoff_figure(metrics(points)))
    assert drawn.count("<circle") == 6
    assert "this model: 2.75, 0.4" in drawn
    assert "predicted &lt;rise&gt;" in drawn
    assert "1 at 2.00 bits to 0.0625 at 3.00; this model 0.4 at 2.75" in drawn


@pytest.mark.parametrize(
    "points",
    [
        [],
        [{"bits_per_weight": 2.0, "cost": 1.0}],
        [{"bits_per_weight": 2.0, "cost": 1.0}, {"bits_per_weight": 4.0, "cost": 0.0}],
        [{"bits_per_weight": "many", "cost": 1.0}, {"bits_per_weight": 4.0}],
    ],
)
def test_fewer_than_two_points_are_no_curve(points: list[dict[str, Any]]) -> None:
    assert tradeoff_figure(metrics(points)) is None
    assert tradeoff_figure({}) is None
