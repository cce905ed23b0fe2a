"""Bring a criterion what it needs: nothing, text, forward passes, or gradients of the weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from compress.errors import CompressError, UsageError
from compress.importance.activations import ActivationCriterion
from compress.importance.base import Criterion, Loss
from compress.importance.modules import decoder_linear, float_weight, plain_model
from compress.importance.moments import MomentCriterion
from compress.model.architecture import Architecture
from compress.model.recompute import recomputing
from compress.progress import Progress


def collect(
    criterion: Criterion,
    model: nn.Module,
    arch: Architecture,
    ids_NS: Tensor,
    *,
    loss: Loss | None,
    batch: int,
    recompute: bool = False,
    progress: Progress | None = None,
) -> None:
    """Let ``criterion`` observe ``model`` once, on calibration text, without training.

    The model runs in evaluation mode; that mode and ``requires_grad`` of its parameters are restored. For
    gradients, every decoder weight gets a full gradient in its own dtype, of the mean loss over all N (S - 1)
    predicted tokens; ``.grad`` of the decoder weights is None afterwards.

    Args:
        criterion: Needs weights, activations or gradients.
        model: A causal language model, plain or PEFT.
        arch: Its architecture.
        ids_NS: Calibration tokens, int64 [N, S]; not looked at when weights are enough.
        loss: Needed for gradients only.
        batch: Windows per pass.
        recompute: Run decoder layers again in backward passes instead of keeping their activations; the scores are the
            same.
        progress: Called after each pass.

    Raises:
        UsageError: The criterion needs adapters in training, or gradients while there is no ``loss``; or layers are to
            be run again and cannot.
        CompressError: There is no text, or gradients are wanted of quantized weights.
    """
    if criterion.needs == "adapters":
        raise UsageError(
            "This criterion scores gradients of adapters.", "Train adapters and observe every step."
        )
    if criterion.needs == "weights":
        criterion.observe(model)
        return
    if ids_NS.numel() == 0 or ids_NS.shape[1] < 2:
        windows, tokens = ids_NS.shape
        raise CompressError(
            f"Calibration got {windows} windows of {tokens} tokens.", "Give a longer text, or longer windows."
        )
    with _evaluating(model):
        if isinstance(criterion, ActivationCriterion):
            _gather_inputs(criterion, model, ids_NS, batch, progress)
            return
        if loss is None:
            raise UsageError("This criterion needs gradients, but there is no loss.", "Give a loss function.")
        if isinstance(criterion, MomentCriterion):
            criterion.measure(model, ids_NS, loss=loss, batch=batch, recompute=recompute, progress=progress)
        else:
            with recomputing(model) if recompute else nullcontext():
                _gather_gradients(criterion, model, arch, ids_NS, loss, batch, progress)


def _gather_inputs(
    criterion: ActivationCriterion, model: nn.Module, ids_NS: Tensor, batch: int, progress: Progress | None
) -> None:
    body: Any = plain_model(model)
    decoder = body.get_decoder()  # without the output matrix, whose logits nobody reads
    with torch.no_grad(), criterion.watching(model):
        for ids_BS in _batches(model, ids_NS, batch, progress):
            decoder(input_ids=ids_BS, use_cache=False)
    criterion.observe(model)


def _gather_gradients(
    criterion: Criterion,
    model: nn.Module,
    arch: Architecture,
    ids_NS: Tensor,
    loss: Loss,
    batch: int,
    progress: Progress | None,
) -> None:
    weights = [
        float_weight(decoder_linear(model, arch, layer, spec), arch.module_name(layer, spec))
        for layer in range(arch.layers)
        for spec in arch.linears_at(layer)
    ]
    tokens = ids_NS.shape[0] * (ids_NS.shape[1] - 1)
    with torch.enable_grad(), _only_trainable(model, weights):
        for ids_BS in _batches(model, ids_NS, batch, progress):
            (loss(model, ids_BS) / tokens).backward()
        criterion.observe(model)


def _batches(model: nn.Module, ids_NS: Tensor, batch: int, progress: Progress | None) -> Iterator[Tensor]:
    """Batches [B, S] on the model's device; progress is told when the next one is asked for."""
    device = next(model.parameters()).device
    parts = ids_NS.split(batch)
    for done, ids_BS in enumerate(parts, start=1):
        yield ids_BS.to(device)
        if progress is not None:
            progress(done, len(parts), "score")


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, then every module's own mode again."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def _only_trainable(model: nn.Module, weights: list[nn.Parameter]) -> Iterator[None]:
    """Gradients for ``weights`` alone, none at first; afterwards none again, and every flag as before."""
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    model.requires_grad_(False)
    for weight in weights:
        weight.requires_grad_(True)
        weight.grad = None
    try:
        yield
    finally:
        for weight in weights:
            weight.grad = None
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
