"""How a stage opens models: whole, or layer by layer where they do not fit."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from compress.model.load import load_model
from compress.model.states import Room
from compress.model.streamed import stream_model

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True, slots=True, kw_only=True)
class Way:
    """How a stage opens models; what it computes is the same, bit by bit.

    Attributes:
        streamed: Each layer is read when it runs, not the whole model at once.
        ahead: Streamed, the next layer is read meanwhile.
        room: Where hidden states of calibration text are kept when they are many; None: in memory.
        workers: How many matrices are worked on at once.
    """

    streamed: bool = False
    ahead: bool = True
    room: Room | None = None
    workers: int = 1

    def open(
        self, path: Path, *, dtype: torch.dtype | str, device: torch.device | str = "cpu"
    ) -> PreTrainedModel:
        """The causal language model in a folder, to be run, never trained.

        Raises:
            CompressError: As ``load_model`` or ``stream_model``.
        """
        if not self.streamed:
            return load_model(path, dtype=dtype, device=device)
        kind = getattr(torch, dtype) if isinstance(dtype, str) else dtype
        return stream_model(path, dtype=kind, device=device, ahead=self.ahead, room=self.room)


WHOLE = Way()
"""Everything in memory."""
