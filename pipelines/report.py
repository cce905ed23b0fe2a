"""``compress report``: the chain's records as one HTML page, perhaps beside those of other chains."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from compress.durable import replacing
from compress.errors import CompressError, UsageError
from compress.pipelines.reporter import Reporter
from compress.pipelines.settings import DEFAULT_RUN, Common
from compress.pipelines.stage import Context
from compress.pipelines.workspace import Workspace, read_json, workspace_nearby
from compress.report.page import write_report

PRUNING = "pruning.json"
"""Results of ``compress.benchmarks.pruning`` or ``pruning_curve``, put into the workspace by hand."""


def report_runs(
    reporter: Reporter, common: Common, paths: Sequence[Path], *, output: Path | None = None
) -> Path:
    """The page of ``--run`` compared with the chains in ``paths``; with none in the default folder, of the first.

    Raises:
        UsageError: See :func:`report`; a path holds no chain.
    """
    root, others = common.run, list(paths)
    if others and root == DEFAULT_RUN and not (root / "run.json").is_file():
        root = others.pop(0)
    if paths:
        _chain(root)
    # No lock: the page tells of what is finished, and need not wait for what is at work.
    context = Context(
        common=dataclasses.replace(common, run=root), workspace=Workspace(root), reporter=reporter
    )
    return report(context, others=others, output=output)


def report(context: Context, *, others: Sequence[Path] = (), output: Path | None = None) -> Path:
    """Write the page and return its path.

    Results of a pruning benchmark that lie in the workspace as ``pruning.json`` are drawn on it.

    Args:
        context: Gives the workspace.
        others: Workspaces to compare with. The workspace itself and repetitions among them are left out.
        output: Where to write; None is ``report.html`` in the workspace.

    Raises:
        UsageError: The chain has no stage yet, one of the others is no chain, or ``output`` cannot be a file.
        CompressError: ``pruning.json`` or a record cannot be read, or the page not be written.
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
    unlike = {root.resolve(): root for root in others if root.resolve() != workspace.root.resolve()}
    chains = [workspace, *(_chain(root) for root in unlike.values())]
    names = _names([chain.root for chain in chains])
    results = workspace.root / PRUNING
    run = {
        "title": _title(str(workspace.model["name"])) if workspace.model else "compress",
        "name": names[0],
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "stages": _records(workspace),
        "others": [
            {"name": name, "stages": _records(chain)}
            for name, chain in zip(names[1:], chains[1:], strict=True)
        ],
        "pruning": read_json(results).get("rows") if results.is_file() else None,
    }
    try:
        with replacing(path) as temporary:
            write_report(run, temporary)
    except OSError as error:
        raise CompressError(
            f"The page cannot be written to {path} ({error.strerror or error}).",
            "Give --output a file that can be written.",
        ) from error
    context.reporter.say(f"report: {path}")
    return path


def _chain(root: Path) -> Workspace:
    if not (root / "run.json").is_file() or not (found := Workspace(root)).stages:
        raise UsageError(
            f"There is no chain in {root}.", "Give folders that compress worked in with --run, or none."
        )
    return found


def _records(workspace: Workspace) -> list[dict[str, Any]]:
    return [dict(stage.record) | {"folder": stage.path.name} for stage in workspace.stages]


def _title(name: str) -> str:
    """The model's name; of a folder its own name, not where it lies."""
    return Path(name).name if Path(name).is_absolute() else name


def _names(roots: Sequence[Path]) -> list[str]:
    """The folders' own names where these differ, else their paths as given."""
    short = [root.resolve().name for root in roots]
    return short if len(set(short)) == len(short) else [str(root) for root in roots]
