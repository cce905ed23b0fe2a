"""The models of a planned chain and their sizes, in the three conventions of the field."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from compress.model.architecture import Architecture
from compress.model.planned import cut
from compress.model.tensor_file import DTYPE_NAMES
from compress.pipelines.allocate import (
    HEADER_BYTES_PER_MATRIX,
    Choice,
    factor_format,
    limit_in_bits,
    parse_rank,
    ranks_of,
)
from compress.pipelines.matrices import matrices_of
from compress.pipelines.model_input import ModelInput
from compress.pipelines.settings import QuantizeSettings
from compress.pipelines.vocabulary import eight_bit_choices, vocabulary_matrices
from compress.prune.shape import ShapePlan
from compress.quantize.decompose import factor_bits
from compress.solvers.budget import parse_budget

PAPER_BITS = 16.0
"""Bits of a parameter that is not quantized, as papers count."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Packed:
    """What quantization will store of its matrices.

    Attributes:
        linear_bits: Stored bits of the decoder matrices: codes, scales, tables, factors.
        vocabulary_bits: Stored bits of the embedding and the output matrix; None where they are kept.
        nominal: Bits per weight that a paper would quote: the budget, where it is one.
        matrices: How many matrices are stored as codes.
    """

    linear_bits: float
    vocabulary_bits: float | None
    nominal: float
    matrices: int


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedModel:
    """A model of the chain, made or not.

    Attributes:
        name: What ``compress eval`` calls it.
        input: Architecture and tensors, without codes.
        packed: How it is quantized; None: it is not.
    """

    name: str
    input: ModelInput
    packed: Packed | None = None

    @property
    def arch(self) -> Architecture:
        """Its architecture."""
        return self.input.architecture

    @property
    def parameters(self) -> int:
        """All parameters, quantized or not, a tied matrix once."""
        return self.input.checkpoint.parameters

    @property
    def linears(self) -> int:
        """Weights of the decoder matrices."""
        return self.arch.decoder_linear_parameters()

    @property
    def vocabulary(self) -> tuple[str, ...]:
        """Tensors of the embedding and of the output matrix, as stored."""
        names = (self.arch.embedding, self.arch.lm_head)
        return tuple(name for name in names if name in self.input.checkpoint)

    @property
    def packed_bytes(self) -> float:
        """Stored bytes of everything that is codes; 0 without."""
        if self.packed is None:
            return 0.0
        return (self.packed.linear_bits + (self.packed.vocabulary_bits or 0.0)) / 8

    @property
    def dense_parameters(self) -> int:
        """Parameters that are no codes."""
        if self.packed is None:
            return self.parameters
        gone = self.linears
        if self.packed.vocabulary_bits is not None:
            gone += sum(math.prod(self.input.checkpoint.shape(name)) for name in self.vocabulary)
        return self.parameters - gone

    def loaded(self, itemsize: int) -> float:
        """Bytes of the model loaded in a dtype of ``itemsize`` bytes: codes as they are, all else in that dtype."""
        return self.packed_bytes + itemsize * self.dense_parameters

    def streamed(self, itemsize: int, *, ahead: bool) -> dict[str, float]:
        """Bytes by term of the model run layer by layer in a dtype of ``itemsize`` bytes.

        What is always there; the largest part that is there while it runs, a layer or a matrix of the vocabulary,
        with one matrix on its way to that dtype; and, ``ahead``, the stored bytes of the largest part to come.
        """
        checkpoint, arch = self.input.checkpoint, self.arch
        prefixes = [arch.layer_prefix.format(layer=layer) for layer in range(arch.layers)]
        parts: dict[str, list[str]] = {prefix: [] for prefix in prefixes}
        always = 0.0
        codes = set() if self.packed is None else {matrix.tensor for matrix in matrices_of(self.input)}
        start = prefixes[0].partition("0")[0]
        for name in checkpoint.names:
            if name in codes:
                continue
            if name.startswith(start):
                parts[f"{start}{name.removeprefix(start).partition('.')[0]}."].append(name)
            elif name not in self.vocabulary:
                always += itemsize * math.prod(checkpoint.shape(name))
            elif self.packed is None or self.packed.vocabulary_bits is None:
                parts[name] = [name]
        packed = 0.0
        if self.packed is not None:
            packed = self.packed.linear_bits / 8 / arch.layers
            always += (self.packed.vocabulary_bits or 0.0) / 8
        wide, stored, matrix = 0.0, 0.0, 0.0
        for part, names in parts.items():
            own = packed if part in prefixes else 0.0
            wide = max(wide, own + sum(itemsize * math.prod(checkpoint.shape(name)) for name in names))
            stored = max(stored, own + sum(checkpoint.nbytes(name) for name in names))
            matrix = max([matrix, *(checkpoint.nbytes(name) for name in names)])
        terms = {"weights that stay": always, "one part's weights": wide + matrix}
        return terms | {"read ahead": stored} if ahead else terms

    @property
    def bits_per_weight(self) -> float:
        """Stored bits per weight of the decoder matrices, all overhead included."""
        if self.packed is not None:
            return self.packed.linear_bits / self.linears
        return 8 * self._linear_bytes() / self.linears

    @property
    def weight_bytes(self) -> float:
        """Bytes of all tensors."""
        checkpoint = self.input.checkpoint
        if self.packed is None:
            return checkpoint.bytes
        dense = checkpoint.bytes - self._linear_bytes()
        if self.packed.vocabulary_bits is not None:
            dense -= sum(checkpoint.nbytes(name) for name in self.vocabulary)
        return dense + self.packed_bytes

    @property
    def file_bytes(self) -> float:
        """Bytes of the weight files: tensors, and headers as ``CheckpointWriter`` writes them.

        The header of a quantized file is bounded from above, as ``quantize`` does it.
        """
        checkpoint = self.input.checkpoint
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        end = 0
        for name in checkpoint.names:
            start, end = end, end + checkpoint.nbytes(name)
            header[name] = {
                "dtype": DTYPE_NAMES[checkpoint.dtype(name)],
                "shape": list(checkpoint.shape(name)),
                "data_offsets": [start, end],
            }
        text = len(json.dumps(header, separators=(",", ":")))
        codes = 0 if self.packed is None else HEADER_BYTES_PER_MATRIX * self.packed.matrices
        return self.weight_bytes + 8 + text + -text % 8 + codes

    def to_dict(self, full: PlannedModel, *, adapter: int = 0) -> dict[str, Any]:
        """Its sizes as JSON values, compared with the full model; ``adapter``: parameters of a float32 adapter."""
        nominal = PAPER_BITS if self.packed is None else self.packed.nominal
        return {
            "name": self.name,
            "parameters": self.parameters,
            "paper_bits": nominal,
            "paper_reduction": PAPER_BITS * full.parameters / (nominal * self.parameters),
            "bits_per_weight": self.bits_per_weight,
            "adapter_parameters": adapter,
            "bytes": round(self.file_bytes + 4 * adapter),
            "bits_per_parameter": 8 * (self.file_bytes + 4 * adapter) / self.parameters,
            "reduction": full.file_bytes / (self.file_bytes + 4 * adapter),
        }

    def _linear_bytes(self) -> int:
        return sum(self.input.checkpoint.nbytes(matrix.tensor) for matrix in matrices_of(self.input))


