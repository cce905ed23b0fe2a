"""The torch operations: gradients against autograd on dense weights, shapes without data."""

from __future__ import annotations

import pytest
import torch

from compress.kernels.library import library
from compress.kernels.operations import arguments, linear
from tests.unit.kernels.native import random_case, random_input

CHECKS = ("test_schema", "test_autograd_registration", "test_faketensor")
"""Those that need no compiler."""

pytestmark = pytest.mark.skipif(library() is None, reason="the C library was not built")


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("tokens", [(2, 3), (170,)])
def test_gradients_equal_those_of_dense_weights(bits: int, tokens: tuple[int, ...]) -> None:
    case = random_case(37, 53, bits=bits)
    x, left, right = random_input(*tokens, 53), random_input(4, 37, seed=2), random_input(4, 53, seed=3)
    ours = [t.clone().requires_grad_() for t in (x, left, right)]
    dense = [t.double().requires_grad_() for t in (x, left, right)]
    out = linear(ours[0], case.matrix, (ours[1], ours[2]))
    expected = dense[0] @ (case.exact + dense[1].T @ dense[2]).T
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-4)
    weights = random_input(*out.shape, seed=4)
    (out * weights).sum().backward()
    (expected * weights.double()).sum().backward()
    for found, exact in zip(ours, dense, strict=True):
        assert found.grad is not None
        assert exact.grad is not None
        torch.testing.assert_close(found.grad.double(), exact.grad, rtol=1e-5, atol=1e-3)


def test_only_what_trains_is_kept() -> None:
    case = random_case(37, 53)
    kept: list[tuple[int, ...]] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tuple(tensor.shape))
        return tensor

    left, right = random_input(4, 37, seed=2), random_input(4, 53, seed=3)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        linear(random_input(7, 53).requires_grad_(), case.matrix, (left, right))
        assert (7, 53) not in kept
        linear(random_input(7, 53), case.matrix, (left.requires_grad_(), right))
    assert (7, 53) in kept
    assert (7, 4) in kept
    assert (37, 53) not in kept


def test_operations_pass_the_checks_of_torch() -> None:
    case = random_case(37, 53)
    x, left, right = random_input(3, 53), random_input(4, 37, seed=2), random_input(4, 53, seed=3)
    matrix = arguments(case.matrix)
    leaves = [t.requires_grad_() for t in (x, left, right)]
    ops = torch.ops.compress
    for operation, given in (
        (ops.nf_linear, (leaves[0], *matrix, *leaves[1:])),
        (ops.nf_linear, (x.detach(), *matrix, None, None)),
        (ops.nf_linear_transposed, (random_input(3, 37), *matrix, None, None)),
        (ops.nf_dequantize, (*matrix, torch.bfloat16, 3, 20)),
    ):
        torch.library.opcheck(operation.default, given, test_utils=CHECKS)
