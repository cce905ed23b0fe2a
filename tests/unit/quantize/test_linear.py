"""LQLinear against a dense layer with the dequantized weight."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from compress.kernels.dispatch import native_matmul
from compress.kernels.library import library
from compress.quantize.checkpoint import MatrixRecord
from compress.quantize.config import FACTOR_8BIT, QuantConfig
from compress.quantize.decompose import decompose
from compress.quantize.linear import LQLinear
from tests.unit.quantize.test_decompose import trained


def layer(
    bits: int = 3, rank: int = 5, factor_config: QuantConfig | None = FACTOR_8BIT, bias: bool = True
) -> LQLinear:
    config = QuantConfig(bits=bits, scale_dtype="float16", block_size=16)
    result = decompose(trained((37, 53)), config, rank=rank, factor_config=factor_config, iterations=2)
    offset = torch.linspace(-1, 1, 37) if bias else None
    return LQLinear.from_decomposition(result, offset)


def dense(of: LQLinear, dtype: torch.dtype = torch.float32) -> nn.Linear:
    twin = nn.Linear(53, 37, bias=of.bias is not None, dtype=dtype)
    twin.weight = nn.Parameter(of.dequantized_weight(dtype))
    if of.bias is not None:
        twin.bias = nn.Parameter(of.bias.detach().to(dtype))
    return twin


def inputs(dtype: torch.dtype = torch.float32) -> torch.Tensor:
    x = torch.randn(2, 7, 53, generator=torch.Generator().manual_seed(0)).to(dtype)
    return x.requires_grad_()


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize(("rank", "factor_config"), [(0, None), (5, None), (5, FACTOR_8BIT)])
@pytest.mark.parametrize("bias", [True, False])
def test_output_and_gradient_equal_those_of_the_dense_layer(
    bits: int, rank: int, factor_config: QuantConfig | None, bias: bool
) -> None:
    quantized = layer(bits, rank, factor_config, bias)
    x, y = inputs(), inputs()
    out, expected = quantized(x), dense(quantized)(y)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
    out.square().sum().backward()
    expected.square().sum().backward()
    torch.testing.assert_close(x.grad, y.grad, rtol=1e-4, atol=1e-4)
    if bias:
        torch.testing.assert_close(quantized.bias.grad, 2 * out.detach().sum((0, 1)), rtol=1e-4, atol=1e-4)


def test_the_weight_is_the_decomposition() -> None:
    result = decompose(trained((37, 53)), QuantConfig(bits=4), rank=4)
    quantized = LQLinear.from_decomposition(result)
    assert torch.equal(quantized.dequantized_weight(), result.dequantize())
    factors, expected = quantized.factors(), result.factors()
    assert factors is not None
    assert expected is not None
    assert all(torch.equal(a, b) for a, b in zip(factors, expected, strict=True))
    assert quantized.bias is None


def test_the_factors_can_be_left_out() -> None:
    quantized = layer(rank=5, bias=False)
    full = quantized.dequantized_weight()
    quantized.use_factors = False
    assert torch.equal(quantized.dequantized_weight(), quantized.quantized().dequantize())
    assert not torch.equal(quantized.dequantized_weight(), full)
    x = inputs()
    torch.testing.assert_close(quantized(x), x @ quantized.dequantized_weight().T, rtol=1e-4, atol=1e-5)
    assert quantized.factors() is not None
    assert layer(rank=0).factors() is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_casting_the_module_changes_no_stored_tensor(dtype: torch.dtype) -> None:
    for factor_config in (FACTOR_8BIT, None):
        quantized = layer(factor_config=factor_config)
        weight = quantized.dequantized_weight()
        types = {name: b.dtype for name, b in quantized.named_buffers()}
        model = nn.Sequential(quantized, nn.Linear(37, 3)).to(dtype)
        assert {name: b.dtype for name, b in quantized.named_buffers()} == types
        assert torch.equal(quantized.dequantized_weight(), weight)
        assert quantized.weight.dtype == torch.uint8
        assert quantized.bias.dtype == dtype
        assert model(inputs(dtype)).dtype == dtype
    halved = layer()
    weight = halved.dequantized_weight()
    assert torch.equal(halved.half().float().dequantized_weight(), weight)


def test_moves_reach_every_tensor() -> None:
    moved = layer(factor_config=None).to("meta")
    assert {t.device.type for t in (*moved.parameters(), *moved.buffers())} == {"meta"}
    assert moved.get_buffer("factor_in").shape == (5, 53)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_compute_type_is_that_of_the_input(dtype: torch.dtype) -> None:
    quantized = layer(rank=0, bias=False)
    x = inputs(dtype)
    out = quantized(x)
    exact = x.double() @ quantized.dequantized_weight().double().T
    torch.testing.assert_close(out.double(), exact, rtol=0.01, atol=0.01)  # torch rounds the weights too
    out.sum().backward()
    assert x.grad is not None
    assert x.grad.dtype == dtype


def test_autocast_decides_the_compute_type() -> None:
    quantized = layer()
    x = inputs()
    with torch.autocast("cpu", torch.bfloat16):
        out = quantized(x)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), dense(quantized)(x), rtol=0.05, atol=0.05)
    out.float().square().sum().backward()
    assert x.grad is not None
    assert x.grad.dtype == torch.float32


def test_nothing_dequantized_is_kept_for_the_backward_pass() -> None:
    kept: list[int] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        layer(bias=False)(inputs()).sum()
    assert kept == []


def test_only_the_bias_trains() -> None:
    quantized = layer()
    assert [name for name, p in quantized.named_parameters() if p.requires_grad] == ["bias"]


def test_state_dicts_round_trip() -> None:
    quantized = layer()
    other = LQLinear(quantized.record, bias=True)
    other.load_state_dict(quantized.state_dict())
    assert torch.equal(other.dequantized_weight(), quantized.dequantized_weight())
    assert torch.equal(other(inputs()), quantized(inputs()))


def used(of: LQLinear) -> LQLinear:
    """The layer after a product, which may have changed how its codes are held."""
    of(inputs())
    return of


def assert_same(one: LQLinear, other: LQLinear) -> None:
    assert one.quantized().codes.dtype == torch.uint8
    assert torch.equal(one.quantized().codes, other.quantized().codes)
    assert torch.equal(one.dequantized_weight(), other.dequantized_weight())
    assert torch.equal(one(inputs()), other(inputs()))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_a_layer_that_was_used_stores_what_it_did_before(bits: int) -> None:
    before = {name: tensor.clone() for name, tensor in layer(bits).state_dict().items()}
    after = used(layer(bits)).state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert {after[name].dtype for name in before} == {before[name].dtype for name in before}


@pytest.mark.parametrize("assign", [True, False])
def test_a_layer_that_was_used_can_be_loaded_into(assign: bool) -> None:
    new = layer(factor_config=None)
    new.get_buffer("weight_offset").mul_(3)
    new.weight.data.bitwise_xor_(21)
    old = used(layer(factor_config=None))
    old.load_state_dict(new.state_dict(), assign=assign)
    assert_same(old, new)
    old.load_state_dict(used(layer()).state_dict(), strict=False, assign=assign)
    assert torch.equal(old.quantized().codes, layer().quantized().codes)


def test_a_layer_that_was_used_can_be_copied_moved_and_cast() -> None:
    original = used(layer())
    twin = copy.deepcopy(original)
    assert_same(twin, layer())
    twin.weight.data.zero_()
    assert_same(original, layer())
    assert_same(used(layer()).bfloat16().float(), layer().bfloat16().float())
    moved = used(layer()).to("meta")
    assert {name: tuple(t.shape) for name, t in moved.state_dict().items()} == {
        name: tuple(t.shape) for name, t in layer().state_dict().items()
    }
    wide = used(layer())(inputs().double())
    torch.testing.assert_close(wide, layer()(inputs()).double(), rtol=1e-5, atol=1e-5)


def test_a_first_use_without_gradients_does_not_stand_in_the_way_of_training() -> None:
    quantized, expected = layer(), used(layer())
    with torch.inference_mode():
        quantized(inputs())
    assert not any(t.is_inference() for t in (*quantized.parameters(), *quantized.buffers()))
    x, y = inputs(), inputs()
    quantized(x).square().sum().backward()
    expected(y).square().sum().backward()
    assert torch.equal(x.grad, y.grad)
    quantized.load_state_dict(expected.state_dict())
    assert_same(quantized, expected)


def test_a_change_in_place_is_seen() -> None:
    quantized, expected = used(layer()), layer()
    for of in (quantized, expected):
        of.get_buffer("weight_offset").mul_(2)
        of.get_buffer("factor_in_offset").mul_(2)
    assert_same(quantized, expected)


def test_use_adds_nothing_to_what_a_layer_holds() -> None:
    config = QuantConfig(bits=3, block_size=32)
    quantized = LQLinear.from_decomposition(decompose(trained((32, 64)), config, rank=0))
    stored = sum(t.nbytes for t in (*quantized.parameters(), *quantized.buffers()))
    quantized(torch.zeros(1, 64))
    assert sum(t.nbytes for t in (*quantized.parameters(), *quantized.buffers())) == stored


def test_a_random_start_is_refused() -> None:
    with pytest.raises(TypeError, match="at random"):
        LQLinear(MatrixRecord(shape=(4, 16), config=QuantConfig(bits=2))).reset_parameters()


def test_repr_names_widths_and_rank() -> None:
    assert "bits=3, block_size=16, rank=5" in repr(layer())


def test_a_copy_of_a_used_layer_computes_on_tensors_of_its_own() -> None:
    original = used(layer())
    other = copy.deepcopy(original)
    for tensor in (original.weight.data, *original.buffers()):
        tensor.zero_()  # an address that came along would read these
    assert_same(other, layer())


@pytest.mark.skipif(library() is None, reason="the C library was not built")
def test_a_matrix_is_found_where_its_tensors_are() -> None:
    quantized, x = used(layer()), inputs().detach()
    matrix, factors = quantized.tiled(), quantized.stored_factors(x.dtype)
    expected = native_matmul(x, matrix, factors)
    assert matrix.made
    assert copy.copy(matrix.made) == []  # as in another process, where its addresses mean nothing
    twin = copy.deepcopy(matrix)
    moved, at = matrix.steps.clone(), matrix.steps.data_ptr()
    matrix.steps.zero_()
    torch.testing.assert_close(native_matmul(x, twin, factors), expected, rtol=0, atol=0)
    matrix.steps.set_(moved)  # type: ignore[call-overload]
    assert matrix.steps.data_ptr() != at
    torch.testing.assert_close(native_matmul(x, matrix, factors), expected, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gradient_to_come_changes_no_output(dtype: torch.dtype) -> None:
    quantized, x = layer(), inputs().detach().to(dtype)
    plain, recorded = quantized(x), quantized(x.clone().requires_grad_())
    assert recorded.grad_fn is not None
    with torch.no_grad():
        torch.testing.assert_close(quantized(x), recorded, rtol=0, atol=0)
    torch.testing.assert_close(plain, recorded, rtol=0, atol=0)
