"""Masks that act like pruning while the weights are still whole: zeros at the inputs of o and down."""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from compress.importance.modules import decoder_linear
from compress.model.architecture import Architecture
from compress.structure import LayerStructure, kept_columns


class GroupMasks:
    """Multiply the inputs of every o and down projection by 0 where a group is pruned (LoRAPrune §3.3).

    For KV groups, query heads and channels this equals removing their slices. Where a whole branch is gone, its
    output is masked too, since o and down may have biases. The hook sits on the module the forward pass calls, so a
    LoRA wrapper and its base layer both see the masked input. Leave the ``with`` block, or call :meth:`remove`, to
    take the masks off.

    Args:
        model: Plain or PEFT model.
        arch: Its architecture.
        layers: What to keep; None keeps everything until :meth:`update`.
    """

    def __init__(
        self, model: nn.Module, arch: Architecture, layers: Sequence[LayerStructure] | None = None
    ) -> None:
        self._arch = arch
        self._masks: dict[tuple[int, str], torch.Tensor] = {}
        self._gone: set[tuple[int, str]] = set()
        self._handles: list[RemovableHandle] = []
        for layer in range(arch.layers):
            for spec in arch.linears:
                if spec.role in ("o", "down"):
                    module = decoder_linear(model, arch, layer, spec)
                    self._handles.append(module.register_forward_pre_hook(self._hook((layer, spec.name))))
                    self._handles.append(module.register_forward_hook(self._output_hook((layer, spec.name))))
        if layers is not None:
            self.update(layers)

    def update(self, layers: Sequence[LayerStructure]) -> None:
        """Replace the masks by those of ``layers``."""
        self._masks.clear()
        self._gone.clear()
        for index, layer in enumerate(layers):
            for spec in self._arch.linears:
                columns = kept_columns(self._arch, spec, layer)
                if columns is not None:
                    mask = torch.zeros(self._arch.linear_shape(spec)[1])
                    mask[columns] = 1
                    self._masks[index, spec.name] = mask
                    if len(columns) == 0:
                        self._gone.add((index, spec.name))

    def remove(self) -> None:
        """Take every mask off."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._masks.clear()
        self._gone.clear()

    def _hook(self, key: tuple[int, str]) -> Any:
        def mask_input(_: nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...] | None:
            mask = self._masks.get(key)
            if mask is None:
                return None
            x = inputs[0]
            if mask.dtype != x.dtype or mask.device != x.device:
                mask = self._masks[key] = mask.to(x)  # moved once, at the first forward pass after an update
            return (x * mask, *inputs[1:])

        return mask_input

    def _output_hook(self, key: tuple[int, str]) -> Any:
        def mask_output(_: nn.Module, inputs: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor | None:
            return (
                output * 0 if key in self._gone else None
            )  # a product: adapters keep their (zero) gradients

        return mask_output

    def __enter__(self) -> GroupMasks:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()
