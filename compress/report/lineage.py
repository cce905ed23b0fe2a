"""The lineage: every stage with what it did, its settings, what it took, and what it was made from."""

from __future__ import annotations

from collections.abc import Sequence

from compress.report.html import Html, h
from compress.report.memory import peaks
from compress.report.stages import headline
from compress.report.values import DASH, Record, at, seconds, sequence, string


def lineage(stages: Sequence[Record]) -> Html | None:
    """The section; None without stages."""
    if not stages:
        return None
    made = {string(stage.get("id")): n for n, stage in enumerate(stages, start=1) if stage.get("id")}
    steps = [_step(n, stage, made) for n, stage in enumerate(stages, start=1)]
    return h("section", h("h2", "How it was made"), h("ol", steps, class_="chain"), id="chain")


def _step(n: int, stage: Record, made: dict[str, int]) -> Html:
    verb = string(stage.get("verb"))
    metrics = stage.get("metrics")
    settings = _settings(stage, verb)
    return h(
        "li",
        h("a", h("span", str(n), class_="number"), h("b", verb), href=f"#stage-{n}"),
        h("span", headline(verb, metrics if isinstance(metrics, dict) else {})),
        h("code", settings) if settings else None,
        h(
            "span",
            f"{seconds(stage.get('seconds'))} · peak {peaks(stage)}"
            + (f" · effort {string(stage.get('effort'))}" if stage.get("effort") else ""),
            class_="note",
        ),
        h("span", f"from {_inputs(stage, made)}", class_="note"),
    )


def _settings(stage: Record, verb: str) -> str:
    """What was given on the command line; of a stage that another command made, that command."""
    words = [string(word) for word in sequence(stage.get("command"))]
    if len(words) < 2:
        return ""
    return " ".join(words[2:]) if words[1] == verb else " ".join(words)


def _inputs(stage: Record, made: dict[str, int]) -> str:
    """The inputs by name: the stage that made them, else the start of their fingerprint."""
    inputs = at(stage, "inputs")
    if not isinstance(inputs, dict) or not inputs:
        return DASH
    return ", ".join(
        f"{name}: stage {made[string(value)]}" if string(value) in made else f"{name} {string(value)[:12]}"
        for name, value in inputs.items()
    )
