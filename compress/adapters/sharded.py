"""Full parameters trained by several processes, each holding a part: fully sharded data parallelism (FSDP2).

Weights, gradients and moments are cut along their first dimension. The weights of a decoder layer are put together
when it runs, and let go behind it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from compress.adapters.loss import TokenLoss
from compress.adapters.ranks import Ranks
from compress.errors import CompressError


def shard(model: nn.Module, ranks: Ranks) -> None:
    """Leave this rank its part of every weight of the model's body; collective.

    The output matrix stays whole everywhere, and with it an embedding that it is tied to: the loss multiplies with it
    in chunks. Gradients are summed over the ranks, not averaged.

    Args:
        model: A Hugging Face causal language model, the same on every rank, on the CPU or on the rank's device.
        ranks: Who shares it.

    Raises:
        CompressError: The model has no stack of decoder layers, or trains weights outside of its body.
    """
    loss = TokenLoss(model)
    layers = loss.layers
    if not layers:
        raise CompressError(
            f"The weights of {type(model).__name__} cannot be divided among processes: it has no stack of layers.",
            "Launch one process.",
        )
    whole = set(loss.head.parameters())
    mesh = init_device_mesh(ranks.device.type, (ranks.size,))
    for module in (*layers, loss.body):
        fully_shard(module, mesh=mesh, reshard_after_forward=True, ignored_params=whole)
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)  # what gloo can do, and NCCL too
    for parameter in whole:
        parameter.data = parameter.data.to(ranks.device)
    for module in model.modules():
        for name, buffer in module._buffers.items():
            module._buffers[name] = None if buffer is None else buffer.to(ranks.device)
    left = [n for n, p in model.named_parameters() if p.requires_grad and not isinstance(p, DTensor)]
    if left:
        raise CompressError(
            f"The weights of {type(model).__name__} cannot be divided among processes: {left[0]} lies outside of "
            "its body.",
            "Launch one process.",
        )


def whole(tensor: Tensor, ranks: Ranks) -> Tensor:
    """A tensor put together from all ranks' parts, on the CPU of the first; collective.

    Elsewhere it is empty. What was never cut is the same on every rank, and comes back on the CPU.
    """
    if not isinstance(tensor, DTensor):
        return tensor.detach().cpu()
    part = tensor.to_local().detach()
    rows, rest = tensor.shape[0], tensor.shape[1:]
    longest = -(-rows // ranks.size)
    if len(part) < longest:
        part = torch.cat([part, part.new_zeros(longest - len(part), *rest)])
    parts = ranks.gathered(part)
    return torch.cat(parts)[:rows] if parts else torch.empty(0, dtype=tensor.dtype)


def part_of(full: Tensor, like: Tensor, ranks: Ranks) -> Tensor:
    """This rank's part of a whole tensor, cut as ``like`` is; whole where ``like`` is.

    Args:
        full: The same on every rank.
        like: A parameter of the same shape.
        ranks: Who shares it.
    """
    if not isinstance(like, DTensor) or full.shape != like.shape:
        return full
    chunks = full.chunk(ranks.size)
    here: Any = chunks[ranks.rank] if ranks.rank < len(chunks) else full[:0]
    return DTensor.from_local(
        here.to(ranks.device, copy=True).contiguous(),
        like.device_mesh,
        like.placements,
        run_check=False,
        shape=full.shape,
        stride=full.stride(),
    )
