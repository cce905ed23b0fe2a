"""Kernels on a device: loaded into torch's context by the driver, launched on torch's current stream.

Launches neither wait for the device nor allocate, so a CUDA graph can hold them.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from compress.errors import CompressError
from compress.kernels.cuda.compiler import build
from compress.kernels.packed import TiledMatrix

_NO_CONTEXT = 201
_MOST_DYNAMIC_SHARED = 8
"""``CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES``."""
_EARLY = 6
"""``CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION``."""


class NativeMatrix(ctypes.Structure):
    """``Matrix`` of ``common.cuh``; holds addresses only, the tensors must outlive it."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("codes", "scale_codes", "steps", "offset", "table")),
        *((name, ctypes.c_int) for name in ("rows", "columns", "tiles", "chunks", "blocks", "shift")),
    )


class _Attribute(ctypes.Structure):
    """``CUlaunchAttribute``: a name, and a union of 64 bytes."""

    _fields_ = (("name", ctypes.c_int), ("padding", ctypes.c_int), ("value", ctypes.c_uint * 16))


class _Config(ctypes.Structure):
    """``CUlaunchConfig``."""

    _fields_ = (
        *((name, ctypes.c_uint) for name in ("grid_x", "grid_y", "grid_z", "x", "y", "z", "shared")),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(_Attribute)),
        ("count", ctypes.c_uint),
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


def _bound(device: int, name: str, *arguments: object) -> None:
    """Call the driver; in a thread that has no context yet, with torch's as the current one.

    Raises:
        CompressError: The driver refuses.
    """
    function = getattr(_driver(), name)
    code = function(*arguments)
    if code == _NO_CONTEXT:
        handle, context = ctypes.c_int(), ctypes.c_void_p()
        _check("cuDeviceGet", _driver().cuDeviceGet(ctypes.byref(handle), device))
        _check("cuDevicePrimaryCtxRetain", _driver().cuDevicePrimaryCtxRetain(ctypes.byref(context), handle))
        _check("cuCtxSetCurrent", _driver().cuCtxSetCurrent(context))
        code = function(*arguments)
    _check(name, code)


def architecture(major: int, minor: int) -> str:
    """What to compile for: on Hopper and the Blackwell of data centers with the instructions that only those have."""
    return f"sm_{major}{minor}" + ("a" if major in (9, 10) else "")


@cache
def kernel(device: int, file: str, instance: str, shared: int) -> Kernel:
    """An instance of a kernel, built for a device that is the current one, and loaded.

    Raises:
        CompressError: It cannot be built or loaded.
    """
    code, symbol = build(file, instance, architecture(*torch.cuda.get_device_capability(device)))
    module, handle = ctypes.c_void_p(), ctypes.c_void_p()
    _bound(device, "cuModuleLoadData", ctypes.byref(module), code)
    _bound(device, "cuModuleGetFunction", ctypes.byref(handle), module, symbol.encode())
    if shared:
        _bound(device, "cuFuncSetAttribute", handle, _MOST_DYNAMIC_SHARED, shared)
    return Kernel(handle, shared, module)


def zeros(device: int, nbytes: int) -> int:
    """Address of memory of the device that is zero and is never given back, beside torch's allocator and its pools.

    Raises:
        CompressError: The device lacks it.
    """
    address = ctypes.c_uint64()
    _bound(device, "cuMemAlloc_v2", ctypes.byref(address), ctypes.c_size_t(nbytes))
    _bound(device, "cuMemsetD8_v2", address, ctypes.c_ubyte(0), ctypes.c_size_t(nbytes))
    _bound(device, "cuCtxSynchronize")
    return address.value


def launch(
    device: int,
    found: Kernel,
    grid: tuple[int, int, int],
    threads: int,
    arguments: Sequence[Any],
    *,
    together: bool = False,
    early: bool = False,
) -> None:
    """Launch it on a device that is the current one.

    Args:
        device: Its index.
        found: The kernel.
        grid: Blocks.
        threads: Of a block.
        arguments: ctypes values, in the order of its parameters.
        together: Whether no block may begin before there is room for all of them.
        early: Whether it may begin before the kernel that precedes it in the stream has ended, as
            :func:`starts_early` allows; it waits by itself before it reads what that one writes.

    Raises:
        CompressError: The driver refuses.
    """
    addresses = (ctypes.c_void_p * len(arguments))(*(ctypes.addressof(value) for value in arguments))
    stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
    if early:
        attribute = _Attribute(_EARLY, 0, (1,))
        config = _Config(*grid, threads, 1, 1, found.shared, stream, ctypes.pointer(attribute), 1)
        _bound(device, "cuLaunchKernelEx", ctypes.byref(config), found.handle, addresses, None)
        return
    place = (found.handle, *grid, threads, 1, 1, found.shared, stream, addresses)
    if together:
        _bound(device, "cuLaunchCooperativeKernel", *place)
    else:
        _bound(device, "cuLaunchKernel", *place, None)


@cache
def starts_early() -> bool:
    """Whether the driver lets kernels begin early, in CUDA graphs too: from CUDA 12.3 on."""
    version = ctypes.c_int()
    _check("cuDriverGetVersion", _driver().cuDriverGetVersion(ctypes.byref(version)))
    return version.value >= 12030


def integer(value: int) -> ctypes.c_int:
    """An argument of a kernel."""
    return ctypes.c_int(value)


def address(tensor: Tensor | None) -> ctypes.c_void_p:
    """Where a tensor begins, null without one, as an argument of a kernel."""
    return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())


def native(matrix: TiledMatrix, shift: int) -> NativeMatrix:
    """A matrix as the kernels take it; its groups are ``2 ** shift`` blocks."""
    g = matrix.geometry
    tensors = (matrix.codes, matrix.scale_codes, matrix.steps, matrix.offset, matrix.table)
    sizes = (g.rows, g.columns, g.tiles, g.chunks, g.blocks, shift)
    return NativeMatrix(*(tensor.data_ptr() for tensor in tensors), *sizes)
