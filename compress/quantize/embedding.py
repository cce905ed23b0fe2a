"""LQEmbedding: an embedding whose rows are stored as packed codes, and the output layer that reads the same codes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from compress.errors import CompressError
from compress.quantize.checkpoint import MatrixRecord
from compress.quantize.linear import LQLinear
from compress.quantize.native_form import rows_of_tiles

_SCALE_NAME = "scalar_embed_scale"
"""Where transformers' scaled embeddings (Gemma 3) keep the number they multiply with."""


class LQEmbedding(LQLinear):
    """Rows of Q by token id: ``y[t] = multiplier * Q[ids[t]]``. Only the rows asked for are dequantized.

    The tensors are those of an :class:`LQLinear` of the same matrix [V, D], so that a tied output layer can
    multiply with them (:class:`LQTiedHead`). The dtype of the result is that of the module: casts change it, the
    stored values stay as they are.

    Args:
        record: Shape (V, D) and configuration; rank 0.
        multiplier: What the rows are multiplied with, in the result's dtype; None: nothing.
        dtype: Of the result; None is torch's default type.
        device: Of all tensors.

    Raises:
        CompressError: The record has factors.
    """

    def __init__(
        self,
        record: MatrixRecord,
        *,
        multiplier: float | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        if record.rank:
            raise CompressError(
                f"The checkpoint stores an embedding with factors of rank {record.rank}.",
                "Quantize the model again with this version of compress.",
            )
        super().__init__(record, device=device)
        self.num_embeddings, self.embedding_dim = record.shape
        self.multiplier = multiplier
        self.register_buffer("like", torch.empty(0, dtype=dtype, device=device), persistent=False)

    @classmethod
    def in_place_of(
        cls, module: nn.Module, record: MatrixRecord, *, dtype: torch.dtype | None, device: str
    ) -> LQEmbedding:
        """What replaces a dense embedding.

        Raises:
            CompressError: The module does something else than looking rows up and scaling them.
        """
        return cls(record, multiplier=embedding_multiplier(module), dtype=dtype, device=device)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Rows [..., D] for ids [...]."""
        like = self.get_buffer("like")
        rows = self._rows(input).to(like.dtype)
        return rows if self.multiplier is None else rows * torch.tensor(self.multiplier).to(rows)

    def _rows(self, index: torch.Tensor) -> torch.Tensor:
        if self.weight.dtype == torch.uint8:
            return self.quantized().rows(index)
        # A tied output layer has let the kernels have the codes: giving them all back for a few rows would be slow.
        return rows_of_tiles(self.tiled(), self.record.config, self.get_buffer("weight_scale_max"), index)

    def product(self, hidden: torch.Tensor) -> torch.Tensor:
        """``hidden`` [..., D] times the matrix, [..., V]: what a tied output layer gives."""
        return super().forward(hidden)

    def hold_stored_form(self) -> None:
        """Hold the codes as a checkpoint has them, until the kernels ask again."""
        self._hold_plain()

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        self.hold_stored_form()  # so that a tied output layer's entry is the same tensor
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> LQEmbedding:
        # Unlike the stored tensors this one follows casts: it says what type the model computes in.
        like = self._buffers.pop("like")
        super()._apply(fn, recurse)
        self._buffers["like"] = None if like is None else fn(like)
        return self


class LQTiedHead(nn.Module):
    """The output layer of a model with tied embeddings: logits from the codes of an :class:`LQEmbedding`.

    Args:
        table: The embedding, which stays the owner of all tensors but ``weight``, which both name, as tied layers do.
    """

    def __init__(self, table: LQEmbedding) -> None:
        super().__init__()
        object.__setattr__(
            self, "table", table
        )  # not a child: its tensors are stored once, as the embedding's
        self.weight = table.weight
        self.out_features, self.in_features = table.record.shape

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits [..., V] for hidden states [..., D]."""
        return self.owner.product(hidden)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        self.owner.hold_stored_form()
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def dequantized_weight(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The matrix [V, D] this layer multiplies with."""
        return self.owner.dequantized_weight(dtype)

    @property
    def owner(self) -> LQEmbedding:
        """The embedding."""
        table: LQEmbedding = self.__dict__["table"]
        return table


def embedding_multiplier(module: nn.Module) -> float | None:
    """What an embedding multiplies its rows with; None for a plain one.

    Raises:
        CompressError: The module is no embedding, or one of a class whose forward pass is not known.
    """
    if type(module) is nn.Embedding:
        return None
    scale: Any = getattr(module, _SCALE_NAME, None)
    if isinstance(module, nn.Embedding) and isinstance(scale, int | float):
        return float(scale)
    raise CompressError(
        f"The model's embedding is a {type(module).__name__}, and what it does beyond a look-up is not known.",
        "Use --embeddings keep.",
    )
