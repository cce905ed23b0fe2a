"""Merge an adapter into a model, one tensor at a time."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from compress.adapters.adapter_file import PREFIX, AdapterFile, owner
from compress.adapters.factors import factor_product
from compress.errors import CompressError
from compress.model.architecture import architecture_of
from compress.model.checkpoint import Checkpoint, CheckpointWriter, copy_side_files
from compress.progress import Progress


def merge_adapter(full: Checkpoint, adapter: Path, out: Path, *, progress: Progress | None = None) -> Path:
    """Write ``W + scaling * B A`` for every adapted linear of ``full`` as a plain Hugging Face folder.

    One tensor is in memory at a time; sums are taken in float32 and rounded once to the stored dtype.

    Args:
        full: The model the adapter belongs to, not quantized.
        adapter: PEFT folder (LoRA on linears and embeddings, LoRA biases, whole trained tensors).
        out: Folder to write.
        progress: Called after each tensor.

    Raises:
        CompressError: The adapter does not fit the model, is a DoRA, was not trained from zero, or adapts one side
            of tied embeddings.
    """
    with AdapterFile(adapter) as file:
        changes = _changes(full, file)
        transposed = _transposed_names(full)
        with CheckpointWriter(out, config=full.config) as writer:
            for index, name in enumerate(full.names):
                weight = full.read(name)
                if name in changes:
                    weight = _merged(weight, name, file, changes[name], transposed=name in transposed)
                writer.add(name, weight)
                if progress is not None:
                    progress(index + 1, len(full.names), name)
            writer.finish()
    copy_side_files(full.path, out)
    return out


def _changes(full: Checkpoint, file: AdapterFile) -> dict[str, str]:
    """Model tensor -> kind of change, with every tensor of the adapter accounted for."""
    if file.has_initial_factors:
        raise CompressError(
            f"The adapter {file.path} holds a part of the quantized base it was trained on.", "Recover it first."
        )
    if file.config.get("use_dora"):
        raise CompressError(f"The adapter {file.path} is a DoRA.", "Merge it with PEFT's merge_and_unload.")
    tied = full.config.get("tie_word_embeddings", False)
    changes: dict[str, str] = {}
    for name in file.names:
        module, kind = owner(name)
        target = f"{module}.bias" if kind in ("lora_B.bias", "bias") else f"{module}.weight"
        if target not in full.names:
            raise CompressError(
                f"The adapter tensor {name} belongs to no tensor of the model.",
                "Give the model named in the adapter's config"
                + (", or untie its embeddings first." if tied else "."),
            )
        changes[target] = kind
    embedding = next((n for n in changes if changes[n].startswith("lora_embedding")), None)
    if tied and embedding is not None:
        raise CompressError(
            f"The adapter changes {embedding} but not the tied lm_head.", "Keep the adapter apart from the model."
        )
    return changes


def _merged(weight: Tensor, name: str, file: AdapterFile, kind: str, *, transposed: bool) -> Tensor:
    module = name.rpartition(".")[0]
    if kind in ("weight", "bias"):
        stored = next(n for n in file.names if owner(n) == (module, kind))
        change = file.read(stored).float()
        base = torch.zeros_like(change)
    elif kind == "lora_B.bias":
        change = file.read(f"{PREFIX}{module}.{kind}").float() * file.scaling(module).value
        base = weight.float()
    else:
        if kind.startswith("lora_embedding"):
            factor_a = file.read(f"{PREFIX}{module}.lora_embedding_A")  # [r, vocab]
            factor_b = file.read(f"{PREFIX}{module}.lora_embedding_B")  # [hidden, r]
        else:
            factor_a, factor_b = file.factors(module)
        change = factor_product(factor_a, factor_b, file.scaling(module).value)
        if transposed or kind.startswith("lora_embedding"):
            change = change.T
        base = weight.float()
    if change.shape != weight.shape or not weight.is_floating_point():
        raise CompressError(
            f"The adapter of {module} is made for {tuple(change.shape)}, the model stores {tuple(weight.shape)}.",
            "Give the full, unquantized model the adapter was recovered for.",
        )
    return (base + change).to(weight.dtype)


def _transposed_names(full: Checkpoint) -> frozenset[str]:
    """Weights stored [in, out]."""
    arch = architecture_of(full.config, full.names)
    return frozenset(
        arch.tensor_name(layer, spec)
        for layer in range(arch.layers)
        for spec in arch.linears
        if spec.transposed
    )
