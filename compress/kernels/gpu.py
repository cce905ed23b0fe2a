"""Whether the Triton kernels serve a tensor, and why; nothing of triton is imported here.

They serve CUDA devices of compute capability 8.0 and more where triton is installed, unless ``COMPRESS_KERNELS=torch``.
``COMPRESS_KERNELS=triton`` with ``TRITON_INTERPRET=1`` has them serve CPU tensors as well, in the interpreter.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from compress.kernels.library import TRITON, wanted
from compress.kernels.triton.launch import TYPES, installed, interpreted

LEAST_CAPABILITY = (8, 0)
"""What bfloat16 products need."""


@cache
def _cpu() -> bool:
    return wanted() == TRITON and interpreted() and installed()


@cache
def _cuda(index: int) -> tuple[bool, str]:
    if wanted() == "torch":
        return False, "COMPRESS_KERNELS asks for torch"
    if not installed():
        return False, "triton is not installed"
    major, minor = torch.cuda.get_device_capability(index)
    if (major, minor) < LEAST_CAPABILITY:
        return (
            False,
            f"compute capability {major}.{minor} is below {LEAST_CAPABILITY[0]}.{LEAST_CAPABILITY[1]}",
        )
    return True, "triton is installed"


def standing(index: int) -> tuple[bool, str]:
    """Whether the kernels serve a CUDA device, and why, in words."""
    return _cuda(index)


def on_gpu(*tensors: Tensor) -> bool:
    """Whether the Triton kernels serve the device of these tensors, the same for all."""
    device = tensors[0].device
    if any(tensor.device != device for tensor in tensors[1:]):
        return False
    if device.type == "cuda":
        return _cuda(torch.cuda.current_device() if device.index is None else device.index)[0]
    return device.type == "cpu" and _cpu()


def multiplies(x: Tensor) -> bool:
    """Whether products with ``x`` run in the Triton kernels."""
    return x.dtype in TYPES and on_gpu(x)
