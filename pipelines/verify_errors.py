"""Every error of a quantized model that its weights and those of the model before decide, computed again from disk."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from compress.model.checkpoint import Checkpoint
from compress.pipelines.matrices import read_matrix
from compress.pipelines.model_input import ModelInput
from compress.pipelines.verify_quantized import (
    ALLOCATION,
    by_name,
    places_of,
    read_allocation,
    source_model,
)
from compress.pipelines.verify_target import Finding, Target, Value
from compress.progress import Progress
from compress.quantize.checkpoint import MatrixRecord
from compress.quantize.config import QuantConfig
from compress.quantize.decompose import squared_norm
from compress.quantize.linear import LQLinear
from compress.quantize.stored_errors import rounding_error

TOLERANCE = 1e-5
"""Relative; errors are computed in float32, and another machine sums in another order."""
ROUNDING = 1e-12
"""Of a matrix's squared norm: what float32 leaves of an error of zero."""


def check_errors(
    target: Target, checkpoint: Checkpoint, matrices: Mapping[str, MatrixRecord], progress: Progress
) -> Iterator[Finding]:
    """Squared error of each matrix, Q + L1 L2 from disk against the source's weight; and all else of the source.

    With the objective ``frobenius`` also what it was compared with, plain rounding to one format, and the squared
    norms and rank-0 errors that the allocation counted.
    """
    recorded = by_name(target.metrics)
    if not recorded:
        yield target.not_recorded("errors", "only a stage records them")
        return
    if target.source is None:
        yield target.not_checked("errors", "the model before quantization is not here")
        return
    source = source_model(target)
    places = places_of(source, matrices)
    costs = _Costs(target, matrices)
    values: list[Value] = []
    errors: list[float] = []
    worst = 0.0
    for done, (module, record) in enumerate(matrices.items(), start=1):
        weight_OI = read_matrix(source, places[module]).float()
        error, norm = squared_error(checkpoint, module, record, weight_OI)
        known = recorded.get(module, {})
        errors.append(error)
        values += [
            Value(
                what=f"squared_error of {module}",
                recorded=known.get("squared_error"),
                found=error,
                tolerance=TOLERANCE,
                floor=ROUNDING * norm,
            ),
            Value(
                what=f"relative_error of {module}",
                recorded=known.get("relative_error"),
                found=math.sqrt(error / norm) if norm else 0.0,
                tolerance=TOLERANCE,
                floor=math.sqrt(ROUNDING),
            ),
            *costs.of(module, weight_OI, error, norm),
        ]
        before = known.get("squared_error")
        if isinstance(before, float) and before:
            worst = max(worst, abs(error - before) / before)
        progress(done, len(matrices), module)
    total = Value(
        what="squared_error of all matrices",
        recorded=target.metrics.get("squared_error"),
        found=math.fsum(errors),
        tolerance=TOLERANCE,
        floor=1e-300,
    )
    summary = f"{len(matrices)} squared errors from disk{costs.told}, largest relative difference {worst:.0e}"
    yield from target.compare("errors", [*values, total, *costs.totals()], summary)
    yield from _check_rest(target, checkpoint, source, {matrix.tensor for matrix in places.values()})


