"""Alignment: a pruned model's own weights are trained on, its output matrix frozen (LoRAM, arXiv 2502.13533 §3)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from compress.errors import CompressError
from compress.model.checkpoint import Checkpoint, CheckpointWriter, copy_side_files

if TYPE_CHECKING:  # one process needs none of it
    from compress.adapters.ranks import Ranks


def release_weights(model: PreTrainedModel) -> int:
    """Let every weight of ``model`` ask for gradients but those of the output matrix; returns how many numbers train.

    Where the output matrix is tied to the embedding, both are one matrix, and it is frozen.

    Raises:
        CompressError: The weights are not float32: moments of rounded weights would lose small updates.
    """
    narrow = next((n for n, p in model.named_parameters() if p.dtype != torch.float32), None)
    if narrow is not None:
        raise CompressError(f"The weight {narrow} is not held in float32.", "Load the model in float32.")
    model.requires_grad_(True)
    head: Any = model.get_output_embeddings()
    for parameter in head.parameters():
        parameter.requires_grad_(False)
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def write_weights(
    model: PreTrainedModel, source: Checkpoint, target: Path, *, ranks: Ranks | None = None
) -> None:
    """Write the weights of ``model`` as a checkpoint like ``source``: its names, dtypes and config, rounded once.

    Args:
        model: Trained from ``source``, in float32.
        source: What it was loaded from; tensors that are no weights of the model are copied.
        target: Folder without weights.
        ranks: The processes among which the weights are divided: all call this, and the first writes, one weight put
            together at a time.

    Raises:
        CompressError: A trained weight has no place in ``source``.
    """
    weights = _named_as(source, model)
    placed = {id(weight) for weight in weights.values()}
    lost = [n for n, p in model.named_parameters() if p.requires_grad and id(p) not in placed]
    if lost:
        raise CompressError(
            f"{len(lost)} trained weights have other names in {source.path}, first {lost[0]!r}.",
            "Load the model with transformers, save it again with save_pretrained, and use that folder.",
        )
    together: Callable[[Tensor], Tensor] = Tensor.detach
    if ranks is not None:
        from compress.adapters.sharded import whole

        together = partial(whole, ranks=ranks)
        if not ranks.first:
            for name in source.names:
                if name in weights:
                    together(weights[name])
            return
    with CheckpointWriter(target, config=source.config) as writer:
        for name in source.names:
            weight = weights.get(name)
            stored = source.read(name) if weight is None else together(weight).to("cpu", source.dtype(name))
            writer.add(name, stored)
        writer.finish()
    copy_side_files(source.path, target)


def _named_as(source: Checkpoint, model: PreTrainedModel) -> dict[str, Tensor]:
    """Stored name -> parameter; a checkpoint may leave out the prefix of the model's body."""
    own: dict[str, Tensor] = dict(model.named_parameters())
    found: dict[str, Tensor] = {}
    for name in source.names:
        parameter = own.get(name, own.get(f"{model.base_model_prefix}.{name}"))
        if parameter is not None:
            found[name] = parameter
    return found
