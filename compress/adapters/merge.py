"""Merge an adapter into a model, one tensor at a time."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from torch import Tensor

from compress.adapters.adapter_file import PREFIX, AdapterFile, owner
from compress.adapters.factors import factor_product
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


def merge_adapter(full: Checkpoint, adapter: Path, out: Path, *, progress: Progress | None = None) -> Path:
    """Write ``W + scaling * B A`` for every adapted linear of ``full`` as a plain Hugging Face folder.

    One tensor is in memory at a time; sums are taken in float32 and rounded once to the stored dtype. An adapter on
    an output matrix that is tied to the embedding makes it a matrix of its own.

    Args:
        full: The model the adapter belongs to, not quantized.
        adapter: PEFT folder (LoRA on linears and embeddings, LoRA biases, whole trained tensors).
        out: Folder to write, without weights in it.
        progress: Called after each tensor.

    Raises:
        CompressError: The adapter does not fit the model, is a DoRA, holds a part of another base, or changes
            one side of tied embeddings; or the model is quantized.
    """
    require_dense(full, allow_lq=False)
    arch = checkpoint_architecture(full)
    with AdapterFile(adapter) as file:
        _require_whole(file)
        changes = adapter_changes(full.names, arch, file)
        # a changed output matrix cannot be the embedding any more
        untied = arch.tied and arch.lm_head in changes and arch.lm_head not in full.names
        config = {**full.config, "tie_word_embeddings": False} if untied else full.config
        with CheckpointWriter(out, config=config) as writer:
            for index, name in enumerate(full.names):
                weight = full.read(name)
                if name in changes:
                    transposed = file.transposed and name not in (arch.lm_head, arch.embedding)
                    weight = merged(weight, file, changes[name], transposed=transposed)
                writer.add(name, weight)
                if untied and name == arch.embedding:
                    head = merged(weight, file, changes[arch.lm_head], transposed=False)
                    writer.add(arch.lm_head, head)
                if progress is not None:
                    progress(index + 1, len(full.names), name)
    copy_side_files(full.path, out)
    return out


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
        CompressError: The adapter is a DoRA, changes what the model has not got, or one side of tied embeddings.
    """
    if file.config.get("use_dora"):
        raise CompressError(f"The adapter {file.path} is a DoRA.", "Merge it with PEFT's merge_and_unload.")
    changes: dict[str, str] = {}
    for name in file.names:
        module, kind = owner(name)
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


def merged(
    weight: Tensor, file: AdapterFile, name: str, *, transposed: bool, mask: Tensor | None = None
) -> Tensor:
    """``weight`` changed by the adapter tensor ``name`` (and its partner); the sum in float32, the dtype kept.

    Args:
        weight: What the adapter's base computes with; its initial factors, where there are any, are in it.
        file: The adapter.
        name: One of the values of :func:`adapter_changes`.
        transposed: The weight lies [in, out].
        mask: Bool [out, in], False where the base's weight was removed and stays removed.

    Raises:
        CompressError: The shapes differ.
    """
    module, kind = owner(name)
    replaces = kind in ("weight", "bias")
    change = file.read(name) if replaces else _change(file, module, kind)
    if mask is not None and change.shape == mask.shape and not replaces:
        change = change * mask
    if transposed and not replaces:
        change = change.T
    if change.shape != weight.shape:
        raise CompressError(
            f"The adapter of {module} is made for {tuple(change.shape)}, not for {tuple(weight.shape)}.",
            "Give the model the adapter was made for.",
        )
    return (change if replaces else weight.float() + change).to(weight.dtype)


def _change(file: AdapterFile, module: str, kind: str) -> Tensor:
    """The float32 summand of a weight or bias."""
    scaling = file.scaling(module).value
    if kind == "lora_B.bias":
        return file.read(f"{PREFIX}{module}.{kind}").float() * scaling
    if kind == "lora_embedding_B":  # A [r, vocab], B [hidden, r]
        factor_a, factor_b = (file.read(f"{PREFIX}{module}.lora_embedding_{side}") for side in "AB")
        return factor_product(factor_a, factor_b, scaling).T
    delta, start = factor_product(*file.factors(module), scaling), file.initial_factors(module)
    return delta if start is None else delta - factor_product(*start, scaling)
