"""The cards at the top: what got smaller and faster, and what it cost, each before, after and as a ratio."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from compress.report.evaluation import last_evaluation
from compress.report.html import Html, h
from compress.report.memory import PLACES, stage_peak
from compress.report.stages import stored_bits
from compress.report.table import bar
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
    string,
)


def summary_cards(stages: Sequence[Record]) -> Html | None:
    """Cards for size, parameters, bits, perplexity, speed, memory and time, as far as they are known."""
    rows = records(at(last_evaluation(stages), "rows"))
    quality = _quality_cards(rows) or [_stage_quality_card(stages)]
    cards = [*_size_cards(stages), *quality, *_speed_cards(rows), _cost_card(stages)]
    shown = [card for card in cards if card is not None]
    return (
        h("section", h("h2", "At a glance"), h("div", shown, class_="cards"), id="summary") if shown else None
    )


def _card(
    name: str, value: str, note: str, *, before: float | None = None, after: float | None = None
) -> Html:
    """One card; with both numbers it draws them as bars, the note says the same in words."""
    bars = None
    if before is not None and after is not None and min(before, after) >= 0 and max(before, after) > 0:
        largest = max(before, after)
        bars = h("div", bar(before / largest), bar(after / largest), class_="pair", aria_hidden="true")
    return h(
        "div", h("h3", name), h("p", value, class_="big"), bars, h("p", note, class_="note"), class_="card"
    )


def _size_cards(stages: Sequence[Record]) -> list[Html | None]:
    makers = [s for s in stages if at(s, "metrics", "after", "bytes") is not None]
    if not makers:
        return []
    before, after = at(makers[0], "metrics", "before"), at(makers[-1], "metrics", "after")
    cards: list[Html | None] = []
    old, new = number(at(before, "bytes")), number(at(after, "bytes"))
    if old and new:
        note = f"from {size(old)}: {old / new:.1f} times smaller"
        cards.append(_card("Weights", size(new), note, before=old, after=new))
    old, new = number(at(before, "parameters")), number(at(after, "parameters"))
    if old and new is not None:
        less = f"{percent(1 - new / old)} fewer" if new < old else "as many"
        cards.append(_card("Parameters", count(new), f"from {count(old)}: {less}", before=old, after=new))
    quantized = [s for s in stages if s.get("verb") == "quantize"]
    bits = stored_bits(at(quantized[-1], "metrics", "after")) if quantized else None
    if bits is not None:
        was = stored_bits(at(quantized[-1], "metrics", "before"))
        ratio = f", {was / bits:.1f} times fewer" if was and bits > 0 else ""
        origin = f"from {fixed(was, 0)}{ratio}; " if was is not None else ""
        note = f"{origin}scales and factors counted"
        cards.append(_card("Bits per linear weight", fixed(bits), note, before=was, after=bits))
    return cards


def _quality_cards(rows: Sequence[Record]) -> list[Html | None]:
    if len(rows) < 2:
        return []
    original = number(at(rows[0], "perplexity"))
    cards: list[Html | None] = []
    for row in rows[1:][-2:]:
        value = number(at(row, "perplexity"))
        if value is None or not original:
            continue
        note = f"original {fixed(original)}: {change(value / original)}; lower is better"
        name = f"Perplexity, {string(row.get('name'))}"
        cards.append(_card(name, fixed(value), note, before=original, after=value))
    return cards


def _stage_quality_card(stages: Sequence[Record]) -> Html | None:
    """What the stages measured, without an evaluation: first before, last after, on one protocol."""
    sides = [
        (at(s, "metrics", "before"), at(s, "metrics", "after"))
        for s in stages
        if at(s, "metrics", "after", "perplexity") is not None
    ]
    if not sides:
        return None
    before, after = sides[0][0], sides[-1][1]
    old, new = number(at(before, "perplexity")), number(at(after, "perplexity"))
    if not old or new is None or at(before, "protocol_line") != at(after, "protocol_line"):
        return None
    note = f"before {fixed(old)}: {change(new / old)}; lower is better; validation text"
    return _card("Perplexity", fixed(new), note, before=old, after=new)


def _speed_cards(rows: Sequence[Record]) -> list[Html | None]:
    """Speed and memory of the smallest measured model next to the first, the original."""
    sized = [(stored, n) for n, row in enumerate(rows) if (stored := number(row.get("bytes"))) is not None]
    if len(rows) < 2 or not sized or min(sized)[1] == 0:
        return []
    original, small = rows[0], rows[min(sized)[1]]
    name = string(small.get("name"))

    def card(title: str, key: str, write: Callable[[float], str], words: str) -> Html | None:
        old, new = number(original.get(key)), number(small.get(key))
        if not old or new is None:
            return None
        note = f"original {write(old)}: {new / old:.2f} times {words}"
        return _card(f"{title}, {name}", write(new), note, before=old, after=new)

    return [
        card("Prefill tokens/s", "tokens_per_second", lambda v: fixed(v, 0), "as fast"),
        card("Decoded tokens/s", "decode_tokens_per_second", lambda v: fixed(v, 1), "as fast"),
        card("Peak memory", "peak_memory_bytes", size, "as much"),
    ]


def _cost_card(stages: Sequence[Record]) -> Html | None:
    times = numbers([s.get("seconds") for s in stages])
    held = {name: numbers([stage_peak(s, name) for s in stages]) for name in PLACES}
    if not times:
        return None
    told = [f"{size(max(found))} {PLACES[name]}" for name, found in held.items() if found]
    note = f"{len(stages)} stages" + (f", peak memory {', '.join(told)}" if told else "")
    return _card("Time", seconds(sum(times)), note)
