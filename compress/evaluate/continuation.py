"""Log-likelihood of continuations given contexts, in right-padded batches.

The tokens of a continuation are those of context + continuation after the tokens of the context alone. White space at
the end of the context belongs to the continuation, as most vocabularies have words with a space in front.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from compress.data.chat import tokenise
from compress.errors import CompressError
from compress.evaluate.perplexity import CHUNK_ELEMENTS
from compress.progress import Progress

BATCH_TOKENS = 2048
"""Padded tokens of one forward pass."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """A context and a continuation as token ids.

    Args:
        context: At least one token.
        continuation: At least one token.
        truncated: Whether tokens were cut off at the start of the context to fit the model's positions.
    """

    context: tuple[int, ...]
    continuation: tuple[int, ...]
    truncated: bool = False

    @property
    def inputs(self) -> tuple[int, ...]:
        """What the model reads: everything but the last token."""
        return self.context + self.continuation[:-1]


@dataclass(frozen=True, slots=True, kw_only=True)
class Likelihood:
    """How likely a model finds a continuation.

    Args:
        log_likelihood: Sum over its tokens, in nats.
        greedy: Whether each of its tokens is the most likely one, so that greedy decoding would write it.
        tokens: Its tokens.
    """

    log_likelihood: float
    greedy: bool
    tokens: int


def encode_pair(
    context: str, continuation: str, tokenizer: Any, *, positions: int | None = None, bos: bool = False
) -> Pair:
    """Tokenise a context with its continuation.

    Without special tokens, but for ``bos`` and an empty context: the beginning-of-text token, else the end-of-text
    token, stands for it.

    Args:
        context: What the model reads.
        continuation: What is scored.
        tokenizer: Of the model.
        positions: Most tokens that the model reads at once; a longer context loses its start.
        bos: Begin with the beginning-of-text token, also where the context lost its start.

    Raises:
        CompressError: The continuation has no token of its own, or is longer than the positions; nothing can stand for
            an empty context, or there is no BOS.
    """
    bare = context.rstrip()
    continuation = context[len(bare) :] + continuation
    before = tokenise(bare, tokenizer)
    whole = tokenise(bare + continuation, tokenizer)
    if not before:
        start = next((t for t in (tokenizer.bos_token_id, tokenizer.eos_token_id) if t is not None), None)
        if start is None:
            raise CompressError(
                "The context is empty, and the tokenizer has neither a BOS nor an EOS token to begin with.",
                "Give every row a context.",
            )
        before, whole = [start], [start, *whole]
    elif bos:
        before, whole = begun(before, tokenizer), begun(whole, tokenizer)
    scored = whole[len(before) :]
    if not scored:
        raise CompressError(
            f"The continuation {continuation!r} adds no token to its context.", "Give it some text."
        )
    kept = list(before)
    if positions is not None:
        if len(scored) > positions:
            raise CompressError(
                f"A continuation of {len(scored)} tokens is longer than the model's {positions} positions.",
                "Shorten it.",
            )
        kept = kept[max(0, len(kept) - (positions + 1 - len(scored))) :]
        if bos:
            kept[0] = before[0]
    return Pair(context=tuple(kept), continuation=tuple(scored), truncated=len(kept) < len(before))


def begun(ids: Sequence[int], tokenizer: Any) -> list[int]:
    """Tokens with a BOS before them.

    Raises:
        CompressError: The tokenizer has none.
    """
    if tokenizer.bos_token_id is None:
        raise CompressError("The tokenizer has no BOS token to begin with.", "Do without --bos.")
    return [tokenizer.bos_token_id, *ids]


@torch.no_grad()
def log_likelihoods(
    model: Any,
    pairs: Sequence[Pair],
    *,
    batch_tokens: int = BATCH_TOKENS,
    progress: Progress | None = None,
) -> list[Likelihood]:
    """Score continuations, in the order of ``pairs``.

    Pairs whose input is the same (one-token choices after one context) share a forward pass. A batch is padded at the
    right and has an attention mask, so padding changes nothing before it.

    Args:
        model: A causal language model; measured in evaluation mode, its own dtype and device.
        pairs: From ``encode_pair``.
        batch_tokens: Padded tokens of a forward pass; a longer input is a batch of its own.
        progress: Called with inputs done.

    Raises:
        CompressError: A token outside the vocabulary, or a log-likelihood that is not finite.
    """
    vocabulary = int(model.config.get_text_config().vocab_size)
    largest = max((max(*pair.context, *pair.continuation) for pair in pairs), default=0)
    if largest >= vocabulary:
        raise CompressError(
            f"Token {largest} is outside the model's vocabulary of {vocabulary}.",
            "Use the tokenizer that belongs to the model.",
        )
    sharing: dict[tuple[int, ...], list[int]] = {}
    for index, pair in enumerate(pairs):
        sharing.setdefault(pair.inputs, []).append(index)
    inputs = sorted(
        sharing, key=lambda ids: (-len(ids), ids)
    )  # longest first: a shortage of memory shows at once
    found: list[Likelihood | None] = [None] * len(pairs)
    training = model.training
    model.eval()
    try:
        done = 0
        while done < len(inputs):
            batch = inputs[done : done + max(1, batch_tokens // len(inputs[done]))]
            starts = [min(len(pairs[i].context) for i in sharing[ids]) - 1 for ids in batch]
            logits_BSV, first = _logits(model, batch, min(starts))
            for row, ids in enumerate(batch):
                for index in sharing[ids]:
                    found[index] = _score(logits_BSV[row], pairs[index], first)
            done += len(batch)
            if progress is not None:
                progress(done, len(inputs), "scoring")
    finally:
        model.train(training)
    return [likelihood for likelihood in found if likelihood is not None]


def _logits(model: Any, batch: Sequence[tuple[int, ...]], first: int) -> tuple[torch.Tensor, int]:
    """Logits [B, S - start, V] of a batch from position ``start`` on, and that start (at most ``first``)."""
    device = next(model.parameters()).device
    longest = max(map(len, batch))
    ids_BS = torch.zeros(len(batch), longest, dtype=torch.long)
    mask_BS = torch.zeros_like(ids_BS)
    for row, ids in enumerate(batch):
        ids_BS[row, : len(ids)] = torch.tensor(ids)
        mask_BS[row, : len(ids)] = 1
    plain = model.get_base_model() if hasattr(model, "get_base_model") else model
    keeps = "logits_to_keep" in inspect.signature(plain.forward).parameters
    options = {"logits_to_keep": longest - first} if keeps else {}
    out = model(
        input_ids=ids_BS.to(device), attention_mask=mask_BS.to(device), use_cache=False, **options
    ).logits
    return out, first if keeps else 0


def _score(logits_SV: torch.Tensor, pair: Pair, first: int) -> Likelihood:
    """The likelihood of a continuation from the logits of its row, which begin at position ``first``."""
    start = len(pair.context) - 1 - first
    picked_SV = logits_SV[start : start + len(pair.continuation)]
    targets_S = torch.tensor(pair.continuation, device=picked_SV.device)
    rows = max(1, CHUNK_ELEMENTS // picked_SV.shape[-1])
    total, greedy = 0.0, True
    for chunk, targets in zip(picked_SV.split(rows), targets_S.split(rows), strict=True):
        log_p = chunk.float().log_softmax(dim=-1).gather(1, targets[:, None])
        total += float(log_p.double().sum())
        greedy = greedy and bool((chunk.argmax(dim=-1) == targets).all())
    if not math.isfinite(total):
        raise CompressError(
            "The log-likelihood of a continuation is not finite.",
            "Evaluate in float32 (--dtype float32), or check the model.",
        )
    return Likelihood(log_likelihood=total, greedy=greedy, tokens=len(pair.continuation))
