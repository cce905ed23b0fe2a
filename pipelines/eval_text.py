"""What every model of an evaluation reads: windows of the same text, by its own tokenizer."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from compress.data.extent import Extent, limit_extent, reach, scored_extent, token_ends
from compress.data.text import Text
from compress.data.windows import Windows, token_windows
from compress.model.load import load_tokenizer

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Reading:
    """The test text as one tokenizer cuts it.

    Attributes:
        tokenizer: The tokenizer.
        windows: What is scored.
        extent: The words and bytes of it; None where they are not known.
    """

    tokenizer: Any
    windows: Windows
    extent: Extent | None

    @property
    def lacks_bos(self) -> bool:
        """Whether plain text is read without the BOS that the tokenizer itself would put before it."""
        return self.windows.protocol.get("bos") is False and prepends_bos(self.tokenizer)

    def same_tokens(self, other: Reading, count: int) -> bool:
        """Whether the first ``count`` windows have the same tokens."""
        pairs = ((self.windows.ids, other.windows.ids), (self.windows.labels, other.windows.labels))
        return all(torch.equal(a[:count], b[:count]) for a, b in pairs)


def prepends_bos(tokenizer: Any) -> bool:
    """Whether the tokenizer puts a BOS before plain text when nobody asks for it, as Gemma's and Llama's do."""
    return tokenizer.bos_token_id is not None and tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]


def readings(
    text: Text, models: Sequence[Path], *, length: int, count: int, bos: bool = False
) -> list[Reading]:
    """The windows of every model, in order; models with one tokenizer share one reading.

    Tokenizers that cut the text differently get through different amounts of it in ``count`` windows. All are then
    held to the least of these, so that every loss is of the same characters.

    Args:
        text: The test text.
        models: Model folders.
        length: Tokens per window.
        count: Windows of the one that gets least far.
        bos: Begin every window with BOS.
    """
    keys = [_tokenizer_key(model) for model in models]
    cut: dict[str, tuple[Any, Windows, torch.Tensor | None]] = {}
    for key, model in zip(keys, models, strict=True):
        if key not in cut:
            tokenizer = load_tokenizer(model)
            windows = token_windows(text, tokenizer, length=length, count=count, bos=bos, option="--sequence")
            cut[key] = (tokenizer, windows, token_ends(text, tokenizer))
    first = next(iter(cut.values()))[1]
    alike = all(torch.equal(windows.ids, first.ids) for _, windows, _ in cut.values())
    reached = [reach(windows, ends) for _, windows, ends in cut.values() if ends is not None]
    held = not alike and len(reached) == len(cut)
    found = {}
    for key, (tokenizer, windows, ends) in cut.items():
        if ends is None:
            found[key] = Reading(tokenizer=tokenizer, windows=windows, extent=None)
            continue
        scored = limit_extent(windows, ends, min(reached)) if held else windows
        found[key] = Reading(tokenizer=tokenizer, windows=scored, extent=scored_extent(text, scored, ends))
    return [found[key] for key in keys]


def _tokenizer_key(model: Path) -> str:
    """Equal for folders with the same tokenizer files."""
    total = hashlib.sha256()
    for name in TOKENIZER_FILES:
        if (model / name).is_file():
            content = (model / name).read_bytes()
            total.update(f"{name} {len(content)}\n".encode() + content)
    return total.hexdigest()
