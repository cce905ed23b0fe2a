"""Merge an adapter into a model, tensor by tensor."""

from __future__ import annotations

from collections.abc import Collection
from contextlib import closing
from functools import partial
from pathlib import Path

import torch

from compress.adapters.adapter_file import TRAINED_TOKENS, AdapterFile, owner
from compress.adapters.lanes import device_lanes
from compress.adapters.merged import Request, merged_tensors
from compress.errors import CompressError
from compress.model.architecture import Architecture
from compress.model.checkpoint import (
    Checkpoint,
    checkpoint_architecture,
    copy_side_files,
    require_dense,
)
from compress.model.writer import CheckpointWriter
from compress.progress import Progress


def merge_adapter(
    full: Checkpoint,
    adapter: Path,
    out: Path,
    *,
    device: torch.device | str = "cpu",
    progress: Progress | None = None,
) -> Path:
    """Write ``W + scaling * B A`` for every adapted linear of ``full`` as a plain Hugging Face folder.

    Sums are taken in float32 and rounded once to the stored dtype. An adapter on an output matrix that is tied to the
    embedding makes it a matrix of its own. On the CPU one tensor is in memory at a time, and its change in float32.

    Args:
        full: The model the adapter belongs to, not quantized.
        adapter: PEFT folder (LoRA on linears and embeddings, LoRA biases, whole trained tensors).
        out: Folder to write, without weights in it.
        device: Where products are computed; on a CUDA device matrices of equal shapes together, while the next are
            read and those before are written.
        progress: Called after each tensor.

    Raises:
        CompressError: The adapter does not fit the model, is a DoRA, holds a part of another base, or changes
            one side of tied embeddings; the model is quantized; or the device has no room for its largest matrix.
    """
    require_dense(full, allow_lq=False)
    arch = checkpoint_architecture(full)
    with AdapterFile(adapter) as file:
        _require_whole(file)
        changes = adapter_changes(full.names, arch, file)
        # a changed output matrix cannot be the embedding any more
        untied = arch.tied and arch.lm_head in changes and arch.lm_head not in full.names
        config = {**full.config, "tie_word_embeddings": False} if untied else full.config

        def request(target: str, source: str) -> Request:
            return Request(
                change=changes[target],
                shape=full.shape(source),
                dtype=full.dtype(source),
                read=partial(full.read, source),
                read_into=partial(full.read_into, source),
                transposed=file.transposed and target not in (arch.lm_head, arch.embedding),
            )

        written = writing_order(full.names, arch.embedding, arch.lm_head, untied=untied)
        requests = [request(target, source) for target, source in written if target in changes]
        with (
            CheckpointWriter(out, config=config) as writer,
            closing(merged_tensors(requests, file, device_lanes(device))) as changed,
        ):
            for index, (target, source) in enumerate(written):
                writer.add(target, next(changed) if target in changes else full.read(source))
                if progress is not None:
                    progress(index + 1, len(written), target)
    copy_side_files(full.path, out)
    return out


def writing_order(
    names: Collection[str], embedding: str, head: str, *, untied: bool
) -> list[tuple[str, str]]:
    """The tensors to write, each with the stored one it comes from: those of the model, in its order.

    Args:
        names: Of the model's tensors.
        embedding: Name of the embedding.
        head: Name of the output matrix.
        untied: The output matrix is made of the embedding and follows it.
    """
    order = []
    for name in names:
        order.append((name, name))
        if untied and name == embedding:
            order.append((head, name))
    return order


def _require_whole(file: AdapterFile) -> None:
    if file.has_initial_factors:
        raise CompressError(
            f"The adapter {file.path} holds a part of the quantized base it was trained on.",
            "Recover it first.",
        )


def adapter_changes(names: Collection[str], arch: Architecture, file: AdapterFile) -> dict[str, str]:
    """Model tensor -> the adapter tensor that changes it (B stands for A and B); leaves none out.

    Args:
        names: Tensors of the model.
        arch: Of the model.
        file: The adapter.

    Raises:
        CompressError: The adapter is a DoRA or holds single rows, changes what the model has not got, or one side of
            tied embeddings.
    """
    if file.config.get("use_dora"):
        raise CompressError(f"The adapter {file.path} is a DoRA.", "Merge it with PEFT's merge_and_unload.")
    changes: dict[str, str] = {}
    for name in file.names:
        module, kind = owner(name)
        if kind == TRAINED_TOKENS:
            raise CompressError(
                f"The adapter holds single rows of {module}.", "Merge it with PEFT's merge_and_unload."
            )
        target = f"{module}.bias" if kind.endswith("bias") else f"{module}.weight"
        tied_head = arch.tied and target == arch.lm_head and kind in ("lora_A.weight", "lora_B.weight")
        if arch.tied and target in (arch.embedding, arch.lm_head) and not tied_head:
            raise CompressError(
                f"The adapter changes {module}, which shares its weight with another layer.",
                "Use the adapter without merging it.",
            )
        if target not in names and not tied_head:
            raise CompressError(
                f"The adapter changes {target}, which the model has not got.",
                "Give the model that adapter_config.json names as its base.",
            )
        if not kind.endswith(("lora_A.weight", "lora_embedding_A")):
            changes[target] = name
    return changes
