"""Conversations as one stream of tokens, for what looks at activations and not at answers alone."""

from __future__ import annotations

from typing import Any

import torch

from compress.data.chat import IGNORE, encode_conversation
from compress.data.text import Text
from compress.data.windows import Windows, window_protocol
from compress.errors import CompressError


def conversation_stream(
    text: Text, tokenizer: Any, *, length: int, count: int, seed: int, after: int = 0
) -> Windows:
    """Windows of whole conversations one after another, cut where a window is full: no padding.

    Statistics of inputs and gradients count every position of a window, and padding is no input. All tokens carry
    labels, those of the questions too.

    Args:
        text: Conversations.
        tokenizer: With a chat template, or the plain form of `encode_conversation`.
        length: Tokens per window.
        count: Windows wanted; fewer where there is not so much text.
        seed: Of the order of the conversations.
        after: Pass over so many windows, which another draw under this seed has read. Where too few are left, the rest
            are of those after all, and the protocol says how many: ``shared_windows``.

    Raises:
        CompressError: All conversations together are shorter than one window.
    """
    order = torch.randperm(len(text.conversations), generator=torch.Generator().manual_seed(seed)).tolist()
    stream: list[int] = []
    for index in order:
        if len(stream) >= (after + count) * length:
            break
        stream.extend(encode_conversation(text.conversations[index], tokenizer)[0])
    whole = min(after + count, len(stream) // length)
    if whole == 0:
        raise CompressError(
            f"The {text.split} split of {text.source} has {len(stream)} tokens, fewer than one window of {length}.",
            "Give a longer text.",
        )
    every = torch.tensor(stream[: whole * length], dtype=torch.long).view(whole, length)
    fresh = every[after:]
    shared = every[:after][: count - len(fresh)]
    ids = torch.cat([fresh, shared])
    labels = ids.clone()
    labels[:, 0] = IGNORE  # nothing comes before it
    return Windows(
        ids=ids,
        labels=labels,
        protocol=window_protocol(
            text,
            labels,
            bos="template",
            stride=length,
            layout="stream",
            requested=count,
            known=None,
            seed=seed,
            shared=len(shared) if after else None,
        ),
    )
