"""Which shape to try next: predictions of heads and of channels, each scaled to what trials have measured.

Criteria tell well which heads or which channels matter, and badly how heads compare with channels. Two trials that
lie apart in what they take tell that; the third is then chosen by predictions with both scales corrected.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from scipy.optimize import nnls

from compress.prune.shape import Shape

LEAST_RISE = 1e-3
"""Nats per token; a smaller measured rise of the loss is noise, and counts as this."""


def next_trial(shapes: Sequence[Shape], rises: Mapping[int, float]) -> int:
    """Position of the shape to try next.

    The first is the one predicted to be best, the second the one that takes least of the attention among the others.
    The damage of shape i is then taken to be ``a * attention_i + b * mlp_i`` with a and b fitted to the measured
    rises by non-negative least squares of relative errors.

    Args:
        shapes: Candidates, the predicted best first.
        rises: Measured rise of the loss over the full model by position, nats per token; not of all of them.
    """
    left = [at for at in range(len(shapes)) if at not in rises]
    parts = [shape.parts for shape in shapes]
    known = [part for part in parts if part is not None]
    if not rises or len(known) < len(parts):
        return left[0]
    if len(rises) == 1:
        return min(left, key=lambda at: (known[at][0], at))
    measured = {at: max(rise, LEAST_RISE) for at, rise in rises.items()}
    rows = np.asarray([known[at] for at in measured]) / np.asarray(list(measured.values()))[:, None]
    scales, _ = nnls(rows, np.ones(len(measured)))
    return min(left, key=lambda at: (float(scales @ np.asarray(known[at])), at))
