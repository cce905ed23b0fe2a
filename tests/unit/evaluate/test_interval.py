from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from compress.evaluate.interval import exponential, ratio_error, t_interval


@given(st.lists(st.floats(-5, 9), min_size=2, max_size=40), st.integers(1, 600))
def test_equal_windows_give_the_textbook_interval(means: list[float], tokens: int) -> None:
    sums = torch.tensor(means, dtype=torch.float64) * tokens
    counts = torch.full((len(means),), tokens)
    error = ratio_error(sums, counts)
    assert error == pytest.approx(float(stats.sem(means)), rel=1e-9, abs=1e-12)
    found = t_interval(float(np.mean(means)), error, len(means))
    assert found is not None
    if float(stats.sem(means)) > 0:
        expected = stats.t.interval(0.95, len(means) - 1, loc=np.mean(means), scale=stats.sem(means))
        assert found == pytest.approx(tuple(map(float, expected)), rel=1e-9, abs=1e-9)


def test_it_covers_the_truth_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    draws = torch.tensor(rng.normal(3.0, 0.5, (2000, 6)))
    hit = 0
    for sums in draws:
        found = t_interval(float(sums.mean()), ratio_error(sums, torch.ones(6)), 6)
        assert found is not None
        hit += found[0] <= 3.0 <= found[1]
    # a binomial of 2000 trials has a standard deviation of 0.005; with z instead of t it would be 0.89
    assert abs(hit / 2000 - 0.95) < 0.02


def test_a_single_window_has_no_interval() -> None:
    assert ratio_error(torch.tensor([3.0]), torch.tensor([2])) is None
    assert t_interval(1.5, None, 1) is None


def test_what_is_too_large_is_infinite() -> None:
    assert exponential(2.0) == math.exp(2.0)
    assert exponential(1e4) == math.inf
