"""Training on a thinned base: the product B A has the base's zeros, and so have gradients of the base itself."""

from __future__ import annotations

from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora.layer import LoraVariant
from torch import Tensor, nn
from torch.nn import functional as F

from compress.errors import CompressError
from compress.prune.weight_masks import WeightMasks, unpack_bits

# T: tokens, I: inputs, O: outputs, R: rank


class _MaskedProduct(torch.autograd.Function):
    """``x (M * (B A))^T`` for a packed mask M; the product [out, in] is made again in backward, not kept."""

    @staticmethod
    def forward(ctx: Any, x_TI: Tensor, factor_a_RI: Tensor, factor_b_OR: Tensor, packed: Tensor) -> Tensor:
        ctx.save_for_backward(x_TI, factor_a_RI, factor_b_OR, packed)
        return F.linear(x_TI, _masked(factor_a_RI, factor_b_OR, packed).to(x_TI.dtype))

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, Tensor, Tensor, None]:
        x_TI, factor_a_RI, factor_b_OR, packed = ctx.saved_tensors
        (g_TO,) = upstream
        g_x = None
        if ctx.needs_input_grad[0]:
            g_x = g_TO @ _masked(factor_a_RI, factor_b_OR, packed).to(g_TO.dtype)
        g_OI = (g_TO.flatten(0, -2).T @ x_TI.flatten(0, -2).to(g_TO.dtype)).to(factor_a_RI.dtype)
        g_OI *= unpack_bits(packed, g_OI.shape[1])
        return g_x, factor_b_OR.T @ g_OI, g_OI @ factor_a_RI.T, None


def _masked(factor_a_RI: Tensor, factor_b_OR: Tensor, packed: Tensor) -> Tensor:
    return (factor_b_OR @ factor_a_RI).mul_(unpack_bits(packed, factor_a_RI.shape[1]))


class MaskedVariant(LoraVariant):
    """A LoRA whose product B A is multiplied by the pruning mask of its linear (LoRAM, arXiv 2502.13533 §3).

    PEFT asks the variant of a layer for its output. Such an adapter cannot be merged by PEFT: its delta has no
    low rank.
    """

    def __init__(self, packed: Tensor) -> None:
        self.packed = packed

    def forward(self, module: Any, active_adapter: str, x: Tensor, result: Tensor, **_: Any) -> Tensor:
        """``result`` plus the masked product; in autocast's dtype where it is on."""
        if self.packed.device != x.device:
            self.packed = self.packed.to(x.device)
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        factor_a, factor_b = module.lora_A[active_adapter].weight, module.lora_B[active_adapter].weight
        with torch.autocast(kind, enabled=False):
            dropped = module.lora_dropout[active_adapter](x).to(dtype)
            product: Tensor = _MaskedProduct.apply(dropped, factor_a, factor_b, self.packed)
        output: Tensor = result + product * module.scaling[active_adapter]
        return output


def mask_adapters(peft_model: PeftModel, masks: WeightMasks) -> None:
    """Let every adapter of a thinned linear compute with its masked product; the adapter stays what is saved.

    Raises:
        CompressError: A mask does not have the shape of its linear.
    """
    for name, module in peft_model.get_base_model().named_modules():
        if name not in masks.packed or not hasattr(module, "lora_variant"):
            continue
        layer: Any = module
        shape = (len(masks.packed[name]), masks.columns[name])
        if shape != (layer.out_features, layer.in_features):
            raise CompressError(
                f"The mask of {name} is for {shape}, the linear has {(layer.out_features, layer.in_features)}.",
                "Take the small model again from where it came.",
            )
        layer.lora_variant["default"] = MaskedVariant(masks.packed[name])


class MaskedWeights:
    """A step hook of ``fit``: gradients of thinned weights are zero where the weights are, so they stay zero.

    Args:
        model: Trained with all its weights by AdamW without weight decay.
        masks: Of its linears.
        transposed: Whether the linears store [in, out].
    """

    def __init__(self, model: nn.Module, masks: WeightMasks, *, transposed: bool) -> None:
        self.places = [
            (model.get_submodule(name).get_parameter("weight"), packed, masks.columns[name])
            for name, packed in masks.packed.items()
        ]
        self.transposed = transposed

    def before_step(self, step: int) -> None:
        """Zero the gradients."""
        for weight, packed, columns in self.places:
            if weight.grad is not None:
                mask = unpack_bits(packed.to(weight.device), columns)
                weight.grad.mul_(mask.T if self.transposed else mask)
