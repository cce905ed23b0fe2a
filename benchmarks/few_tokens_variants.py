"""Variants of the product of few tokens on a GPU: their sources, how a matrix is cut for them, how they are launched.

The package's own kernel is one of them. The others are ``few_tokens/ring.cu`` after ``few_tokens/ring.cuh``, with
macros; they need compute capability 9.0 and 227 KB of shared memory a block.

Shapes: O out, I in, T tokens, r rank.
"""

from __future__ import annotations

import ctypes
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compress.kernels.cuda import product
from compress.kernels.cuda.launch import Kernel, _bound, kernel, launch, native
from compress.kernels.layout import tile
from compress.kernels.packed import CHUNK, TILE, Geometry, TiledMatrix
from compress.kernels.reference import PackedMatrix
from compress.kernels.reference import dequantize as reference_dequantize
from compress.quantize.blockwise import QuantizedTensor
from compress.quantize.config import QuantConfig
from compress.quantize.native_form import geometry
from compress.quantize.packing import packed_bytes

SOURCES = Path(__file__).parent / "few_tokens"
SHARED = 227 << 10
"""Bytes of shared memory of a block of the ring."""
THREADS = 512
DTYPE = torch.bfloat16
_CHUNKS_OF = {32: 1, 64: 2, 128: 4}
_STAGE = 4 * CHUNK
_PROGRAMMATIC = 6
"""``CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION``."""

Call = Callable[[], tuple[Tensor, Tensor]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """One way to compute it.

    Attributes:
        what: In words.
        macros: Of ``ring.cu``; none: the package's kernel.
        early: Whether a launch may begin before the one ahead of it has ended.
    """

    what: str
    macros: Mapping[str, int] = field(default_factory=dict)
    early: bool = False


VARIANTS = {
    "package": Variant(what="compress/kernels/cuda/few_tokens.cu, as layers use it"),
    "ring": Variant(what="ring.cu, ordinary launches", macros={"PDL": 0}),
    "ring, early": Variant(what="launched programmatically", macros={"PDL": 1}, early=True),
    "ring, early, rank units": Variant(
        what="x L2^T cut by rank too, L1 after the first sums", macros={"PDL": 1, "RANK_UNITS": 1}, early=True
    ),
    "ring, early, L2": Variant(
        what="a block asks for all its codes at its start", macros={"PDL": 1, "PRE": 1}, early=True
    ),
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Cut:
    """How a variant computes a product.

    Attributes:
        instance: Of the kernel's template.
        blocks: Of the launch.
        each: What the kernel is told: pairs of tiles, or whole tiles a block.
    """

    instance: str
    blocks: int
    each: int


def cut(variant: Variant, g: Geometry, tokens: int, rank: int, processors: int) -> Cut:
    """For a device of so many processors; a ring's block takes 2, 4 or 6 tiles at once, as few as will do."""
    even = g.rows % TILE == 0 and g.columns % _STAGE == 0 and g.columns % g.block_size == 0
    at_once, each = 2, -(-g.tiles // 2)
    blocks = min(each, processors)
    if variant.macros:
        blocks = min(g.tiles, processors)
        most, each = -(-g.tiles // blocks), g.tiles // blocks
        at_once = next((some for some in (2, 4) if most <= some), 6)
    else:
        even = even and g.tiles % 2 == 0
    sizes = (
        f"{g.bits}, {g.scale_bits}, {-(-tokens // 8)}, {at_once}, {THREADS // 32}, {_CHUNKS_OF[g.block_size]}"
    )
    flags = f"{str(even).lower()}, {str(rank > 0).lower()}"
    return Cut(instance=f"few_tokens<{sizes}, {flags}>", blocks=blocks, each=each)


@cache
def _folder() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="compress-few-tokens-")


def text(variant: Variant) -> str:
    """A ring's source, to be compiled after the package's ``common.cuh``."""
    head = "".join(f"#define {name} {value}\n" for name, value in variant.macros.items())
    return head + "\n".join((SOURCES / name).read_text(encoding="utf-8") for name in ("ring.cuh", "ring.cu"))


def source(variant: Variant) -> str:
    """The file that :func:`compress.kernels.cuda.compiler.build` takes: the package's, or one of this process."""
    if not variant.macros:
        return "few_tokens.cu"
    name = "-".join(f"{name}{value}".lower() for name, value in variant.macros.items())
    path = Path(_folder().name) / f"ring-{name}.cu"
    if not path.exists():
        path.write_text(text(variant), encoding="utf-8")
    return str(path)


class _Attribute(ctypes.Structure):
    _fields_ = (("id", ctypes.c_int), ("pad", ctypes.c_int), ("value", ctypes.c_uint * 16))


class _Config(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_uint) for name in ("grid", "grid_y", "grid_z", "block", "block_y", "block_z")),
        ("shared", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.c_void_p),
        ("count", ctypes.c_uint),
    )


def _launch_early(device: int, found: Kernel, blocks: int, arguments: Sequence[Any]) -> None:
    addresses = (ctypes.c_void_p * len(arguments))(*(ctypes.addressof(value) for value in arguments))
    attribute = _Attribute(_PROGRAMMATIC, 0, (1,))
    stream = torch.cuda.current_stream().cuda_stream
    sizes = (blocks, 1, 1, THREADS, 1, 1, found.shared)
    config = _Config(*sizes, stream, ctypes.addressof(attribute), 1)
    _bound(device, "cuLaunchKernelEx", ctypes.byref(config), found.handle, addresses, None)


def caller(variant: Variant, of: Operands, *, early: bool | None = None) -> Call:
    """A function that launches it on the current stream and returns ``y`` [T, O] and ``x @ L2.T`` in float32 [T, r].

    A ring writes the same tensors every time. What launches early reads weights before the kernel ahead has ended: that
    kernel must not have written them.

    Args:
        variant: Which.
        of: The operands.
        early: Instead of what the variant says.
    """
    if not variant.macros:
        return lambda: product.few_tokens(of.x, of.matrix, of.factors)
    g, tokens, index = of.matrix.geometry, of.x.shape[0], torch.cuda.current_device()
    left, right = of.factors or (None, None)
    rank = 0 if left is None else left.shape[0]
    chosen = cut(variant, g, tokens, rank, torch.cuda.get_device_properties(index).multi_processor_count)
    found = kernel(index, source(variant), chosen.instance, SHARED)
    y = of.x.new_empty(tokens, g.rows)
    inner = of.x.new_empty(tokens, rank, dtype=torch.float32)
    partial = of.x.new_empty(product.SHARES * tokens * (-(-rank // 16) * 16), dtype=torch.float32)
    flags = torch.zeros(2, dtype=torch.int32, device=of.x.device)

    def at(tensor: Tensor | None) -> ctypes.c_void_p:
        return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())

    shapes = (ctypes.c_int(tokens), ctypes.c_int(chosen.each))
    places = (at(left), at(right), at(partial), at(inner), ctypes.c_int(rank), at(flags))
    arguments = (native(of.matrix, product.group_shift(g)), at(of.x), at(y), *shapes, *places)
    kept = (of, partial, flags)
    starts_early = variant.early if early is None else early

    def call() -> tuple[Tensor, Tensor]:
        assert kept  # their addresses are in the arguments
        if starts_early:
            _launch_early(index, found, chosen.blocks, arguments)
        else:
            launch(index, found, (chosen.blocks, 1, 1), THREADS, arguments)
        return y, inner

    return call
