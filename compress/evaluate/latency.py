"""Tokens per second of prefill and of decoding, measured briefly."""

from __future__ import annotations

import inspect
import statistics
import time
from dataclasses import asdict, dataclass
from typing import Any

import torch

from compress.errors import CompressError, UsageError


@dataclass(frozen=True, slots=True, kw_only=True)
class Throughput:
    """Measured speed and what it was measured on.

    Args:
        prefill_tokens_per_second: Prompt tokens read per second, all sequences of the batch together.
        decode_tokens_per_second: Tokens generated per second with the KV cache, the batch together.
        batch: Sequences at once.
        prompt_tokens: Prompt length.
        decode_tokens: Tokens generated after each prompt.
        repeats: Runs behind each median (one more, the warm-up, is not counted).
        threads: CPU threads torch used.
        dtype: The model's dtype.
        device: The model's device type.
    """

    prefill_tokens_per_second: float
    decode_tokens_per_second: float
    batch: int
    prompt_tokens: int
    decode_tokens: int
    repeats: int
    threads: int
    dtype: str
    device: str

    def to_dict(self) -> dict[str, Any]:
        """All fields, ready for JSON."""
        return asdict(self)


@torch.no_grad()
def throughput(model: Any, ids: torch.Tensor, *, decode_tokens: int = 32, repeats: int = 3) -> Throughput:
    """Measure prefill and greedy decoding: one warm-up run, then the median of ``repeats`` runs.

    Prefill computes the logits of the last position only, as generation does, where the model can.

    Args:
        model: A causal language model; measured in evaluation mode, its own dtype and device.
        ids: Prompts, int64 [B, P] (or [P] for one).
        decode_tokens: Tokens to generate after each prompt; end-of-text does not stop it.
        repeats: Runs to take the median of.

    Raises:
        UsageError: An empty prompt, or nothing to measure.
        CompressError: Prompt and generated tokens exceed the model's positions.
    """
    ids = ids[None] if ids.ndim == 1 else ids
    if ids.numel() == 0 or decode_tokens < 1 or repeats < 1:
        raise UsageError(
            "There is nothing to time.", "Give a prompt, and at least 1 decode token and 1 repeat."
        )
    batch, prompt = ids.shape
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if positions is not None and prompt + decode_tokens > positions:
        raise CompressError(
            f"{prompt} prompt and {decode_tokens} decode tokens exceed the model's {positions} positions.",
            "Give a shorter prompt.",
        )
    parameter = next((p for p in model.parameters() if p.is_floating_point()), next(model.parameters()))
    device = parameter.device
    training = model.training
    model.eval()
    try:
        runs = [_run(model, ids.to(device), decode_tokens, device) for _ in range(repeats + 1)][1:]
    finally:
        model.train(training)
    return Throughput(
        prefill_tokens_per_second=batch * prompt / statistics.median(run[0] for run in runs),
        decode_tokens_per_second=batch * decode_tokens / statistics.median(run[1] for run in runs),
        batch=batch,
        prompt_tokens=prompt,
        decode_tokens=decode_tokens,
        repeats=repeats,
        threads=torch.get_num_threads(),
        dtype=str(parameter.dtype).removeprefix("torch."),
        device=device.type,
    )


def _run(model: Any, ids: torch.Tensor, decode_tokens: int, device: torch.device) -> tuple[float, float]:
    """Seconds of prefill and of decoding."""
    plain = model.get_base_model() if hasattr(model, "get_base_model") else model
    keeps = "logits_to_keep" in inspect.signature(plain.forward).parameters
    begin = _now(device)
    out = model(input_ids=ids, use_cache=True, **({"logits_to_keep": 1} if keeps else {}))
    step = out.logits[:, -1:].argmax(dim=-1)
    read = _now(device)
    for _ in range(decode_tokens):
        out = model(input_ids=step, past_key_values=out.past_key_values, use_cache=True)
        step = out.logits[:, -1:].argmax(dim=-1)
    return read - begin, _now(device) - read


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
