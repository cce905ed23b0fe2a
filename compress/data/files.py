"""Text files as documents or conversations: .txt, .jsonl, .parquet, and folders with a file per split."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compress.data.split import normalised, split_items
from compress.data.text import (
    PARAGRAPH,
    Conversation,
    Message,
    Split,
    Text,
    chat_text,
    conversation_key,
    plain_text,
)
from compress.errors import CompressError

SUFFIXES = (".txt", ".jsonl", ".parquet")
SPLIT_FILES: Mapping[Split, tuple[str, ...]] = {
    "train": ("train",),
    "validation": ("validation", "valid", "dev"),
    "test": ("test",),
}
_DROPPED: Mapping[Split, tuple[Split, ...]] = {
    "train": (),
    "validation": ("train", "test"),
    "test": ("train",),
}
"""Of each split in a folder, the splits whose documents are dropped from it."""
KNOWN_ROWS = '{"text"}, {"instruction", "input", "output"}, {"question", "answer"} or {"messages"}'


@dataclass(frozen=True, slots=True, kw_only=True)
class Content:
    """What one file holds: documents, or conversations (never both)."""

    documents: tuple[str, ...] = ()
    conversations: tuple[Conversation, ...] = ()
    join: str = PARAGRAPH


def load_path(path: Path, split: Split) -> Text:
    """Read one split of a file, or of a folder that has a file per split.

    A file has no splits of its own: its documents (.txt: paragraphs between blank lines, or lines when
    there are fewer than three; .jsonl and .parquet: rows) are cut by `compress.data.split.split_items`, so
    the three splits share no document and no prompt. A folder with ``train.jsonl`` and ``test.jsonl`` keeps
    its own splits; the validation split it lacks is cut from train. What train holds is dropped from test,
    and what either holds from validation.

    Raises:
        CompressError: Missing path, unknown suffix, empty text, or a row that cannot be read.
    """
    if not path.exists():
        raise CompressError(f"There is no text file at {path}.", "Check the path given to --data.")
    if path.is_dir():
        return _load_folder(path, split)
    return _part(path.name, read_file(path), split, ("train", "validation", "test"))


def read_file(path: Path) -> Content:
    """Read a whole .txt, .jsonl or .parquet file.

    Raises:
        CompressError: Unknown suffix, not UTF-8, empty, or a row that cannot be read.
    """
    suffix = path.suffix.lower()
    if suffix == ".txt":
        content = _plain(_read_utf8(path))
    elif suffix == ".jsonl":
        content = _from_rows(path, _json_rows(path))
    elif suffix == ".parquet":
        content = _from_rows(path, _parquet_rows(path))
    else:
        raise CompressError(
            f"The text {path} is of an unknown kind ({path.suffix or 'no suffix'}).",
            f"Give a file that ends in {', '.join(SUFFIXES)}.",
        )
    if not content.documents and not content.conversations:
        raise CompressError(f"The text {path} is empty.", "Give a file with text in it.")
    return content


def files_of(path: Path, split: Split) -> list[Path]:
    """The files that decide one split of a text: the file itself, or those of a folder that are read for it.

    Raises:
        CompressError: The folder lacks its train or test file, or has two of one split.
    """
    if not path.is_dir():
        return [path]
    found = _folder_files(path)
    if split == "validation" and "validation" not in found:
        return [found["train"]]
    return [found[name] for name in (split, *_DROPPED[split])]


def _folder_files(folder: Path) -> dict[Split, Path]:
    found: dict[Split, Path] = {}
    for name, stems in SPLIT_FILES.items():
        candidates = [folder / f"{stem}{suffix}" for stem in stems for suffix in SUFFIXES]
        present = [path for path in candidates if path.is_file()]
        if len(present) > 1:
            raise CompressError(
                f"The folder {folder} has two {name} files, {present[0].name} and {present[1].name}.",
                "Keep one of them, or name one file in --data.",
            )
        if present:
            found[name] = present[0]
    if "train" not in found or "test" not in found:
        raise CompressError(
            f"The folder {folder} lacks a train or a test file ({', '.join(SUFFIXES)}).",
            "Add train.txt and test.txt (or .jsonl, .parquet), or name one file in --data.",
        )
    return found


def _load_folder(folder: Path, split: Split) -> Text:
    found = _folder_files(folder)
    if split != "test" and "validation" not in found:
        return _part(folder.name, read_file(found["train"]), split, ("train", "validation"))
    content = read_file(found[split])
    known: set[str] = set()
    for other in _DROPPED[split]:
        rest = read_file(found[other])
        known.update(map(normalised, rest.documents))
        known.update(normalised(conversation_key(c)) for c in rest.conversations)
    if content.conversations:
        fresh = [c for c in content.conversations if normalised(conversation_key(c)) not in known]
        return chat_text(folder.name, split, fresh)
    documents = [d for d in content.documents if normalised(d) not in known]
    return plain_text(folder.name, split, documents, content.join)


def _part(source: str, content: Content, split: Split, splits: tuple[Split, ...]) -> Text:
    if content.conversations:
        parts = split_items(content.conversations, conversation_key, splits, source=source)
        return chat_text(source, split, parts[split])
    documents = split_items(content.documents, str, splits, source=source)[split]
    return plain_text(source, split, documents, content.join)


def _read_utf8(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise CompressError(
            f"The text {path} is not UTF-8 (byte {error.start}).", "Convert the file to UTF-8."
        ) from error


def _plain(text: str) -> Content:
    paragraphs = [part.strip("\n") for part in re.split(r"\n[ \t]*\n", text) if part.strip()]
    if len({normalised(paragraph) for paragraph in paragraphs}) >= len(SPLIT_FILES):
        return Content(documents=tuple(paragraphs))
    return Content(documents=tuple(line for line in text.split("\n") if line.strip()), join="\n")


def _json_rows(path: Path) -> Iterator[tuple[int, Any]]:
    for number, line in enumerate(_read_utf8(path).split("\n"), start=1):
        if line.strip():
            try:
                yield number, json.loads(line)
            except json.JSONDecodeError as error:
                raise CompressError(
                    f"Line {number} of {path} is not JSON ({error.msg}).", "Give one JSON object per line."
                ) from error


def _parquet_rows(path: Path) -> Iterator[tuple[int, Any]]:
    import pyarrow  # type: ignore[import-untyped]  # half a second that only parquet files cost
    import pyarrow.parquet  # type: ignore[import-untyped]

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            number = 0
            for batch in file.iter_batches():
                for row in batch.to_pylist():
                    number += 1
                    yield number, row
    except pyarrow.ArrowInvalid as error:
        raise CompressError(
            f"The text {path} cannot be read as parquet.", "Write the file again, or give a .jsonl file."
        ) from error


def _from_rows(path: Path, rows: Iterator[tuple[int, Any]]) -> Content:
    documents: list[str] = []
    conversations: list[Conversation] = []
    for number, row in rows:
        item = _row(path, number, row)
        if isinstance(item, str):
            documents.append(item)
        else:
            conversations.append(item)
        if documents and conversations:
            raise CompressError(
                f"Row {number} of {path} mixes plain text with instructions.",
                "Keep text rows and instruction rows in two files.",
            )
    return Content(
        documents=tuple(d for d in documents if d.strip()),
        # A row without an answer has nothing to learn from or to score.
        conversations=tuple(
            c for c in conversations if any(m.content.strip() for m in c if m.role == "assistant")
        ),
    )


def _row(path: Path, number: int, row: Any) -> str | Conversation:
    if not isinstance(row, Mapping):
        raise CompressError(
            f"Row {number} of {path} is {type(row).__name__}, not an object.", f"Give rows like {KNOWN_ROWS}."
        )
    if "text" in row:
        return _string(path, number, row, "text")
    if "messages" in row:
        return _messages(path, number, row["messages"])
    if "instruction" in row and "output" in row:
        extra = _string(path, number, row, "input") if row.get("input") else ""
        prompt = _string(path, number, row, "instruction") + (f"\n\n{extra}" if extra else "")
        return _exchange(prompt, _string(path, number, row, "output"))
    if "question" in row and "answer" in row:
        return _exchange(_string(path, number, row, "question"), _string(path, number, row, "answer"))
    seen = ", ".join(sorted(map(str, row))) or "none"
    raise CompressError(
        f"Row {number} of {path} has none of the known keys (it has: {seen}).",
        f"Give rows like {KNOWN_ROWS}.",
    )


def _exchange(prompt: str, answer: str) -> Conversation:
    return (Message(role="user", content=prompt), Message(role="assistant", content=answer))


def _messages(path: Path, number: int, value: Any) -> Conversation:
    shaped = isinstance(value, list) and all(
        isinstance(m, Mapping) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str)
        for m in value
    )
    if not shaped or not any(m["role"] == "assistant" for m in value):
        raise CompressError(
            f'Row {number} of {path} has "messages" without role and content strings or without an answer.',
            'Give a list of {"role", "content"} with at least one "assistant".',
        )
    return tuple(Message(role=m["role"], content=m["content"]) for m in value)


def _string(path: Path, number: int, row: Mapping[str, Any], key: str) -> str:
    value = row[key]
    if not isinstance(value, str):
        raise CompressError(
            f'Row {number} of {path} has "{key}" as {type(value).__name__}, not a string.',
            f"Give rows like {KNOWN_ROWS}.",
        )
    return value
