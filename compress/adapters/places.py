"""Where the linears of a pruned model lie in the full one."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from compress.model.architecture import Architecture
from compress.structure import StructureMap, kept_columns, kept_rows


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Place:
    """Where a small linear lies in the full one.

    Attributes:
        shape: [out, in] of the full linear.
        rows: Its rows that were kept, int64; None: all.
        columns: Its columns that were kept; None: all.
    """

    shape: tuple[int, int]
    rows: Tensor | None = None
    columns: Tensor | None = None

    @property
    def changed(self) -> bool:
        """Whether pruning cut it."""
        return self.rows is not None or self.columns is not None


def places_of(full: Architecture, structure: StructureMap | None) -> dict[str, Place]:
    """Module -> its place, for the decoder linears.

    Args:
        full: Architecture of the full model.
        structure: What pruning kept; None: everything.
    """
    pruned = None if structure is None or structure.is_identity else structure
    return {
        full.module_name(index, spec): Place(
            shape=full.at(index).linear_shape(spec),
            rows=None if pruned is None else kept_rows(full, spec, pruned.layers[index]),
            columns=None if pruned is None else kept_columns(full, spec, pruned.layers[index]),
        )
        for index in range(full.layers)
        for spec in full.linears_at(index)
    }
