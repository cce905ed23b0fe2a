"""Text sampled from a model itself: calibration and training text where no other is at hand."""

from __future__ import annotations

import hashlib
from typing import Any

import torch

from compress.data.text import SPLITS, Split
from compress.errors import CompressError
from compress.progress import Progress

OPENING_TOKENS = 24
OPENING_CHARACTERS = 16
"""A document's first characters decide its split, so that two splits cannot hold the same document."""

_ROUNDS_WITHOUT_GAIN = 64


def split_of_sample(text: str) -> Split | None:
    """The split that a sampled document belongs to, by the hash of its opening; None when too short."""
    opening = text[:OPENING_CHARACTERS]
    if len(opening) < OPENING_CHARACTERS:
        return None
    return SPLITS[hashlib.sha256(opening.encode("utf-8", "replace")).digest()[0] % len(SPLITS)]


def longest_document(tokens: int) -> int:
    """Tokens after which a document is cut: 512, less when few tokens are wanted in all (but 64)."""
    return min(512, max(64, tokens // 16))


@torch.no_grad()
def sample_documents(
    model: Any,
    tokenizer: Any,
    *,
    split: Split,
    seed: int,
    tokens: int,
    batch_size: int = 32,
    progress: Progress | None = None,
) -> tuple[str, ...]:
    """Sample documents at temperature 1 from the beginning-of-text token until ``tokens`` are reached.

    Openings are sampled first, those of other splits are dropped, and the rest is continued to EOS or to
    `longest_document`; within a split the distribution stays the model's own. Nothing is cached on disk.

    Args:
        model: A causal language model; sampled in evaluation mode.
        tokenizer: Its tokenizer; must have a BOS or EOS token to start from.
        split: The split to sample for.
        seed: Seed of the generator; each split draws its own stream from it.
        tokens: Stop once this many tokens are in finished documents.
        batch_size: Openings sampled together.
        progress: Called with the tokens sampled so far.

    Raises:
        CompressError: No token to start from, or the model does not yield text of this split.
    """
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if start is None:
        raise CompressError(
            "The tokenizer has neither a BOS nor an EOS token to start sampling from.", "Use --data pydoc."
        )
    device = next(model.parameters()).device
    stream = int.from_bytes(hashlib.sha256(f"{seed}:{split}".encode()).digest()[:8], "big") >> 1
    generator = torch.Generator(device=device).manual_seed(stream)
    eos = -1 if tokenizer.eos_token_id is None else int(tokenizer.eos_token_id)
    training = model.training
    model.eval()
    longest = longest_document(tokens)
    documents: dict[str, None] = {}  # ordered, and a document sampled twice counts once
    done = barren = 0
    try:
        while done < tokens:
            begin = torch.full((batch_size, 1), start, dtype=torch.long, device=device)
            opened = _continue(model, begin, OPENING_TOKENS, eos, generator)
            mine = [split_of_sample(_decode(tokenizer, row, eos)) == split for row in opened]
            gained = 0
            if any(mine):
                enough = max(4, -(-(tokens - done) // longest))
                kept = opened[torch.tensor(mine, device=device)][:enough]
                full = _continue(model, kept, longest - OPENING_TOKENS, eos, generator)
                for row in full:
                    text = _decode(tokenizer, row, eos)
                    if split_of_sample(text) == split and text not in documents:
                        documents[text] = None
                        gained += _length(row, eos)
            barren = 0 if gained else barren + 1
            if barren == _ROUNDS_WITHOUT_GAIN:
                raise CompressError(
                    f"The model yields no new text for the {split} split.",
                    "Use another source: --data pydoc.",
                )
            done += gained
            if progress is not None:
                progress(min(done, tokens), tokens, "sampling text")
    finally:
        model.train(training)
    return tuple(documents)


def _continue(model: Any, ids: torch.Tensor, new: int, eos: int, generator: torch.Generator) -> torch.Tensor:
    """Sample up to ``new`` tokens after ids [B, S] with a KV cache; returns [B, S + new] or shorter."""
    past, step = None, ids
    finished = (ids[:, 1:] == eos).any(dim=1)
    for _ in range(new):
        if bool(finished.all()):
            break
        out = model(input_ids=step, past_key_values=past, use_cache=True)
        past = out.past_key_values
        step = torch.multinomial(out.logits[:, -1].float().softmax(-1), 1, generator=generator)
        step = step.masked_fill(finished[:, None], max(eos, 0))  # finished rows repeat EOS
        finished |= step[:, 0] == eos
        ids = torch.cat((ids, step), dim=1)
    return ids


def _length(row: torch.Tensor, eos: int) -> int:
    ends = (row[1:] == eos).nonzero()
    return int(ends[0]) if len(ends) else len(row) - 1


def _decode(tokenizer: Any, row: torch.Tensor, eos: int) -> str:
    body = row[1 : 1 + _length(row, eos)].tolist()
    return str(tokenizer.decode(body, skip_special_tokens=True, clean_up_tokenization_spaces=False))
