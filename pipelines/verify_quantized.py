"""A quantized model against its record: stored bits, the allocation's certificate, every squared error from disk."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from compress.evaluate.memory import file_bytes
from compress.model.checkpoint import Checkpoint, checkpoint_architecture
from compress.pipelines.matrices import Matrix, matrices_of, read_matrix
from compress.pipelines.model_input import ModelInput
from compress.pipelines.verify_target import Finding, Target, Value
from compress.pipelines.vocabulary import vocabulary_matrices
from compress.pipelines.workspace import read_json
from compress.progress import Progress
from compress.quantize.checkpoint import MatrixRecord
from compress.quantize.decompose import squared_norm
from compress.quantize.linear import LQLinear
from compress.solvers.problem import relative_gap

TOLERANCE = 1e-5
"""Relative; errors are computed in float32, and another machine sums in another order."""
ROUNDING = 1e-12
"""Of a matrix's squared norm: what float32 leaves of an error of zero."""
ALLOCATION = "allocation.json"


def check_stored_bits(
    target: Target, checkpoint: Checkpoint, matrices: Mapping[str, MatrixRecord]
) -> Iterator[Finding]:
    """Bits of each matrix, counted from its tensors, against the stage's record and the allocation's."""
    recorded, allocated = by_name(target.metrics), by_name(read_allocation(target))
    values, total, numel = [], 0, 0
    uncounted = _uncounted(read_allocation(target))
    for module, record in matrices.items():
        bits = 8 * sum(checkpoint.nbytes(f"{module}.{part}") for part in record.layout())
        weights = record.shape[0] * record.shape[1]
        if module not in uncounted:
            total, numel = total + bits, numel + weights
        for where, entry in (("stage.json", recorded.get(module)), (ALLOCATION, allocated.get(module))):
            known = entry or {}
            choice = {"rank": record.rank, **record.config.to_dict()}
            values += [
                Value(what=f"{key} of {module} in {where}", recorded=known.get(key), found=found)
                for key, found in {"stored_bits": bits, **choice}.items()
            ]
            per_weight = Value(
                what=f"bits_per_weight of {module} in {where}",
                recorded=known.get("bits_per_weight"),
                found=bits / weights,
                tolerance=1e-9,
            )
            values.append(per_weight)
    for where, entries in (("stage.json", recorded), (ALLOCATION, allocated)):
        names = sorted(entries) if entries else None
        values.append(Value(what=f"matrices in {where}", recorded=names, found=sorted(matrices)))
    for key in ("stored_bits_per_weight", "bits_per_weight"):
        place = target.metrics if key.startswith("stored") else target.metrics.get("after", {})
        values.append(Value(what=key, recorded=place.get(key), found=total / numel, tolerance=1e-9))
    summary = f"{len(matrices)} matrices, {total} bits that a budget counts, {total / numel:.4f} per weight"
    yield from target.compare("stored bits", values, summary)


def check_allocation(target: Target, matrices: Mapping[str, MatrixRecord]) -> Iterator[Finding]:
    """``allocation.json``: its sum under its limit, its cost, lower bound and gap; the same in the stage's record."""
    allocation = read_allocation(target)
    if not allocation:
        yield target.not_recorded("allocation", f"there is no {ALLOCATION}")
        return
    certificate, limit = allocation["certificate"], allocation["limit_bits"]
    counted = allocation["budget_includes"] == "factors"
    uncounted = _uncounted(allocation)
    chosen = [record for module, record in matrices.items() if module not in uncounted]
    size = sum(r.storage_bits if counted else r.config.storage_bits(r.shape) for r in chosen)
    total = sum(record.storage_bits for record in chosen)
    numel = sum(record.shape[0] * record.shape[1] for record in chosen)
    cost, bound, gap = (certificate[key] for key in ("objective", "lower_bound", "gap"))
    faults = []
    if size > limit:
        faults.append(f"the matrices take {size} bits, above limit_bits ({limit})")
    if bound > cost:
        faults.append(f"lower_bound {bound:.9g} is above the objective {cost:.9g}")
    if (certificate["status"] == "optimal") != (gap == 0):
        faults.append(f"the status {certificate['status']} does not go with a gap of {gap:.1e}")
    values = [
        Value(what="size of the certificate", recorded=certificate["size"], found=size),
        Value(
            what="bits_per_weight",
            recorded=allocation["bits_per_weight"],
            found=total / numel,
            tolerance=1e-9,
        ),
        Value(what="gap", recorded=gap, found=relative_gap(cost, bound), tolerance=1e-9, floor=1e-15),
        Value(
            what="certificate in stage.json",
            recorded=_untimed(target.metrics.get("allocation")),
            found=_untimed(certificate),
        ),
        Value(what="budget in stage.json", recorded=target.metrics.get("budget"), found=allocation["budget"]),
    ]
    summed = math.fsum(
        entry["expected_cost"] for entry in allocation["matrices"] if entry["name"] not in uncounted
    )
    values.append(Value(what="objective", recorded=cost, found=summed, tolerance=1e-9, floor=1e-300))
    budget, taken = allocation["budget"], file_bytes(target.path)
    if budget["kind"] == "bits":
        values.append(Value(what="limit_bits", recorded=limit, found=math.floor(budget["value"] * numel)))
    elif counted and taken > budget["value"]:
        faults.append(f"the weight files have {taken} bytes, above the budget of {budget['text']}")
    yield from (target.differs("allocation", fault) for fault in faults)
    summary = f"{size} of {limit} bits, {certificate['solver']}, gap {gap:.1e}"
    compared = target.compare("allocation", values, summary)
    yield from (finding for finding in compared if not faults or finding.result == "differs")


