"""``compress report``: the chain's records as one HTML page."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

from compress.errors import UsageError
from compress.pipelines.stage import Context
from compress.pipelines.workspace import read_json, workspace_nearby
from compress.report.page import write_report

PRUNING = "pruning.json"
"""Results of ``compress.benchmarks.pruning`` or ``pruning_curve``, put into the workspace by hand."""


def report(context: Context, *, output: Path | None = None) -> Path:
    """Write the page and return its path.

    Results of a pruning benchmark that lie in the workspace as ``pruning.json`` are drawn on it.

    Raises:
        UsageError: The chain has no stage yet, or ``output`` cannot be a file.
        CompressError: ``pruning.json`` cannot be read.
    """
    workspace = context.workspace
    stages = workspace.stages
    if not stages:
        near = workspace_nearby(workspace.root)
        remedy = "Run a stage first: compress prune." if near is None else f"Did you mean --run {near}?"
        raise UsageError(f"There is nothing to report in {workspace.root}.", remedy)
    path = output or workspace.root / "report.html"
    if path.is_dir() or not path.parent.is_dir():
        raise UsageError(
            f"The page cannot be written to {path}.", "Give --output a file in a folder that exists."
        )
    results = workspace.root / PRUNING
    run = {
        "title": str(workspace.model["name"]) if workspace.model else "compress",
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "stages": [dict(stage.record) | {"folder": stage.path.name} for stage in stages],
        "pruning": read_json(results).get("rows") if results.is_file() else None,
    }
    write_report(run, path)
    context.reporter.say(f"report: {path}")
    return path
