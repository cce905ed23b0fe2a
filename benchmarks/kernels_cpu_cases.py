"""What the benchmark of the CPU kernels times: every contestant as a call on weights that rotate through memory.

Shapes: O out, I in, T tokens, r rank.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import cache, partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from compress.benchmarks.peers.environment import ENVIRONMENTS
from compress.kernels import native_product, operations, reference
from compress.kernels.packed import TiledMatrix
from compress.kernels.reference import PackedMatrix
from compress.quantize.blockwise import QuantizedTensor, quantize_blockwise
from compress.quantize.config import QuantConfig
from compress.quantize.native_form import tiled_form

SHAPES = ((4096, 4096), (11008, 4096), (4096, 11008))
"""[out, in]."""
ROTATED = 128 << 20
"""Bytes of weights that a contestant goes through before it meets the first copy again: more than a cache holds."""
BITS = (4, 3, 2)
GROUP = 64
"""Weights that share a scale, for everybody."""
RANK = 64
DTYPE = torch.bfloat16

Call = Callable[[], Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Contestant:
    """One way to compute a case.

    Attributes:
        calls: The same work on different copies of the weights; they are taken in turns.
        weight_bytes: What one call reads of weights.
    """

    calls: tuple[Call, ...]
    weight_bytes: int


def add_peers(folder: Path = ENVIRONMENTS) -> list[str]:
    """Let peers be imported from the environments that ``make peers`` made; returns the names of those found.

    Their folders go to the end of the path, so torch and everything else that is here stays ours; what they need
    besides comes from their environment.
    """
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    found = []
    for name in ("bitsandbytes", "hqq"):
        site = folder / name / "lib" / version / "site-packages"
        if find_spec(name) is None and site.is_dir():
            sys.path.append(str(site))
        if find_spec(name) is not None:
            found.append(name)
    return found


def copies(nbytes: int) -> int:
    """How many copies of so many bytes exceed :data:`ROTATED`."""
    return 1 + ROTATED // nbytes


def _turns(make: Callable[[], Call], nbytes: int) -> Contestant:
    """A contestant from a function that makes a call on weights of its own."""
    return Contestant(calls=tuple(make() for _ in range(copies(nbytes))), weight_bytes=nbytes)


def random_quantized(shape: tuple[int, int], bits: int) -> QuantizedTensor:
    """A normal matrix in NormalFloat with double quantization, blocks of 64."""
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(bits))
    return quantize_blockwise(weight, QuantConfig(bits=bits, block_size=GROUP))


def _ours(quantized: QuantizedTensor, call: Callable[[TiledMatrix], Any]) -> Contestant:
    matrix = tiled_form(quantized)

    def make() -> Call:
        held = replace(matrix, codes=matrix.codes.clone(), scale_codes=matrix.scale_codes.clone())
        return partial(call, held)

    return _turns(make, matrix.nbytes)


def _reference(quantized: QuantizedTensor, call: Callable[[PackedMatrix], Any]) -> Contestant:
    matrix = quantized.packed()
    nbytes = matrix.codes.nbytes + matrix.scales.nbytes
    return _turns(lambda: partial(call, replace(matrix, codes=matrix.codes.clone())), nbytes)


def _dense(shape: tuple[int, int], x: Tensor) -> Contestant:
    weight = torch.randn(shape).to(x.dtype)
    return _turns(lambda: partial(functional.linear, x, weight.clone()), weight.nbytes)


def _int4pack(shape: tuple[int, int], x: Tensor) -> Contestant:
    packed = torch._convert_weight_to_int4pack_for_cpu(torch.randint(16, shape, dtype=torch.int32), 2)
    scales = torch.rand(shape[1] // GROUP, shape[0], 2).to(x.dtype)

    def make() -> Call:
        return partial(torch._weight_int4pack_mm_for_cpu, x, packed.clone(), GROUP, scales.clone())

    return _turns(make, packed.nbytes + scales.nbytes)


def _bitsandbytes(shape: tuple[int, int]) -> Any:
    modules = import_module("bitsandbytes").nn
    layer = modules.Linear4bit(shape[1], shape[0], bias=False, quant_type="nf4", compute_dtype=DTYPE)
    layer.weight = modules.Params4bit(
        torch.randn(shape).to(DTYPE),
        quant_type="nf4",
        blocksize=GROUP,
        compress_statistics=True,
        module=layer,
    )
    return layer.to("cpu").eval()


@cache
def _hqq(shape: tuple[int, int]) -> Any:
    """One that others are copies of: quantizing takes it tens of seconds."""
    library = import_module("hqq.core.quantize")
    library.HQQLinear.set_backend(library.HQQBackend.PYTORCH)
    config = library.BaseQuantizeConfig(nbits=4, group_size=GROUP, axis=1)
    linear = torch.nn.Linear(shape[1], shape[0], bias=False)
    return library.HQQLinear(linear, config, compute_dtype=DTYPE, device="cpu")


def linear_case(shape: tuple[int, int], tokens: int, peers: Collection[str]) -> dict[str, Contestant]:
    """Everybody's y = x W^T in bfloat16 without gradients, [T, I] to [T, O]."""
    x = torch.randn(tokens, shape[1]).to(DTYPE)
    half_byte = shape[0] * shape[1] // 2
    made = {}
    for bits in BITS:
        quantized = random_quantized(shape, bits)
        made[f"nf{bits}"] = _ours(quantized, lambda matrix: native_product.product(x, matrix, None))
        if tokens == 1:
            made[f"nf{bits}, dequantize + linear"] = _reference(
                quantized, lambda matrix: reference.matmul(x, matrix, None)
            )
    made["dense bfloat16"] = _dense(shape, x)
    made["dense float32"] = _dense(shape, x.float())
    made["int4pack"] = _int4pack(shape, x)
    if "bitsandbytes" in peers:
        made["bitsandbytes"] = _turns(lambda: partial(_bitsandbytes(shape), x), half_byte)
    if "hqq" in peers:
        made["hqq"] = _turns(lambda: partial(deepcopy(_hqq(shape)), x), half_byte)
    return made