class _Costs:
    """What the allocation of the objective ``frobenius`` counted in squared errors; nothing for other objectives."""

    def __init__(self, target: Target, matrices: Mapping[str, MatrixRecord]) -> None:
        self._matrices = matrices
        self._metrics, self._allocation = target.metrics, read_allocation(target)
        config = {} if target.stage is None else target.stage.record["config"]
        self._allocated = by_name(self._allocation) if config.get("objective") == "frobenius" else {}
        records = (self._metrics, self._allocation) if self._allocated else ()
        plain = next((known for record in records if (known := record.get("plain_rounding"))), None)
        self._plain = None if plain is None else QuantConfig.from_dict(plain["config"])
        self._norms: list[float] = []
        self._errors: list[float] = []
        self._bits = 0

    @property
    def told(self) -> str:
        """For the summary."""
        return "" if self._plain is None else " and that of plain rounding"

    def of(self, module: str, weight_OI: Tensor, error: float, norm: float) -> Iterator[Value]:
        """The allocation's numbers of one matrix."""
        entry = self._allocated.get(module)
        if entry is None or not entry.get("counted", True):
            return
        yield Value(
            what=f"squared_norm of {module} in {ALLOCATION}",
            recorded=entry.get("squared_norm"),
            found=norm,
            tolerance=TOLERANCE,
            floor=1e-300,
        )
        if self._matrices[module].rank == 0:  # of higher ranks the cost is an estimate
            yield Value(
                what=f"expected_cost of {module} in {ALLOCATION}",
                recorded=entry.get("expected_cost"),
                found=error,
                tolerance=TOLERANCE,
                floor=ROUNDING * norm,
            )
        if self._plain is not None:
            self._norms.append(norm)
            self._errors.append(rounding_error(weight_OI, self._plain))
            self._bits += self._plain.storage_bits((weight_OI.shape[0], weight_OI.shape[1]))

    def totals(self) -> Iterator[Value]:
        """Plain rounding of all matrices, in both records."""
        found = {"stored_bits": self._bits, "squared_error": math.fsum(self._errors)}
        if self._plain is None:
            return
        for where, record in (("stage.json", self._metrics), (ALLOCATION, self._allocation)):
            known: Mapping[str, Any] = record.get("plain_rounding") or {}
            yield Value(
                what=f"config of plain_rounding in {where}",
                recorded=known.get("config", "nothing"),
                found=self._plain.to_dict(),
            )
            yield Value(
                what=f"stored_bits of plain_rounding in {where}",
                recorded=known.get("stored_bits", "nothing"),
                found=found["stored_bits"],
            )
            yield Value(
                what=f"squared_error of plain_rounding in {where}",
                recorded=known.get("squared_error", "nothing"),
                found=found["squared_error"],
                tolerance=TOLERANCE,
                floor=ROUNDING * math.fsum(self._norms),
            )


def squared_error(
    checkpoint: Checkpoint, module: str, record: MatrixRecord, weight_OI: Tensor
) -> tuple[float, float]:
    """``||W - Q - L1 L2||_F^2`` and ``||W||_F^2`` of one matrix, with what is on disk."""
    layer = stored_layer(checkpoint, module, record)
    factors = layer.factors()
    rest_OI = (
        weight_OI - layer.quantized().dequantize()
    )  # in the order of the decomposition: the same rounding
    if factors is not None:
        rest_OI = rest_OI - factors[0] @ factors[1]
    return squared_norm(rest_OI), squared_norm(weight_OI)


def stored_layer(checkpoint: Checkpoint, module: str, record: MatrixRecord) -> LQLinear:
    """A quantized matrix of a checkpoint as a layer."""
    return LQLinear.from_stored(record, lambda part: checkpoint.read(f"{module}.{part}"))


def _check_rest(
    target: Target, checkpoint: Checkpoint, source: ModelInput, quantized: set[str]
) -> Iterator[Finding]:
    """What is not quantized is the source's, bit for bit."""
    rest = [name for name in source.checkpoint.names if name not in quantized]
    changed = [
        n for n in rest if n in checkpoint and not _same(checkpoint.read(n), source.checkpoint.read(n))
    ]
    yield from (
        target.differs("dense tensors", f"{name} is not that of the model before") for name in changed
    )
    missing = [name for name in rest if name not in checkpoint]
    yield from (target.differs("dense tensors", f"{name} is missing") for name in missing)
    if not changed and not missing:
        yield target.ok("dense tensors", f"{len(rest)} tensors as in the model before")


def _same(one: torch.Tensor, other: torch.Tensor) -> bool:
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    return torch.equal(one.reshape(-1).view(torch.uint8), other.reshape(-1).view(torch.uint8))
