"""How a decomposed matrix lies in a checkpoint: its tensors, and its record in config.json."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from compress.errors import CompressError
from compress.quantize.blockwise import QuantizedTensor
from compress.quantize.config import QuantConfig
from compress.quantize.decompose import DENSE_FACTOR_DTYPE, Decomposition, Factor, factor_bits

FORMAT_VERSION = 1
QUANT_METHOD = "lq"


@dataclass(frozen=True, slots=True, kw_only=True)
class MatrixRecord:
    """What ``config.json`` says of one quantized matrix.

    Attributes:
        shape: (O, I).
        config: Of Q.
        rank: r, 0 for none.
        factor_config: Of the stored factors; None when they are 16-bit.
    """

    shape: tuple[int, int]
    config: QuantConfig
    rank: int = 0
    factor_config: QuantConfig | None = None

    @property
    def storage_bits(self) -> int:
        """Stored bits of Q and the factors, without a bias."""
        return self.config.storage_bits(self.shape) + factor_bits(self.shape, self.rank, self.factor_config)

    def to_dict(self) -> dict[str, Any]:
        """A JSON object that :meth:`from_dict` reads."""
        factors = self.factor_config
        return {
            "shape": list(self.shape),
            "config": self.config.to_dict(),
            "rank": self.rank,
            "factor_config": None if factors is None else factors.to_dict(),
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> MatrixRecord:
        """The record of a JSON object.

        Raises:
            CompressError: A key is missing.
            UsageError: A configuration is not valid.
        """
        missing = sorted({"shape", "config", "rank", "factor_config"} - set(values))
        if missing:
            raise CompressError(
                f"The record of a quantized matrix lacks {missing[0]!r}.",
                "Write the checkpoint again with this version of compress.",
            )
        factors = values["factor_config"]
        return cls(
            shape=(values["shape"][0], values["shape"][1]),
            config=QuantConfig.from_dict(values["config"]),
            rank=values["rank"],
            factor_config=None if factors is None else QuantConfig.from_dict(factors),
        )

    def layout(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Shape and type of each stored tensor by its name in the module; ``weight`` holds the codes of Q."""
        names = dict(_quantized_layout("weight", self.shape, self.config))
        names = {"weight": names.pop("weight_codes"), **names}
        if self.rank:
            for name, size in (("factor_out", self.shape[0]), ("factor_in", self.shape[1])):
                if self.factor_config is None:
                    names[name] = ((self.rank, size), DENSE_FACTOR_DTYPE)
                else:
                    names.update(_quantized_layout(name, (self.rank, size), self.factor_config))
        return names


def _quantized_layout(
    name: str, shape: tuple[int, int], config: QuantConfig
) -> Iterator[tuple[str, tuple[tuple[int, ...], torch.dtype]]]:
    types = {
        "codes": torch.uint8,
        "scale_codes": torch.uint8,
        "scale_max": config.torch_scale_dtype,
        "offset": torch.float32,
        "table": torch.float32,
    }
    for part, size in config.storage_bytes(shape).items():
        yield f"{name}_{part}", ((size // types[part].itemsize,), types[part])


def record_of(decomposition: Decomposition) -> MatrixRecord:
    """The record of a decomposition."""
    factor = decomposition.factor_out
    return MatrixRecord(
        shape=decomposition.quantized.shape,
        config=decomposition.quantized.config,
        rank=decomposition.rank,
        factor_config=factor.config if isinstance(factor, QuantizedTensor) else None,
    )


def factor_tensors(name: str, factor: Factor) -> dict[str, torch.Tensor]:
    """The tensors of a stored factor, ``factor_out`` or ``factor_in``, under their names in the module."""
    if isinstance(factor, torch.Tensor):
        return {name: factor}
    return {f"{name}_{part}": tensor for part, tensor in factor.tensors().items()}


def lq_tensors(
    prefix: str, decomposition: Decomposition, bias: torch.Tensor | None = None
) -> dict[str, torch.Tensor]:
    """The tensors of one matrix under their names in the checkpoint.

    Args:
        prefix: Module name, without a final dot ("model.layers.0.self_attn.q_proj").
        decomposition: Of the module's weight [O, I].
        bias: The module's bias [O], stored as it is.
    """
    stored = {"weight": decomposition.quantized.codes}
    for part, tensor in decomposition.quantized.tensors().items():
        if part != "codes":
            stored[f"weight_{part}"] = tensor
    if decomposition.factor_out is not None and decomposition.factor_in is not None:
        stored |= factor_tensors("factor_out", decomposition.factor_out)
        stored |= factor_tensors("factor_in", decomposition.factor_in)
    if bias is not None:
        stored["bias"] = bias
    return {f"{prefix}.{name}": tensor for name, tensor in stored.items()}


def lq_config(per_matrix: Mapping[str, MatrixRecord]) -> dict[str, Any]:
    """The ``quantization_config`` of config.json.

    Args:
        per_matrix: Record of every quantized matrix by module name; what is not listed stays dense.
    """
    return {
        "quant_method": QUANT_METHOD,
        "format_version": FORMAT_VERSION,
        "matrices": {name: record.to_dict() for name, record in per_matrix.items()},
    }


def read_lq_config(values: Mapping[str, Any]) -> dict[str, MatrixRecord]:
    """The records of a ``quantization_config``.

    Raises:
        CompressError: It is of another method or format version, or lacks its matrices.
    """
    version = values.get("format_version")
    if values.get("quant_method") != QUANT_METHOD or version != FORMAT_VERSION or "matrices" not in values:
        raise CompressError(
            f"The quantization_config is {values.get('quant_method')!r} of format version {version!r}, "
            f"not {QUANT_METHOD!r} of version {FORMAT_VERSION}.",
            "Open the checkpoint with the version of compress that wrote it, or quantize the model again.",
        )
    return {name: MatrixRecord.from_dict(record) for name, record in values["matrices"].items()}
