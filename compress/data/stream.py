"""Conversations as one stream of tokens, for what looks at activations and not at answers alone."""

from __future__ import annotations

from typing import Any

import torch

from compress.data.chat import IGNORE, encode_conversation
from compress.data.text import Text
from compress.data.windows import Windows
from compress.errors import CompressError


def conversation_stream(text: Text, tokenizer: Any, *, length: int, count: int, seed: int) -> Windows:
    """Windows of whole conversations one after another, cut where a window is full: no padding.

    Statistics of inputs and gradients count every position of a window, and padding is no input. All tokens carry
    labels, those of the questions too.

    Args:
        text: Conversations.
        tokenizer: With a chat template, or the plain form of `encode_conversation`.
        length: Tokens per window.
        count: Windows wanted; fewer where there is not so much text.
        seed: Of the order of the conversations.

    Raises:
        CompressError: All conversations together are shorter than one window.
    """
    order = torch.randperm(len(text.conversations), generator=torch.Generator().manual_seed(seed)).tolist()
    stream: list[int] = []
    for index in order:
        if len(stream) >= count * length:
            break
        stream.extend(encode_conversation(text.conversations[index], tokenizer)[0])
    whole = min(count, len(stream) // length)
    if whole == 0:
        raise CompressError(
            f"The {text.split} split of {text.source} has {len(stream)} tokens, fewer than one window of {length}.",
            "Give a longer text.",
        )
    ids = torch.tensor(stream[: whole * length], dtype=torch.long).view(whole, length)
    labels = ids.clone()
    labels[:, 0] = IGNORE  # nothing comes before it
    return Windows(
        ids=ids,
        labels=labels,
        protocol={
            "source": text.source,
            "split": text.split,
            "sha256": text.sha256,
            "join": None,
            "bos": "template",
            "length": length,
            "stride": length,
            "layout": "stream",
            "windows": whole,
            "requested_windows": count,
            "tokens": whole * (length - 1),
            "text_tokens": None,
            "seed": seed,
        },
    )
