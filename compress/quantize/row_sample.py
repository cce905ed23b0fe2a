"""Rows that stand for a whole matrix: one of each stratum, drawn under a seed."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from compress.errors import UsageError

_FLOOR = 0.1
"""Share of the draws that falls on rows of whatever size: a row of small weights may still hold an error."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RowSample:
    """Some rows of a matrix, and how many rows each of them stands for.

    Attributes:
        rows: int64 [n], ascending; a large row may be there more than once.
        counts: float64 [n], on the device of the rows.
    """

    rows: torch.Tensor
    counts: torch.Tensor


def sample_rows(sizes: torch.Tensor, sample: float, seed: int) -> RowSample:
    """Draw one row from each of n consecutive runs of rows of equal summed size.

    A row is drawn in proportion to its size and counts for that much less, so a sum over rows estimated with
    ``counts`` has no bias, and hardly any spread where the summands go with the sizes.

    Args:
        sizes: About what each row adds to the sums that will be estimated, [O], not negative.
        sample: A share of the rows (a float up to 1), or their number (an int); from their number on, all of them.
        seed: Of the draw.

    Raises:
        UsageError: The share or the number is not positive, or the share exceeds 1.
    """
    if sample <= 0 or (isinstance(sample, float) and not sample <= 1):
        raise UsageError(
            f"A sample of {sample!r} rows cannot be drawn.", "Give a share up to 1.0, or a number."
        )
    total = len(sizes)
    count = max(1, round(sample * total)) if isinstance(sample, float) else sample
    if count >= total:
        every = torch.arange(total, device=sizes.device)
        return RowSample(rows=every, counts=torch.ones_like(every, dtype=torch.float64))
    wide = sizes.double().cpu()
    mean = wide.mean()
    odds = (1 - _FLOOR) * wide / mean + _FLOOR if mean > 0 else torch.ones_like(wide)  # they add up to O
    generator = torch.Generator().manual_seed(seed)
    points = (
        (torch.arange(count) + torch.rand(count, generator=generator, dtype=torch.float64)) * total / count
    )
    rows = torch.searchsorted(odds.cumsum(0), points, right=True).clamp_(max=total - 1)
    counts = total / (count * odds[rows])
    return RowSample(rows=rows.to(sizes.device), counts=counts.to(sizes.device))
