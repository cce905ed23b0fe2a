"""``compress eval`` without models: one table over the original, every stage of the chain, and full + recovered."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from compress.data.sources import default_source
from compress.evaluate.protocol import protocol_line
from compress.pipelines.eval_entries import chain_entries
from compress.pipelines.eval_out import check_out
from compress.pipelines.eval_run import (
    configuration,
    identities,
    make_bench,
    measure_all,
    readings_of,
    reference_of,
)
from compress.pipelines.eval_tables import show
from compress.pipelines.identity import HELD_OUT
from compress.pipelines.measure import WINDOWS, check_length, validation_windows
from compress.pipelines.model_input import original
from compress.pipelines.settings import EvalSettings
from compress.pipelines.stage import Context, Outcome, run_stage
from compress.pipelines.text import read_text, text_inputs
from compress.pipelines.ways_of_stages import refuse_evaluation
from compress.pipelines.workspace import write_json


def evaluate(context: Context, settings: EvalSettings, *, out: Path | None = None) -> Outcome:
    """Measure everything the chain has made; see ``compress eval --help``.

    Args:
        context: The open workspace.
        settings: Of the verb.
        out: Also write the stage's record to this file.

    Raises:
        UsageError: ``--sequence`` is above the model's positions, or ``out`` cannot be written.
        CompressError: A task file or the reference is not to be had.
    """
    if out is not None:
        check_out(out)
    full = original(context)
    check_length(full.path, settings.sequence)
    entries = chain_entries(context, full)
    reference = reference_of(context.reporter, settings, entries, dry=context.common.dry_run)
    check_length(reference.model, settings.sequence)
    bench = make_bench(context.reporter, context.common, settings)
    source = context.common.data or default_source()
    trained = context.workspace.find("train")
    training_source = str(trained.record["config"]["data"]) if trained is not None else source
    config = configuration(bench, source) | {
        "held_out": training_source,
        "held_out_windows": WINDOWS[context.common.effort or "quick"],
    }

    texts = text_inputs(source, "test")
    texts |= text_inputs(training_source, "validation", name=HELD_OUT)
    measured = [(entry.model, entry.adapter) for entry in entries]
    other = (reference.model, reference.adapter)
    refuse_evaluation(context.common, measured, other, settings, bench.device, bench.dtype)

    def work(folder: Path) -> Mapping[str, Any]:
        text = read_text(context, source, "test", full.path)
        read = readings_of(text, entries, reference, settings, tokenizer=full.path)
        held_out = validation_windows(
            context, full.path, training_source, length=settings.sequence, option="--sequence"
        )
        finished = folder / "rows"
        finished.mkdir(exist_ok=True)
        metrics = measure_all(bench, entries, reference, read, held_out, finished)
        kept = dict(held_out.protocol) | {"dtype": config["dtype"], "device": bench.device}
        return metrics | {"held_out_protocol": kept, "held_out_protocol_line": protocol_line(kept)}

    outcome = run_stage(
        context,
        "eval",
        config=config,
        inputs=identities(bench, entries, reference) | texts,
        work=work,
        scratch=("rows",),
    )
    if outcome.stage is not None:
        show(context.reporter, outcome.stage.record["metrics"])
        if out is not None:
            write_json(out, outcome.stage.record)
            context.reporter.say(f"eval: {out}")
    return outcome
