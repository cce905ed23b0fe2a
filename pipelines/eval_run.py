"""What both forms of an evaluation share: what is measured, of which models, and in which order."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from compress.data.text import Text
from compress.data.windows import Windows
from compress.errors import UsageError
from compress.evaluate.harness import check_harness
from compress.evaluate.task_file import read_task
from compress.pipelines.eval_entries import Entry, named_entry
from compress.pipelines.eval_row import Bench, compare, delimiter_of, measure
from compress.pipelines.eval_text import Reading, readings
from compress.pipelines.identity import digest
from compress.pipelines.integrity import describe_files
from compress.pipelines.model_input import device_and_dtype
from compress.pipelines.reporter import Reporter
from compress.pipelines.settings import Common, EvalSettings
from compress.pipelines.stage import settings_dict
from compress.pipelines.workspace import read_json, write_json


def make_bench(reporter: Reporter, common: Common, settings: EvalSettings) -> Bench:
    """Everything that can be refused before a model is read is refused here."""
    if settings.lm_eval is not None:
        check_harness(settings.lm_eval, settings.lm_eval_tasks)
    device, dtype = device_and_dtype(common)
    tasks = [read_task(Path(name).expanduser(), rows=settings.task_rows) for name in settings.task]
    names = [task.name for task in tasks]
    if len(set(names)) < len(names):
        raise UsageError("Two task files have the same name.", "Rename one of them, or score them apart.")
    return Bench(reporter=reporter, settings=settings, device=device, dtype=dtype, tasks=tasks)


def reference_of(
    reporter: Reporter, settings: EvalSettings, entries: Sequence[Entry], *, dry: bool = False
) -> Entry:
    """The model that the others are compared with: ``--reference``, else the first; ``dry`` fetches no weights."""
    if settings.reference is None:
        return entries[0]
    found = named_entry(reporter, settings.reference, dry=dry)
    return next(
        (e for e in entries if (e.model.resolve(), e.adapter) == (found.model.resolve(), found.adapter)),
        found,
    )


def configuration(bench: Bench, source: str) -> dict[str, Any]:
    """Every setting that decides the result, as JSON values."""
    return settings_dict(bench.settings) | {
        "task": list(bench.settings.task),
        "task_delimiter": delimiter_of(bench.settings),
        "data": source,
        "dtype": str(bench.dtype).removeprefix("torch."),
        "device": bench.device,
    }


def identities(bench: Bench, entries: Sequence[Entry], reference: Entry) -> dict[str, str]:
    """The identity of every model and task file, and the version of lm-eval where it is asked."""
    found = {entry.name: entry.id for entry in entries}
    if reference not in entries:
        found["reference"] = reference.id
    if bench.settings.lm_eval is not None:
        found["lm-eval"] = importlib.metadata.version("lm-eval")
    if bench.settings.lm_eval_tasks is not None:
        found["lm-eval tasks"] = digest(describe_files(Path(bench.settings.lm_eval_tasks)))
    return found | {f"task {task.name}": task.sha256 for task in bench.tasks}


def readings_of(
    text: Text,
    entries: Sequence[Entry],
    reference: Entry,
    settings: EvalSettings,
    *,
    tokenizer: Path | None = None,
) -> list[Reading]:
    """What each of ``entries`` reads, and at the end the reference where it is none of them.

    Such a reference is measured for itself nowhere, so its tokenizer does not hold the others to less text.

    Args:
        text: The test text.
        entries: The models.
        reference: One of them, or another.
        settings: Give the windows.
        tokenizer: Folder with the tokenizer of all ``entries``; None: each has its own.
    """
    shared: dict[str, Any] = {
        "length": settings.sequence,
        "count": settings.windows,
        "bos": settings.bos,
    }
    found = readings(text, [tokenizer or entry.model for entry in entries], **shared)
    return found if reference in entries else [*found, *readings(text, [reference.model], **shared)]


def measure_all(
    bench: Bench,
    entries: Sequence[Entry],
    reference: Entry,
    read: Sequence[Reading],
    held_out: Windows | None,
    finished: Path | None,
) -> dict[str, Any]:
    """The metrics: every model alone, so that memory and speed are its own; then each beside the reference.

    Args:
        bench: How to measure.
        entries: The models.
        reference: One of them, or another.
        read: What each of ``entries`` reads, and the reference at the end where it is another.
        held_out: Validation windows, in a chain.
        finished: Folder for what is measured, found again after an interruption; None keeps nothing.
    """
    rows = []
    for entry, reading in zip(entries, read, strict=False):
        kept = None if finished is None else finished / f"{entry.id[:16]}.json"
        if kept is None or not kept.is_file():
            row = measure(bench, entry, reading, held_out)
            if kept is not None:
                write_json(kept, row)
        else:
            row = read_json(kept)
        rows.append(row)
        _free(bench.device)
    notes = _text_notes(entries, read)
    others = [n for n, entry in enumerate(entries) if entry != reference]
    if bench.settings.kl_windows and others:
        at = entries.index(reference) if reference in entries else len(entries)
        network: Any = None
        for n in others:
            kept = None if finished is None else finished / f"{entries[n].id[:16]}-reference.json"
            if kept is None or not kept.is_file():
                network = network or bench.load(reference)
                found = compare(bench, entries[n], bench.load(entries[n]), read[n], network, read[at])
                if kept is not None:
                    write_json(kept, found)
            else:
                found = read_json(kept)
            _free(bench.device)
            rows[n]["divergence"] = found["divergence"]
            if found["note"]:
                notes.append(found["note"])
    protocols = [row.pop("protocol") for row in rows]
    return {
        "rows": rows,
        "protocol": protocols[0],
        "protocol_line": rows[0]["protocol_line"],
        "reference": reference.name,
        "notes": notes,
    }


def _text_notes(entries: Sequence[Entry], read: Sequence[Reading]) -> list[str]:
    """What to mind where the models do not read the same tokens."""
    rows = list(zip(entries, read, strict=False))
    groups: list[tuple[Reading, list[str]]] = []
    for entry, reading in rows:
        known = next((names for r, names in groups if torch.equal(r.windows.ids, reading.windows.ids)), None)
        if known is None:
            groups.append((reading, [entry.name]))
        else:
            known.append(entry.name)
    notes = []
    if len(groups) > 1:
        listed = "; ".join(", ".join(names) for _, names in groups)
        notes.append(
            f"The tokenizers differ ({listed}), so the perplexities per token cannot be compared between them: "
            "compare word-level perplexity or bits per byte."
        )
    lacking = [entry.name for entry, reading in rows if reading.lacks_bos]
    if lacking:
        notes.append(
            f"The tokenizer of {', '.join(lacking)} begins plain text with a BOS, and nothing is measured with one "
            "here: --bos does."
        )
    bare = [entry.name for entry, reading in rows if reading.extent is None]
    if bare:
        notes.append(
            f"Words and bytes are not counted for {', '.join(bare)}: conversations, or a tokenizer without offsets."
        )
    return notes


def _free(device: str) -> None:
    if device != "cpu":
        torch.cuda.empty_cache()
