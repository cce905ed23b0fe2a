"""What the tests of whole chains share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from compress.pipelines.dispatch import run_verb
from compress.pipelines.settings import Common

TRAINING = {
    "steps": 4,
    "micro_batch": 2,
    "accumulation": 1,
    "sequence": 32,
    "lr": 1e-3,
    "rank": 4,
    "alpha": 8,
}
PRUNING = {**TRAINING, "calibration_tokens": 2048, "repair_steps": 8}
"""Few tokens for ``prune``."""


def run(verb: str, common: Common, **given: Any) -> dict[str, Any]:
    """One verb, quietly."""
    return run_verb(verb, common, given, quiet=True)


def logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """Logits of the last position."""
    with torch.inference_mode():
        result: torch.Tensor = model(ids, use_cache=False).logits[:, -1].float()
    return result


def assert_recorded(model: Any, folder: Path) -> None:
    """The model gives the logits that the stage in ``folder`` recorded."""
    record = load_file(folder / "logits.safetensors")
    torch.testing.assert_close(logits(model, record["input_ids"]), record["logits"], rtol=1e-4, atol=1e-4)
