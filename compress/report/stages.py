"""What each verb's record shows: one function a verb, and a generic one for verbs nobody declared."""

from __future__ import annotations

from collections.abc import Callable

from compress.report.allocation import allocation_figure, kind_table, matrix_table
from compress.report.charts import line_chart
from compress.report.html import Html, h, join
from compress.report.pruned import kept_figure, span, trials_table
from compress.report.spectrum import spectrum_figure, worst_table
from compress.report.svg import figure
from compress.report.table import facts, record_facts, table
from compress.report.tradeoff import tradeoff_figure
from compress.report.values import (
    DASH,
    Record,
    at,
    change,
    count,
    fixed,
    general,
    number,
    numbers,
    percent,
    records,
    seconds,
    sequence,
    size,
    string,
)


def details(verb: str, metrics: Record) -> Html:
    """Tables and figures of one stage."""
    known = VERBS.get(verb)
    return known(metrics) if known is not None else record_facts(metrics)


def headline(verb: str, metrics: Record) -> str:
    """One line: what the stage did."""
    if verb == "prune":
        masked = at(metrics, "masked_ratio")
        if masked is not None:
            return f"{percent(masked)} of the decoder's linear weights set to zero"
        removed = percent(at(metrics, "achieved_ratio"))
        return f"{removed} of the decoder's linear parameters removed"
    if verb == "align":
        trained = count(at(metrics, "trainable_parameters"))
        return f"{trained} parameters trained on {count(at(metrics, 'tokens'))} tokens"
    if verb == "quantize":
        bits = stored_bits(at(metrics, "after"))
        return f"{fixed(bits)} bits per linear weight"
    if verb == "train":
        before, after = at(metrics, "validation_loss_before"), at(metrics, "validation_loss_after")
        return f"validation loss {fixed(before, 3)} → {fixed(after, 3)}"
    if verb == "recover":
        return f"adapter of {count(at(metrics, 'adapter_parameters'))} parameters for the full model"
    if verb == "eval":
        return f"{len(sequence(at(metrics, 'rows')))} models measured"
    return ""


def stored_bits(side: object) -> float | None:
    """Bits per linear weight with all overhead, under either of its names."""
    with_factors = number(at(side, "stored_bits_per_weight_with_factors"))
    return with_factors if with_factors is not None else number(at(side, "bits_per_weight"))


def before_after(metrics: Record) -> Html:
    """Sizes and perplexity before and after a stage that made a model."""
    sides = (at(metrics, "before"), at(metrics, "after"))
    rows = [
        ["Parameters", *(count(at(s, "parameters")) for s in sides)],
        ["Decoder linear parameters", *(count(at(s, "decoder_parameters")) for s in sides)],
        ["Weight bytes", *(size(at(s, "bytes")) for s in sides)],
        ["File bits per parameter, everything counted", *(fixed(file_bits(s), 3) for s in sides)],
        ["Bits per linear weight, scales and factors counted", *(fixed(stored_bits(s), 3) for s in sides)],
    ]
    protocols = [at(s, "protocol_line") for s in sides]
    note = None
    if any(number(at(s, "perplexity")) is not None for s in sides):
        if protocols[0] == protocols[1]:
            rows.append(["Perplexity", *(perplexity(s) for s in sides)])
            note = f"Perplexity: {protocols[0]}." if protocols[0] else None
        else:  # numbers with different protocols never share a line
            for side, line, place in zip(sides, protocols, (0, 1), strict=True):
                cells = [perplexity(side) if place == n else DASH for n in (0, 1)]
                rows.append([f"Perplexity ({line or 'protocol not recorded'})", *cells])
    shown = [row for row in rows if any(cell != DASH for cell in row[1:])]
    return join(
        table(("Quantity", "Before", "After"), shown, caption="Before and after this stage"),
        h("p", note, class_="note") if note else None,
    )


def file_bits(side: object) -> float | None:
    """8 x bytes / parameters."""
    stored, parameters = number(at(side, "bytes")), number(at(side, "parameters"))
    return 8 * stored / parameters if stored is not None and parameters else None


def perplexity(row: object) -> str:
    """Perplexity and its standard error (that of the mean loss, carried over)."""
    value, error = number(at(row, "perplexity")), number(at(row, "standard_error"))
    if value is None:
        return DASH
    return fixed(value) if error is None else f"{fixed(value)} ± {fixed(value * error)}"


def _prune(metrics: Record) -> Html:
    original, shape, kept = (at(metrics, name) for name in ("original", "shape", "kept"))
    groups = [len(sequence(layer)) for layer in sequence(at(kept, "kv_groups"))]

    def of_original(name: str, layers: list[int] | list[float]) -> str:
        """What every layer keeps, or the range of the layers, where they differ."""
        found = string(at(shape, name)) if shape is not None or not layers else span(layers)
        return f"{found} of {string(at(original, name))}"

    return join(
        h("p", string(at(metrics, "reason"))),
        before_after(metrics),
        facts(
            [
                ("requested ratio", percent(at(metrics, "requested_ratio"))),
                ("achieved ratio", percent(at(metrics, "achieved_ratio"))),
                ("criterion", string(at(metrics, "criterion"))),
                ("KV groups a layer", of_original("kv_heads", groups)),
                ("query heads a KV group", of_original("queries", numbers(at(kept, "queries_per_layer")))),
                ("channels a layer", of_original("channels", numbers(at(kept, "channels_kept_per_layer")))),
                *_certificate(at(metrics, "certificate")),
            ]
        ),
        h(
            "div",
            kept_figure(metrics),
            trials_table(metrics),
            _loss_figure(metrics, "Loss while scoring and masking"),
            _loss_figure(at(metrics, "repair"), "Loss of repair training"),
            class_="figures",
        ),
    )


