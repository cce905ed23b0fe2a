"""What it takes to make the same again: commands, protocols, seeds, libraries and the machine."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from itertools import groupby

from compress.report.html import Html, h
from compress.report.table import code_block, facts, record_facts, table
from compress.report.values import DASH, Record, at, sequence, string

OURS = "compress"
"""What a record calls this package, which is not on a package index."""
_VERSION = re.compile(r"[A-Za-z0-9.+!_-]{1,80}", re.ASCII)


def reproduce(stages: Sequence[Record]) -> Html | None:
    """The section; None without stages."""
    if not stages:
        return None
    lines = [
        (f"{n} {string(stage.get('verb'))}", line)
        for n, stage in enumerate(stages, start=1)
        for line in _protocols(stage)
    ]
    rows = [
        (
            f"{n} {string(s.get('verb'))}",
            string(s.get("seed")),
            string(s.get("effort")),
            string(at(s, "config", "data")),
            string(at(s, "config", "dtype")),
            string(s.get("created")),
        )
        for n, s in enumerate(stages, start=1)
    ]
    last = stages[-1]
    same = all(_section(s, k) == _section(last, k) for s in stages for k in ("versions", "host"))
    commands, pins = _commands(stages), _pins(_section(last, "versions"))
    return h(
        "section",
        h("h2", "To reproduce it"),
        _block("Libraries, with Python " + string(at(last, "versions", "python")), pins),
        _block("Commands, in an empty folder", commands),
        h("h3", "Protocol of every perplexity"),
        facts(lines, long=True) if lines else h("p", DASH),
        h("h3", "Seeds and text"),
        table(
            ("Stage", "Seed", "Effort", "Text", "Compute dtype", "Finished"),
            rows,
            caption="What every stage was given",
            numeric=False,
        ),
        h("h3", "Machine and versions"),
        None if same else h("p", "Of the last stage; the others differ, see their records.", class_="note"),
        record_facts({**_section(last, "host"), **_section(last, "versions")}),
        id="reproduce",
    )


def _block(title: str, lines: Sequence[str]) -> list[Html] | None:
    return [h("h3", title), code_block(lines, title)] if lines else None


def _commands(stages: Sequence[Record]) -> list[str]:
    """The command lines in order; one that made several stages is written once."""
    lines = [shlex.join(map(str, words)) for s in stages if (words := sequence(s.get("command")))]
    return [line for line, _ in groupby(lines)]


def _pins(versions: Record) -> list[str]:
    """One pip command with the public versions; what does not look like a version is left out.

    A local part (``+cpu``) names a build that the index does not have, so it is only told; so is our own version.
    """
    known = {
        str(name): version
        for name, version in sorted(versions.items())
        if isinstance(version, str) and _VERSION.fullmatch(version) and _VERSION.fullmatch(str(name))
    }
    libraries = {name: version for name, version in known.items() if name not in ("python", OURS)}
    lines = []
    if libraries:
        pinned = (f"{name}=={version.partition('+')[0]}" for name, version in libraries.items())
        lines.append(f"pip install {' '.join(pinned)}")
    built = [f"{name} {version}" for name, version in libraries.items() if "+" in version]
    if built:
        lines.append(f"# the builds here were {', '.join(built)}")
    if OURS in known:
        lines.append("pip install --no-deps .")
        lines[-1] += f"  # in a checkout of compress-llm at version {known[OURS]}"
    return lines


def _protocols(stage: Record) -> list[str]:
    metrics = _section(stage, "metrics")
    found = [
        at(metrics, "protocol_line"),
        *(at(metrics, side, "protocol_line") for side in ("before", "after")),
    ]
    return list(dict.fromkeys(line for line in found if isinstance(line, str) and line))


def _section(stage: Record, name: str) -> Record:
    value = stage.get(name)
    return value if isinstance(value, dict) else {}
