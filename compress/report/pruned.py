"""What pruning kept of every layer, and the shapes it tried."""

from __future__ import annotations

from compress.report.html import Html
from compress.report.maps import KeptLayer, kept_map
from compress.report.svg import figure
from compress.report.table import table
from compress.report.values import DASH, Record, at, fixed, number, numbers, records, sequence, string


def kept_figure(metrics: Record) -> Html | None:
    """Map of KV groups, query heads and channels, layer by layer; None where the record does not say."""
    kept = [frozenset(int(n) for n in numbers(layer)) for layer in sequence(at(metrics, "kept", "kv_groups"))]
    total, channels = number(at(metrics, "original", "kv_heads")), number(at(metrics, "original", "channels"))
    widths = numbers(at(metrics, "kept", "channels_kept_per_layer"))
    if not kept or not total or not channels or len(widths) != len(kept) or not 1 <= total <= 512:
        return None
    queries = _heads(at(metrics, "original", "queries"))
    each = numbers(at(metrics, "kept", "queries_per_layer"))
    shares = [min(max(width / channels, 0.0), 1.0) for width in widths]
    layers = [
        KeptLayer(groups=groups, queries=_heads(each[i]) if len(each) == len(kept) else None, channels=share)
        for i, (groups, share) in enumerate(zip(kept, shares, strict=True))
    ]
    alt = (
        f"Map of {len(kept)} layers: {span([len(layer) for layer in kept])} of {total:.0f} KV groups kept a layer, "
        f"{span([100 * s for s in shares])} percent of the MLP channels."
    )
    return figure(
        kept_map(layers, total=int(total), queries=queries, alt=alt),
        "Kept (filled) and removed (empty), layer by layer: KV groups by index, query heads by number, MLP channels "
        "by share.",
        name="What was kept",
    )


def trials_table(metrics: Record) -> Html | None:
    """The uniform shapes that were tried, in the order of the trials, the best one marked in words."""
    trials = records(at(metrics, "trials"))
    if len(trials) < 2:
        return None
    rises = [rise for trial in trials if (rise := number(trial.get("rise"))) is not None]
    rows = [
        [
            f"{string(trial.get('kv_heads'))} groups of {string(trial.get('queries'))}"
            + (", best" if rises and number(trial.get("rise")) == min(rises) else ""),
            string(trial.get("channels")),
            fixed(trial.get("predicted"), 3),
            fixed(trial.get("rise"), 3) if number(trial.get("rise")) is not None else DASH,
        ]
        for trial in trials
    ]
    head = ("Heads a layer", "Channels a layer", "Predicted rise", "Measured rise")
    return table(
        head, rows, caption="Shapes tried: rise of the loss in nats per token, before repair training"
    )


def span(values: list[int] | list[float]) -> str:
    """The range of some numbers, or the number they all are."""
    low, high = f"{min(values):.0f}", f"{max(values):.0f}"
    return low if low == high else f"{low} to {high}"


def _heads(value: object) -> int | None:
    found = number(value)
    return int(found) if found is not None and 0 <= found <= 4096 else None
