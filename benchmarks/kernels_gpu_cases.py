"""What the benchmark of the GPU kernels checks and times: contestants on weights that rotate through memory.

Shapes: O out, I in, T tokens, r rank.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from compress.benchmarks.kernels_cpu_cases import Contestant
from compress.errors import CompressError
from compress.kernels.layout import tile
from compress.kernels.packed import TiledMatrix
from compress.kernels.reference import dequantize as reference_dequantize
from compress.kernels.triton import dense, product
from compress.kernels.triton.choice import Choice, Fused, Slices, Tiles, choose
from compress.kernels.triton.grouped import group_product
from compress.quantize.blockwise import QuantizedTensor
from compress.quantize.config import QuantConfig
from compress.quantize.decompose import Decomposition
from compress.quantize.linear import LQLinear
from compress.quantize.native_form import geometry

DTYPE = torch.bfloat16
GROUP = 64
"""Weights that share a scale, for everybody."""
RANK = 64

Shape = tuple[int, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """Where and on how much to measure.

    Attributes:
        device: A CUDA device, or the CPU with the interpreter.
        rotated: Bytes of weights that a contestant goes through before it meets the first copy again.
    """

    device: torch.device
    rotated: int


def peers_here(wanted: Sequence[str]) -> list[str]:
    """Those of the peers that can be imported."""
    return [name for name in wanted if find_spec(name) is not None]


def random_quantized(shape: Shape, bits: int, device: torch.device, seed: int = 0) -> QuantizedTensor:
    """Random codes and scales, in NormalFloat with double quantization: nothing is rounded, which would take long."""
    generator = torch.Generator(device).manual_seed(seed)
    config = QuantConfig(bits=bits, block_size=GROUP)
    blocks = config.blocks(shape)

    def draw(count: int) -> Tensor:
        return torch.randint(256, (count,), dtype=torch.uint8, generator=generator, device=device)

    groups = -(-blocks // config.group_size)
    return QuantizedTensor(
        shape=shape,
        config=config,
        codes=draw(blocks * GROUP * bits // 8),
        scale_codes=draw(blocks * config.scale_bits // 8),
        scale_max=torch.rand(groups, generator=generator, device=device).to(config.torch_scale_dtype),
        offset=torch.full((1,), 0.01, device=device),
    )


def tiled(quantized: QuantizedTensor) -> TiledMatrix:
    """The packed layout, made on the matrix's device."""
    return tile(
        geometry(quantized.shape, quantized.config),
        codes=quantized.codes,
        scale_codes=quantized.scale_codes,
        scale_max=quantized.scale_max,
        offset=quantized.offset,
        table=quantized.lookup_table(),
    )


def turns(setting: Setting, nbytes: int, make: Callable[[], Callable[[], Any]]) -> Contestant:
    """A contestant from a function that makes a call on weights of its own."""
    count = 1 + setting.rotated // nbytes
    return Contestant(calls=tuple(make() for _ in range(count)), weight_bytes=nbytes)


def copied(matrix: TiledMatrix) -> TiledMatrix:
    """The same matrix in memory of its own."""
    return replace(matrix, codes=matrix.codes.clone(), scale_codes=matrix.scale_codes.clone())


def layer_of(quantized: QuantizedTensor) -> LQLinear:
    """A layer without factors that holds the matrix."""
    bare = {
        "factor_out": None,
        "factor_in": None,
        "rank": 0,
        "error": 0.0,
        "weight_norm": 0.0,
        "iterates": (),
    }
    return LQLinear.from_decomposition(Decomposition(quantized=quantized, **bare))  # type: ignore[arg-type]


