"""What every benchmark agrees on: text, windows, scoring, and a results file that an interrupted run goes on with."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from compress.data.sources import load_text
from compress.data.windows import Windows, token_windows
from compress.errors import UsageError
from compress.evaluate.perplexity import perplexity
from compress.evaluate.protocol import protocol_line
from compress.pipelines.identity import differences, digest
from compress.pipelines.stage import host, versions
from compress.pipelines.workspace import read_json, write_json

__all__ = [
    "LENGTH",
    "TOKENS",
    "Rows",
    "calibration",
    "host",
    "score",
    "test_windows",
    "versions",
    "write_json",
]

LENGTH = 512
"""Tokens of a window."""
TOKENS = 20480
"""Test tokens that are read unless all are asked for."""

_FORMAT_VERSION = 1


def test_windows(
    tokenizer: Any,
    *,
    length: int = LENGTH,  # noqa: PT028
    tokens: int | None = TOKENS,  # noqa: PT028
) -> Windows:
    """The raw WikiText-2 test text in consecutive windows without BOS (METHODS §5).

    Args:
        tokenizer: Of the model that will be scored.
        length: Tokens of a window.
        tokens: Only windows that lie within the first so many tokens, but at least one; None: the whole text.

    Raises:
        CompressError: The text cannot be had.
    """
    count = None if tokens is None else max(1, tokens // length)
    return token_windows(load_text("wikitext2", "test"), tokenizer, length=length, count=count)


def calibration(
    tokenizer: Any, source: str | None, tokens: int, seed: int, *, length: int = LENGTH
) -> Windows:
    """About ``tokens`` tokens of the training split of ``source``, drawn under ``seed``; never the test text.

    Raises:
        CompressError: The text cannot be had, or is shorter than one window.
        UsageError: There is no such source.
    """
    text = load_text(source, "train")
    return token_windows(text, tokenizer, length=length, count=max(1, tokens // length), seed=seed)


def score(model: Any, windows: Windows, *, batch_size: int = 4) -> dict[str, Any]:
    """Perplexity of ``model`` over ``windows`` as JSON values.

    Returns:
        ``perplexity``, ``standard_error`` (of the mean loss, in nats), ``protocol`` and ``protocol_line``.

    Raises:
        CompressError: The loss is not finite, or a token lies outside the vocabulary.
    """
    result = perplexity(model, windows, batch_size=batch_size)
    return {
        "perplexity": result.value,
        "standard_error": result.standard_error,
        "protocol": dict(result.protocol),
        "protocol_line": protocol_line(result.protocol),
    }


class Rows:
    """Results by name in one JSON file, each on disk as soon as it is known.

    Opened again with the same identity on the same machine and libraries, the file goes on where it stopped.

    Args:
        path: The file; it is made by the first ``put``.
        identity: Everything all rows have in common (benchmark, model, protocol, settings); JSON values.

    Raises:
        UsageError: The file was made with another identity, machine or version of a library.
        CompressError: It cannot be read.
    """

    def __init__(self, path: Path, identity: Mapping[str, Any]) -> None:
        self.path = path
        head = {"identity": dict(identity), "versions": versions(), "host": host()}
        self._content: dict[str, Any] = {"format_version": _FORMAT_VERSION, **head, "rows": {}}
        if not path.is_file():
            return
        found = read_json(path)
        if digest({key: found.get(key) for key in head}) != digest(head):
            changed = [differences(found.get(key, {}), value) for key, value in head.items()]
            raise UsageError(
                f"{path} holds results of another benchmark or machine ({', '.join(filter(None, changed))}).",
                "Write to another file, or remove this one.",
            )
        self._content = found

    def has(self, key: str) -> bool:
        """Whether row ``key`` is there."""
        return key in self._content["rows"]

    def get(self, key: str) -> dict[str, Any]:
        """Row ``key``, as it is in the file.

        Raises:
            KeyError: It is not there.
        """
        row: dict[str, Any] = self._content["rows"][key]
        return row

    def put(self, key: str, row: Mapping[str, Any]) -> None:
        """Add (or replace) row ``key`` and write the file, all of it or nothing."""
        self._content["rows"][key] = dict(row)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_json(self.path, self._content)

    @property
    def rows(self) -> dict[str, dict[str, Any]]:
        """All rows by name, in alphabetical order (that of the file)."""
        return dict(sorted(self._content["rows"].items()))
