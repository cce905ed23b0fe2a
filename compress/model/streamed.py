"""A model that is larger than memory: each decoder layer is read when it runs and let go behind it."""

from __future__ import annotations

import weakref
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import init_empty_weights
from torch import nn
from transformers import AutoModelForCausalLM

from compress.errors import CompressError
from compress.heap import give_back
from compress.model.architecture import Architecture, architecture_of
from compress.model.checkpoint import Checkpoint
from compress.model.config import build_config
from compress.model.quiet import quiet_transformers
from compress.model.resident import Feeder, Slot, Unit
from compress.model.states import Room
from compress.model.uneven import is_uneven
from compress.model.uneven_model import uneven_class

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def stream_model(
    path: Path | str,
    *,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    ahead: bool = True,
    room: Room | None = None,
) -> PreTrainedModel:
    """The causal language model of a local folder, in eval mode, its weights left on disk until they are used.

    It computes what `compress.model.load.load_model` would, bit by bit. Decoder layers, the embedding and the output
    matrix are in memory only while they run (or under `compress.model.resident.resident`); norms and what else lies
    outside of the layers always is. Gradients with respect to activations are computed by running each layer again;
    weights get none.

    Args:
        path: A Hugging Face folder, plain, of layers that differ in size, or LQ.
        dtype: In which precision it computes.
        device: Where it does.
        ahead: Read the next layer while one computes, which takes the stored bytes of one more.
        room: Where a walk along its layers keeps hidden states that are too many for memory; None: in memory.

    Raises:
        CompressError: The folder is no checkpoint, or lacks a tensor.
    """
    checkpoint = Checkpoint(path)
    give_back()
    arch = architecture_of(checkpoint.config, checkpoint.names)
    model = _skeleton(checkpoint, arch, dtype)
    place = torch.device(device)
    feeder = Feeder(checkpoint, place, ahead=ahead, room=room)
    layers = [model.get_submodule(arch.layer_prefix.format(layer=i).rstrip(".")) for i in range(arch.layers)]
    outside = [_matrix(model.get_input_embeddings()), _matrix(model.get_output_embeddings())]
    names = {module: name for name, module in model.named_modules()}
    taken: set[nn.Module] = set()
    for module in (*outside[:1], *layers, *outside[1:]):
        if module is not None:
            slots = _slots(module, names[module], checkpoint, arch)
            taken.update(module.modules())
            Unit(module, slots, feeder)
    for module, name in names.items():
        if module not in taken:
            _settle(module, name, checkpoint, arch, place)
    _move_buffers(model, place)
    return model.eval()


def _skeleton(checkpoint: Checkpoint, arch: Architecture, dtype: torch.dtype) -> PreTrainedModel:
    """The model with weights on the meta device, and buffers that no checkpoint has computed."""
    config = build_config(checkpoint.config)
    declared = vars(config).pop("quantization_config", None)
    build: Any = AutoModelForCausalLM.from_config
    if is_uneven(checkpoint.config):
        build = uneven_class(checkpoint.config, arch)._from_config
    with (
        quiet_transformers(),
        torch.random.fork_rng(devices=[]),
        init_empty_weights(include_buffers=False),
    ):
        model: PreTrainedModel = build(config, dtype=dtype)
    if declared is not None:
        from transformers.quantizers.auto import AutoHfQuantizer  # loads whole models' code, for seconds

        quantizer = AutoHfQuantizer.from_config(declared, pre_quantized=True)
        files = sorted({str(file) for file in checkpoint.files})
        quantizer.preprocess_model(model=model, dtype=dtype, checkpoint_files=files)
    return model


def _matrix(module: nn.Module | None) -> nn.Module | None:
    """An embedding or output matrix that is worth reading when it is used; None for one that is codes, or none."""
    if type(module) is not nn.Linear and not isinstance(module, nn.Embedding):
        return None
    return module if module.weight.is_floating_point() else None


def _slots(root: nn.Module, name: str, checkpoint: Checkpoint, arch: Architecture) -> list[Slot]:
    return [
        slot
        for path, module in root.named_modules()
        for slot in _own_slots(module, ".".join(filter(None, (name, path))), checkpoint, arch)
    ]


def _own_slots(module: nn.Module, name: str, checkpoint: Checkpoint, arch: Architecture) -> list[Slot]:
    """The tensors that ``module`` itself has in a checkpoint."""
    tensors: dict[str, torch.Tensor | None] = {**module._parameters}
    tensors |= {
        key: value for key, value in module._buffers.items() if key not in module._non_persistent_buffers_set
    }
    found = []
    for attribute, tensor in tensors.items():
        if tensor is None:
            continue
        stored = f"{name}.{attribute}"
        if arch.tied and stored == arch.lm_head:
            stored = arch.embedding
        if stored not in checkpoint:
            raise CompressError(
                f"The checkpoint {checkpoint.path} lacks the tensor {stored!r}.",
                "Download or write it again.",
            )
        if checkpoint.shape(stored) != tuple(tensor.shape):
            raise CompressError(
                f"The tensor {stored!r} has the shape {checkpoint.shape(stored)} where the config asks for "
                f"{tuple(tensor.shape)}.",
                "Use a checkpoint whose config.json belongs to its weights.",
            )
        if tensor.is_meta and attribute in module._parameters:
            module.register_parameter(
                attribute,
                nn.Parameter(torch.zeros(1, dtype=tensor.dtype).expand(tensor.shape), tensor.requires_grad),
            )
        found.append(
            Slot(
                place=weakref.ref(module),
                attribute=attribute,
                stored=stored,
                dtype=tensor.dtype,
                shape=tensor.shape,
            )
        )
    return found


def _settle(
    module: nn.Module, name: str, checkpoint: Checkpoint, arch: Architecture, device: torch.device
) -> None:
    """Load the tensors of a module that always has them."""
    for slot in _own_slots(module, name, checkpoint, arch):
        slot.put(checkpoint.read(slot.stored).to(device, slot.dtype))


def _move_buffers(model: nn.Module, device: torch.device) -> None:
    for module in model.modules():
        for name in module._non_persistent_buffers_set:
            buffer = module._buffers.get(name)
            if buffer is None:
                continue
            if buffer.is_meta and not buffer.numel():  # of a quantized embedding: tells a type, holds nothing
                buffer = torch.empty_like(buffer, device=device)
            module._buffers[name] = buffer.to(device)
