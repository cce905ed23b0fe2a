"""Local task files: multiple-choice questions, or contexts with the one continuation that is right."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from compress.errors import CompressError

Kind = Literal["choices", "continuation"]
_FORMS = 'Write {"query", "choices", "gold"} or {"context", "continuation"} in every row.'


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskRow:
    """One question.

    Args:
        line: Its line in the file, from 1.
        context: What the model reads.
        choices: What may follow; a single one in a task of kind "continuation".
        gold: Index of the right choice.
    """

    line: int
    context: str
    choices: tuple[str, ...]
    gold: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """A task file.

    Args:
        name: The file's name without its ending.
        kind: Whether there are choices, or one continuation to be predicted.
        rows: The rows that are scored, in the file's order.
        sha256: Hash of the whole file.
        file_rows: Rows in the file.
    """

    name: str
    kind: Kind
    rows: tuple[TaskRow, ...]
    sha256: str
    file_rows: int


def read_task(path: Path, *, rows: int | None = None) -> Task:
    """Read a ``.jsonl`` file; every row is checked, also those that are not scored.

    Args:
        path: Rows ``{"query", "choices", "gold"}`` (``gold`` counts from 0), or all ``{"context", "continuation"}``;
            other keys are left alone.
        rows: Score only so many, from the start; None: all.

    Raises:
        CompressError: There is no such file, it has no row, or a row is wrong, named with its line.
    """
    if not path.is_file():
        raise CompressError(f"There is no task file {str(path)!r}.", "Check the path.")
    content = path.read_bytes()
    try:
        lines = content.decode("utf-8").split("\n")  # not splitlines: JSON text may hold U+2028
    except UnicodeDecodeError as error:
        raise CompressError(
            f"{path} is not a text file in UTF-8.", "Give a .jsonl file with one JSON object a line."
        ) from error
    found: list[TaskRow] = []
    kind: Kind | None = None
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        row, its_kind = _read_row(line, f"{path.name}, line {number},", number)
        if kind not in (None, its_kind):
            raise CompressError(
                f"{path.name}, line {number}, is a row of another kind than those before it.",
                "Give rows of one kind in one file.",
            )
        kind = its_kind
        found.append(row)
    if kind is None:
        raise CompressError(f"The task file {path} has no row.", _FORMS)
    return Task(
        name=path.stem,
        kind=kind,
        rows=tuple(found[:rows]),
        sha256=hashlib.sha256(content).hexdigest(),
        file_rows=len(found),
    )


def _read_row(line: str, place: str, number: int) -> tuple[TaskRow, Kind]:
    try:
        row: Any = json.loads(line)
    except ValueError as error:
        raise CompressError(
            f"{place} is no valid JSON.", "Mend that line, or give a .jsonl file with one object a line."
        ) from error
    if not isinstance(row, Mapping):
        raise CompressError(f"{place} is no JSON object.", _FORMS)
    if "query" in row or "choices" in row:
        return _choices(row, place, number), "choices"
    context = _text(row, "context", place)
    continuation = _text(row, "continuation", place)
    if not continuation.strip():
        raise CompressError(f"{place} has an empty 'continuation'.", "Give it some text.")
    return TaskRow(line=number, context=context, choices=(continuation,), gold=0), "continuation"


def _choices(row: Mapping[str, Any], place: str, number: int) -> TaskRow:
    query, choices, gold = _text(row, "query", place), row.get("choices"), row.get("gold")
    if not isinstance(choices, list) or not all(isinstance(c, str) and c.strip() for c in choices):
        raise CompressError(f"{place} has no list of texts as 'choices'.", _FORMS)
    if len(choices) < 2:
        raise CompressError(f"{place} has {len(choices)} choices.", "Give at least two.")
    if type(gold) is not int or not 0 <= gold < len(choices):
        raise CompressError(
            f"{place} has the gold {gold!r}, and {len(choices)} choices.",
            f"Give the index of the right choice, 0 to {len(choices) - 1}.",
        )
    return TaskRow(line=number, context=query, choices=tuple(choices), gold=gold)


def _text(row: Mapping[str, Any], key: str, place: str) -> str:
    value = row.get(key)
    if not isinstance(value, str):
        raise CompressError(f"{place} has no text {key!r}.", _FORMS)
    return value
