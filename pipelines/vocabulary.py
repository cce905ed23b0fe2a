"""The embedding and the output matrix as matrices to quantize: which there are, and what the loss minds of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from compress.adapters.loss import TokenLoss
from compress.durable import replacing
from compress.errors import CompressError
from compress.model.config import build_config, meta_model
from compress.model.resident import resident
from compress.model.uneven import plain_config
from compress.pipelines.allocate import Choice
from compress.pipelines.matrices import VOCABULARY, Matrix
from compress.pipelines.model_input import ModelInput
from compress.progress import Progress
from compress.quantize.config import QuantConfig
from compress.quantize.embedding import embedding_multiplier
from compress.quantize.vocabulary import HeadMoments, MatrixMoments, embedding_moments, tied_moments

EIGHT_BITS = QuantConfig(bits=8, scale_bits=8, scale_dtype="float16", block_size=64, group_size=64)
"""How ``--embeddings 8bit`` stores them."""


def vocabulary_matrices(model: ModelInput) -> list[Matrix]:
    """The embedding, and the output matrix where it is another one.

    Raises:
        CompressError: One of them is of a kind that cannot be stored as codes.
    """
    arch = model.architecture
    dense = meta_model(build_config(plain_config(model.checkpoint.config)))
    embedding_multiplier(dense.get_input_embeddings())
    head = dense.get_output_embeddings()
    if type(head) is not nn.Linear or (arch.tied and head.bias is not None):
        raise CompressError(
            f"The model's output layer ({type(head).__name__}) is not a plain product with a matrix.",
            "Use --embeddings keep.",
        )
    shape = (arch.vocab, arch.hidden)
    found = [
        Matrix(
            layer=VOCABULARY,
            module=arch.embedding_module,
            tensor=arch.embedding,
            shape=shape,
            role="embedding",
        )
    ]
    if not arch.tied:
        found.append(
            Matrix(layer=VOCABULARY, module=arch.head_module, tensor=arch.lm_head, shape=shape, role="head")
        )
    return found


def eight_bit_choices(matrices: list[Matrix]) -> list[Choice]:
    """What ``--embeddings 8bit`` gives them."""
    return [
        Choice(
            matrix=matrix,
            config=EIGHT_BITS,
            rank=0,
            factor_config=None,
            bits=EIGHT_BITS.storage_bits(matrix.shape),
        )
        for matrix in matrices
    ]


def vocabulary_moments(
    model: ModelInput,
    network: nn.Module,
    batches: tuple[Tensor, ...],
    sensitivity_D: Tensor,
    progress: Progress | None = None,
) -> dict[str, MatrixMoments]:
    """What errors of the embedding and the output matrix cost, by module name.

    Args:
        model: The model.
        network: The same, loaded.
        batches: Tokens, int64 [B, S] each.
        sensitivity_D: Mean squared gradient of the summed loss at the embedding's output.
        progress: Called after every batch.

    Raises:
        CompressError: The logits are not the output matrix times the final hidden states.
    """
    arch, loss = model.architecture, TokenLoss(network)
    if not loss.separable(batches[0][:1, :8]):
        raise CompressError(
            "The logits of this model are more than its output matrix times the last hidden states.",
            "Use --embeddings 8bit or keep.",
        )
    sums = HeadMoments()
    with torch.no_grad():
        for done, ids_BS in enumerate(batches, start=1):
            hidden_TD = loss.hidden(ids_BS).flatten(0, -2)
            with resident(loss.head):  # once for all of its chunks
                sums.add(hidden_TD, loss.head, softcap=loss.softcap)
            if progress is not None:
                progress(done, len(batches), "logits")
    head, expected_V = sums.moments()
    plain: Any = network
    multiplier = embedding_multiplier(plain.get_input_embeddings()) or 1.0
    embedding = embedding_moments(multiplier**2 * sensitivity_D, expected_V)
    if arch.tied:
        return {arch.embedding_module: tied_moments(head, embedding)}
    return {arch.embedding_module: embedding, arch.head_module: head}


def save_moments(moments: dict[str, MatrixMoments], path: Path) -> None:
    """Write moments that :func:`load_moments` reads; all of the file or nothing."""
    tensors = {
        f"{name}.{part}": getattr(found, part).cpu().contiguous()
        for name, found in moments.items()
        for part in ("gram", "minds")
    }
    with replacing(path) as temporary:
        save_file(tensors, temporary)


def load_moments(path: Path) -> dict[str, MatrixMoments]:
    """The moments in a file, by module name; nothing when there is none."""
    if not path.is_file():
        return {}
    stored = load_file(path)
    names = sorted({name.rpartition(".")[0] for name in stored})
    return {name: MatrixMoments(gram=stored[f"{name}.gram"], minds=stored[f"{name}.minds"]) for name in names}
