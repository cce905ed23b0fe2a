"""Named text sources and files, each with disjoint train, validation and test splits."""

from __future__ import annotations

import itertools
import os
from collections import defaultdict
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

from compress.data.files import SUFFIXES, load_path, read_file
from compress.data.sampled import sample_documents
from compress.data.split import assign_splits, clusters, split_items
from compress.data.text import SPLITS, Split, Text, plain_text
from compress.errors import CompressError, UsageError, nearest
from compress.progress import Progress

SOURCES = ("c4", "pydoc", "self", "wikitext2")
C4_DOCUMENTS, C4_HELD_OUT = 25_000, 2000
"""Documents taken from the head of C4's own splits when they are streamed from the hub, for training and for the rest:
at over 400 tokens a document, the ten million that the recipe ``lq-lora`` calibrates on."""

_WIKITEXT_FILES: dict[Split, tuple[str, ...]] = {
    "train": ("wikitext-2-raw/wiki.train.raw", "wikitext-2/train.txt"),
    "validation": ("wikitext-2-raw/wiki.valid.raw", "wikitext-2/valid.txt"),
    "test": ("wikitext-2-raw/wiki.test.raw",),
}


def load_text(
    source: str | Path | None,
    split: Split,
    *,
    tokenizer: Any = None,
    model: Any = None,
    seed: int = 0,
    tokens: int | None = None,
    progress: Progress | None = None,
) -> Text:
    """Read one split of a text source.

    Sources: ``pydoc`` (the language topics of the running Python, split by topic), ``wikitext2``,
    ``c4``, ``self`` (sampled from ``model``), or a path to a .txt, .jsonl or .parquet file or to a folder
    with one such file per split. The three splits of a source never share a document.

    Args:
        source: Name or path; None takes `default_source`.
        split: "train", "validation" or "test".
        tokenizer: Only for ``self``.
        model: Only for ``self``.
        seed: Only for ``self``: seed of the sampling.
        tokens: Only for ``self``: how many tokens to sample (default 32768 for train, else 8192).
        progress: Called while ``self`` samples.

    Raises:
        UsageError: Unknown source name, or ``self`` without a model and tokenizer.
        CompressError: The source cannot be read or is empty.
    """
    if split not in SPLITS:
        raise UsageError(f"There is no split {split!r}.", f"Choose one of: {', '.join(SPLITS)}.")
    name = default_source() if source is None else str(source)
    if name == "pydoc":
        return _pydoc(split)
    if name == "wikitext2":
        return _wikitext2(split)
    if name == "c4":
        return _c4(split)
    if name == "self":
        if model is None or tokenizer is None:
            raise UsageError(
                "The text source self needs a model to sample from.", "Name the model, or use --data pydoc."
            )
        documents = sample_documents(
            model,
            tokenizer,
            split=split,
            seed=seed,
            tokens=tokens or (32768 if split == "train" else 8192),
            progress=progress,
        )
        return plain_text("self", split, documents)
    path = Path(name).expanduser()
    if not path.exists() and path.suffix.lower() not in SUFFIXES and len(path.parts) == 1:
        raise UsageError(
            f"There is no text source {name!r}.",
            f"Did you mean {near!r}?"
            if (near := nearest(name, SOURCES)) is not None
            else f"Choose one of: {', '.join(SOURCES)}, or a path to a {', '.join(SUFFIXES)} file.",
        )
    return load_path(path, split)


def data_root() -> Path | None:
    """The folder of local data sets, from the environment variable COMPRESS_DATA; None when unset."""
    value = os.environ.get("COMPRESS_DATA")
    return Path(value) if value else None


def default_source() -> str:
    """``wikitext2`` when COMPRESS_DATA holds all its splits, else ``pydoc`` (every CPython has it)."""
    return "wikitext2" if all(_wikitext_file(split) for split in SPLITS) else "pydoc"


def local_files(source: str) -> dict[str, list[Path]]:
    """What COMPRESS_DATA holds of ``wikitext2`` or ``c4``: the files of each split that is there."""
    if source == "wikitext2":
        found = {split: _wikitext_file(split) for split in SPLITS}
        return {split: [path] for split, path in found.items() if path is not None}
    files = _c4_files()
    return dict.fromkeys(SPLITS, files) if files else {}


def _pydoc(split: Split) -> Text:
    # Topics quote each other ("for" is a passage of "compound"), hence clusters.
    cluster = clusters(topics)
    weights: dict[str, int] = defaultdict(int)
    for name, body in topics.items():
        weights[cluster[name]] += len(body)
    assigned = assign_splits(weights)
    bodies = [topics[name].strip("\n") for name in sorted(topics) if assigned[cluster[name]] == split]
    return plain_text("pydoc", split, bodies)


def _wikitext2(split: Split) -> Text:
    """WikiText-2 in the convention of METHODS §5, the same for every split.

    Documents are the lines with their line ends, blank lines as empty strings, joined by a blank line.
    The test split is always the raw text; train and validation are the raw text where it is at hand, else
    the tokenised one (with ``<unk>``), whose different hash tells.
    """
    path = _wikitext_file(split)
    if path is not None:
        # newline="": only "\n" ends a line here, whatever else the articles contain.
        with path.open(encoding="utf-8", newline="") as file:
            lines = file.read().split("\n")
        rows = [f"{line}\n" if line.strip() else "" for line in lines[:-1]]
        rows += [lines[-1]] if lines[-1].strip() else []
    else:
        rows = list(_hub_column("Salesforce/wikitext", "wikitext-2-raw-v1", split, limit=None))
    return plain_text("wikitext2", split, rows)


def _wikitext_file(split: Split) -> Path | None:
    root = data_root()
    if root is None:
        return None
    return next((root / name for name in _WIKITEXT_FILES[split] if (root / name).is_file()), None)


def _c4(split: Split) -> Text:
    """C4 (en): local files under COMPRESS_DATA/c4 cut by document, or the head of the hub's own splits.

    The hub has no test split: its validation split is cut in two by document.
    """
    files = _c4_files()
    if files:
        documents = [document for file in files for document in read_file(file).documents]
        return plain_text("c4", split, split_items(documents, str, source="c4")[split])
    own: Split = "train" if split == "train" else "validation"
    limit = C4_DOCUMENTS if split == "train" else C4_HELD_OUT
    documents = _hub_column("allenai/c4", "en", own, limit=limit)
    if split == "train":
        return plain_text("c4", split, documents)
    half = len(documents) // 2
    halves = {"validation": documents[:half], "test": documents[half:]}
    known = set(halves["validation"])
    return plain_text("c4", split, [d for d in halves[split] if split == "validation" or d not in known])


def _c4_files() -> list[Path]:
    root = data_root()
    return sorted((root / "c4").glob("*.jsonl")) if root is not None else []


def _hub_column(repository: str, name: str, split: Split, *, limit: int | None) -> list[str]:
    import datasets  # a second of import that only the hub costs

    try:
        rows = datasets.load_dataset(repository, name, split=split, streaming=limit is not None)
        return [row["text"] for row in itertools.islice(rows, limit)]
    except OSError as error:  # ConnectionError and DatasetNotFoundError are OSErrors
        raise CompressError(
            f"The data set {repository} ({name}) cannot be fetched from the hub.",
            "Set COMPRESS_DATA to a folder that has it, check the network, or use --data pydoc.",
        ) from error
