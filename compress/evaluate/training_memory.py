"""How much memory training adapters on a frozen base takes, counted from shapes before anything runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

from compress.model.architecture import Architecture

HEAD_CHUNK = 256
"""Rows of logits that the loss holds at once."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingMemory:
    """Bytes at the peak of a training step.

    Attributes:
        weights: The frozen base.
        adapters: Their parameters, in float32.
        gradients: Of the adapters.
        optimizer: Two moments of every adapter parameter.
        activations: What the forward pass keeps for the backward pass.
        workspace: What lives for a moment: a chunk of logits, the gradients of one layer's activations, and of a
            quantized base its largest matrix unpacked.
    """

    weights: float
    adapters: float
    gradients: float
    optimizer: float
    activations: float
    workspace: float

    @property
    def total(self) -> float:
        """All of them."""
        parts = (self.weights, self.adapters, self.gradients, self.optimizer)
        return sum(parts) + self.activations + self.workspace


def training_memory(
    arch: Architecture,
    weight_bytes: float,
    *,
    quantized: bool,
    rank: int,
    batch: int,
    sequence: int,
    head_adapter: bool = True,
    dropout: bool = True,
    itemsize: int = 2,
    recompute: bool = False,
) -> TrainingMemory:
    """Memory of a step of LoRA on every decoder linear.

    Activations: what `layers_kept` says of the layers' own, and ``T (8 + 2 e) H`` behind them, for T tokens, hidden
    size H and e bytes of a number: what the final norm keeps, its output, and the gradient that the loss has taken.

    Args:
        arch: Of the model that is trained on; its layers may differ.
        weight_bytes: Of the base.
        quantized: Whether its linears are unpacked one by one.
        rank: Of the adapters.
        batch: Windows of one forward pass.
        sequence: Tokens of a window.
        head_adapter: Whether the output matrix has an adapter too.
        dropout: Whether the adapters' inputs go through dropout.
        itemsize: Bytes of a number in the computation: 2 for bfloat16, 4 for float32.
        recompute: Layers are run again in the backward pass (gradient checkpointing).
    """
    parameters = adapter_parameters(arch, rank, head=head_adapter)
    tokens = batch * sequence
    layers = [
        activation_bytes(arch.at(i), rank, dropout=dropout, itemsize=itemsize) for i in range(arch.layers)
    ]
    matrices = [
        prod(arch.at(i).linear_shape(spec)) for i in range(arch.layers) for spec in arch.linears_at(i)
    ]
    widest = max(max(arch.at(i).channels, arch.hidden) for i in range(arch.layers))
    workspace = 3 * 4 * min(HEAD_CHUNK, tokens) * arch.vocab + 3 * itemsize * tokens * widest
    return TrainingMemory(
        weights=weight_bytes,
        adapters=4 * parameters,
        gradients=4 * parameters,
        optimizer=8 * parameters,
        activations=tokens
        * (layers_kept(arch, layers, itemsize, recompute=recompute) + (8 + 2 * itemsize) * arch.hidden),
        workspace=workspace + (itemsize * max(matrices) if quantized else 0),
    )


def layers_kept(arch: Architecture, layers: Sequence[int], itemsize: int, *, recompute: bool) -> int:
    """Bytes that all decoder layers keep for each token of a backward pass.

    Run again in it, L layers keep their inputs, ``L e H``, and the one at work has its activations, those of the
    largest; else all keep theirs.

    Args:
        arch: Gives L and the hidden size H.
        layers: Bytes of each layer's activations a token.
        itemsize: e, bytes of a number of the hidden states.
        recompute: Layers are run again.
    """
    return max(layers) + arch.layers * itemsize * arch.hidden if recompute else sum(layers)


def adapter_parameters(arch: Architecture, rank: int, *, head: bool) -> int:
    """Parameters of LoRA factors on every decoder linear, and on the output matrix."""
    sides = sum(
        sum(arch.at(layer).linear_shape(spec))
        for layer in range(arch.layers)
        for spec in arch.linears_at(layer)
    )
    return rank * (sides + (arch.hidden + arch.vocab if head else 0))


def activation_bytes(layer: Architecture, rank: int, *, dropout: bool, itemsize: int) -> int:
    """Bytes that one decoder layer of the Llama layout keeps for each token, attention without its score matrix.

    The two norms keep their inputs in float32 and their outputs; attention keeps q, k, v and its output with a
    normalizer for each head; the MLP keeps the gate, its activation, the up branch and their product. Adapters keep
    their inner outputs in float32, and with dropout each one its own input and the mask.
    """
    hidden, queries = layer.hidden, layer.heads * layer.head_dim
    keys, channels = layer.kv_heads * layer.head_dim, layer.channels
    kept = 8 * hidden + 2 * itemsize * (hidden + queries + keys) + 4 * itemsize * channels
    kept += 4 * 7 * rank + 4 * layer.heads + 8
    if dropout:
        kept += 8 * itemsize * hidden + 2 * itemsize * queries + itemsize * channels
    return kept


def frozen_activation_bytes(layer: Architecture, *, itemsize: int) -> int:
    """Bytes that one decoder layer of the Llama layout keeps for each token when no weight of it is trained.

    As `activation_bytes`, less what only gradients of weights or adapters need: the outputs of the norms and the
    product in the MLP. This is a backward pass that gathers gradients at outputs.
    """
    hidden, queries = layer.hidden, layer.heads * layer.head_dim
    keys, channels = layer.kv_heads * layer.head_dim, layer.channels
    return 8 * hidden + 2 * itemsize * (queries + keys) + 3 * itemsize * channels + 4 * layer.heads + 8
