"""One self-contained HTML page from a run's records: no script, no network, readable on paper and on a phone."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from compress.report.compare import Run, comparison
from compress.report.damage_curve import damage_curve
from compress.report.evaluation import evaluation
from compress.report.html import Html, h, join
from compress.report.lineage import lineage
from compress.report.measured import measured_figures
from compress.report.memory import cost_section
from compress.report.omitted import omitted
from compress.report.reproduce import reproduce
from compress.report.stages import details, headline
from compress.report.summary import summary_cards
from compress.report.table import folded, record_facts
from compress.report.values import Record, records, string

_POLICY = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"


def write_report(run: dict[str, Any], path: Path | str) -> None:
    """Write :func:`render`'s page to ``path`` as UTF-8; a file that is there stays until the new one is whole."""
    path = Path(path)
    temporary = path.with_name(path.name + ".tmp")
    try:
        temporary.write_text(render(run), encoding="utf-8")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def render(run: dict[str, Any]) -> str:
    """The page of a run.

    Args:
        run: ``title``, ``created`` and ``stages``, the ``stage.json`` objects in order; perhaps ``pruning``, the
            rows of a pruning benchmark (see :func:`~compress.report.damage_curve.damage_curve`), and ``others``, runs
            to compare with: objects with ``name`` and ``stages``, next to which this run is called ``name``. Whatever
            is missing shows as a dash, or is left out and named at the end; a verb the page does not know shows as
            its names and values. All strings are escaped.
    """
    stages = records(run.get("stages"))
    title = string(run.get("title"))
    parts: list[tuple[str, str, Html | None]] = [
        ("summary", "At a glance", summary_cards(stages)),
        ("evaluation", "Measured", evaluation(stages)),
        (
            "curve",
            "Quality, size and speed",
            _framed("curve", "Quality, size and speed", measured_figures(stages)),
        ),
        ("runs", "Runs compared", comparison(_runs(run, stages))),
        ("chain", "How it was made", lineage(stages)),
        *((f"stage-{n}", f"{n} {_verb(s)}", _stage(n, s)) for n, s in enumerate(stages, start=1)),
        ("cost", "Time and memory", cost_section(stages)),
        ("pruning", "Pruning methods compared", _pruning(run)),
        ("reproduce", "To reproduce it", reproduce(stages)),
        ("omitted", "Not on this page", omitted(stages)),
    ]
    shown = [(place, name, section) for place, name, section in parts if section]
    links = [h("li", h("a", name, href=f"#{place}")) for place, name, _ in shown]
    body = join(
        h("a", "Skip to the content", href="#content", class_="skip"),
        _header(run, title, stages),
        h("nav", h("ul", links), aria_label="Contents") if links else None,
        h("main", [section for _, _, section in shown], id="content", tabindex="-1"),
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
    way = " → ".join(_verb(stage) for stage in stages) or "no stage yet"
    return h(
        "header",
        h("p", "compress report", class_="eyebrow"),
        h("h1", title),
        h("p", way, class_="path"),
        h("p", f"Created {string(run.get('created'))}", class_="note"),
    )


def _stage(n: int, stage: Record) -> Html:
    verb, metrics = _verb(stage), _section(stage, "metrics")
    return h(
        "section",
        h("h2", h("span", str(n), class_="number"), verb),
        h("p", headline(verb, metrics), class_="lead"),
        details(verb, metrics),
        folded(
            "Settings, inputs and everything recorded",
            h("h3", "Settings"),
            record_facts(_section(stage, "config")),
            h("h3", "Inputs"),
            record_facts(_section(stage, "inputs")),
            h("h3", "Metrics"),
            record_facts(metrics),
        ),
        id=f"stage-{n}",
    )


def _framed(place: str, title: str, drawn: Html | None) -> Html | None:
    return h("section", h("h2", title), drawn, id=place) if drawn else None


def _pruning(run: Record) -> Html | None:
    rows = run.get("pruning")
    drawn = damage_curve(rows) if isinstance(rows, dict) else None
    return _framed("pruning", "Pruning methods compared", drawn)


def _runs(run: Record, stages: Sequence[Record]) -> list[Run]:
    own = Run(name=string(run.get("name") or run.get("title")), stages=stages)
    others = [
        Run(name=string(other.get("name")), stages=records(other.get("stages")))
        for other in records(run.get("others"))
    ]
    return [own, *others]


def _verb(stage: Record) -> str:
    return string(stage.get("verb"))


def _section(stage: Record, name: str) -> Record:
    value = stage.get(name)
    return value if isinstance(value, dict) else {}
