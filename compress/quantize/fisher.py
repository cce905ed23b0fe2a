"""The diagonal Fisher information of a matrix: what an error of each of its weights costs the loss (LQ-LoRA §3.4).

``F`` is the sum over examples of the squared gradient of one example's loss, and ``sum F (W - W')^2`` the cost of
replacing W by W'. Factors of least cost are known only where F has rank one, so the low-rank step weighs a matrix
from two sides, with ``D_row`` and ``D_col``; the cost itself takes the whole F where it was kept.

Shapes: O out, I in.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from compress.durable import replacing
from compress.errors import UsageError
from compress.model.tensor_file import save_tensors

FLOOR = 1e-4
"""Least entry of ``D_row`` and ``D_col``, their mean being one: what never had a gradient can be un-scaled."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Fisher:
    """Diagonal Fisher information F of a matrix [O, I], float32, not negative.

    Attributes:
        rows: F summed over each row, [O].
        columns: F summed over each column, [I].
        examples: Examples behind the sums.
        full: F [O, I] itself; None: it is taken for the rank-one matrix that has these sums.
    """

    rows: Tensor
    columns: Tensor
    examples: int
    full: Tensor | None = None

    @classmethod
    def of(cls, full_OI: Tensor, *, examples: int) -> Fisher:
        """Of a whole F."""
        wide = full_OI.detach().float()
        rows, columns = (wide.sum(axis, dtype=torch.float64).float() for axis in (1, 0))
        return cls(rows=rows, columns=columns, examples=examples, full=wide)

    @classmethod
    def uniform(cls, shape: tuple[int, int], *, device: torch.device | None = None) -> Fisher:
        """One for every weight: costs are squared Frobenius norms, and the low-rank step is a plain SVD."""
        rows = torch.full((shape[0],), float(shape[1]), device=device)
        columns = torch.full((shape[1],), float(shape[0]), device=device)
        return cls(rows=rows, columns=columns, examples=1)

    @property
    def shape(self) -> tuple[int, int]:
        """(O, I)."""
        return len(self.rows), len(self.columns)

    def scale_rows(self) -> Tensor:
        """``D_row`` [O], the root of F's mean over the columns, scaled to a mean of one; at least ``FLOOR``."""
        return _scale(self.rows)

    def scale_columns(self) -> Tensor:
        """``D_col`` [I], the root of F's mean over the rows, scaled to a mean of one; at least ``FLOOR``."""
        return _scale(self.columns)

    def cost(self, error_OI: Tensor) -> float:
        """``sum F E^2`` with the whole F, or with ``rows columns^T / sum of F`` where it was not kept.

        Raises:
            UsageError: E has another shape.
        """
        if tuple(error_OI.shape) != self.shape:
            raise UsageError(
                f"A Fisher matrix of {self.shape[0]} x {self.shape[1]} cannot weigh one of shape "
                f"{tuple(error_OI.shape)}.",
                "Pass both as [out, in].",
            )
        squares = error_OI.float().square()
        if self.full is not None:
            return float((squares * self.full).sum(1).double().sum())
        total = float(self.columns.double().sum())
        if total == 0:
            return 0.0
        return float((squares @ (self.columns / total)).double() @ self.rows.double())

    def summed(self) -> Fisher:
        """The same without the whole F."""
        return Fisher(rows=self.rows, columns=self.columns, examples=self.examples)


def _scale(sums: Tensor) -> Tensor:
    root = sums.double().sqrt()
    mean = root.mean()
    return (root / mean).clamp(min=FLOOR).float() if mean > 0 else torch.ones_like(sums)


def save_fisher(path: Path, found: Mapping[str, Fisher]) -> None:
    """Write the Fisher matrices of some modules, by name, into one safetensors file, all or nothing."""
    tensors: dict[str, Tensor] = {}
    for name, fisher in found.items():
        parts = {"rows": fisher.rows, "columns": fisher.columns, "full": fisher.full}
        tensors |= {f"{name}.{part}": t.cpu().contiguous() for part, t in parts.items() if t is not None}
    examples = {name: str(fisher.examples) for name, fisher in found.items()}
    with replacing(path) as temporary:
        save_tensors(temporary, tensors, examples)


def load_fisher(path: Path) -> dict[str, Fisher]:
    """What :func:`save_fisher` wrote."""
    with safe_open(str(path), framework="pt") as file:
        kept = set(file.keys())
        names = {name: e for name, e in (file.metadata() or {}).items() if f"{name}.rows" in kept}
        return {
            name: Fisher(
                rows=file.get_tensor(f"{name}.rows"),
                columns=file.get_tensor(f"{name}.columns"),
                examples=int(examples),
                full=file.get_tensor(f"{name}.full") if f"{name}.full" in kept else None,
            )
            for name, examples in names.items()
        }
