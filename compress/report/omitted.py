"""What the page leaves out, and why: a record that is missing or older is said in a sentence, never guessed."""

from __future__ import annotations

from collections.abc import Sequence

from compress.report.allocation import locate
from compress.report.evaluation import last_evaluation
from compress.report.html import Html, h
from compress.report.values import Record, at, numbers, records, sequence, string


def omitted(stages: Sequence[Record]) -> Html | None:
    """The section; None where nothing is missing."""
    sentences = missing(stages)
    if not sentences:
        return None
    return h(
        "section",
        h("h2", "Not on this page"),
        h("ul", [h("li", sentence) for sentence in sentences]),
        id="omitted",
    )


def missing(stages: Sequence[Record]) -> list[str]:
    """One sentence for every part that a record does not hold."""
    found: list[str] = []
    if not stages:
        return ["No stage is recorded yet: compress prune or compress quantize makes the first."]
    if not records(at(last_evaluation(stages), "rows")):
        found.append(
            "Size, speed and perplexity of all models side by side: the chain has no evaluation (compress eval)."
        )
    for n, stage in enumerate(stages, start=1):
        verb, metrics = stage.get("verb"), stage.get("metrics")
        place = f"stage {n} ({string(verb)})"
        if verb == "prune" and not sequence(at(metrics, "kept", "kv_groups")):
            found.append(f"The map of what was kept: {place} does not record it.")
        if verb == "quantize" and not any(
            locate(string(m.get("name"))) for m in records(at(metrics, "matrices"))
        ):
            found.append(f"Bits, ranks and errors of the matrices: {place} does not record them.")
        if verb == "quantize" and len(records(at(metrics, "tradeoff", "points"))) < 2:
            found.append(f"The cost of other budgets: {place} does not record it.")
        if verb in ("train", "align") and not numbers(at(metrics, "losses")):
            found.append(f"The training curve: {place} records no losses.")
    without = [
        f"{n} ({string(stage.get('verb'))})"
        for n, stage in enumerate(stages, start=1)
        if not numbers(at(stage, "memory_timeline", "host_bytes"))
    ]
    if without:
        found.append(
            f"Memory over time of stage {', '.join(without)}: it is recorded on Linux, by newer versions of compress."
        )
    return found