def _align(metrics: Record) -> Html:
    return join(
        before_after(metrics),
        facts(
            [
                ("trained parameters", count(at(metrics, "trainable_parameters"))),
                ("frozen parameters", count(at(metrics, "frozen_parameters"))),
                ("tokens", count(at(metrics, "tokens"))),
            ]
        ),
        h("div", _loss_figure(metrics, "Loss of alignment"), class_="figures"),
    )


def _certificate(certificate: object) -> list[tuple[str, str]]:
    """What an allocation of shapes predicts, and how near to the best it is proved to be."""
    if number(at(certificate, "damage")) is None:
        return []
    return [
        ("predicted rise of the loss", f"{fixed(at(certificate, 'damage'), 3)} nats per token"),
        ("proved lower bound", f"{fixed(at(certificate, 'lower_bound'), 3)} nats per token"),
        ("gap", _gap(certificate)),
        ("solver", f"{string(at(certificate, 'solver'))}, {seconds(at(certificate, 'seconds'))}"),
    ]


def _loss_figure(metrics: object, title: str) -> Html | None:
    losses = numbers(at(metrics, "losses"))
    if not losses:
        return None
    ends = (("before", "validation_loss_before"), ("after", "validation_loss_after"))
    marks = [
        (f"validation {name} {value:.3f}", value)
        for name, key in ends
        if (value := number(at(metrics, key))) is not None
    ]
    alt = f"{title}: {losses[0]:.3f} at step 1, {losses[-1]:.3f} at step {len(losses)}. " + "; ".join(
        name for name, _ in marks
    )
    return figure(
        line_chart(losses, marks=marks, alt=alt.strip(), x_title="step", y_title="loss"),
        f"{title}: every step (thin) and its moving average (thick)"
        + ("; dashed: the loss on validation text." if marks else "."),
        name=title,
    )


def _quantize(metrics: Record) -> Html:
    solver = at(metrics, "allocation")
    matrices = sequence(at(metrics, "matrices"))
    return join(
        before_after(metrics),
        facts(
            [
                ("budget", string(at(metrics, "budget", "text"))),
                ("solver", string(at(solver, "solver"))),
                ("objective", general(at(solver, "objective"))),
                ("proved lower bound", general(at(solver, "lower_bound"))),
                ("gap", _gap(solver)),
                ("solver time", seconds(at(solver, "seconds"))),
                ("against plain rounding", _against_plain(metrics)),
            ]
        ),
        h("div", allocation_figure(matrices), kind_table(matrices), class_="figures"),
        h(
            "div",
            spectrum_figure(matrices),
            worst_table(matrices),
            tradeoff_figure(metrics),
            class_="figures",
        ),
        matrix_table(matrices),
    )


def _gap(solver: object) -> str:
    gap = number(at(solver, "gap"))
    return "0, proved optimal" if gap == 0 else general(gap, 2)


def _against_plain(metrics: Record) -> str:
    """Squared error next to the best single plain configuration within the same limit."""
    plain = number(at(metrics, "plain_rounding", "squared_error"))
    counted = [row for row in records(metrics.get("matrices")) if row.get("counted", True)]
    errors = [number(row.get("squared_error")) for row in counted]
    known = [error for error in errors if error is not None]
    ours = sum(known) if known else number(at(metrics, "allocation", "objective"))
    if plain is None or ours is None or plain <= 0:
        return DASH
    return f"squared error {general(ours, 3)} instead of {general(plain, 3)} ({change(ours / plain)})"


def _train(metrics: Record) -> Html:
    return join(
        facts(
            [
                ("validation loss before", fixed(at(metrics, "validation_loss_before"), 4)),
                ("validation loss after", fixed(at(metrics, "validation_loss_after"), 4)),
                ("trainable parameters", count(at(metrics, "trainable_parameters"))),
                ("tokens", count(at(metrics, "tokens"))),
                ("method", string(at(metrics, "method"))),
            ]
        ),
        h("div", _loss_figure(metrics, "Training loss"), class_="figures"),
    )


def _recover(metrics: Record) -> Html:
    return facts(
        [
            ("adapted modules", string(at(metrics, "modules"))),
            ("rank", string(at(metrics, "rank"))),
            ("adapter parameters", count(at(metrics, "adapter_parameters"))),
            ("relative truncation error", general(at(metrics, "truncation_error"), 2)),
            ("onto", string(at(metrics, "onto"))),
        ]
    )


def _eval(metrics: Record) -> Html:
    names = ", ".join(string(row.get("name")) for row in records(at(metrics, "rows"))) or DASH
    return facts([("models", names), ("protocol", string(at(metrics, "protocol_line")))], long=True)


VERBS: dict[str, Callable[[Record], Html]] = {
    "prune": _prune,
    "align": _align,
    "quantize": _quantize,
    "train": _train,
    "recover": _recover,
    "eval": _eval,
}