def dequantize_case(shape: tuple[int, int], peers: Collection[str]) -> dict[str, Contestant]:
    """The whole matrix of 4-bit codes as bfloat16."""
    quantized = random_quantized(shape, 4)
    made = {
        "nf4": _ours(quantized, lambda matrix: native_product.dequantize(matrix, DTYPE)),
        "nf4, torch": _reference(quantized, lambda matrix: reference.dequantize(matrix, DTYPE)),
    }
    if "bitsandbytes" in peers:
        functions = import_module("bitsandbytes.functional")
        codes, state = functions.quantize_4bit(
            torch.randn(shape).to(DTYPE), quant_type="nf4", blocksize=GROUP, compress_statistics=True
        )
        made["bitsandbytes"] = _turns(
            lambda: partial(functions.dequantize_4bit, codes.clone(), state), codes.nbytes
        )
    return made


def quantize_case(shape: tuple[int, int], peers: Collection[str]) -> dict[str, Contestant]:
    """Plain rounding of a float32 matrix to 4 bits, blocks of 64, scales in 8 bits, themselves scaled in groups."""
    weight, config = torch.randn(shape), QuantConfig(bits=4, block_size=GROUP)
    made = {"nf4": _turns(lambda: partial(quantize_blockwise, weight.clone(), config), weight.nbytes)}
    if "bitsandbytes" in peers:
        quantize = import_module("bitsandbytes.functional").quantize_4bit
        given = {"quant_type": "nf4", "blocksize": GROUP, "compress_statistics": True}
        made["bitsandbytes"] = _turns(lambda: partial(quantize, weight.clone(), **given), weight.nbytes)
    return made


def training_case(shape: tuple[int, int], tokens: int, peers: Collection[str]) -> dict[str, Contestant]:
    """Forward and backward of one 4-bit linear with factors of rank 64 that train; the input has a gradient too.

    The peer's factors are two products beside its own, as a LoRA layer of peft without dropout has them.
    """
    x = torch.randn(tokens, shape[1]).to(DTYPE).requires_grad_()
    left = (0.01 * torch.randn(RANK, shape[0])).to(DTYPE).requires_grad_()
    right = (0.01 * torch.randn(RANK, shape[1])).to(DTYPE).requires_grad_()
    grad = torch.randn(tokens, shape[0]).to(DTYPE)

    def step(forward: Callable[[], Tensor]) -> None:
        forward().backward(grad)
        x.grad = left.grad = right.grad = None

    def ours(matrix: TiledMatrix) -> None:
        step(lambda: operations.linear(x, matrix, (left, right)))

    def beside(layer: Callable[[Tensor], Tensor]) -> None:
        step(lambda: layer(x) + functional.linear(functional.linear(x, right), left.T))

    made = {"nf4": _ours(random_quantized(shape, 4), ours)}
    if "bitsandbytes" in peers:
        made["bitsandbytes"] = _turns(lambda: partial(beside, _bitsandbytes(shape)), shape[0] * shape[1] // 2)
    return made
