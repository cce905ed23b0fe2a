"""Disjoint train, validation and test parts of a text that comes without them."""

from __future__ import annotations

import hashlib
import re
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

from compress.data.text import SPLITS, Split
from compress.errors import CompressError

T = TypeVar("T")

SHARES: Mapping[Split, float] = {"train": 0.8, "validation": 0.1, "test": 0.1}
"""Share of the characters that each split aims at."""


def normalised(text: str) -> str:
    """The text with every run of white space as one space: what counts as the same document."""
    return " ".join(text.split())


def assign_splits(
    weights: Mapping[str, int], splits: Sequence[Split] = SPLITS, *, source: str = "given"
) -> dict[str, Split]:
    """Give every key one split: deterministic, disjoint, each split near its share of the weight.

    Keys are taken in the order of their SHA-256, so that the outcome depends on no file order. Test is
    filled to its tenth of the weight, then validation; the rest is train. A key heavier than half a
    split's target goes to train while lighter ones are left, so that no split is one document.

    Args:
        weights: Characters behind each key (a document, or a cluster of documents that must stay together).
        splits: The splits to fill; without "test", its share falls to train.
        source: Name of the text, for the error message.

    Raises:
        CompressError: Fewer keys than splits.
    """
    if len(weights) < len(splits):
        raise CompressError(
            f"The text {source} has {len(weights)} distinct document(s), too few for {len(splits)} "
            f"disjoint splits.",
            "Give more documents: rows, or paragraphs separated by blank lines.",
        )
    left = sorted(weights, key=lambda key: hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest())
    total = sum(weights.values())
    result: dict[str, Split] = {}
    held_out: tuple[Split, ...] = ("test", "validation")
    filled = [split for split in held_out if split in splits]
    for position, split in enumerate(filled):
        target = SHARES[split] * total
        spare = len(left) - (len(filled) - position)  # each split still to come, and train, needs one key
        light = [key for key in left if weights[key] <= target / 2]
        heavy = sorted((key for key in left if weights[key] > target / 2), key=lambda key: weights[key])
        taken = 0
        for key, limit in [*((k, target) for k in light), *((k, target / 2) for k in heavy)]:
            if taken < max(limit, 1) and spare > 0:
                result[key] = split
                taken += weights[key]
                spare -= 1
        left = [key for key in left if key not in result]
    return result | dict.fromkeys(left, "train")


def split_items(
    items: Sequence[T], key: Callable[[T], str], splits: Sequence[Split] = SPLITS, *, source: str = "given"
) -> dict[Split, tuple[T, ...]]:
    """Cut items into disjoint splits; items with the same normalised key stay together, order is kept."""
    keys = [normalised(key(item)) for item in items]
    weights: dict[str, int] = defaultdict(int)
    for name in keys:
        weights[name] += len(name)
    assigned = assign_splits(weights, splits, source=source)
    return {
        split: tuple(item for item, name in zip(items, keys, strict=True) if assigned[name] == split)
        for split in splits
    }


def clusters(documents: Mapping[str, str], shortest: int = 60) -> dict[str, str]:
    """Map each document's name to its cluster: documents that share a paragraph are one cluster.

    Splitting by cluster keeps repeated passages out of the held-out text.

    Args:
        documents: Name to text.
        shortest: Paragraphs with fewer characters (after normalising) tie nothing together.

    Returns:
        Name to the first name, in sorted order, of its cluster.
    """
    parent = {name: name for name in documents}

    def root(name: str) -> str:
        while parent[name] != name:
            name = parent[name]
        return name

    seen: dict[str, str] = {}
    for name in sorted(documents):
        for paragraph in re.split(r"\n\s*\n", documents[name]):
            passage = normalised(paragraph)
            if len(passage) >= shortest:
                low, high = sorted((root(name), root(seen.setdefault(passage, name))))
                parent[high] = low
    return {name: root(name) for name in documents}
