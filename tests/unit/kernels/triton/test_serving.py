"""What is built on the kernels: layers, operations, rounding and importance give what they give without them."""

from __future__ import annotations

from unittest.mock import patch

import pytest
import torch

from compress.importance.lora import lora_group_sums
from compress.importance.modules import WeightRows
from compress.kernels import gpu
from compress.kernels.dispatch import native_serves
from compress.kernels.operations import arguments, linear
from compress.kernels.triton.choice import Slices
from compress.kernels.triton.launch import runs_on
from compress.quantize.blockwise import quantize_blockwise, quantize_dequantize
from compress.quantize.config import QuantConfig
from compress.quantize.decompose import decompose
from compress.quantize.linear import LQLinear
from compress.quantize.rounding_errors import rounding_errors
from tests.unit.kernels.native import random_case, random_input

from .cases import DEVICE, needs_kernels, placed

pytestmark = needs_kernels

if runs_on(DEVICE):
    from compress.kernels.triton import blocks, importance, layout, product


@pytest.fixture(autouse=True)
def served(monkeypatch: pytest.MonkeyPatch) -> None:
    """As with COMPRESS_KERNELS=triton."""
    monkeypatch.setattr(gpu, "_cpu", lambda: True)


def layer() -> LQLinear:
    weight = random_input(40, 72, seed=5)
    config = QuantConfig(bits=3, block_size=24, group_size=16)
    with patch.object(gpu, "_cpu", lambda: False):
        return LQLinear.from_decomposition(
            decompose(weight, config, rank=4), bias=random_input(40, seed=6)
        ).to(DEVICE)


def test_a_layer_multiplies_and_gives_its_stored_form_back() -> None:
    module = layer()
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    dense = module.dequantized_weight(torch.float64)
    x = random_input(2, 3, 72).to(DEVICE).requires_grad_()
    assert native_serves(x)
    with patch.object(product, "product", wraps=product.product) as forward:
        y = module(x)
    assert forward.call_count == 1
    assert module.bias is not None
    expected = x.detach().double() @ dense.T + module.bias.double()
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-4)
    grad = random_input(2, 3, 40, seed=7).to(DEVICE)
    y.backward(grad)
    assert x.grad is not None
    torch.testing.assert_close(x.grad.double(), grad.double() @ dense, rtol=1e-5, atol=1e-4)
    assert module.weight.dtype == torch.int32
    after = module.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    module.to(torch.bfloat16)
    assert module.weight.dtype == torch.uint8


def test_operations_have_the_gradients_of_dense_weights() -> None:
    case = random_case(37, 53, bits=4)
    matrix = placed(case.matrix)
    x, left, right = random_input(3, 53), random_input(4, 37, seed=2), random_input(4, 53, seed=3)
    ours = [t.clone().to(DEVICE).requires_grad_() for t in (x, left, right)]
    dense = [t.double().requires_grad_() for t in (x, left, right)]
    out = linear(ours[0], matrix, (ours[1], ours[2]))
    expected = dense[0] @ (case.exact + dense[1].T @ dense[2]).T
    torch.testing.assert_close(out.cpu().double(), expected, rtol=1e-5, atol=1e-4)
    weights = random_input(*out.shape, seed=4)
    (out * weights.to(DEVICE)).sum().backward()
    (expected * weights.double()).sum().backward()
    for found, exact in zip(ours, dense, strict=True):
        assert found.grad is not None
        assert exact.grad is not None
        torch.testing.assert_close(found.grad.cpu().double(), exact.grad, rtol=1e-5, atol=1e-3)
    part = torch.ops.compress.nf_dequantize(*arguments(matrix), torch.bfloat16, 3, 20)
    assert torch.equal(part.cpu(), case.weights[3:20].bfloat16())


def test_quantized_tensors_and_errors_are_those_of_the_other_backends() -> None:
    weight = random_input(20, 72, seed=8)
    config = QuantConfig(bits=4, block_size=24, group_size=7)
    menu = [QuantConfig(bits=bits, block_size=size, group_size=7) for bits in (2, 4) for size in (24, 72)]
    elements = torch.rand(20, 72, generator=torch.Generator().manual_seed(1))
    with patch.object(gpu, "_cpu", lambda: False):
        known, values = quantize_blockwise(weight, config), quantize_dequantize(weight, config)
        errors = rounding_errors(weight, menu, element_weights=elements)
    with patch.object(blocks, "packed_codes", wraps=blocks.packed_codes) as used:
        found = quantize_blockwise(weight.to(DEVICE), config)
    assert used.call_count == 1
    for name, tensor in known.tensors().items():
        assert torch.equal(found.tensors()[name].cpu(), tensor), name
    assert torch.equal(quantize_dequantize(weight.to(DEVICE), config).cpu(), values)
    with patch.object(blocks, "menu_errors", wraps=blocks.menu_errors) as used:
        ours = rounding_errors(weight.to(DEVICE), menu, element_weights=elements.to(DEVICE))
    assert used.call_count == 2
    torch.testing.assert_close(torch.from_numpy(ours), torch.from_numpy(errors), rtol=1e-4, atol=0)


@pytest.mark.parametrize("over", ["rows", "columns"])
def test_importance_is_that_of_the_formula(over: str) -> None:
    weight, a, grad_a = random_input(30, 50), random_input(3, 50, seed=2), random_input(3, 50, seed=3)
    b, grad_b = random_input(30, 3, seed=4), random_input(30, 3, seed=5)
    wide = [tensor.double() for tensor in (weight, a, b, grad_a, grad_b)]
    merged = wide[0] + 2 * wide[2] @ wide[1]
    estimate = wide[4] @ wide[1] + wide[2] @ wide[3] - wide[4] @ wide[3]
    expected = (estimate * merged).square().sum(1 if over == "rows" else 0)
    given = [tensor.to(DEVICE) for tensor in (weight, a, b, grad_a, grad_b)]
    rows = WeightRows.of(given[0])
    with patch.object(importance, "importance_sums", wraps=importance.importance_sums) as used:
        found = lora_group_sums(rows, *given[1:], scaling=2.0, over=over, chunk_elements=700)  # type: ignore[arg-type]
    assert used.call_count > 1
    torch.testing.assert_close(found.cpu().double(), expected, rtol=1e-4, atol=1e-4)


def test_layouts_are_made_where_the_tensors_are() -> None:
    module = layer()
    if DEVICE.type == "cpu":
        pytest.skip("the C library makes them on a CPU; test_layout.py looks at the kernels")
    with patch.object(layout, "tile", wraps=layout.tile) as made:
        module(random_input(1, 72).to(DEVICE))
    assert made.call_count == 1


def test_many_tokens_go_by_slices() -> None:
    module = layer()
    x = random_input(300, 72).to(DEVICE)
    with patch.object(product, "product_by_slices", wraps=product.product_by_slices) as used:
        y = module(x)
    assert isinstance(used.call_args.args[3], Slices)
    dense = module.dequantized_weight(torch.float64)
    assert module.bias is not None
    torch.testing.assert_close(y.double(), x.double() @ dense.T + module.bias.double(), rtol=1e-5, atol=1e-4)
