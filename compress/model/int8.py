"""Int8Linear: a frozen linear layer with 8-bit weights, the base of "LoRAPrune-8bit" (arXiv 2305.18403)."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable

from compress.errors import CompressError
from compress.model.layout import Architecture

# O output rows, I input columns


class Int8Linear(nn.Linear):
    """``y = x W^T + b`` with ``W = scale * codes``: int8 codes and one float32 scale for each row.

    The compute type is that of the input, or autocast's; W exists in it only during a product. The backward
    pass dequantizes again, and only the input (and the bias) gets a gradient. Casts of the module, such as
    ``.to(torch.bfloat16)``, change neither codes nor scales. PEFT attaches LoRA as to any linear layer, but
    cannot merge it: the weight has no room for a delta.

    Args:
        weight_OI: The weight to round, any float dtype; its values are finite.
        bias: The bias, shared, or None.

    Attributes:
        weight: Codes, int8 [O, I] in -127 to 127, a parameter that never requires a gradient.
        scale_bits: The bits of the scales as int32 [O], for a cast of a module leaves integers alone.
    """

    scale_bits: torch.Tensor

    def __init__(self, weight_OI: torch.Tensor, bias: nn.Parameter | None = None) -> None:
        nn.Module.__init__(self)
        self.out_features, self.in_features = weight_OI.shape
        codes_OI, scale_O = int8_rows(weight_OI.detach())
        self.weight = nn.Parameter(codes_OI, requires_grad=False)
        self.register_buffer("scale_bits", scale_O.view(torch.int32))
        self.register_parameter("bias", bias)

    @property
    def scale(self) -> torch.Tensor:
        """The scales of the rows, float32 [O]."""
        return self.scale_bits.view(torch.float32)

    def rows(self, chunk: slice) -> torch.Tensor:
        """Some rows of W in float32, [rows, I]."""
        return _dequantized(self.weight[chunk], self.scale[chunk], torch.float32)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Multiply ``input`` [..., I]; the result is [..., O] in the compute type."""
        device = input.device.type
        if torch.is_autocast_enabled(device):
            input = input.to(torch.get_autocast_dtype(device))
        y: torch.Tensor = _Product.apply(input, self.weight, self.scale)
        return y if self.bias is None else y + self.bias.to(y.dtype)


def int8_rows(weight_OI: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Round each row to 127 steps of its largest absolute value, to the nearest.

    Args:
        weight_OI: Any float dtype; computed in float32.

    Returns:
        Codes int8 [O, I] and scales float32 [O]; an element is off by at most half a scale. A row of zeros
        has scale 0.
    """
    wide_OI = weight_OI.float()
    scale_O = wide_OI.abs().amax(dim=1) / 127
    divisor_O = torch.where(scale_O > 0, scale_O, 1.0)
    # The clamp is for subnormal scales, whose own rounding can leave an element beyond 127 of them.
    codes_OI = (wide_OI / divisor_O[:, None]).round_().clamp_(-127, 127).to(torch.int8)
    return codes_OI, scale_O


def to_int8(model: nn.Module, arch: Architecture) -> None:
    """Replace every decoder linear of ``model`` by an :class:`Int8Linear`, in place and one at a time.

    Raises:
        CompressError: A decoder linear is no plain linear layer (a Conv1D, an adapter's, quantized already) or
            holds values that are not finite. Nothing is changed then, or only the linears before it.
    """
    names = [arch.module_name(layer, spec) for layer in range(arch.layers) for spec in arch.linears_at(layer)]
    for name in names:
        kind = type(model.get_submodule(name))
        if kind is not nn.Linear:
            raise CompressError(
                f"{name} is a {kind.__name__}, which has no 8-bit form.",
                "Leave the model in 16 bit, or start from a model of plain linear layers.",
            )
    for name in names:
        linear: Any = model.get_submodule(name)
        if not bool(linear.weight.isfinite().all()):
            raise CompressError(f"The weight of {name} is not finite.", "Use an undamaged checkpoint.")
        small = Int8Linear(linear.weight, linear.bias).train(linear.training)
        parent, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(parent), attribute, small)


def _dequantized(codes_OI: torch.Tensor, scale_O: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """``scale * codes``, computed in float32 and rounded once, without a float32 copy where it can be avoided."""
    out_OI = torch.empty(codes_OI.shape, dtype=dtype, device=codes_OI.device)
    return torch.mul(codes_OI, scale_O[:, None], out=out_OI)


class _Product(torch.autograd.Function):
    """The product with dequantized rows; codes and scales, not W, are saved for the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, codes_OI: torch.Tensor, scale_O: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(codes_OI, scale_O)
        return nn.functional.linear(x, _dequantized(codes_OI, scale_O, x.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        codes_OI, scale_O = ctx.saved_tensors
        return grad @ _dequantized(codes_OI, scale_O, grad.dtype), None, None
