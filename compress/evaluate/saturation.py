"""Decoding speed at saturation: the batch grows until the device gives no more."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch

from compress.errors import UsageError
from compress.evaluate.latency import throughput
from compress.machine import host_memory
from compress.progress import Progress

GAIN = 0.10
"""A doubled batch that decodes less than so much faster is saturation."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Saturation:
    """The batch at which decoding stops to gain, and what led there.

    Args:
        batch: Sequences at once of the fastest batch.
        tokens_per_second: Tokens it decodes per second, all sequences together.
        stopped_by: "throughput" (the next batch gained less than `GAIN`), "memory" (the next batch has no room) or
            "limit" (the largest batch that was allowed).
        steps: Batch and tokens per second of every batch tried.
        prompt_tokens: Prompt length of every sequence.
        decode_tokens: Tokens generated for each.
    """

    batch: int
    tokens_per_second: float
    stopped_by: Literal["throughput", "memory", "limit"]
    steps: tuple[tuple[int, float], ...]
    prompt_tokens: int
    decode_tokens: int

    def to_dict(self) -> dict[str, Any]:
        """All fields, ready for JSON."""
        return asdict(self) | {"steps": [list(step) for step in self.steps]}


def saturation(
    model: Any,
    ids: torch.Tensor,
    *,
    decode_tokens: int = 16,
    repeats: int = 2,
    limit: int = 256,
    progress: Progress | None = None,
) -> Saturation:
    """Decode batches of 1, 2, 4, ... sequences until a doubled batch gains less than `GAIN`, measured twice.

    Args:
        model: A causal language model.
        ids: One prompt, int64 [P]; every sequence of a batch begins with it.
        decode_tokens: Tokens to generate for each sequence.
        repeats: Runs to take the median of, after a warm-up.
        limit: Largest batch to try.
        progress: Called with the batch that is next.

    Raises:
        UsageError: A limit below 1, or an empty prompt.
    """
    if limit < 1:
        raise UsageError(f"A batch of at most {limit} sequences decodes nothing.", "Allow at least 1.")
    steps: list[tuple[int, float]] = []
    stopped_by: Literal["throughput", "memory", "limit"] = "limit"
    batch = 1
    device = next(model.parameters()).device
    each = 0
    while batch <= limit:
        if progress is not None:
            progress(len(steps), limit.bit_length(), f"batch {batch}")
        if each and not _has_room(device, batch * each):
            stopped_by = "memory"
            break
        try:
            each = each or sequence_bytes(model, ids, decode_tokens)
            speed = _speed(model, ids, batch, decode_tokens, repeats)
            if (
                steps and speed < (1 + GAIN) * steps[-1][1]
            ):  # once more: another program may have been in the way
                speed = max(speed, _speed(model, ids, batch, decode_tokens, repeats))
        except torch.OutOfMemoryError:
            if not steps:
                raise
            stopped_by = "memory"
            torch.cuda.empty_cache()
            break
        gained = not steps or speed >= (1 + GAIN) * steps[-1][1]
        steps.append((batch, speed))
        if not gained:
            stopped_by = "throughput"
            break
        batch *= 2
    best = max(steps, key=lambda step: step[1])
    return Saturation(
        batch=best[0],
        tokens_per_second=best[1],
        stopped_by=stopped_by,
        steps=tuple(steps),
        prompt_tokens=len(ids),
        decode_tokens=decode_tokens,
    )


def _speed(model: Any, ids: torch.Tensor, batch: int, decode_tokens: int, repeats: int) -> float:
    prompts = ids[None].expand(batch, -1)
    return throughput(model, prompts, decode_tokens=decode_tokens, repeats=repeats).decode_tokens_per_second


@torch.no_grad()
def sequence_bytes(model: Any, ids: torch.Tensor, decode_tokens: int) -> int:
    """Bytes that one more sequence takes at its end: its KV cache, and its logits in float32 as sampling has them."""
    device = next(model.parameters()).device
    out = model(input_ids=ids[None].to(device), use_cache=True)
    layers = getattr(out.past_key_values, "layers", ())
    tensors = [getattr(layer, name, None) for layer in layers for name in ("keys", "values")]
    cached = sum(t.numel() * t.element_size() for t in tensors if isinstance(t, torch.Tensor))
    return int(cached * (len(ids) + decode_tokens) / len(ids)) + 4 * int(out.logits.shape[-1])


def _has_room(device: torch.device, size: int) -> bool:
    """Whether half of the memory that is free holds ``size`` bytes."""
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else host_memory()[1]
    return size <= free / 2
