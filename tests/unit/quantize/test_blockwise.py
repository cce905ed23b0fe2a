"""Blockwise quantization against a plain float64-free recomputation, block by block."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from compress.errors import CompressError, UsageError
from compress.quantize.blockwise import QuantizedTensor, quantize_blockwise, quantize_dequantize
from compress.quantize.config import MENU, QuantConfig
from compress.quantize.normal_float import normal_float_table

SHAPES = [(37, 53), (1, 1), (3, 16), (64, 64), (5, 130), (2, 7)]


def random(shape: tuple[int, int], seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.02


def by_definition(weight: torch.Tensor, config: QuantConfig) -> torch.Tensor:
    """METHODS §3.2 spelt out: loops over rows, blocks and groups, float32 scalars."""
    rows, columns = weight.shape
    spans = [
        (row, start, min(start + config.block_size, columns))
        for row in range(rows)
        for start in range(0, columns, config.block_size)
    ]
    absmax = torch.stack([weight[row, start:stop].abs().max() for row, start, stop in spans])
    offset = absmax.min()
    levels = 2**config.scale_bits - 1
    table = normal_float_table(config.bits)
    midpoints = ((table[1:].double() + table[:-1].double()) / 2).float()
    out = torch.zeros_like(weight)
    for first in range(0, len(spans), config.group_size):
        members = range(first, min(first + config.group_size, len(spans)))
        largest = (absmax[members] - offset).max().to(config.torch_scale_dtype).float()
        for at in members:
            row, start, stop = spans[at]
            code = (
                ((absmax[at] - offset) / (largest / levels)).round().clamp(max=levels) if largest > 0 else 0
            )
            scale = offset + code * (largest / levels)
            if scale > 0:
                codes = torch.bucketize(weight[row, start:stop] / scale, midpoints)
                out[row, start:stop] = table[codes] * scale
    return out


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("config", MENU[5::47])
def test_values_follow_the_definition(shape: tuple[int, int], config: QuantConfig) -> None:
    weight = random(shape)
    assert torch.equal(quantize_dequantize(weight, config), by_definition(weight, config))


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(MENU), st.integers(1, 40), st.integers(1, 90), st.integers(0, 99))
def test_stored_form_gives_the_same_values_and_the_promised_size(
    config: QuantConfig, rows: int, columns: int, seed: int
) -> None:
    weight = random((rows, columns), seed)
    stored = quantize_blockwise(weight, config)
    assert torch.equal(stored.dequantize(), quantize_dequantize(weight, config))
    sizes = {name: tensor.numel() * tensor.itemsize for name, tensor in stored.tensors().items()}
    assert sizes == config.storage_bytes((rows, columns))
    assert stored.storage_bits == config.storage_bits((rows, columns)) == 8 * sum(sizes.values())


def test_rows_can_be_dequantized_apart() -> None:
    stored = quantize_blockwise(random((37, 53)), QuantConfig(bits=3, block_size=16))
    assert torch.equal(stored.dequantize_rows(5, 11), stored.dequantize()[5:11])
    assert torch.equal(stored.dequantize_rows(36, 37, torch.bfloat16), stored.dequantize()[36:].bfloat16())


def test_rows_do_not_share_blocks() -> None:
    weight = random((4, 53))
    louder = weight.clone()
    louder[1] *= 100
    config = QuantConfig(bits=4, scale_bits=8, block_size=64, group_size=1)  # scales as good as exact
    before, after = (quantize_dequantize(w, config) for w in (weight, louder))
    torch.testing.assert_close(after[[0, 2, 3]], before[[0, 2, 3]], rtol=1e-5, atol=0)


@pytest.mark.parametrize("config", MENU[::61])
def test_zero_blocks_and_equal_scales_stay_finite(config: QuantConfig) -> None:
    zeros = torch.zeros(5, 70)
    assert torch.equal(quantize_dequantize(zeros, config), zeros)
    some = random((6, 128))
    some[2] = 0
    some[4, :64] = 0
    result = quantize_dequantize(some, config)
    assert result.isfinite().all()
    assert torch.equal(result[2], zeros[0].new_zeros(128))
    constant = torch.full((6, 128), -0.5)
    assert torch.equal(quantize_dequantize(constant, config), constant)


@pytest.mark.parametrize("scale_dtype", ["float16", "bfloat16", "float32"])
def test_extreme_magnitudes_stay_finite(scale_dtype: str) -> None:
    config = QuantConfig.from_dict({"bits": 4, "scale_dtype": scale_dtype, "block_size": 16})
    for size in (1e-30, 1e-8, 1e6, 1e30):
        result = quantize_dequantize(random((8, 64)) * size, config)
        assert result.isfinite().all()


def test_more_bits_and_smaller_blocks_cost_less_error() -> None:
    weight = random((64, 256))

    def error(config: QuantConfig) -> float:
        return (weight - quantize_dequantize(weight, config)).square().sum().item()

    by_bits = [error(QuantConfig(bits=b)) for b in (2, 3, 4, 8)]
    by_block = [error(QuantConfig(bits=3, block_size=size)) for size in (64, 32, 16)]
    assert by_bits == sorted(by_bits, reverse=True)
    assert by_block == sorted(by_block, reverse=True)
    assert by_bits[-1] < 2e-4 * weight.square().sum().item()


def test_other_types_and_layouts_are_computed_in_float32() -> None:
    config = QuantConfig(bits=3, block_size=16)
    weight = random((48, 40)).bfloat16()
    expected = quantize_dequantize(weight.float(), config)
    assert torch.equal(quantize_dequantize(weight, config), expected)
    assert torch.equal(quantize_dequantize(weight.T.contiguous().T, config), expected)
    assert torch.equal(quantize_dequantize(torch.nn.Parameter(weight), config), expected)
    assert not quantize_blockwise(torch.nn.Parameter(weight), config).dequantize().requires_grad


def test_quantizing_twice_gives_the_same_bytes() -> None:
    weight, config = random((37, 53)), QuantConfig(bits=2, block_size=16, scale_dtype="float16")
    first, second = (quantize_blockwise(weight, config).tensors() for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_weight_that_is_not_finite_is_refused(value: float) -> None:
    weight = random((4, 64))
    weight[1, 2] = value
    with pytest.raises(CompressError, match="not finite"):
        quantize_blockwise(weight, QuantConfig(bits=4))


@pytest.mark.parametrize("tensor", [torch.zeros(4), torch.zeros(0, 4), torch.zeros(4, 4, dtype=torch.int8)])
def test_what_is_no_matrix_of_weights_is_refused(tensor: torch.Tensor) -> None:
    with pytest.raises(UsageError, match="cannot be quantized"):
        quantize_blockwise(tensor, QuantConfig(bits=4))


def test_stored_tensors_rebuild_the_matrix() -> None:
    stored = quantize_blockwise(random((37, 53)), QuantConfig(bits=3, scale_bits=3, block_size=16))
    rebuilt = QuantizedTensor(shape=stored.shape, config=stored.config, **stored.tensors())
    assert torch.equal(rebuilt.dequantize(), stored.dequantize())
