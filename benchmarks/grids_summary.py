"""Errors of matrices to figures: families at equal stored bits, and turns of an alternation, as means over matrices."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from compress.benchmarks.grids_alternation import ONE_PASS, VARIANTS
from compress.benchmarks.grids_rounding import FAMILIES
from compress.benchmarks.protocol import Rows

BUDGETS = (2.25, 2.5, 3.25, 4.25)
"""Stored bits per weight of Q."""
CLEAR = 0.05
"""A family wins clearly when its error is lower by more than this share."""
STAGES = {"": "descent", ", feedback alone": "feedback", ", rank 8": "corrected"}
"""Words after a budget -> the error that is compared."""
ON_GRID_VARIANTS = (ONE_PASS, "feedback, factors first")
"""Turns that are also taken from the weights as they are stored."""

Found = Mapping[str, Mapping[str, Any]]


def geometric_mean(values: Sequence[float]) -> float:
    """Of positive numbers."""
    return math.exp(math.fsum(math.log(value) for value in values) / len(values))


def at_bits(points: Sequence[tuple[float, float]], bits: float) -> float | None:
    """The error at ``bits`` between two block sizes of one width: its logarithm is taken to be linear in bits.

    Args:
        points: Stored bits and error of each block size.
        bits: Where.

    Returns:
        None where no two block sizes enclose ``bits``: nothing is extrapolated.
    """
    ordered = sorted(points)
    for (low, first), (high, second) in pairwise(ordered):
        if low <= bits <= high:
            share = (bits - low) / (high - low)
            return math.exp((1 - share) * math.log(first) + share * math.log(second))
    return None


def matrix_at_bits(menu: Found, family: str, stage: str, bits: float) -> float | None:
    """Error of a matrix and family at ``bits`` of Q; the best width where several reach it.

    Args:
        menu: ``"3 bits, block 64"`` -> family -> its figures.
        family: Which.
        stage: Which error.
        bits: Where.
    """
    points: dict[int, list[tuple[float, float]]] = {}
    for name, families in menu.items():
        figures = families.get(family, {})
        if stage in figures:
            points.setdefault(int(name.split()[0]), []).append((figures["bits"], figures[stage]))
    reached = [error for of in points.values() if (error := at_bits(of, bits)) is not None]
    return min(reached, default=None)


def families_at(
    rows: Found, menu: str, stage: str, bits: float, reference: str = "NormalFloat"
) -> dict[str, Any]:
    """Families at equal bits over all matrices that every family reaches ``bits`` on.

    Args:
        rows: Of matrices.
        menu: Key of their errors.
        stage: Which error.
        bits: Of Q.
        reference: Whose error is 1.

    Returns:
        ``matrices``, ``best`` (least mean), and of every family ``error`` (geometric mean relative to the reference)
        and ``best_on`` (matrices on which it is best); without families where there is no such matrix.
    """
    every: list[dict[str, float]] = []
    for row in rows.values():
        names = {name for families in row.get(menu, {}).values() for name in families}
        found = {name: matrix_at_bits(row[menu], name, stage, bits) for name in sorted(names)}
        known = {name: error for name, error in found.items() if error is not None}
        if known and len(known) == len(found):
            every.append(known)
    if not every:
        return {"matrices": 0}
    result: dict[str, Any] = {
        name: {
            "error": geometric_mean([errors[name] / errors[reference] for errors in every]),
            "best_on": sum(min(errors, key=lambda key: errors[key]) == name for errors in every),
        }
        for name in every[0]
    }
    best = min(result, key=lambda name: result[name]["error"])
    clear = sum(
        errors["affine"] < (1 - CLEAR) * min(errors["NormalFloat"], errors["learned"]) for errors in every
    )
    return {**result, "best": best, "affine_clearly_best_on": clear, "matrices": len(every)}


def turns_of(rows: Found, width: str, variant: str, unit: str, key: str = "alternation") -> dict[str, Any]:
    """Means over matrices of every figure of the turns of one variant.

    Args:
        rows: Of matrices.
        width: As ``NF3``.
        variant: Which.
        unit: The variant whose first turn, after its factors, errors are relative to.
        key: Of the turns.

    Returns:
        ``turn 1`` and so on -> figure -> mean; errors geometric, the others arithmetic.
    """
    made = [row[key][width] for row in rows.values()]
    result: dict[str, Any] = {}
    for turn in range(len(made[0][variant])):
        figures: dict[str, float] = {}
        for name in ("rounded", "fitted", "held_out"):
            one = "fitted" if name == "rounded" else name
            figures[name] = geometric_mean([of[variant][turn][name] / of[unit][0][one] for of in made])
        for name in ("taken", "could_take", "overlap", "range"):
            values = [of[variant][turn][name] for of in made]
            if None not in values:
                figures[name] = math.fsum(values) / len(values)
        result[f"turn {turn + 1}"] = figures
    return result


def rounded(value: Any) -> Any:
    """Floats to six digits, which is more than errors in float32 have."""
    if isinstance(value, dict):
        return {key: rounded(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [rounded(inner) for inner in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value


def summarize(found: Found, rows: Rows) -> None:
    """Put the means over all matrices into the record, and of each matrix its errors at equal bits."""
    for name, row in found.items():
        equal = {
            f"{bits:g} bits": {
                family: {
                    label: error
                    for label, stage in (("rank 0", "descent"), ("rank 8", "corrected"))
                    if (error := matrix_at_bits(row["menu"], family, stage, bits)) is not None
                }
                for family in FAMILIES
            }
            for bits in BUDGETS
        }
        short = {key: row[key] for key in ("weights", "on_grid", "moved_by") if key in row}
        rows.put(name, rounded({**short, **equal}))
    for bits in BUDGETS:
        for label, stage in STAGES.items():
            for also, key in ((label, stage), (f"{label}, held out", f"{stage}_held_out")):
                at = families_at(found, "menu", key, bits)
                if at["matrices"]:
                    rows.put(f"at {bits:g} bits{also}", rounded(at))
        at = families_at(found, "menu_on_grid", "descent", bits)
        if at["matrices"]:
            rows.put(f"at {bits:g} bits, on the source's grid", rounded(at))
    on_grid = {name: row for name, row in found.items() if row["on_grid"]}
    for width in next(iter(found.values()))["alternation"]:
        for variant in VARIANTS:
            unit = ONE_PASS if VARIANTS[variant][2] else "weight error, rounding first"
            rows.put(f"turns, {width}, {variant}", rounded(turns_of(found, width, variant, unit)))
        for variant in ON_GRID_VARIANTS if on_grid else ():
            turns = turns_of(on_grid, width, variant, ONE_PASS, "alternation_on_grid")
            rows.put(f"turns, {width}, {variant}, on the source's grid", rounded(turns))
        ratios = {
            name: geometric_mean(
                [
                    row["output_aware"][width][name] / row["alternation"][width][ONE_PASS][0][name]
                    for row in found.values()
                ]
            )
            for name in ("fitted", "held_out")
        }
        rows.put(f"order of compress quantize, {width}", rounded(ratios))


def report(rows: dict[str, dict[str, Any]]) -> str:
    """The means as lines of text."""
    lines = ["errors at equal stored bits, relative to NormalFloat (matrices a family is best on):"]
    for name, row in rows.items():
        if name.startswith("at "):
            parts = [f"{f} {row[f]['error']:.3f} ({row[f]['best_on']})" for f in FAMILIES if f in row]
            lines.append(f"{name}: {', '.join(parts)}; best {row['best']}, of {row['matrices']} matrices")
    lines.append(
        "turns: error after rounding > after new factors, one pass with feedback = 1; share the factors took of it,"
    )
    lines.append("and would have, had they nothing else to hold; overlap with the last error; ranges to W's")
    for name, row in rows.items():
        if name.startswith("turns, "):
            for turn, of in row.items():
                lines.append(
                    f"{name}, {turn}: {of['rounded']:.3f} > {of['fitted']:.3f} (held out {of['held_out']:.3f}); "
                    f"took {of['taken']:.3f} of {of['could_take']:.3f}; overlap {of.get('overlap', 0):.2f}; "
                    f"ranges {of['range']:.3f}"
                )
        elif name.startswith("order"):
            lines.append(f"{name}: {row['fitted']:.3f} (held out {row['held_out']:.3f}) of one pass")
    return "\n".join(lines)
