"""What this machine has: processor, threads, memory, disk, GPUs and the types they compute in."""

from __future__ import annotations

import os
import platform
import shutil
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from compress.model.load import preferred_dtype

_CPUINFO = Path("/proc/cpuinfo")
_LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))


@dataclass(frozen=True, slots=True, kw_only=True)
class CudaDevice:
    """A GPU that torch sees.

    Attributes:
        name: As the driver calls it.
        capability: Compute capability, such as "9.0".
        memory: Bytes in all.
        free: Bytes free now.
        bfloat16: Whether it computes in bfloat16 natively.
    """

    name: str
    capability: str
    memory: int
    free: int
    bfloat16: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """This machine.

    Attributes:
        processor: The CPU's name.
        cores: Logical processors this process may run on.
        threads: Threads torch computes with.
        vectors: The instruction set torch's own CPU code uses.
        memory: Bytes this process may use at most: physical memory, or a container's limit below it.
        available: Bytes of it that are free or can be freed now.
        cpu_dtype: What ``--dtype auto`` is on the CPU.
        cuda: The GPUs.
    """

    processor: str
    cores: int
    threads: int
    vectors: str
    memory: int
    available: int
    cpu_dtype: str
    cuda: tuple[CudaDevice, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Capacity:
    """Bytes there are.

    Attributes:
        host_total: Of memory this process may use at most: physical memory, or a container's limit below it.
        host_free: Of it, what is free or can be freed now.
        device_total: Of the accelerator; None: the host computes.
        device_free: Of it, what nobody holds; None: the host computes.
        disk_free: Where the workspace is or would be.
    """

    host_total: int
    host_free: int
    device_total: int | None
    device_free: int | None
    disk_free: int


def this_machine() -> Machine:
    """Look at the machine; nothing is written and no model is loaded."""
    memory, available = host_memory()
    return Machine(
        processor=processor_name(),
        cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        threads=torch.get_num_threads(),
        vectors=torch.backends.cpu.get_cpu_capability(),
        memory=memory,
        available=available,
        cpu_dtype=str(preferred_dtype("cpu")).removeprefix("torch."),
        cuda=tuple(cuda_device(index) for index in range(torch.cuda.device_count())),
    )


def capacity(place: Path, device: str) -> Capacity:
    """What there is now for a stage that writes to ``place`` and computes on "cpu", "cuda" or "cuda:N"."""
    total, free = host_memory()
    device_total = device_free = None
    if device != "cpu":
        device_free, device_total = torch.cuda.mem_get_info(torch.device(device))
    return Capacity(
        host_total=total,
        host_free=free,
        device_total=device_total,
        device_free=device_free,
        disk_free=free_disk(place),
    )


def host_memory() -> tuple[int, int]:
    """Bytes of memory that this process may use, and of them those that are free or can be freed now."""
    memory = psutil.virtual_memory()
    total = min(memory.total, container_limit() or memory.total)
    return total, min(memory.available, total)


def cuda_device(index: int) -> CudaDevice:
    """The GPU of a number."""
    free, memory = torch.cuda.mem_get_info(index)
    with torch.cuda.device(index):
        bfloat16 = torch.cuda.is_bf16_supported(including_emulation=False)
    return CudaDevice(
        name=torch.cuda.get_device_name(index),
        capability=".".join(map(str, torch.cuda.get_device_capability(index))),
        memory=memory,
        free=free,
        bfloat16=bfloat16,
    )


def processor_name() -> str:
    """The CPU's name, or its architecture where the system does not tell."""
    if _CPUINFO.is_file():
        for line in _CPUINFO.read_text(encoding="utf-8", errors="replace").splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name" and value.strip():
                return value.strip()
    return platform.processor() or platform.machine() or "unknown"


def container_limit() -> int | None:
    """Bytes of memory that a container may use; None without a limit."""
    for file in _LIMITS:
        try:
            text = file.read_text(encoding="ascii").strip()
        except OSError:  # another version of cgroups, or none
            continue
        if text.isdigit():
            return int(text)
    return None


def free_disk(path: Path) -> int:
    """Bytes free where ``path`` is or would be made."""
    return shutil.disk_usage(existing(path)).free


def existing(path: Path) -> Path:
    """``path``, or its nearest parent that exists."""
    path = path.expanduser().absolute()
    while not path.exists():
        path = path.parent
    return path
