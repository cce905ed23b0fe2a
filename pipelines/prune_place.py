"""Where a pruning computes and what it reads."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from compress.model.load import load_model
from compress.pipelines.stage import Context

BATCH = 4
"""Windows per forward pass of the calibration."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where a pruning computes and what it reads.

    Attributes:
        context: Options and reporter.
        source: Text source.
        device: Torch device.
        dtype: Compute dtype.
    """

    context: Context
    source: str
    device: str
    dtype: Any

    def load(self, path: Path) -> PreTrainedModel:
        """A model on this device."""
        return load_model(path, dtype=self.dtype, device=self.device)
