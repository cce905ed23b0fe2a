"""What a quantized matrix is stored as: the tuple (b, b0, b1, B0, B1) of LQ-LoRA (arXiv 2311.12023) §3.2."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from itertools import product
from math import prod
from typing import Any, Literal, get_args

import torch

from compress.errors import UsageError
from compress.quantize.normal_float import TABLE_BITS
from compress.quantize.packing import packed_bytes

ScaleDtype = Literal["bfloat16", "float16", "float32"]
Codebook = Literal["normal", "learned"]

_DTYPES: dict[str, torch.dtype] = {
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float32": torch.float32,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantConfig:
    """A look-up table of values with double-quantized block scales.

    Attributes:
        bits: Width b of a weight's code: 2, 3, 4 or 8.
        scale_bits: Width b0 of a first-level scale's code: 2, 3, 4 or 8.
        scale_dtype: Type b1 of the second-level scales.
        block_size: B0, weights of one row that share a scale; a multiple of 8.
        group_size: B1, consecutive blocks in row-major order that share a second-level scale.
        codebook: ``normal``: the NormalFloat table. ``learned``: a table fitted to the matrix and stored with it
            (float32; up to 4 bits).

    Raises:
        UsageError: A value outside of these.
    """

    bits: int
    scale_bits: int = 8
    scale_dtype: ScaleDtype = "float32"
    block_size: int = 64
    group_size: int = 256
    codebook: Codebook = "normal"

    def __post_init__(self) -> None:
        for name in ("bits", "scale_bits"):
            if getattr(self, name) not in TABLE_BITS:
                raise UsageError(f"{name} is {getattr(self, name)!r}.", "Choose 2, 3, 4 or 8.")
        if self.scale_dtype not in get_args(ScaleDtype):
            raise UsageError(
                f"scale_dtype is {self.scale_dtype!r}.", f"Choose {', '.join(get_args(ScaleDtype))}."
            )
        if self.block_size < 8 or self.block_size % 8:
            raise UsageError(f"block_size is {self.block_size!r}.", "Choose a positive multiple of 8.")
        if self.group_size < 1:
            raise UsageError(f"group_size is {self.group_size!r}.", "Choose a positive number.")
        if self.codebook not in get_args(Codebook):
            raise UsageError(f"codebook is {self.codebook!r}.", f"Choose {', '.join(get_args(Codebook))}.")
        if self.codebook == "learned" and self.bits > 4:
            raise UsageError(
                f"A learned codebook of {self.bits} bits is not offered.", "Choose 2, 3 or 4 bits, or normal."
            )

    @property
    def torch_scale_dtype(self) -> torch.dtype:
        """The torch type of the second-level scales."""
        return _DTYPES[self.scale_dtype]

    @property
    def nominal_bits(self) -> float:
        """Bits per weight as the paper counts: b + b0/B0 + b1/(B0 B1); no padding, no offset, no table."""
        b1 = self.torch_scale_dtype.itemsize * 8
        return self.bits + self.scale_bits / self.block_size + b1 / (self.block_size * self.group_size)

    def blocks(self, shape: tuple[int, ...]) -> int:
        """First-level blocks of a matrix [out, in]; the last block of every row is padded."""
        rows, columns = shape
        return rows * -(-columns // self.block_size)

    def storage_bytes(self, shape: tuple[int, ...]) -> dict[str, int]:
        """Bytes of each stored tensor of a matrix [out, in]."""
        blocks = self.blocks(shape)
        table = {"table": 4 * 2**self.bits} if self.codebook == "learned" else {}
        return {
            "codes": packed_bytes(blocks * self.block_size, self.bits),
            "scale_codes": packed_bytes(blocks, self.scale_bits),
            "scale_max": -(-blocks // self.group_size) * self.torch_scale_dtype.itemsize,
            "offset": 4,
            **table,
        }

    def storage_bits(self, shape: tuple[int, ...]) -> int:
        """Stored bits of a matrix [out, in]: codes with row padding, both scale levels, fp32 offset, own table."""
        return 8 * sum(self.storage_bytes(shape).values())

    def bits_per_weight(self, shape: tuple[int, ...]) -> float:
        """:meth:`storage_bits` per weight of the matrix (padding is cost, not weight)."""
        return self.storage_bits(shape) / prod(shape)

    def to_dict(self) -> dict[str, Any]:
        """A JSON object that :meth:`from_dict` reads."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> QuantConfig:
        """The configuration of a JSON object.

        Raises:
            UsageError: A key is unknown, ``bits`` is missing or a value is not valid.
        """
        unknown = sorted(set(values) - {f.name for f in fields(cls)})
        if unknown or "bits" not in values:
            problem = f"has the unknown key {unknown[0]!r}" if unknown else "lacks the key 'bits'"
            raise UsageError(
                f"The quantization configuration {problem}.",
                f"Its keys are {', '.join(f.name for f in fields(cls))}.",
            )
        return cls(**values)


FACTOR_8BIT = QuantConfig(bits=8)
"""How low-rank factors are stored unless asked otherwise: (8, 8, fp32, 64, 256)."""

MENU: tuple[QuantConfig, ...] = tuple(
    QuantConfig(bits=b, scale_bits=b0, scale_dtype=b1, block_size=size, group_size=group)
    for b, b0, b1, size, group in product(
        TABLE_BITS, TABLE_BITS, get_args(ScaleDtype), (16, 32, 64), (16, 64, 256)
    )
)
"""The 432 configurations of the paper, 184 distinct nominal bit rates."""
