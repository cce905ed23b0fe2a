"""Ways to compute a product of few tokens on a GPU, and what it is computed of.

Shapes: O out, I in, T tokens, r rank.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from compress.kernels.cuda import early, product, streamed
from compress.kernels.cuda.shapes import CHUNKS_OF, even
from compress.kernels.layout import tile
from compress.kernels.packed import Geometry, TiledMatrix
from compress.kernels.reference import PackedMatrix
from compress.kernels.reference import dequantize as reference_dequantize
from compress.quantize.blockwise import QuantizedTensor
from compress.quantize.config import QuantConfig
from compress.quantize.native_form import geometry
from compress.quantize.packing import packed_bytes

THREADS = 512
DTYPE = torch.bfloat16

Call = Callable[[], tuple[Tensor, Tensor]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """One way to compute it.

    Attributes:
        what: In words.
        early: Whether a launch may begin before the one ahead of it has ended.
        older: Whether it is the package's for older devices.
    """

    what: str
    early: bool = False
    older: bool = False


VARIANTS = {
    "package": Variant(
        what="as layers use it: compress/kernels/cuda/streamed.cu where it is faster", early=True
    ),
    "waiting": Variant(what="the same, every launch after the one before it"),
    "older": Variant(what="compress/kernels/cuda/few_tokens.cu, for older devices", older=True),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """Of a product.

    Attributes:
        rows: O.
        columns: I.
        bits: Width of a code.
        tokens: T.
        rank: r; 0: no low-rank part.
        scale_bits: Width of a scale's code.
        block: Weights that share a scale: 32, 64 or 128.
        group: Blocks that share a second-level scale.
    """

    rows: int
    columns: int
    bits: int
    tokens: int
    rank: int = 0
    scale_bits: int = 8
    block: int = 64
    group: int = 256

    def __str__(self) -> str:
        words = [f"{self.rows} x {self.columns}", f"NF{self.bits}", f"{self.tokens} tokens"]
        return ", ".join(words + [f"rank {self.rank}"] * (self.rank > 0))

    @property
    def config(self) -> QuantConfig:
        """How the matrix is quantized."""
        return QuantConfig(
            bits=self.bits, scale_bits=self.scale_bits, block_size=self.block, group_size=self.group
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Operands:
    """What a product is computed of.

    Attributes:
        x: bfloat16 [T, I].
        matrix: Q [O, I].
        factors: (L1 [r, O], L2 [r, I]) in bfloat16, or None.
        plain: The same matrix as torch dequantizes it.
    """

    x: Tensor
    matrix: TiledMatrix
    factors: tuple[Tensor, Tensor] | None
    plain: PackedMatrix

    @property
    def nbytes(self) -> int:
        """Bytes of weights that a call reads."""
        return self.matrix.nbytes + sum(factor.nbytes for factor in self.factors or ())

    def copied(self) -> Operands:
        """The same with weights in memory of their own."""
        codes, scale_codes = self.matrix.codes.clone(), self.matrix.scale_codes.clone()
        factors = self.factors and (self.factors[0].clone(), self.factors[1].clone())
        return replace(
            self, matrix=replace(self.matrix, codes=codes, scale_codes=scale_codes), factors=factors
        )

    def weights(self) -> Tensor:
        """Q in float64 [O, I], by torch."""
        return reference_dequantize(self.plain).double()


def operands(sizes: Sizes, device: torch.device, seed: int) -> Operands:
    """Random ones; the table's values are bfloat16 numbers, as the kernels have them, so that sums can be compared."""
    made = torch.Generator(device).manual_seed(seed)
    config, shape = sizes.config, (sizes.rows, sizes.columns)
    blocks = config.blocks(shape)

    def bytes_of(count: int, bits: int) -> Tensor:
        size = (packed_bytes(count, bits),)
        return torch.randint(256, size, dtype=torch.uint8, generator=made, device=device)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=made, device=device).to(DTYPE)

    quantized = QuantizedTensor(
        shape=shape,
        config=config,
        codes=bytes_of(blocks * config.block_size, config.bits),
        scale_codes=bytes_of(blocks, config.scale_bits),
        scale_max=torch.rand(-(-blocks // config.group_size), generator=made, device=device),
        offset=torch.full((1,), 0.01, device=device),
    )
    table = quantized.lookup_table().to(DTYPE).float()
    matrix = tile(
        geometry(shape, config),
        codes=quantized.codes,
        scale_codes=quantized.scale_codes,
        scale_max=quantized.scale_max,
        offset=quantized.offset,
        table=table,
    )
    factors = (normal(sizes.rank, sizes.rows), normal(sizes.rank, sizes.columns)) if sizes.rank else None
    plain = replace(quantized.packed(), table=table)
    return Operands(x=normal(sizes.tokens, sizes.columns), matrix=matrix, factors=factors, plain=plain)


def kernel_of(variant: Variant, g: Geometry, tokens: int, rank: int, processors: int) -> tuple[str, str]:
    """Source and instance of the kernel, on a device of so many processors."""
    if not variant.older and streamed.takes(tokens, rank):
        return "streamed.cu", streamed.plan(g, tokens, rank, processors).instance
    sizes = f"{g.bits}, {g.scale_bits}, {-(-tokens // 8)}, 2, {THREADS // 32}, {CHUNKS_OF[g.block_size]}"
    return "few_tokens.cu", f"few_tokens<{sizes}, {str(even(g, 2)).lower()}, {str(rank > 0).lower()}>"


def caller(variant: Variant, of: Operands, *, waits: bool = False) -> Call:
    """A function that launches it on the current stream and returns ``y`` [T, O] and ``x @ L2.T`` in float32 [T, r].

    Args:
        variant: Which.
        of: The operands.
        waits: Whether it never begins early, whatever the variant says.
    """

    def call() -> tuple[Tensor, Tensor]:
        before = early.STREAMS, early.EARLY
        early.STREAMS, early.EARLY = not variant.older, variant.early and not waits
        try:
            return product.few_tokens(of.x, of.matrix, of.factors)
        finally:
            early.STREAMS, early.EARLY = before

    return call
