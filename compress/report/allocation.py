"""Bits and ranks of every matrix: a heat map of layers by matrices, and the numbers behind it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from compress.report.html import Html
from compress.report.maps import Cell, heat_map
from compress.report.svg import figure
from compress.report.table import folded, table
from compress.report.values import DASH, Record, at, fixed, general, number, numbers, records, string

_LAYER = re.compile(r"(?:^|\.)([0-9]{1,5})\.(.+)$", re.ASCII)
_SUFFIXES = ("_proj", ".weight")


def allocation_figure(matrices: Sequence[Any]) -> Html | None:
    """Heat map of stored bits per weight, each cell labelled with code bits and rank; None without matrices."""
    placed: dict[tuple[int, str], Record] = {}
    for record in records(matrices):
        place = locate(string(record.get("name")))
        if place is not None:
            placed[place] = record
    if not placed:
        return None
    layers = sorted({layer for layer, _ in placed})
    kinds = list(dict.fromkeys(kind for _, kind in placed))
    cells = [[_cell(layer, kind, placed.get((layer, kind))) for kind in kinds] for layer in layers]
    rates = [r for m in placed.values() if (r := number(at(m, "bits_per_weight"))) is not None]
    ranks = [r for m in placed.values() if (r := number(at(m, "rank"))) is not None]
    alt = f"Heat map of {len(layers)} layers by {len(kinds)} matrices."
    if rates:
        alt += f" Stored bits per weight lie between {min(rates):.2f} and {max(rates):.2f}."
    if ranks:
        alt += f" {sum(r > 0 for r in ranks)} of {len(ranks)} matrices have low-rank factors."
    return figure(
        heat_map([str(n) for n in layers], kinds, cells, unit="bits per weight", alt=alt),
        "What the solver gave each matrix. Shade: stored bits per weight, everything counted; "
        "text: bits of a code, and r with the rank of its factors where there are any.",
        name="Bits and ranks",
    )


def kind_table(matrices: Sequence[Any]) -> Html | None:
    """Means over the layers for each kind of matrix."""
    kinds: dict[str, list[Record]] = {}
    for record in records(matrices):
        place = locate(string(record.get("name")))
        if place is not None:
            kinds.setdefault(place[1], []).append(record)
    if not kinds:
        return None
    columns = (
        ("bits_per_weight", "Bits per weight", 2),
        ("rank", "Rank", 1),
        ("relative_error", "Error of weights", 3),
    )
    rows = [
        [kind, str(len(found)), *(fixed(_mean(found, key), digits) for key, _, digits in columns)]
        for kind, found in kinds.items()
    ]
    head = ("Matrix", "Layers", *(title for _, title, _ in columns))
    return table(head, rows, caption="Means by kind of matrix")


def _mean(found: Sequence[Record], key: str) -> float | None:
    values = numbers([record.get(key) for record in found])
    return sum(values) / len(values) if values else None


def matrix_table(matrices: Sequence[Any]) -> Html | None:
    """All matrices with their configuration, folded away."""
    rows = [
        (
            string(m.get("name")),
            string(m.get("bits")),
            string(m.get("block_size")),
            string(m.get("rank")),
            fixed(m.get("bits_per_weight"), 3),
            general(m.get("relative_error"), 3),
        )
        for m in records(matrices)
    ]
    if not rows:
        return None
    head = ("Matrix", "Bits", "Block", "Rank", "Bits per weight", "Relative error")
    return folded(
        f"All {len(rows)} matrices", table(head, rows, caption="Every matrix with its format, rank and error")
    )


def locate(name: str) -> tuple[int, str] | None:
    """Layer and short name of a matrix: ``model.layers.3.self_attn.q_proj`` is (3, "q")."""
    match = _LAYER.search(name)
    if match is None:
        return None
    short = match.group(2)
    for suffix in reversed(_SUFFIXES):
        short = short.removesuffix(suffix)
    return int(match.group(1)), short.rsplit(".", 1)[-1]


def _cell(layer: int, kind: str, record: Record | None) -> Cell:
    if record is None:
        return Cell(value=None, label=DASH, note=f"layer {layer}, {kind}: not quantized")
    bits, rank, rate = record.get("bits"), number(record.get("rank")), number(record.get("bits_per_weight"))
    label = general(bits) + (f" r{rank:.0f}" if rank else "")
    shown = DASH if rate is None else f"{rate:.3f}"
    return Cell(
        value=rate,
        label=label,
        note=f"layer {layer}, {kind}: {shown} bits per weight, {string(bits)} bit codes, rank "
        f"{string(record.get('rank'))}, relative error {general(record.get('relative_error'), 3)}",
    )
