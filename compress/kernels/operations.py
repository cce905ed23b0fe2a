"""Torch operations ``torch.ops.compress.nf_linear``, ``nf_linear_transposed``, ``nf_dequantize``, on CPU and GPU.

A matrix is given as its tensors and six sizes (:meth:`compress.kernels.packed.Geometry.numbers`), so that torch sees
every tensor. Q is frozen; the input and the factors have gradients. ``nf_linear`` also returns ``x @ L2.T``, which the
gradient of L1 needs and which is all that is kept besides the arguments.

Shapes: O out, I in, T tokens, r rank.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from compress.kernels.dispatch import products
from compress.kernels.native_product import StoredFactors
from compress.kernels.packed import TILE, Geometry, TiledMatrix, check

_MATRIX = "Tensor codes, Tensor scale_codes, Tensor steps, Tensor offset, Tensor table, int[] sizes"

OPERATIONS = torch.library.Library("compress", "DEF")
"""Keeps the registrations alive."""

OPERATIONS.define(f"nf_linear(Tensor x, {_MATRIX}, Tensor? left, Tensor? right) -> (Tensor, Tensor)")
OPERATIONS.define(f"nf_linear_transposed(Tensor grad, {_MATRIX}, Tensor? left, Tensor? right) -> Tensor")
OPERATIONS.define(f"nf_dequantize({_MATRIX}, ScalarType dtype, int start, int stop) -> Tensor")


def arguments(matrix: TiledMatrix) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, list[int]]:
    """A tiled matrix as the operations take it."""
    m = matrix
    return m.codes, m.scale_codes, m.steps, m.offset, m.table, m.geometry.numbers()


def linear(x: Tensor, matrix: TiledMatrix, factors: StoredFactors | None = None) -> Tensor:
    """``x @ (Q + L1.T @ L2).T``, differentiable in ``x`` and the factors.

    Args:
        x: [..., I], float32, bfloat16 or float16.
        matrix: Q.
        factors: (L1 [r, O], L2 [r, I]) in the type of ``x``, or None.

    Returns:
        [..., O] in the type of ``x``.
    """
    left, right = factors or (None, None)
    y: Tensor = torch.ops.compress.nf_linear(x.reshape(-1, x.shape[-1]), *arguments(matrix), left, right)[0]
    return y.view(*x.shape[:-1], y.shape[1])


def _matrix(tensors: tuple[Any, ...]) -> TiledMatrix:
    codes, scale_codes, steps, offset, table, sizes = tensors
    names = ("rows", "columns", "bits", "scale_bits", "block_size", "group_size")
    geometry = Geometry(**dict(zip(names, sizes, strict=True)))
    if codes.device.type == "cpu":  # Triton's functions look at the tensors themselves
        g, floats = geometry, (torch.float32,)
        check("codes", codes, g.tiles * g.chunks * g.bits * TILE, (torch.int32,))
        check("scale_codes", scale_codes, g.tiles * g.blocks * 2 * g.scale_bits, (torch.uint8,))
        check("steps", steps, -(-g.rows * g.blocks // g.group_size), floats)
        check("offset", offset, 1, floats)
        check("table", table, 2**g.bits, floats)
    return TiledMatrix(
        geometry=geometry, codes=codes, scale_codes=scale_codes, steps=steps, offset=offset, table=table
    )


def _factors(left: Tensor | None, right: Tensor | None) -> StoredFactors | None:
    return None if left is None or right is None else (left.contiguous(), right.contiguous())


def _linear(x: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    found: tuple[Tensor, Tensor] = products(x).product(x, _matrix(rest[:6]), _factors(*rest[6:]))
    return found


def _linear_meta(x: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    rank = 0 if rest[6] is None else rest[6].shape[0]
    return x.new_empty(x.shape[0], rest[5][0]), x.new_empty(x.shape[0], rank, dtype=torch.float32)


def _transposed(grad: Tensor, *rest: Any) -> Tensor:
    found: Tensor = products(grad).product_transposed(grad, _matrix(rest[:6]), _factors(*rest[6:]))
    return found


def _transposed_meta(grad: Tensor, *rest: Any) -> Tensor:
    return grad.new_empty(grad.shape[0], rest[5][1])


def _dequantize(*rest: Any) -> Tensor:
    found: Tensor = products(rest[0]).dequantize(_matrix(rest[:6]), *rest[6:])
    return found


def _dequantize_meta(*rest: Any) -> Tensor:
    dtype, start, stop = rest[6:]
    return torch.empty(stop - start, rest[5][1], dtype=dtype, device="meta")


for _name, _run, _meta in (
    ("nf_linear", _linear, _linear_meta),
    ("nf_linear_transposed", _transposed, _transposed_meta),
    ("nf_dequantize", _dequantize, _dequantize_meta),
):
    for _device in ("CPU", "CUDA"):
        OPERATIONS.impl(_name, _run, _device)
    OPERATIONS.impl(_name, _meta, "Meta")


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, *matrix, left, right = inputs
    ctx.sizes = matrix[5]
    ctx.mark_non_differentiable(output[1])
    trains = left is not None and (left.requires_grad or right.requires_grad)
    ctx.save_for_backward(x if trains else None, output[1] if trains else None, *matrix[:5], left, right)


def _linear_backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    x, inner, *tensors, left, right = ctx.saved_tensors
    x_needs, left_needs, right_needs = (ctx.needs_input_grad[i] for i in (0, 7, 8))
    dx = d_left = d_right = None
    if x_needs:
        dx = torch.ops.compress.nf_linear_transposed(grad, *tensors, ctx.sizes, left, right)
    if left_needs:
        d_left = (inner.T @ grad.float()).to(left.dtype)
    if right_needs:  # in float32: few processors multiply 16-bit floats any faster
        d_right = ((grad.float() @ left.float().T).T @ x.float()).to(right.dtype)
    return dx, *(None,) * 6, d_left, d_right


torch.library.register_autograd("compress::nf_linear", _linear_backward, setup_context=_keep, lib=OPERATIONS)
