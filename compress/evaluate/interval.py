"""Standard error and confidence interval of a mean over windows of different weights."""

from __future__ import annotations

import math

import torch
from scipy.special import stdtrit

LEVEL = 0.95
"""Probability of the intervals that are reported."""


def ratio_error(sums: torch.Tensor, counts: torch.Tensor) -> float | None:
    """Standard error of the ratio ``sum(sums) / sum(counts)`` over windows; None for a single window.

    With equal counts it is the usual standard error of the windows' means.

    Args:
        sums: What each window adds up, float64 [windows].
        counts: Tokens of each window, int64 [windows].
    """
    n = len(sums)
    if n < 2:
        return None
    residuals = sums - sums.sum() / counts.sum() * counts
    return float((residuals.square().sum() * n / (n - 1)).sqrt() / counts.sum())


def t_interval(mean: float, error: float | None, n: int) -> tuple[float, float] | None:
    """The 95 % interval of Student's t around a mean over ``n`` windows; None where there is no error.

    Windows count as independent draws. Neighbouring windows of one article are alike, so for a text of few long
    documents the interval is too narrow.
    """
    if error is None or n < 2:
        return None
    reach = float(stdtrit(n - 1, (1 + LEVEL) / 2)) * error
    return mean - reach, mean + reach


def exponential(value: float) -> float:
    """``exp(value)``, infinite instead of an error where it is too large."""
    return math.exp(value) if value < 700 else math.inf
