"""Kernels on a device: loaded into torch's context by the driver, launched on torch's current stream.

Launches neither wait for the device nor allocate, so a CUDA graph can hold them.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch

from compress.errors import CompressError
from compress.kernels.cuda.compiler import build
from compress.kernels.packed import TiledMatrix

_MOST_DYNAMIC_SHARED = 8
"""``CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES``."""


class NativeMatrix(ctypes.Structure):
    """``Matrix`` of ``common.cuh``; holds addresses only, the tensors must outlive it."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("codes", "scale_codes", "steps", "offset", "table")),
        *((name, ctypes.c_int) for name in ("rows", "columns", "tiles", "chunks", "blocks", "shift")),
    )


@dataclass(frozen=True, slots=True)
class Kernel:
    """A kernel that is loaded on a device.

    Attributes:
        handle: The driver's.
        shared: Bytes of dynamic shared memory of a block.
        module: Keeps the code alive.
    """

    handle: ctypes.c_void_p
    shared: int
    module: ctypes.c_void_p


@cache
def _driver() -> ctypes.CDLL:
    return ctypes.CDLL("libcuda.so.1")


def _check(name: str, code: int) -> None:
    if code:
        text = ctypes.c_char_p()
        _driver().cuGetErrorString(code, ctypes.byref(text))
        reason = text.value.decode() if text.value else f"error {code}"
        raise CompressError(f"CUDA fails in {name}: {reason}.", "Set COMPRESS_KERNELS=triton.")


@cache
def kernel(device: int, file: str, instance: str, shared: int) -> Kernel:
    """An instance of a kernel, built for a device that is the current one, and loaded.

    Raises:
        CompressError: It cannot be built or loaded.
    """
    major, minor = torch.cuda.get_device_capability(device)
    code, symbol = build(file, instance, f"sm_{major}{minor}")
    module, handle = ctypes.c_void_p(), ctypes.c_void_p()
    _check("cuModuleLoadData", _driver().cuModuleLoadData(ctypes.byref(module), code))
    _check(
        "cuModuleGetFunction", _driver().cuModuleGetFunction(ctypes.byref(handle), module, symbol.encode())
    )
    if shared:
        _check("cuFuncSetAttribute", _driver().cuFuncSetAttribute(handle, _MOST_DYNAMIC_SHARED, shared))
    return Kernel(handle, shared, module)


def launch(
    found: Kernel, grid: tuple[int, int, int], threads: int, arguments: Sequence[ctypes.Structure | object]
) -> None:
    """Launch it with ctypes values, in the order of its parameters.

    Raises:
        CompressError: The driver refuses.
    """
    addresses = (ctypes.c_void_p * len(arguments))(
        *(ctypes.addressof(value) for value in arguments)  # type: ignore[arg-type]
    )
    stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
    code = _driver().cuLaunchKernel(found.handle, *grid, threads, 1, 1, found.shared, stream, addresses, None)
    _check("cuLaunchKernel", code)


def native(matrix: TiledMatrix, shift: int) -> NativeMatrix:
    """A matrix as the kernels take it; its groups are ``2 ** shift`` blocks."""
    g = matrix.geometry
    tensors = (matrix.codes, matrix.scale_codes, matrix.steps, matrix.offset, matrix.table)
    sizes = (g.rows, g.columns, g.tiles, g.chunks, g.blocks, shift)
    return NativeMatrix(*(tensor.data_ptr() for tensor in tensors), *sizes)
