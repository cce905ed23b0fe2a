"""Numbers for people, and ticks for charts."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from compress.report.allocation import locate
from compress.report.html import h, join
from compress.report.svg import log_ticks, nice_ticks
from compress.report.values import change, count, fixed, general, percent, seconds, size


@pytest.mark.parametrize(
    ("shown", "expected"),
    [
        (count(0), "0"),
        (count(999), "999"),
        (count(53_568), "53.6 K"),
        (count(134_515_008), "134.5 M"),
        (count(999_960), "1.00 M"),
        (count(6.74e9), "6.74 B"),
        (count(7e15), "7,000.0 T"),
        (size(512), "512 B"),
        (size(90_100_000), "90.1 MB"),
        (seconds(0.05), "0.05 s"),
        (seconds(12.44), "12.4 s"),
        (seconds(200), "3 min 20 s"),
        (seconds(7500), "2 h 05 min"),
        (percent(0.4986), "49.9 %"),
        (change(0.96), "−4.0 %"),
        (change(1.5), "+50.0 %"),
        (general(5132.1), "5,132"),
        (general(1.2e-7), "1.2e-07"),
        (fixed(1234.5678, 1), "1,234.6"),
    ],
)
def test_numbers(shown: str, expected: str) -> None:
    assert shown.replace("\u202f", " ") == expected


@pytest.mark.parametrize("value", [None, "12", float("nan"), float("inf"), True, [], {}, 10**400])
def test_anything_else_is_a_dash(value: Any) -> None:
    for write in (count, size, seconds, percent, fixed, general):
        assert write(value) == "—"


@given(st.floats(-1e9, 1e9), st.floats(0, 1e9))
def test_ticks_enclose_and_rise(low: float, span: float) -> None:
    ticks = nice_ticks(low, low + span)
    slack = 1e-6 * max(abs(low), span, 1e-9)  # closer values count as one
    assert ticks[0] <= low + slack
    assert ticks[-1] >= low + span - slack
    assert 2 <= len(ticks) <= 12
    assert all(b > a for a, b in itertools.pairwise(ticks))


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (29.0, 450.0, [20, 50, 100, 200, 500]),
        (10.0, 100.0, [10, 20, 50, 100]),
        (29.0, 9000.0, [20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000]),
        (3.0, 3.0, [2, 5]),
        (2.0, 2.0, [2, 5]),
        (0.7, 0.9, [0.5, 1]),
        (5.0, 4e6, [1, 10, 100, 1000, 10**4, 10**5, 10**6, 10**7]),
        (1.0, 1e16, [10 ** (2 * n) for n in range(9)]),
    ],
)
def test_ticks_of_a_logarithmic_axis(low: float, high: float, expected: list[float]) -> None:
    assert log_ticks(low, high) == pytest.approx(expected)


@given(st.floats(1e-6, 1e200), st.floats(1, 1e60))
def test_logarithmic_ticks_enclose_and_rise(low: float, factor: float) -> None:
    ticks = log_ticks(low, low * factor)
    assert ticks[0] <= low * (1 + 1e-6)
    assert ticks[-1] >= low * factor * (1 - 1e-6)
    assert 2 <= len(ticks) <= 9
    assert all(b > a for a, b in itertools.pairwise(ticks))


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("model.layers.3.self_attn.q_proj", (3, "q")),
        ("model.layers.11.mlp.gate_up_proj.weight", (11, "gate_up")),
        ("transformer.h.0.mlp.c_fc", (0, "c_fc")),
        ("lm_head", None),
        ("layers.x.q", None),
    ],
)
def test_locate(name: str, place: tuple[int, str] | None) -> None:
    assert locate(name) == place


def test_markup_is_escaped_once() -> None:
    inner = h("b", "<&>", title='"')
    assert inner == '<b title="&quot;">&lt;&amp;&gt;</b>'
    assert join(h("p", inner, None, ["x", h("br")])) == f"<p>{inner}x<br/></p>"
