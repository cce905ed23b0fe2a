"""``compress report``: the chain's records as one HTML page."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

from compress.pipelines.stage import Context
from compress.report.page import write_report

from compress.errors import UsageError


def report(context: Context, *, output: Path | None = None) -> Path:
    """Write the page and return its path.

    Raises:
        UsageError: The chain has no stage yet.
    """
    workspace = context.workspace
    stages = workspace.stages
    if not stages:
        raise UsageError(
            f"There is nothing to report in {workspace.root}.", "Run a stage first: compress prune."
        )
    path = output or workspace.root / "report.html"
    run = {
        "title": str(workspace.model["name"]) if workspace.model else "compress",
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "stages": [dict(stage.record) | {"folder": stage.path.name} for stage in stages],
    }
    write_report(run, path)
    context.reporter.say(f"report: {path}")
    return path