def check_errors(
    target: Target, checkpoint: Checkpoint, matrices: Mapping[str, MatrixRecord], progress: Progress
) -> Iterator[Finding]:
    """Squared error of each matrix, Q + L1 L2 from disk against the source's weight; and all else of the source."""
    recorded = by_name(target.metrics)
    if not recorded:
        yield target.not_recorded("errors", "only a stage records them")
        return
    if target.source is None:
        yield target.not_checked("errors", "the model before quantization is not here")
        return
    source = _model_input(target)
    places = {matrix.module: matrix for matrix in matrices_of(source)}
    if source.architecture.embedding_module in matrices:
        places |= {matrix.module: matrix for matrix in vocabulary_matrices(source)}
    values: list[Value] = []
    errors: list[float] = []
    worst = 0.0
    for done, (module, record) in enumerate(matrices.items(), start=1):
        error, norm = squared_error(checkpoint, module, record, source, places[module])
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
        ]
        before = values[-2].recorded
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
    summary = f"{len(matrices)} squared errors from disk, largest relative difference {worst:.0e}"
    yield from target.compare("errors", [*values, total], summary)
    yield from _check_rest(target, checkpoint, source, {matrix.tensor for matrix in places.values()})


def squared_error(
    checkpoint: Checkpoint, module: str, record: MatrixRecord, source: ModelInput, place: Matrix
) -> tuple[float, float]:
    """``||W - Q - L1 L2||_F^2`` and ``||W||_F^2`` of one matrix, with what is on disk."""
    layer = LQLinear.from_stored(record, lambda part: checkpoint.read(f"{module}.{part}"))
    weight_OI, factors = read_matrix(source, place).float(), layer.factors()
    rest_OI = (
        weight_OI - layer.quantized().dequantize()
    )  # in the order of the decomposition: the same rounding
    if factors is not None:
        rest_OI = rest_OI - factors[0] @ factors[1]
    return squared_norm(rest_OI), squared_norm(weight_OI)


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


def _model_input(target: Target) -> ModelInput:
    checkpoint = Checkpoint(target.source or target.path)
    return ModelInput(
        name=checkpoint.path.name,
        path=checkpoint.path,
        id="",
        checkpoint=checkpoint,
        architecture=checkpoint_architecture(checkpoint),
    )


def read_allocation(target: Target) -> Mapping[str, Any]:
    """The content of ``allocation.json``; empty when there is none."""
    path = target.path / ALLOCATION
    return read_json(path) if path.is_file() else {}


def _untimed(certificate: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """A certificate without the time that it took; None where there is no record of one."""
    if certificate is None:
        return None
    return {key: value for key, value in certificate.items() if key != "seconds"}


def _uncounted(allocation: Mapping[str, Any]) -> set[str]:
    """Modules that a budget in bits does not count."""
    return {name for name, entry in by_name(allocation).items() if not entry.get("counted", True)}


def by_name(content: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """The entries of ``matrices`` by module name."""
    return {str(entry["name"]): entry for entry in content.get("matrices") or ()}
