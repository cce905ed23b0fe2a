"""How operations of the C library on contiguous tensors are called."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from compress.errors import CompressError
from compress.kernels.gpu import on_gpu
from compress.kernels.library import library
from compress.kernels.packed import needed


def serves(*tensors: Tensor) -> bool:
    """Whether the C library is there for tensors of these devices."""
    return library() is not None and all(tensor.device.type == "cpu" for tensor in tensors)


def serves_blocks(*tensors: Tensor) -> bool:
    """Whether plain rounding and LoRA-guided importance of tensors run in the C library or in Triton's kernels."""
    return serves(*tensors) or on_gpu(*tensors)


def contiguous(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors as the library reads them; hold on to them until the call is over."""
    return tuple(tensor.contiguous() for tensor in tensors)


def call(name: str, *tensors: Tensor | None, sizes: Sequence[int]) -> None:
    """Call an operation on tensors (None: no address) and sizes, with as many threads as torch has.

    Raises:
        CompressError: It ran out of memory.
    """
    addresses = [ctypes.c_void_p(None if tensor is None else tensor.data_ptr()) for tensor in tensors]
    numbers = (ctypes.c_int64 * len(sizes))(*sizes)
    if getattr(needed(), name)(*addresses, numbers, ctypes.c_int(torch.get_num_threads())):
        raise CompressError(
            "There is not enough memory to round a matrix.", "Close other programs, or take a smaller model."
        )
