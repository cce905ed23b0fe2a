"""``compress eval A B C``: any models side by side, without a workspace."""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from compress.data.sources import default_source, load_text
from compress.errors import UsageError
from compress.pipelines.eval_entries import named_entries
from compress.pipelines.eval_out import abandon, check_out, finished_record, open_partial
from compress.pipelines.eval_run import (
    configuration,
    identities,
    make_bench,
    measure_all,
    readings_of,
    reference_of,
)
from compress.pipelines.eval_tables import show
from compress.pipelines.identity import TEXT, stage_id
from compress.pipelines.measure import check_length
from compress.pipelines.reporter import Reporter
from compress.pipelines.settings import Common, EvalSettings
from compress.pipelines.stage import host, show_plan, versions
from compress.pipelines.ways_of_stages import refuse_evaluation
from compress.pipelines.workspace import FORMAT_VERSION, write_json

FETCHED = ("c4", "wikitext2")
"""Texts that may come from the hub, for which a dry run does not ask."""


def evaluate_named(
    reporter: Reporter,
    common: Common,
    settings: EvalSettings,
    names: Sequence[str],
    *,
    out: Path | None = None,
) -> dict[str, Any]:
    """Measure the models that are named, side by side, without a workspace.

    With ``out``, what is finished lies in ``out`` + ".partial" until all is, and the same command goes on from there;
    without it there is no place to keep it, and an interrupted command begins again.

    Args:
        reporter: Shows progress and the tables.
        common: Common options; the workspace is not touched.
        settings: Of the verb.
        names: What the user calls the models.
        out: JSON file for the record.

    Returns:
        The record: ``config``, ``inputs``, ``metrics`` and where and when they were measured; of a dry run ``verb``
        and ``config``.

    Raises:
        UsageError: ``--model`` is given too, a window is longer than a model's positions, the text is ``self``, or
            ``out`` holds something else.
        CompressError: A model, a task file or the text is not to be had.
    """
    if common.model is not None:
        raise UsageError(
            "--model begins a chain, and the models to compare are arguments.",
            f"Write compress eval {' '.join([common.model, *names])}.",
        )
    source = common.data or default_source()
    if source == "self":
        raise UsageError(
            "The text self is written by a chain's own model, and there is no chain.",
            "Give another text with --data.",
        )
    if out is not None:
        check_out(out)
    bench = make_bench(reporter, common, settings)
    text = None if common.dry_run and source in FETCHED else load_text(source, "test")
    entries = named_entries(reporter, names, dry=common.dry_run)
    reference = reference_of(reporter, settings, entries, dry=common.dry_run)
    for entry in (*entries, reference):
        check_length(entry.model, settings.sequence, whose=f"{entry.name}'s")
    measured = [(entry.model, entry.adapter) for entry in entries]
    other = (reference.model, reference.adapter)
    refuse_evaluation(common, measured, other, settings, bench.device, bench.dtype)
    config = configuration(bench, source)
    if common.dry_run or text is None:
        show_plan(reporter, "eval", config)
        return {"verb": "eval", "config": config}
    inputs = identities(bench, entries, reference) | {TEXT: text.sha256}
    wanted = stage_id("eval", config, inputs)
    done = None if out is None or common.redo else finished_record(out, wanted)
    if done is not None:
        reporter.say(f"eval: already done in {out} with these settings; nothing to do.")
        show(reporter, done["metrics"])
        return done
    partial = None if out is None else open_partial(out, wanted, redo=common.redo)
    started = time.monotonic()
    try:
        read = readings_of(text, entries, reference, settings)
        metrics = measure_all(bench, entries, reference, read, None, partial)
    except BaseException:
        if partial is not None:
            abandon(partial)
        raise
    record = {
        "format_version": FORMAT_VERSION,
        "id": wanted,
        "verb": "eval",
        "config": config,
        "inputs": inputs,
        "effort": common.effort,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": versions(),
        "host": host(),
        "command": ["compress", *sys.argv[1:]],
        "seconds": round(time.monotonic() - started, 2),
        "metrics": metrics,
    }
    show(reporter, metrics)
    if out is not None and partial is not None:
        write_json(out, record)
        shutil.rmtree(partial)
        reporter.say(f"eval: {out}")
    return record
