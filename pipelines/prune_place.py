"""Where a pruning computes and what it reads."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.model.load import load_model
from compress.pipelines.stage import Context
from compress.pipelines.way import WHOLE, Way

if TYPE_CHECKING:
    from transformers import PreTrainedModel

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
        way: How models that are run are opened.
    """

    context: Context
    source: str
    device: str
    dtype: Any
    way: Way = WHOLE

    def load(self, path: Path) -> PreTrainedModel:
        """A model on this device, to be run."""
        return self.way.open(path, dtype=self.dtype, device=self.device)

    def load_whole(self, path: Path) -> PreTrainedModel:
        """A model on this device, to be trained or to teach."""
        return load_model(path, dtype=self.dtype, device=self.device)
