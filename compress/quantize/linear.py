"""LQLinear: a linear layer whose weight is stored as packed codes plus low-rank factors."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable

from compress.kernels.dispatch import backend, native_matmul, native_matmul_transposed, native_serves
from compress.kernels.layout import untile
from compress.kernels.native_product import StoredFactors
from compress.kernels.packed import TiledMatrix
from compress.kernels.reference import Factors, PackedMatrix
from compress.quantize.blockwise import QuantizedTensor
from compress.quantize.checkpoint import MatrixRecord, lq_tensors, record_of
from compress.quantize.config import QuantConfig
from compress.quantize.decompose import Decomposition, Factor, read_factor
from compress.quantize.native_form import NativeForm, geometry, tiled_form

_CONVERTING = threading.RLock()
"""Two threads must not change a layer from one layout to the other at once."""


class LQLinear(nn.Linear):
    """``y = x (Q + L1 L2)^T + b`` with Q, L1 and L2 frozen in the form they are stored in.

    ``weight`` holds the packed codes as a flat uint8 parameter, so that software that does not know the
    format meets a shape mismatch instead of numbers. Scales and factors are buffers that no cast of the
    module changes: under ``.to(torch.bfloat16)`` the dequantized values stay the same. The compute type is
    that of the input, or autocast's. Nothing dequantized is kept for the backward pass, which dequantizes
    again. Once the C or the Triton kernels have served, ``weight`` and the scale codes are held in their layout instead
    (int32, and three dimensions): a state dict, a move and :meth:`quantized` give the stored form back.

    Args:
        record: Shape, configuration and rank.
        bias: Whether there is a bias.
        dtype: Of the bias; None is torch's default type.
        device: Of all tensors.

    Attributes:
        record: As given.
        use_factors: False leaves L1 L2 out, for training them as an adapter instead.
    """

    def __init__(
        self,
        record: MatrixRecord,
        *,
        bias: bool = False,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        nn.Module.__init__(self)
        self.record = record
        self.out_features, self.in_features = record.shape
        self.use_factors = True
        self._native: NativeForm | None = None
        for name, (shape, kind) in record.layout().items():
            tensor = torch.empty(shape, dtype=kind, device=device)
            if name == "weight":
                self.weight = nn.Parameter(tensor, requires_grad=False)
            else:
                self.register_buffer(name, tensor)
        if bias:
            self.bias = nn.Parameter(torch.empty(self.out_features, dtype=dtype, device=device))
        else:
            self.register_parameter("bias", None)

    @classmethod
    def from_decomposition(cls, decomposition: Decomposition, bias: torch.Tensor | None = None) -> LQLinear:
        """A layer that holds a decomposition (and shares its tensors)."""
        layer = cls(record_of(decomposition), bias=bias is not None, device="meta")
        tensors = lq_tensors("", decomposition, None if bias is None else bias.detach())
        layer.load_state_dict({name[1:]: tensor for name, tensor in tensors.items()}, assign=True)
        return layer

    @classmethod
    def from_stored(cls, record: MatrixRecord, read: Callable[[str], torch.Tensor]) -> LQLinear:
        """A layer without a bias whose tensors ``read`` gives by their names in the module."""
        layer = cls(record, device="meta")
        layer.load_state_dict({part: read(part) for part in record.layout()}, assign=True)
        return layer

    def _stored(self, name: str, shape: tuple[int, int], config: QuantConfig) -> QuantizedTensor:
        if name == "weight":
            codes, scale_codes = self._plain()
        else:
            codes, scale_codes = self.get_buffer(f"{name}_codes"), self.get_buffer(f"{name}_scale_codes")
        return QuantizedTensor(
            shape=shape,
            config=config,
            codes=codes,
            scale_codes=scale_codes,
            scale_max=self.get_buffer(f"{name}_scale_max"),
            offset=self.get_buffer(f"{name}_offset"),
            table=self.get_buffer(f"{name}_table") if config.codebook == "learned" else None,
        )

    def quantized(self) -> QuantizedTensor:
        """Q, sharing this layer's tensors but for codes that the kernels have in their layout."""
        return self._stored("weight", self.record.shape, self.record.config)

    def _factor(self, name: str, size: int) -> Factor:
        if self.record.factor_config is None:
            return self.get_buffer(name)
        return self._stored(name, (self.record.rank, size), self.record.factor_config)

    def factors(self) -> Factors | None:
        """(L1 [O, r], L2 [r, I]) in float32, whether in use or not; None for rank 0."""
        if self.record.rank == 0:
            return None
        left = read_factor(self._factor("factor_out", self.out_features))
        return left.T, read_factor(self._factor("factor_in", self.in_features))

    def dequantized_weight(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The weight [O, I] the layer multiplies with, computed in float32, then cast."""
        weight = self.quantized().dequantize()
        factors = self.factors() if self.use_factors else None
        return (weight if factors is None else weight + factors[0] @ factors[1]).to(dtype)

    def operands(self, dtype: torch.dtype) -> tuple[PackedMatrix, Factors | None]:
        """What the kernels multiply with: Q packed and the factors in use, of ``dtype``."""
        factors = self.factors() if self.use_factors else None
        cast = None if factors is None else (factors[0].to(dtype), factors[1].to(dtype))
        return self.quantized().packed(), cast

    def tiled(self) -> TiledMatrix:
        """Q in the layout of the kernels, which from then on is all that is held of its codes."""
        return self._native_form().matrix

    def stored_factors(self, dtype: torch.dtype) -> StoredFactors | None:
        """The factors in use as (L1 [r, O], L2 [r, I]) of ``dtype``, dequantized once and kept; None without."""
        return self._kept_factors(self._native_form(), dtype)

    def _kept_factors(self, native: NativeForm, dtype: torch.dtype) -> StoredFactors | None:
        if self.record.rank == 0 or not self.use_factors:
            return None
        if native.factors is None or native.factors[0].dtype != dtype:
            with torch.inference_mode(False):
                left = read_factor(self._factor("factor_out", self.out_features))
                right = read_factor(self._factor("factor_in", self.in_features))
                native.factors = (left.to(dtype).contiguous(), right.to(dtype).contiguous())
        return native.factors

    def _native_form(self) -> NativeForm:
        with _CONVERTING:
            if self._native is None or self._native.versions != self._versions():
                with torch.inference_mode(False):  # what is kept may be used in training later
                    matrix = tiled_form(self.quantized())
                self.weight.data = matrix.codes
                self._buffers["weight_scale_codes"] = matrix.scale_codes
                self._native = NativeForm(versions=self._versions(), matrix=matrix)
            return self._native

    def _versions(self) -> tuple[tuple[int, int], ...]:
        stored = (self.weight, *self._buffers.values())
        return tuple(
            (tensor.data_ptr(), 0 if tensor.is_inference() else tensor._version)
            for tensor in stored
            if tensor is not None
        )

    def _plain(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Codes and scale codes of Q as a checkpoint has them, whichever way they are held."""
        codes, scale_codes = self.weight.data, self.get_buffer("weight_scale_codes")
        if codes.dtype == torch.uint8:
            return codes, scale_codes
        return untile(geometry(self.record.shape, self.record.config), codes, scale_codes)

    def _hold_plain(self) -> None:
        with _CONVERTING:
            self._native = None
            if self.weight.dtype != torch.uint8:
                self.weight.data, self._buffers["weight_scale_codes"] = self._plain()

    def forget_layout(self) -> None:
        """Drop what was made of the stored tensors: they have been replaced by others."""
        with _CONVERTING:
            self._native = None

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.weight.dtype != torch.uint8:
            destination[f"{prefix}weight"], destination[f"{prefix}weight_scale_codes"] = self._plain()

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._hold_plain()
        super()._load_from_state_dict(*args, **kwargs)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Multiply ``input`` [..., I]; the result is [..., O] in the compute type."""
        device = input.device.type
        if torch.is_autocast_enabled(device):
            input = input.to(torch.get_autocast_dtype(device))
        # a decoded token meets hundreds of layers: an autograd function that keeps nothing costs as much as they do
        if torch.is_grad_enabled() and input.requires_grad:
            y: torch.Tensor = _Product.apply(input, self)
        else:
            y = self.multiplied(input)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def multiplied(self, input: torch.Tensor) -> torch.Tensor:
        """``input @ weight.T`` [..., O] of [..., I], without the bias; nothing is recorded for a gradient."""
        if native_serves(input):
            native = self._native_form()
            return native_matmul(input, native.matrix, self._kept_factors(native, input.dtype))
        return backend().matmul(input, *self.operands(input.dtype))

    def reset_parameters(self) -> None:
        """Refuse: codes come from a checkpoint or a decomposition, never from a distribution."""
        raise TypeError("An LQLinear cannot be initialized at random; load it or use from_decomposition.")

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> LQLinear:
        self._hold_plain()
        # Moves must reach scales and factors, casts must not: a cast leaves integers alone, so show bytes.
        types = {
            name: b.dtype for name, b in self._buffers.items() if b is not None and b.is_floating_point()
        }
        for name in types:
            self._buffers[name] = self.get_buffer(name).view(torch.uint8)
        try:
            super()._apply(fn, recurse)
        finally:
            for name, kind in types.items():
                self._buffers[name] = self.get_buffer(name).view(kind)
        return self

    def extra_repr(self) -> str:
        """Shape, widths and rank."""
        config = self.record.config
        shape = f"in_features={self.in_features}, out_features={self.out_features}"
        return (
            f"{shape}, bias={self.bias is not None}, bits={config.bits}, block_size={config.block_size}, "
            f"rank={self.record.rank}"
        )


class _Product(torch.autograd.Function):
    """The product with a layer's operands; only the layer itself is remembered for the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, layer: LQLinear) -> torch.Tensor:
        ctx.layer = layer
        return layer.multiplied(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        layer: LQLinear = ctx.layer
        if native_serves(grad):
            return native_matmul_transposed(grad, layer.tiled(), layer.stored_factors(grad.dtype)), None
        return backend().matmul_transposed(grad, *layer.operands(grad.dtype)), None
