"""What ``compress quantize`` prints: what it leaves out, then the model before and after."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from compress.pipelines.reporter import human_bytes, human_count
from compress.pipelines.stage import Context
from compress.quantize.hessian import DAMPING

NEAR = 0.8
"""Budgets at most so many bits away are printed."""
NEARLY = 0.9
"""A budget of bits that is used less than this is worth a word."""
NAMED = 3
"""At most so many matrices are named; their number is told."""


def show_left_out(
    context: Context, left_dense: Sequence[str], lower_ranks: Mapping[str, int], rank: int | None
) -> None:
    """Say which decoder matrices stay as they are, and which get a lower rank than the one that was asked for."""
    if left_dense:
        context.reporter.out.print(
            f"{len(left_dense)} decoder matrices stay as they are, as this model type is known in part: "
            f"{_some(left_dense)}.",
            markup=False,
        )
    if lower_ranks:
        least, most = min(lower_ranks.values()), max(lower_ranks.values())
        span = f"{least}" if least == most else f"{least} to {most}"
        context.reporter.out.print(
            f"{len(lower_ranks)} matrices are too narrow for rank {rank} and get {span}: "
            f"{_some(list(lower_ranks))}.",
            markup=False,
        )


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:NAMED]) + (", ..." if len(names) > NAMED else "")


def singular_hessians(records: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    """How many matrices have inputs that are always zero, how many inputs these are, and how many needed more damping.

    Args:
        records: One per matrix; those without ``damping`` and ``dead_inputs`` were not rounded against a Hessian.

    Returns:
        Empty when there is nothing to tell.
    """
    known = [record for record in records if {"damping", "dead_inputs"} <= record.keys()]
    found = {
        "matrices": len(known),
        "matrices_with_dead_inputs": sum(record["dead_inputs"] > 0 for record in known),
        "dead_inputs": sum(record["dead_inputs"] for record in known),
        "matrices_damped_more": sum(record["damping"] > DAMPING for record in known),
    }
    return found if found["dead_inputs"] or found["matrices_damped_more"] else {}


def _singular(found: Mapping[str, int]) -> str:
    parts = []
    if found["dead_inputs"]:
        parts.append(
            f"{found['dead_inputs']} inputs of {found['matrices_with_dead_inputs']} matrices are zero on all of the "
            "calibration text"
        )
    if found["matrices_damped_more"]:
        parts.append(
            f"{found['matrices_damped_more']} of {found['matrices']} Hessians were singular and damped more than usual"
        )
    return "; ".join(parts)


def show(
    context: Context, metrics: Mapping[str, Any], *, embeddings: bool, counted_apart: bool = False
) -> None:
    """Print before and after, the certificate and near budgets.

    Args:
        context: Where to print.
        metrics: Of the stage.
        embeddings: The budget counts them too.
        counted_apart: The budget leaves the factors out, so that what is stored does not compare with it.
    """
    before, after = metrics["before"], metrics["after"]
    certificate = metrics["allocation"]
    context.reporter.table(
        "quantize",
        ("", "before", "after"),
        [
            ("parameters", human_count(before["parameters"]), human_count(after["parameters"])),
            ("weight bytes", human_bytes(before["bytes"]), human_bytes(after["bytes"])),
            (
                "stored bits per weight" if embeddings else "stored bits per linear weight",
                f"{before['bits_per_weight']:.3f}",
                f"{after['bits_per_weight']:.3f}",
            ),
            (
                "file bits per parameter",
                f"{8 * before['bytes'] / before['parameters']:.3f}",
                f"{metrics['file_bits_per_parameter']:.3f}",
            ),
            ("perplexity (validation)", f"{before['perplexity']:.2f}", f"{after['perplexity']:.2f}"),
        ],
    )
    context.reporter.out.print(f"perplexity: {after['protocol_line']}", markup=False)
    context.reporter.out.print(
        f"allocation: {certificate['solver']}, gap {certificate['gap']:.1e}, {certificate['seconds']:.1f} s",
        markup=False,
    )
    budget, used = metrics["budget"], metrics["stored_bits_per_weight"]
    if budget["kind"] == "bits" and used < NEARLY * budget["value"] and not counted_apart:
        context.reporter.say(
            f"quantize: {budget['value'] - used:.2f} bits a weight of the budget stay unused: no better choice that "
            "fits is offered."
        )
    if singular := metrics["singular"]:
        context.reporter.say(f"quantize: {_singular(singular)}.")
    own = certificate["objective"]
    near = [
        f"{point['bits_per_weight']:.2f} bits {point['cost'] / own:.3g}x"
        for point in metrics["tradeoff"]["points"]
        if own > 0 and abs(point["bits_per_weight"] - metrics["stored_bits_per_weight"]) < NEAR
    ]
    if near:
        context.reporter.out.print(
            f"{metrics['tradeoff']['cost']}: {own:.3g}; other budgets: {', '.join(near)}", markup=False
        )
