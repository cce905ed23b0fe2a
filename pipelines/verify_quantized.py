"""A quantized model against its record: stored bits, what was left as it was, the allocation's certificate."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from compress.evaluate.memory import file_bytes
from compress.model.checkpoint import Checkpoint, checkpoint_architecture
from compress.pipelines.allocate import narrow, parse_rank
from compress.pipelines.matrices import Matrix, left_dense_of, matrices_of
from compress.pipelines.model_input import ModelInput
from compress.pipelines.quantize_tables import singular_hessians
from compress.pipelines.verify_target import Finding, Target, Value
from compress.pipelines.vocabulary import vocabulary_matrices
from compress.pipelines.workspace import read_json
from compress.quantize.checkpoint import MatrixRecord
from compress.solvers.problem import relative_gap

ALLOCATION = "allocation.json"


def check_stored_bits(
    target: Target, checkpoint: Checkpoint, matrices: Mapping[str, MatrixRecord]
) -> Iterator[Finding]:
    """Bits of each matrix, counted from its tensors, against the stage's record and the allocation's.

    Where the model before is here, also the bits that its matrices took and what was left as it was.
    """
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
    if target.stage is not None and target.source is not None:
        values += _before(target, {module for module in matrices if module not in uncounted})
    summary = f"{len(matrices)} matrices, {total} bits that a budget counts, {total / numel:.4f} per weight"
    yield from target.compare("stored bits", values, summary)


def _before(target: Target, counted: set[str]) -> Iterator[Value]:
    """What the stage recorded of its matrices as they were, and of those that it could not take as asked."""
    metrics, source = target.metrics, source_model(target)
    places = places_of(source, counted)
    config = {} if target.stage is None else target.stage.record["config"]
    chosen = [places[module] for module in counted]
    dense = sum(source.checkpoint.nbytes(matrix.tensor) for matrix in chosen)
    yield Value(
        what="bits_per_weight before",
        recorded=metrics.get("before", {}).get("bits_per_weight"),
        found=8 * dense / sum(matrix.numel for matrix in chosen),
        tolerance=1e-9,
    )
    yield Value(what="left_dense", recorded=metrics.get("left_dense"), found=left_dense_of(source))
    yield Value(
        what="lower_ranks",
        recorded=metrics.get("lower_ranks"),
        found=narrow(matrices_of(source), parse_rank(config["rank"]), config["runtime"]),
    )
    if "singular" in metrics:  # not recorded by earlier versions
        yield Value(
            what="singular",
            recorded=metrics["singular"],
            found=singular_hessians(metrics.get("matrices", [])),
        )
    decoder = {matrix.module for matrix in matrices_of(source)}
    for module, known in by_name(metrics).items():
        found = module in decoder or config["embeddings"] == "menu"
        yield Value(what=f"counted of {module}", recorded=known.get("counted"), found=found)


def places_of(source: ModelInput, modules: Collection[str]) -> dict[str, Matrix]:
    """Module name -> where a model has the matrix, with the embedding and the output matrix if among ``modules``."""
    places = {matrix.module: matrix for matrix in matrices_of(source)}
    if source.architecture.embedding_module in modules:
        places |= {matrix.module: matrix for matrix in vocabulary_matrices(source)}
    return places


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


def source_model(target: Target) -> ModelInput:
    """The model that the stage quantized."""
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
