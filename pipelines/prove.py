"""What a model that was written computes: recorded for whoever opens it, scored, and opened again to compare."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch

from compress.data.windows import Windows
from compress.pipelines.measure import measured_once, validation_perplexity
from compress.pipelines.reopen import check_ids, record_logits
from compress.pipelines.stage import Context
from compress.pipelines.way import WHOLE, Way


def record_and_score(
    context: Context,
    folder: Path,
    vocab: int,
    validation: Windows,
    label: str,
    *,
    dtype: torch.dtype,
    device: str,
    way: Way = WHOLE,
    into: Path | None = None,
) -> dict[str, Any]:
    """Record the logits of the model in ``folder``, in float32, and measure its perplexity in ``dtype``.

    Args:
        context: Gives the seed and the reporter.
        folder: Holds the model and gets the record.
        vocab: How many tokens it knows.
        validation: What to score.
        label: What the model is called meanwhile.
        dtype: In which it is scored. It is opened again for that: a cast would round its rotary frequencies too.
        device: Where it runs.
        way: How it is opened.
        into: File that keeps the result for a run that goes on after an interruption.

    Returns:
        The perplexity as JSON values with its protocol.
    """
    network = way.open(folder, dtype=torch.float32, device=device)
    record_logits(network, check_ids(vocab, context.common.seed), folder)
    if dtype != torch.float32:
        del network
        network = way.open(folder, dtype=dtype, device=device)
    measure = partial(validation_perplexity, context, network, validation, label)
    return measure() if into is None else measured_once(into, measure)
