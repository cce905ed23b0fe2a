"""Baselines: what is noise passes, what is not fails and says so, other protocols are refused."""

from __future__ import annotations

import statistics
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from compress.benchmarks.figures import (
    DEVIATIONS,
    FLOORS,
    Kind,
    check_protocol,
    compare,
    make_baseline,
    tolerance,
)
from compress.errors import CompressError

PROTOCOL = {"model": "abc", "dtype": "float32", "test_text": "123"}


def figures(perplexity: float, size: float, memory: float) -> dict[str, tuple[Kind, float]]:
    return {
        "quantize: perplexity": ("perplexity", perplexity),
        "eval, quantized: bytes": ("bytes", size),
        "quantize: peak memory": ("peak_memory", memory),
    }


def baseline(*perplexities: float) -> dict[str, Any]:
    return make_baseline("quick", PROTOCOL, [figures(value, 1000.0, 5e8) for value in perplexities])


@given(
    values=st.lists(st.floats(5.0, 50.0), min_size=2, max_size=6),
    inside=st.floats(-0.99, 0.99),
    outside=st.floats(1.01, 5.0),
)
def test_noise_passes_and_more_than_noise_does_not(
    values: list[float], inside: float, outside: float
) -> None:
    """The bar is computed here from the values by themselves."""
    known = baseline(*values)
    mean = sum(values) / len(values)
    deviation = (sum((value - mean) ** 2 for value in values) / (len(values) - 1)) ** 0.5
    slack = max(0.01 * mean, 4 * deviation)
    for factor, passes in ((inside, True), (outside, False)):
        verdicts = {each.name: each for each in compare(known, figures(mean + factor * slack, 1000.0, 5e8))}
        found = verdicts["quantize: perplexity"]
        assert found.passed is passes
        assert found.bar == pytest.approx(mean + slack)
        assert all(each.passed for name, each in verdicts.items() if name != "quantize: perplexity")


def test_a_regression_is_named_with_its_size_and_the_bar() -> None:
    known = baseline(20.0, 20.0)
    (failed,) = [each for each in compare(known, figures(22.0, 1000.0, 5e8)) if not each.passed]
    assert failed.verdict == "regressed"
    assert failed.sentence() == (
        "quantize: perplexity is 22.0000, the baseline 20.0000 (+10.00%), the bar 20.2000"
    )


@pytest.mark.parametrize("size", [999.0, 1001.0])
def test_bytes_are_compared_exactly(size: float) -> None:
    (failed,) = [each for each in compare(baseline(20.0), figures(20.0, size, 5e8)) if not each.passed]
    assert (failed.name, failed.kind) == ("eval, quantized: bytes", "bytes")


def test_what_became_better_passes_and_is_said() -> None:
    verdicts = {each.name: each.verdict for each in compare(baseline(20.0), figures(10.0, 1000.0, 5e8))}
    assert verdicts["quantize: perplexity"] == "better"
    assert verdicts["quantize: peak memory"] == "ok"


def test_nan_missing_and_new_figures_fail() -> None:
    known = baseline(20.0)
    assert not compare(known, figures(float("nan"), 1000.0, 5e8))[0].passed
    some = figures(20.0, 1000.0, 5e8)
    some.pop("quantize: peak memory")
    some["train: peak memory"] = ("peak_memory", 1.0)
    verdicts = {each.name: each for each in compare(known, some)}
    assert verdicts["quantize: peak memory"].verdict == "missing"
    assert verdicts["train: peak memory"].verdict == "new"
    assert "was not measured" in verdicts["quantize: peak memory"].sentence()
    assert not any(verdicts[name].passed for name in ("quantize: peak memory", "train: peak memory"))


def test_tolerances_come_from_the_runs_and_have_floors() -> None:
    values = [30.0, 33.0, 36.0]
    assert tolerance("perplexity", values) == pytest.approx(DEVIATIONS * statistics.stdev(values) / 33)
    assert tolerance("peak_memory", [5e8]) == FLOORS["peak_memory"]
    assert tolerance("bytes", [10.0, 10.0]) == 0
    with pytest.raises(CompressError, match="differs from run to run"):
        make_baseline("quick", PROTOCOL, [figures(20.0, size, 5e8) for size in (1.0, 2.0)])


def test_other_protocols_are_not_compared() -> None:
    known = baseline(20.0)
    check_protocol(known, dict(PROTOCOL))
    with pytest.raises(CompressError, match=r"test_text: 123 there, 456 here"):
        check_protocol(known, PROTOCOL | {"test_text": "456"})
    with pytest.raises(CompressError, match="dtype: float32 there, None here"):
        check_protocol(known, {key: value for key, value in PROTOCOL.items() if key != "dtype"})
    with pytest.raises(CompressError, match="format version"):
        check_protocol(known | {"format_version": 0}, PROTOCOL)
