"""One self-contained HTML page from a run's records: no script, no network, readable on paper and on a phone."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from compress.report.damage_curve import damage_curve
from compress.report.evaluation import evaluation
from compress.report.html import Html, h, join
from compress.report.stages import details, headline
from compress.report.summary import summary_cards
from compress.report.table import facts, folded, record_facts, table
from compress.report.values import DASH, Record, at, records, seconds, sequence, size, string

_POLICY = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"


def write_report(run: dict[str, Any], path: Path | str) -> None:
    """Write :func:`render`'s page to ``path`` as UTF-8."""
    Path(path).write_text(render(run), encoding="utf-8")


def render(run: dict[str, Any]) -> str:
    """The page of a run.

    Args:
        run: ``title``, ``created`` and ``stages``, the ``stage.json`` objects in order; perhaps ``pruning``, the
            rows of a pruning benchmark (see :func:`~compress.report.damage_curve.damage_curve`). Whatever is missing
            shows as a dash; a verb the page does not know shows as its names and values. All strings are escaped.
    """
    stages = records(run.get("stages"))
    title = string(run.get("title"))
    body = join(
        _header(run, title, stages),
        h("main", _summary(stages), _chain(stages), _stages(stages), _curve(run), _reproduce(stages)),
        h("footer", "Written by compress from the records of this run."),
    )
    head = h(
        "head",
        h("meta", charset="utf-8"),
        h("meta", name="viewport", content="width=device-width, initial-scale=1"),
        h("meta", http_equiv="Content-Security-Policy", content=_POLICY),
        h("meta", name="color-scheme", content="light dark"),
        h("title", f"{title} · compress report"),
        h("style", Html(files("compress.report").joinpath("style.css").read_text(encoding="utf-8"))),
    )
    return f"<!DOCTYPE html>\n{h('html', head, h('body', body), lang='en')}\n"


def _header(run: Record, title: str, stages: Sequence[Record]) -> Html:
    path = " → ".join(_verb(stage) for stage in stages) or "no stage yet"
    return h(
        "header",
        h("p", "compress report", class_="eyebrow"),
        h("h1", title),
        h("p", path, class_="path"),
        h("p", f"Created {string(run.get('created'))}", class_="note"),
    )


def _summary(stages: Sequence[Record]) -> Html:
    return join(summary_cards(stages), evaluation(stages))


def _chain(stages: Sequence[Record]) -> Html | None:
    if not stages:
        return None
    steps = [
        h(
            "li",
            h("a", h("b", _verb(stage)), href=f"#stage-{n}"),
            h("span", headline(_verb(stage), _metrics(stage))),
            h(
                "span",
                f"{seconds(stage.get('seconds'))} · peak {size(stage.get('peak_memory_bytes'))}",
                class_="note",
            ),
            h("span", f"from {_inputs(stage)}", class_="note"),
        )
        for n, stage in enumerate(stages, start=1)
    ]
    return h("section", h("h2", "How it was made"), h("ol", steps, class_="chain"), id="chain")


def _stages(stages: Sequence[Record]) -> list[Html]:
    return [
        h(
            "section",
            h("h2", h("span", str(n), class_="number"), _verb(stage)),
            h("p", headline(_verb(stage), _metrics(stage)), class_="lead"),
            details(_verb(stage), _metrics(stage)),
            folded(
                "Settings, inputs and everything recorded",
                h("h3", "Settings"),
                record_facts(_section(stage, "config")),
                h("h3", "Inputs"),
                record_facts(_section(stage, "inputs")),
                h("h3", "Metrics"),
                record_facts(_metrics(stage)),
            ),
            id=f"stage-{n}",
        )
        for n, stage in enumerate(stages, start=1)
    ]


def _curve(run: Record) -> Html | None:
    rows = run.get("pruning")
    drawn = damage_curve(rows) if isinstance(rows, dict) else None
    return h("section", h("h2", "Pruning methods compared"), drawn, id="pruning") if drawn else None


def _reproduce(stages: Sequence[Record]) -> Html | None:
    if not stages:
        return None
    commands = [shlex.join(map(str, words)) for stage in stages if (words := sequence(stage.get("command")))]
    lines = [(_verb(stage), line) for stage in stages for line in _protocols(stage)]
    rows = [
        (_verb(s), string(s.get("seed")), seconds(s.get("seconds")), size(s.get("peak_memory_bytes")))
        for s in stages
    ]
    last = stages[-1]
    same = all(_section(s, k) == _section(last, k) for s in stages for k in ("versions", "host"))
    return h(
        "section",
        h("h2", "To reproduce it"),
        join(h("p", "Commands, in an empty folder:"), h("pre", h("code", "\n".join(commands))))
        if commands
        else None,
        h("h3", "Protocol of every perplexity"),
        facts(lines, long=True) if lines else h("p", DASH),
        h("h3", "Seeds and cost"),
        table(("Stage", "Seed", "Time", "Peak memory"), rows),
        h("h3", "Machine and versions"),
        None if same else h("p", "Of the last stage; the others differ, see their records.", class_="note"),
        record_facts({**_section(last, "host"), **_section(last, "versions")}),
        id="reproduce",
    )


def _protocols(stage: Record) -> list[str]:
    metrics = _metrics(stage)
    found = [
        at(metrics, "protocol_line"),
        *(at(metrics, side, "protocol_line") for side in ("before", "after")),
    ]
    return list(dict.fromkeys(line for line in found if isinstance(line, str) and line))


def _inputs(stage: Record) -> str:
    inputs = _section(stage, "inputs")
    return ", ".join(f"{name} {string(value)[:12]}" for name, value in inputs.items()) or DASH


def _verb(stage: Record) -> str:
    return string(stage.get("verb"))


def _metrics(stage: Record) -> Record:
    return _section(stage, "metrics")


def _section(stage: Record, name: str) -> Record:
    value = stage.get(name)
    return value if isinstance(value, dict) else {}
