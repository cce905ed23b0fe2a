"""Which characters of a text its windows score, so that tokenizers with tokens of different size can be compared."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from compress.data.chat import IGNORE
from compress.data.text import Text
from compress.data.windows import Windows


@dataclass(frozen=True, slots=True, kw_only=True)
class Extent:
    """What the scored tokens of windows spell.

    Args:
        words: Whitespace-separated words whose last character is scored.
        bytes: Bytes of the scored characters in UTF-8.
        characters: Characters from the start of the text to the end of the last window.
    """

    words: int
    bytes: int
    characters: int


def token_ends(text: Text, tokenizer: Any) -> torch.Tensor | None:
    """Where every token of the joined text ends, in characters, int64 [tokens], never falling.

    A character belongs to the first token that ends after it: two tokens that share a character of several bytes give
    it to the first, and characters that a tokenizer drops go to the token that follows.

    Returns:
        None where that is not known: conversations, and tokenizers that keep no offsets.
    """
    if text.conversations or not getattr(tokenizer, "is_fast", False):
        return None
    found = tokenizer(text.joined, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    ends = torch.tensor([end for _, end in found["offset_mapping"]], dtype=torch.long)
    return ends.cummax(dim=0).values if len(ends) else ends


def scored_extent(text: Text, windows: Windows, ends: torch.Tensor) -> Extent:
    """Words and bytes of the characters that ``windows`` score.

    Args:
        text: The plain text that the windows were cut from, from its start (no seed).
        windows: Consecutive windows; the first token of each is not scored. Where that is a BOS, all of the text's are.
        ends: From ``token_ends``.
    """
    joined = text.joined
    lead, stride = _lead(windows)
    words = size = 0
    for index, labels in enumerate(windows.labels):
        scored = (labels[1:] != IGNORE).nonzero()
        if len(scored) == 0:
            continue
        before, last = index * stride - lead, index * stride - lead + 1 + int(scored[-1])
        start, stop = int(ends[before]) if before >= 0 else 0, int(ends[last])
        words += _word_ends(joined, start, stop)
        size += len(joined[start:stop].encode("utf-8"))
    return Extent(words=words, bytes=size, characters=reach(windows, ends))


def reach(windows: Windows, ends: torch.Tensor) -> int:
    """Characters from the start of the text to the end of the last window."""
    return int(ends[len(windows) * _lead(windows)[1] - 1])


def limit_extent(windows: Windows, ends: torch.Tensor, characters: int) -> Windows:
    """The same windows without the tokens that end after so many characters of the text.

    Windows that are left without a scored token are dropped; the protocol says how many tokens still count.
    """
    lead, stride = _lead(windows)
    count = len(windows)
    inside = (ends[: count * stride] <= characters).view(count, stride)
    inside = torch.cat((torch.ones(count, lead, dtype=torch.bool), inside), dim=1)
    labels = windows.labels.masked_fill(~inside, IGNORE)
    kept = (labels[:, 1:] != IGNORE).any(dim=1)
    ids, labels = windows.ids[kept], labels[kept]
    protocol = {
        **windows.protocol,
        "windows": len(ids),
        "tokens": int((labels[:, 1:] != IGNORE).sum()),
        "characters": characters,
    }
    return Windows(ids=ids, labels=labels, protocol=protocol)


def _lead(windows: Windows) -> tuple[int, int]:
    """Tokens of a window that are none of the text's (a BOS), and those that are."""
    lead = int(windows.protocol.get("bos") is True)
    return lead, windows.ids.shape[1] - lead


def _word_ends(joined: str, start: int, stop: int) -> int:
    """Words whose last character lies in [start, stop)."""
    piece = joined[start:stop]
    count = len(piece.split())
    cut = bool(piece) and not piece[-1].isspace() and stop < len(joined) and not joined[stop].isspace()
    return count - cut
