"""The cards at the top: what got smaller, and what it cost."""

from __future__ import annotations

from collections.abc import Sequence

from compress.report.evaluation import last_evaluation
from compress.report.html import Html, h
from compress.report.stages import stored_bits
from compress.report.values import (
    Record,
    at,
    change,
    count,
    fixed,
    number,
    numbers,
    percent,
    records,
    seconds,
    size,
)


def summary_cards(stages: Sequence[Record]) -> Html | None:
    """Cards for size, parameters, bits, perplexity and time, as far as they are known."""
    cards = [*_size_cards(stages), *_quality_cards(stages), _cost_card(stages)]
    shown = [card for card in cards if card is not None]
    return (
        h("section", h("h2", "At a glance"), h("div", shown, class_="cards"), id="summary") if shown else None
    )


def _card(name: str, value: str, note: str) -> Html:
    return h("div", h("h3", name), h("p", value, class_="big"), h("p", note, class_="note"), class_="card")


def _size_cards(stages: Sequence[Record]) -> list[Html | None]:
    makers = [s for s in stages if at(s, "metrics", "after", "bytes") is not None]
    if not makers:
        return []
    before, after = at(makers[0], "metrics", "before"), at(makers[-1], "metrics", "after")
    cards: list[Html | None] = []
    old, new = number(at(before, "bytes")), number(at(after, "bytes"))
    if old and new:
        cards.append(_card("Weights", size(new), f"from {size(old)}: {old / new:.1f} times smaller"))
    old, new = number(at(before, "parameters")), number(at(after, "parameters"))
    if old and new is not None:
        change = f"{percent(1 - new / old)} fewer" if new < old else "as many"
        cards.append(_card("Parameters", count(new), f"from {count(old)}: {change}"))
    quantized = [s for s in stages if s.get("verb") == "quantize"]
    bits = stored_bits(at(quantized[-1], "metrics", "after")) if quantized else None
    if bits is not None:
        was = stored_bits(at(quantized[-1], "metrics", "before"))
        origin = f"from {fixed(was, 0)}; " if was is not None else ""
        cards.append(_card("Bits per linear weight", fixed(bits), f"{origin}scales and factors counted"))
    return cards


def _quality_cards(stages: Sequence[Record]) -> list[Html | None]:
    rows = records(at(last_evaluation(stages), "rows"))
    if len(rows) < 2:
        return []
    original = number(at(rows[0], "perplexity"))
    cards: list[Html | None] = []
    for row in rows[1:][-2:]:
        value = number(at(row, "perplexity"))
        if value is None or not original:
            continue
        note = f"original {fixed(original)}: {change(value / original)}; lower is better"
        cards.append(_card(f"Perplexity, {row.get('name')}", fixed(value), note))
    return cards


def _cost_card(stages: Sequence[Record]) -> Html | None:
    times = numbers([s.get("seconds") for s in stages])
    peaks = numbers([s.get("peak_memory_bytes") for s in stages])
    if not times:
        return None
    note = f"{len(stages)} stages" + (f", peak memory {size(max(peaks))}" if peaks else "")
    return _card("Time", seconds(sum(times)), note)