def linear_case(
    setting: Setting, shape: Shape, tokens: int, widths: Sequence[int], peers: Sequence[str]
) -> dict[str, Contestant]:
    """Everybody's y = x W^T in bfloat16 without gradients, [T, I] to [T, O]."""
    device = setting.device
    x = torch.randn(tokens, shape[1], device=device).to(DTYPE)
    made: dict[str, Contestant] = {}
    for bits in widths:
        quantized = random_quantized(shape, bits, device)
        matrix = tiled(quantized)

        def kernel(matrix: TiledMatrix = matrix) -> Callable[[], Any]:
            return partial(product.product, x, copied(matrix), None)

        def module(quantized: QuantizedTensor = quantized) -> Callable[[], Any]:
            return partial(layer_of(replace(quantized, codes=quantized.codes.clone())), x)

        made[f"nf{bits}"] = turns(setting, matrix.nbytes, kernel)
        made[f"nf{bits} module"] = turns(setting, matrix.nbytes, module)
        if bits == widths[0] and isinstance(choose(device, matrix.geometry, tokens, DTYPE), Fused):
            made[f"nf{bits} by Triton"] = _by_triton(setting, matrix, x)
        if bits == 4:
            made["nf4 + rank 64"] = _with_factors(setting, matrix, x)
    weight = torch.randn(shape, device=device).to(DTYPE)
    made["dense bfloat16"] = turns(
        setting, weight.nbytes, lambda: partial(functional.linear, x, weight.clone())
    )
    layers = {"bitsandbytes": bitsandbytes_layer, "gemlite": gemlite_layer}
    for peer in peers:
        first = layers[peer](shape, device)
        name = "gemlite int4" if peer == "gemlite" else peer
        made[name] = turns(setting, shape[0] * shape[1] // 2, lambda layer=first: partial(deepcopy(layer), x))  # type: ignore[misc]
    return made


def _by_triton(setting: Setting, matrix: TiledMatrix, x: Tensor) -> Contestant:
    """What would compute it if the CUDA C++ kernels did not serve."""
    choice = choose(x.device, matrix.geometry, x.shape[0], DTYPE, fused=False)
    return turns(
        setting, matrix.nbytes, lambda: partial(product.product, x, copied(matrix), None, choice=choice)
    )


def _with_factors(setting: Setting, matrix: TiledMatrix, x: Tensor) -> Contestant:
    g = matrix.geometry
    left, right = (torch.randn(RANK, size, device=x.device).to(DTYPE) for size in (g.rows, g.columns))

    def make() -> Callable[[], Any]:
        return partial(product.product, x, copied(matrix), (left.clone(), right.clone()))

    return turns(setting, matrix.nbytes + left.nbytes + right.nbytes, make)


def bitsandbytes_layer(shape: Shape, device: torch.device) -> Any:
    """The peer's NF4 layer with double quantization."""
    modules = import_module("bitsandbytes").nn
    layer = modules.Linear4bit(shape[1], shape[0], bias=False, quant_type="nf4", compute_dtype=DTYPE)
    weight = torch.randn(shape, device=device).to(DTYPE).cpu()
    layer.weight = modules.Params4bit(
        weight, quant_type="nf4", blocksize=GROUP, compress_statistics=True, module=layer
    )
    return layer.to(device).eval()


def gemlite_layer(shape: Shape, device: torch.device) -> Any:
    """The peer's layer of 4-bit integers in groups; not NormalFloat, and its scales are 16 bits wide."""
    core = import_module("gemlite.core")
    kind = core.TORCH_TO_DTYPE[DTYPE]
    layer = core.GemLiteLinearTriton(
        4,
        group_size=GROUP,
        in_features=shape[1],
        out_features=shape[0],
        input_dtype=kind,
        output_dtype=kind,
    )
    codes = torch.randint(16, shape, dtype=torch.uint8, device=device)
    scales = torch.rand(shape[0] * shape[1] // GROUP, 1, device=device).to(DTYPE)
    layer.pack(codes, scales, torch.full_like(scales, 8.0), None)
    return layer


def dequantize_case(setting: Setting, shape: Shape, widths: Sequence[int]) -> dict[str, Contestant]:
    """The whole matrix as bfloat16; bytes are those read and those written."""
    made = {}
    for bits in widths:
        matrix = tiled(random_quantized(shape, bits, setting.device))
        made[f"nf{bits}"] = turns(
            setting,
            matrix.nbytes + 2 * shape[0] * shape[1],
            lambda matrix=matrix: partial(dense.dequantize, copied(matrix), DTYPE),  # type: ignore[misc]
        )
    return made


def backward_case(
    setting: Setting, shape: Shape, tokens: int, widths: Sequence[int]
) -> dict[str, Contestant]:
    """The gradient in the input, [T, O] to [T, I]."""
    grad = torch.randn(tokens, shape[0], device=setting.device).to(DTYPE)
    made = {}
    for bits in widths:
        matrix = tiled(random_quantized(shape, bits, setting.device))
        made[f"nf{bits}"] = turns(
            setting,
            matrix.nbytes,
            lambda matrix=matrix: partial(product.product_transposed, grad, copied(matrix), None),  # type: ignore[misc]
        )
    weight = torch.randn(shape, device=setting.device).to(DTYPE)
    made["dense bfloat16"] = turns(setting, weight.nbytes, lambda: partial(torch.mm, grad, weight.clone()))
    return made


def group_case(setting: Setting, shapes: Sequence[Shape], tokens: int) -> dict[str, Contestant]:
    """NF4 matrices that share their input, in one launch and one by one."""
    x = torch.randn(tokens, shapes[0][1], device=setting.device).to(DTYPE)
    matrices = [tiled(random_quantized(shape, 4, setting.device)) for shape in shapes]
    nbytes = sum(matrix.nbytes for matrix in matrices)
    whole = replace(matrices[0].geometry, rows=sum(shape[0] for shape in shapes))
    chosen = choose(setting.device, whole, tokens, DTYPE, fused=False)
    tiles = chosen if isinstance(chosen, Tiles) else Tiles()

    def together() -> Callable[[], Any]:
        held = [copied(matrix) for matrix in matrices]
        return partial(group_product, x, held, [None] * len(held), tiles)

    def apart() -> Callable[[], Any]:
        held = [copied(matrix) for matrix in matrices]
        return lambda: [product.product(x, matrix, None) for matrix in held]

    return {"one launch": turns(setting, nbytes, together), "one by one": turns(setting, nbytes, apart)}


def check_products(device: torch.device, shape: Shape, tokens: Sequence[int]) -> dict[str, float]:
    """Largest error of both directions, of weights and of a group, over the size of the terms; raises above 2%.

    The reference is a float64 product of the weights that torch dequantizes; bfloat16 results are within 2^-8 of it
    and of their terms' sizes.

    Raises:
        CompressError: A result is further off than its type allows.
    """
    found: dict[str, float] = {}
    for bits in (2, 3, 4, 8):
        quantized = random_quantized(shape, bits, device, seed=bits)
        matrix, weights = tiled(quantized), reference_dequantize(quantized.packed())
        if not torch.equal(dense.dequantize(matrix), weights):
            raise CompressError(f"NF{bits} weights differ from torch's.", "Set COMPRESS_KERNELS=torch.")
        for count in tokens:
            for transposed in (False, True):
                terms = weights.double() if transposed else weights.double().T
                x = torch.randn(count, len(terms), device=device).to(DTYPE)
                others = choose(device, matrix.geometry, count, DTYPE, transposed=transposed, fused=False)
                ways: dict[str, Choice | None] = {
                    "": None,
                    " by Triton": others,
                    " by slices": Slices(nbytes=1 << 20),
                }
                exact, sizes = x.double() @ terms, x.double().abs() @ terms.abs()
                for way, choice in ways.items():
                    if transposed:
                        y = product.product_transposed(x, matrix, None, choice=choice)
                    else:
                        y = product.product(x, matrix, None, choice=choice)[0]
                    error = (y.double() - exact).abs() / sizes
                    name = f"nf{bits}{' gradient' if transposed else ''}{way}, {count} tokens"
                    found[name] = float(error.max())
        if found and max(found.values()) > 2**-7:
            worst = max(found, key=lambda name: found[name])
            raise CompressError(
                f"{worst}: off by {found[worst]:.3g} of its terms.",
                "Set COMPRESS_KERNELS=torch and report it.",
            )
    return found
