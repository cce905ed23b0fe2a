"""A chain run stage by stage, each in a fresh process, so that its peak memory is its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from compress.errors import CompressError
from compress.pipelines.settings import Common

Given = Mapping[str, Any]
Runner = Callable[[str, Common, Given], dict[str, Any]]
"""Verb, common options and its own options -> the stage's record."""

_SHARED = ("run", "model", "data", "device", "dtype", "seed", "threads", "effort", "memory_limit")


def in_fresh_process(verb: str, common: Common, given: Given) -> dict[str, Any]:
    """``compress VERB --json`` with these options; its progress goes to standard error.

    Raises:
        CompressError: The stage failed; has its own sentences.
    """
    command = [sys.executable, "-P", "-m", "compress", verb, "--json", *options(common, given)]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env={**os.environ, "PYTHONWARNINGS": "ignore"}
    )
    if done.returncode != 0:
        lines = [line for line in done.stderr.strip().splitlines() if line.strip()] or ["no message"]
        cause = lines[-2] if len(lines) > 1 else lines[-1]
        raise CompressError(
            f"The stage {verb} failed: {cause.removeprefix('error: ')}",
            lines[-1] if len(lines) > 1 else f"Run compress {verb} by itself to see more.",
        )
    record: dict[str, Any] = json.loads(done.stdout)
    return record


def options(common: Common, given: Given) -> list[str]:
    """Command-line options for settings that are set; flags for those that are true."""
    values = {name: getattr(common, name) for name in _SHARED} | dict(given)
    found: list[str] = []
    for name, value in values.items():
        if value is None or value is False:
            continue
        found.append(f"--{name.replace('_', '-')}")
        if value is not True:
            found.append(str(value))
    return found


def run_stages(
    steps: Sequence[tuple[str, Given]], common: Common, *, runner: Runner = in_fresh_process
) -> dict[str, dict[str, Any]]:
    """Run every step; the records by verb.

    Args:
        steps: Verbs with their options, in order.
        common: Workspace, model, text and the rest.
        runner: Runs one of them.
    """
    return {verb: runner(verb, common, given) for verb, given in steps}


def stage_records(run: Path) -> dict[str, dict[str, Any]]:
    """The records of a chain that was run before, by verb."""
    from compress.pipelines.workspace import Workspace

    return {stage.verb: {"path": str(stage.path), **stage.record} for stage in Workspace(run).stages}
