"""Which windows of a step each of several processes computes, and dropout that does not depend on it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from compress.errors import UsageError


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """Consecutive windows of one micro batch.

    Attributes:
        index: The micro batch within its step, from 0.
        first: The first window, counted within the micro batch.
        count: How many windows.
        of: Windows of the whole micro batch.
    """

    index: int
    first: int
    count: int
    of: int


def shares(windows: int, micro_batch: int, ranks: int) -> tuple[tuple[Piece, ...], ...]:
    """The windows of a step, divided among ``ranks`` processes; nothing is left out and nothing taken twice.

    Every process gets a run of consecutive windows, as equal in length as can be: the first ``windows % ranks`` have
    one more. Runs are cut where micro batches end, so that no forward pass is larger than in one process, and each
    lies in one micro batch.

    Args:
        windows: Of a step: micro batches times their size.
        micro_batch: Windows of a forward pass in one process.
        ranks: Processes.

    Raises:
        UsageError: A process would have nothing to do.
    """
    if ranks > windows:
        raise UsageError(
            f"{ranks} processes were launched, and a step trains {windows} windows.",
            f"Launch {windows} or fewer, or raise --micro-batch or --accumulation.",
        )
    base, more = divmod(windows, ranks)
    found, start = [], 0
    for rank in range(ranks):
        end = start + base + (rank < more)
        pieces = []
        while start < end:
            index, first = divmod(start, micro_batch)
            stop = min(end, (index + 1) * micro_batch)
            of = min(micro_batch, windows - index * micro_batch)
            pieces.append(Piece(index=index, first=first, count=stop - start, of=of))
            start = stop
        found.append(tuple(pieces))
    return tuple(found)


class RowDropout:
    """Dropout of a few rows of a batch that is what it would be for them in the whole batch.

    A dropout layer draws one number for every element of its input, in order. Inside :meth:`rows` each layer is given
    the whole batch, zeros in the place of the rows that another process has, and what comes out is cut back to the
    rows that are here. So the numbers drawn for a window depend on the window, and not on how many processes there are.

    It acts on ``nn.Dropout`` layers whose inputs have the windows as their first dimension; dropout that a model
    applies as a function (to attention weights) draws for the rows at hand.

    Args:
        model: Its dropout layers are watched from now on.
    """

    def __init__(self, model: nn.Module) -> None:
        self._piece: Piece | None = None
        for module in model.modules():
            if isinstance(module, nn.Dropout) and module.p > 0:
                module.register_forward_pre_hook(self._widen)
                module.register_forward_hook(self._narrow)

    @contextmanager
    def rows(self, piece: Piece) -> Iterator[None]:
        """Forward passes in here are of the windows of ``piece``."""
        self._piece = piece
        try:
            yield
        finally:
            self._piece = None

    def _partial(self, module: nn.Module, rows: int) -> Piece | None:
        piece = self._piece
        if (
            piece is None
            or not module.training
            or piece.count == piece.of
            or rows not in (piece.count, piece.of)
        ):
            return None
        return piece

    def _widen(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Any, ...] | None:
        piece = self._partial(module, len(inputs[0]))
        if piece is None:
            return None
        after = piece.of - piece.first - piece.count
        edges = [0, 0] * (inputs[0].dim() - 1) + [piece.first, after]
        return (F.pad(inputs[0], edges), *inputs[1:])

    def _narrow(self, module: nn.Module, _: Any, output: Tensor) -> Tensor | None:
        piece = self._partial(module, len(output))
        if piece is None:
            return None
        return torch.narrow(output, 0, piece.first, piece.count)
