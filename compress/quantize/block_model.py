"""The error a block is likely to have, from its largest weight and its scale alone.

It corrects estimates from a sample of rows: the sum over all rows of what it says, which takes no weights but the
largest, is compared with the sample's estimate of that sum, and what the sample overstates there it is taken to
overstate of the errors (a ratio estimate, whose bias falls with the number of rows drawn).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from compress.quantize.config import QuantConfig
from compress.quantize.row_sample import RowSample

_NODES = 256
"""Ratios of scale to largest weight that errors are tabulated for, evenly up to `_LARGEST`."""
_LARGEST = 4.0
_WEIGHTS = 1 << 12
"""Weights, at most, whose mean error is tabulated."""


def typical_units(weight: Tensor, size: int) -> Tensor:
    """Weights of evenly spaced blocks as shares of their block's largest, [n].

    Args:
        weight: [O, I].
        size: Weights of a block; those at the end of a row that do not fill one are left out where others do.
    """
    rows, columns = weight.shape
    width = min(size, columns)
    per_row = columns // width
    at = torch.arange(0, rows * per_row, -(-rows * per_row * width // _WEIGHTS), device=weight.device)
    inside = (at % per_row * width)[:, None] + torch.arange(width, device=weight.device)
    blocks = weight[(at // per_row)[:, None], inside].float()
    return (blocks / blocks.abs().amax(1, keepdim=True).clamp(min=torch.finfo(blocks.dtype).tiny)).view(-1)


def relative_errors(units: Tensor, nearest: Tensor) -> Tensor:
    """Mean squared error of a weight for each ratio of scale to largest weight, in squares of that weight.

    Args:
        units: From :func:`typical_units`.
        nearest: Table entries of the equal cells of [-1, 1], [cells].

    Returns:
        float32 [nodes].
    """
    ratios = torch.arange(_NODES, device=units.device).clamp(min=0.5)[:, None] * (_LARGEST / _NODES)
    half = len(nearest) // 2
    cells = (units / ratios * half + half).clamp_(0, len(nearest) - 1).long()
    values = nearest.index_select(0, cells.view(-1)).view(cells.shape)
    return (units - values * ratios).square_().mean(1)


class BlockModel:
    """Corrections for the configurations of one block size.

    Args:
        weight: [O, I].
        absmax_ON: Largest absolute weights of all blocks.
        weights: Summed weights of the elements of every block, [O, N], or [N] where all rows have the same.
        tables: By width, the table entries nearest to equal cells of [-1, 1].
        rows: The sample.
        size: Weights of a block.
    """

    def __init__(
        self,
        weight: Tensor,
        absmax_ON: Tensor,
        weights: Tensor,
        tables: Mapping[int, Tensor],
        rows: RowSample,
        size: int,
    ) -> None:
        self._absmax = absmax_ON
        self._squares = absmax_ON.square() * weights
        self._rows = rows
        units = typical_units(weight, size)
        self._errors = {bits: relative_errors(units, table) for bits, table in tables.items()}
        self._nodes: dict[tuple[int, int], Tensor] = {}
        self._found: dict[tuple[int, int, int], Tensor] = {}

    def correction(self, config: QuantConfig, bits: int) -> Tensor:
        """What all rows are likely to lose, as a share of what the sample says that they are likely to; float64 [].

        Args:
            config: Gives scale bits and group size; the type of the second-level scales makes no difference here.
            bits: Width of the codes.
        """
        key = config.scale_bits, config.group_size
        if key not in self._nodes:
            self._nodes[key] = self._find(config)
        if (*key, bits) not in self._found:
            likely = self._errors[bits].index_select(0, self._nodes[key]).view(self._squares.shape)
            likely_O = likely.mul_(self._squares).sum(1).double()
            estimate = likely_O[self._rows.rows] @ self._rows.counts
            self._found[*key, bits] = torch.where(estimate > 0, likely_O.sum() / estimate, 1.0)
        return self._found[*key, bits]

    def _find(self, config: QuantConfig) -> Tensor:
        """The node of every block, int64 [O * N]."""
        flat = self._absmax.view(-1)
        least = flat.min()
        above = flat - least
        size = min(config.group_size, len(flat))
        groups = torch.nn.functional.pad(above, (0, -len(flat) % size)).view(-1, size)
        tiny = torch.finfo(flat.dtype).tiny
        steps = (groups.amax(1, keepdim=True) / (2**config.scale_bits - 1)).clamp_(min=tiny)
        scales = (groups / steps).round_().mul_(steps).view(-1)[: len(flat)].add_(least)
        ratios: Tensor = scales.div_(self._absmax.view(-1).clamp(min=tiny)).mul_(_NODES / _LARGEST)
        return ratios.round_().clamp_(0, _NODES - 1).long()