def pruned(model: PlannedModel, shapes: ShapePlan) -> PlannedModel:
    """The model with the layers of ``shapes``; layers that are all alike are a plain smaller model."""
    arch = model.arch
    if (one := shapes.uniform) is not None:
        arch = replace(arch, heads=one.kv_heads * one.queries, kv_heads=one.kv_heads, channels=one.channels)
    else:
        arch = replace(arch, layer_shapes=shapes.shapes)
    checkpoint = cut(model.input.checkpoint, arch)
    return PlannedModel(name="pruned", input=replace(model.input, checkpoint=checkpoint, architecture=arch))


def quantized(model: PlannedModel, settings: QuantizeSettings) -> PlannedModel:
    """The model at its budget: what the solver may spend is spent.

    With factors outside of the budget and a free rank, every matrix is counted with the largest rank it may take,
    since larger ones cost nothing there.

    Raises:
        UsageError: A budget or rank that is not understood, or above the model's own size.
        CompressError: A budget below the smallest size.
    """
    budget, fixed = parse_budget(settings.budget), parse_rank(settings.rank)
    linears = matrices_of(model.input)
    vocabulary = [] if settings.embeddings == "keep" else vocabulary_matrices(model.input)
    uncounted: Sequence[Choice] = eight_bit_choices(vocabulary) if settings.embeddings == "8bit" else ()
    chosen = [*vocabulary, *linears] if settings.embeddings == "menu" else linears
    limit = limit_in_bits(budget, model.input, chosen, settings, fixed, uncounted)
    share = limit / sum(matrix.numel for matrix in chosen)
    bits = share * sum(matrix.numel for matrix in linears)
    if settings.budget_includes == "none":
        largest = [max(ranks) for ranks in ranks_of(linears, fixed, settings.runtime)]
        bits += sum(
            factor_bits(matrix.shape, rank, factor_format(settings))
            for matrix, rank in zip(linears, largest, strict=True)
        )
    vocabulary_bits: float | None = None
    if settings.embeddings == "menu":
        vocabulary_bits = share * sum(matrix.numel for matrix in vocabulary)
    elif uncounted:
        vocabulary_bits = float(sum(choice.bits for choice in uncounted))
    packed = Packed(
        linear_bits=bits,
        vocabulary_bits=vocabulary_bits,
        nominal=budget.value if budget.kind == "bits" else share,
        matrices=len(linears) + len(vocabulary),
    )
    return replace(model, name="quantized", packed=packed)
