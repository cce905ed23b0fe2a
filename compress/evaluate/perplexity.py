"""Perplexity and mean loss over token windows, in bounded memory."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F

from compress.data.chat import IGNORE
from compress.data.windows import Windows
from compress.errors import CompressError
from compress.evaluate.interval import exponential, ratio_error, t_interval
from compress.progress import Progress

LOGITS_AT_ONCE = 1 << 25
"""Logits of one forward pass, where it can have several windows; one window may have more."""
MOST_AT_ONCE = 4
CHUNK_ELEMENTS = 1 << 23
"""Logits turned to fp32 at once: 32 MiB."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Perplexity:
    """A perplexity with all that is needed to repeat it.

    Args:
        value: ``exp(mean_nll)``.
        mean_nll: Mean negative log likelihood per scored token, in nats.
        standard_error: Standard error of ``mean_nll`` over windows, in nats; None for a single window.
        interval: 95 % confidence interval of ``value``: that of ``mean_nll`` over windows (Student's t) through
            ``exp``; None for a single window.
        tokens: Tokens scored.
        windows: Windows scored.
        protocol: The windows' protocol with model, tokens_scored, dtype and device.
    """

    value: float
    mean_nll: float
    standard_error: float | None
    interval: tuple[float, float] | None
    tokens: int
    windows: int
    protocol: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """All fields, ready for JSON."""
        return asdict(self)


def perplexity(
    model: Any,
    windows: Windows,
    *,
    batch_size: int | None = None,
    model_name: str | None = None,
    progress: Progress | None = None,
) -> Perplexity:
    """Measure perplexity over windows: loss over every labelled token but a window's first.

    Args:
        model: A causal language model; evaluated in evaluation mode, its own dtype and device.
        windows: What to score.
        batch_size: Windows per forward pass; None: as `windows_at_once` says.
        model_name: Recorded in the protocol.
        progress: Called with windows done.

    Raises:
        CompressError: No scored token, a token id outside the vocabulary, or a loss that is not finite.
    """
    sums, counts = window_losses(model, windows, batch_size=batch_size, progress=progress)
    tokens = int(counts.sum())
    mean = float(sums.sum() / tokens)
    error = ratio_error(sums, counts)
    nats = t_interval(mean, error, len(sums))
    parameter = _floating_parameter(model)
    return Perplexity(
        value=exponential(mean),
        mean_nll=mean,
        standard_error=error,
        interval=None if nats is None else (exponential(nats[0]), exponential(nats[1])),
        tokens=tokens,
        windows=len(windows),
        protocol={
            "model": model_name,
            **windows.protocol,
            "tokens_scored": tokens,
            "dtype": str(parameter.dtype).removeprefix("torch."),
            "device": parameter.device.type,
        },
    )


def windows_at_once(vocabulary: int, length: int) -> int:
    """How many windows are scored in one forward pass: their logits take most of its memory."""
    return max(1, min(MOST_AT_ONCE, LOGITS_AT_ONCE // (vocabulary * length)))


def mean_loss(
    model: Any, windows: Windows, *, batch_size: int | None = None, progress: Progress | None = None
) -> float:
    """Mean negative log likelihood per labelled token, in nats; the same number as `perplexity`'s."""
    sums, counts = window_losses(model, windows, batch_size=batch_size, progress=progress)
    return float(sums.sum() / counts.sum())


@torch.no_grad()
def window_losses(
    model: Any, windows: Windows, *, batch_size: int | None = None, progress: Progress | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Summed loss (float64 [windows], nats) and scored tokens (int64 [windows]) of every window.

    The model's logits [B, S, V] exist once in the model's dtype; fp32 copies only `CHUNK_ELEMENTS` at a
    time. Columns after a batch's last label are not computed: causal attention never looks at them.

    Raises:
        CompressError: No scored token, a token id outside the vocabulary, or a loss that is not finite.
    """
    if not bool((windows.labels[:, 1:] != IGNORE).any()):
        raise CompressError(
            "The windows have no token to score.", "Give a text with answers, or longer windows."
        )
    vocabulary = int(model.config.get_text_config().vocab_size)
    largest = int(windows.ids.max())
    if largest >= vocabulary:
        raise CompressError(
            f"Token {largest} is outside the model's vocabulary of {vocabulary}.",
            "Use the tokenizer that belongs to the model.",
        )
    device = next(model.parameters()).device
    if batch_size is None:
        batch_size = windows_at_once(vocabulary, windows.ids.shape[1])
    sums, counts = [], []
    training = model.training
    model.eval()
    try:
        for start in range(0, len(windows), batch_size):
            ids_BS = windows.ids[start : start + batch_size].to(device)
            labels_BS = windows.labels[start : start + batch_size].to(device)
            scored_S = (labels_BS != IGNORE).any(dim=0)
            last = int(scored_S.nonzero().max()) + 1 if bool(scored_S.any()) else 0
            if last > 1:
                ids_BS, labels_BS = ids_BS[:, :last], labels_BS[:, :last]
                logits_BSV = model(input_ids=ids_BS, use_cache=False).logits
                nll_BS = _token_losses(logits_BSV, labels_BS)
            else:
                nll_BS = torch.zeros(len(ids_BS), 1, device=device)
            sums.append(nll_BS.double().sum(dim=1).cpu())
            counts.append((labels_BS[:, 1:] != IGNORE).sum(dim=1).cpu())
            if progress is not None:
                progress(min(start + batch_size, len(windows)), len(windows), "scoring")
    finally:
        model.train(training)
    total = torch.cat(sums)
    if not bool(torch.isfinite(total).all()):
        raise CompressError(
            f"The model's loss is not finite in window {int((~torch.isfinite(total)).nonzero()[0])}.",
            "Evaluate in float32 (--dtype float32), or check the model.",
        )
    return total, torch.cat(counts)


def _token_losses(logits_BSV: torch.Tensor, labels_BS: torch.Tensor) -> torch.Tensor:
    """Loss of each position's label from the position before it, fp32 [B, S - 1], 0 where ignored."""
    vocabulary = logits_BSV.shape[-1]
    rows = max(1, CHUNK_ELEMENTS // vocabulary)
    losses = []
    for logits_SV, labels_S in zip(logits_BSV, labels_BS, strict=True):  # per window: views, no copy
        chunks = zip(logits_SV[:-1].split(rows), labels_S[1:].split(rows), strict=True)
        losses.append(
            torch.cat(
                [F.cross_entropy(x.float(), y, ignore_index=IGNORE, reduction="none") for x, y in chunks]
            )
        )
    return torch.stack(losses)


def computed_in(model: Any) -> str:
    """In which dtype and where a model computes, as a protocol line says it: ``float32 on cpu``."""
    parameter = _floating_parameter(model)
    return f"{str(parameter.dtype).removeprefix('torch.')} on {parameter.device.type}"


def _floating_parameter(model: Any) -> torch.Tensor:
    """A parameter that tells the compute dtype (packed codes are integers)."""
    parameters: list[torch.Tensor] = list(model.parameters())
    return next((p for p in parameters if p.is_floating_point()), parameters[0])
