"""How far a model's predictions are from another's: KL divergence and top-1 agreement, in bounded memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch

from compress.data.chat import IGNORE
from compress.data.windows import Windows
from compress.errors import CompressError
from compress.evaluate.interval import ratio_error, t_interval
from compress.evaluate.perplexity import CHUNK_ELEMENTS
from compress.progress import Progress


@dataclass(frozen=True, slots=True, kw_only=True)
class Divergence:
    """Predictions of a model against those of a reference, over the scored positions of windows.

    Args:
        kl: Mean of ``KL(reference || model)`` over positions, in nats per token.
        kl_standard_error: Its standard error over windows; None for a single window.
        kl_interval: Its 95 % confidence interval over windows (Student's t); None for a single window.
        agreement: Share of positions where both models have the same most likely token.
        agreement_standard_error: Its standard error over windows; None for a single window.
        tokens: Positions compared.
        windows: Windows compared.
    """

    kl: float
    kl_standard_error: float | None
    kl_interval: tuple[float, float] | None
    agreement: float
    agreement_standard_error: float | None
    tokens: int
    windows: int

    def to_dict(self) -> dict[str, Any]:
        """All fields, ready for JSON."""
        return asdict(self) | {"kl_interval": None if self.kl_interval is None else list(self.kl_interval)}


def divergence(
    model: Any, reference: Any, windows: Windows, *, progress: Progress | None = None
) -> Divergence:
    """Compare the predictions of two models window by window, at every position whose next token is scored.

    Both models are in memory, and of each the logits [S, V] of one window in its own dtype. They become float32 for
    `CHUNK_ELEMENTS` at a time; what is added up over windows is float64.

    Args:
        model: A causal language model.
        reference: The model it is compared with; both read the same token ids.
        windows: What both read.
        progress: Called with windows done.

    Raises:
        CompressError: The vocabularies differ in size, no token is scored, or a prediction is not finite.
    """
    sizes = [int(each.config.get_text_config().vocab_size) for each in (model, reference)]
    if sizes[0] != sizes[1]:
        raise _other_vocabulary(*sizes)
    total = len(windows)
    kls, hits, counts = (torch.zeros(total, dtype=torch.float64) for _ in range(3))
    with _evaluating(model, reference), torch.no_grad():
        for index in range(total):
            scored_S = (windows.labels[index, 1:] != IGNORE).nonzero().squeeze(1)
            counts[index] = len(scored_S)
            if len(scored_S):
                last = int(scored_S[-1]) + 1
                ours, theirs = (
                    _predictions(each, windows.ids[index : index + 1, :last], scored_S)
                    for each in (model, reference)
                )
                kls[index], hits[index] = _compare(ours, theirs)
                del ours, theirs
            if progress is not None:
                progress(index + 1, total, "comparing")
    tokens = int(counts.sum())
    if tokens == 0:
        raise CompressError(
            "The windows have no token to compare.", "Give a text with answers, or longer windows."
        )
    if not bool(torch.isfinite(kls).all()):
        raise CompressError(
            f"The KL divergence is not finite in window {int((~torch.isfinite(kls)).nonzero()[0])}.",
            "Evaluate in float32 (--dtype float32), or check the models.",
        )
    kl, error = float(kls.sum() / tokens), ratio_error(kls, counts)
    return Divergence(
        kl=kl,
        kl_standard_error=error,
        kl_interval=t_interval(kl, error, total),
        agreement=float(hits.sum() / tokens),
        agreement_standard_error=ratio_error(hits, counts),
        tokens=tokens,
        windows=total,
    )


def _predictions(model: Any, ids_1S: torch.Tensor, scored_S: torch.Tensor) -> torch.Tensor:
    """Logits of the scored positions, [scored, V], on the model's device and in its dtype."""
    device = next(model.parameters()).device
    logits_1SV: torch.Tensor = model(input_ids=ids_1S.to(device), use_cache=False).logits
    whole = len(scored_S) == ids_1S.shape[1]
    return logits_1SV[0] if whole else logits_1SV[0, scored_S.to(device)]


def _compare(ours_SV: torch.Tensor, theirs_SV: torch.Tensor) -> tuple[float, int]:
    """Sum over positions of ``KL(theirs || ours)``, and the positions whose most likely token is the same."""
    if ours_SV.shape[-1] != theirs_SV.shape[-1]:
        raise _other_vocabulary(ours_SV.shape[-1], theirs_SV.shape[-1])
    rows = max(1, CHUNK_ELEMENTS // ours_SV.shape[-1])
    kl, hits = 0.0, 0
    for ours, theirs in zip(ours_SV.split(rows), theirs_SV.split(rows), strict=True):
        ours, theirs = ours.to(theirs.device), theirs
        hits += int((ours.argmax(dim=-1) == theirs.argmax(dim=-1)).sum())
        log_q, log_p = ours.float().log_softmax(dim=-1), theirs.float().log_softmax(dim=-1)
        # where p is 0 the term is 0, also when q is 0 as well (a masked token: -inf - -inf)
        terms = torch.where(log_p == -torch.inf, 0.0, log_p.exp() * (log_p - log_q))
        kl += float(terms.sum(dim=-1).double().sum())
    return kl, hits


@contextmanager
def _evaluating(*models: Any) -> Iterator[None]:
    """Evaluation mode inside the block, each model's own mode after it."""
    modes = [model.training for model in models]
    for model in models:
        model.eval()
    try:
        yield
    finally:
        for model, mode in zip(models, modes, strict=True):
            model.train(mode)


def _other_vocabulary(ours: int, theirs: int) -> CompressError:
    return CompressError(
        f"The model predicts {ours} tokens and the reference {theirs}, so their predictions cannot be compared.",
        "Compare models with one vocabulary, or name another --reference.",
    )
