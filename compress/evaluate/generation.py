"""One text after a prompt, token by token: greedy, or sampled at a temperature with a generator of its own."""

from __future__ import annotations

import inspect
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from compress.errors import CompressError, UsageError


@dataclass(frozen=True, slots=True, kw_only=True)
class Generated:
    """What a model wrote and how fast.

    Attributes:
        ids: The new token ids, the end-of-text token among them where it stopped there.
        prefill_seconds: Until the first new token was known: reading the prompt.
        decode_seconds: From the first new token to the last.
        stopped: ``end`` at an end-of-text token, ``length`` when there were as many tokens as asked for.
    """

    ids: tuple[int, ...]
    prefill_seconds: float
    decode_seconds: float
    stopped: Literal["end", "length"]

    @property
    def tokens_per_second(self) -> float | None:
        """New tokens after the first, per second of decoding; None where there is only the first."""
        return (len(self.ids) - 1) / self.decode_seconds if len(self.ids) > 1 else None


@torch.inference_mode()
def generate(
    model: Any,
    ids: Sequence[int],
    *,
    tokens: int,
    temperature: float = 0.0,
    seed: int = 0,
    each: Callable[[list[int]], None] | None = None,
) -> Generated:
    """Continue a prompt with the KV cache, one sequence.

    Args:
        model: A causal language model in eval mode, PEFT's included.
        ids: The prompt's token ids.
        tokens: Most new tokens.
        temperature: 0 takes the likeliest token; above it, tokens are drawn from softmax(logits / temperature).
        seed: Seed of the draws.
        each: Called after every token with all new ids so far.

    Raises:
        UsageError: An empty prompt, no token asked for, or a temperature below zero.
        CompressError: The logits are not finite.
    """
    if not ids or tokens < 1 or not 0 <= temperature < math.inf:
        raise UsageError(
            "There is nothing to generate.", "Give a prompt, 1 token or more, and a temperature of 0 or more."
        )
    device = next(model.parameters()).device
    generator = torch.Generator(device).manual_seed(seed)
    ends, keep = end_ids(model), {"logits_to_keep": 1} if _keeps_logits(model) else {}
    step = torch.tensor([list(ids)], device=device)
    cache, new, first = None, [], 0.0
    begun = _now(device)
    while True:
        out = model(input_ids=step, past_key_values=cache, use_cache=True, **keep)
        cache = out.past_key_values
        new.append(pick(out.logits[0, -1], temperature, generator))
        first = first or _now(device)
        if each is not None:
            each(new)
        if new[-1] in ends or len(new) == tokens:
            return Generated(
                ids=tuple(new),
                prefill_seconds=first - begun,
                decode_seconds=_now(device) - first,
                stopped="end" if new[-1] in ends else "length",
            )
        step = torch.tensor([[new[-1]]], device=device)


def pick(logits_V: Tensor, temperature: float, generator: torch.Generator) -> int:
    """The next token from the logits [V] over the vocabulary.

    Raises:
        CompressError: They are not finite.
    """
    logits_V = logits_V.float()
    if not torch.isfinite(logits_V).all():
        raise CompressError(
            "The model's predictions are not finite.", "Try --dtype float32, or compress verify."
        )
    if temperature == 0:
        return int(logits_V.argmax())
    # The largest is subtracted first: a temperature near zero would overflow, and is then the likeliest token.
    chances_V = ((logits_V - logits_V.max()) / temperature).softmax(-1)
    return int(torch.multinomial(chances_V, 1, generator=generator))


def end_ids(model: Any) -> frozenset[int]:
    """The ids that end a text: those of the generation config, else of the config."""
    for config in (getattr(model, "generation_config", None), model.config.get_text_config()):
        ends = getattr(config, "eos_token_id", None)
        if ends is not None:
            return frozenset(ends) if isinstance(ends, list | tuple) else frozenset((ends,))
    return frozenset()


def _keeps_logits(model: Any) -> bool:
    plain = model.get_base_model() if hasattr(model, "get_base_model") else model
    return "logits_to_keep" in inspect.signature(plain.forward).parameters


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
