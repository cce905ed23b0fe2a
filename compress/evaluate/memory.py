"""Bytes of weight files, bytes of a loaded model, and the peak memory of a piece of work."""

from __future__ import annotations

import json
import sys
import threading
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from compress.errors import CompressError

_STATUS = Path("/proc/self/status")
_CLEAR_REFS = Path("/proc/self/clear_refs")


def file_bytes(path: Path) -> int:
    """Bytes of the weight files of a model or adapter: a folder, or one .gguf or .safetensors file.

    Counts what a loader reads: the shards of an index, else ``model.safetensors``, else
    ``adapter_model.safetensors``; not the other artifacts beside them.

    Raises:
        CompressError: No weight file there.
    """
    if path.is_file():
        return path.stat().st_size
    index = path / "model.safetensors.index.json"
    if index.is_file():
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        return sum((path / name).stat().st_size for name in set(weight_map.values()))
    for name in ("model.safetensors", "adapter_model.safetensors"):
        if (path / name).is_file():
            return (path / name).stat().st_size
    raise CompressError(f"There is no weight file in {path}.", "Give the folder of a model or adapter.")


def resident_bytes(model: torch.nn.Module) -> int:
    """Bytes of a loaded model's parameters and buffers; tensors that share storage count once."""
    storages = {}
    for tensor in (*model.parameters(), *model.buffers()):
        storage = tensor.untyped_storage()
        storages[(tensor.device, storage.data_ptr())] = storage.nbytes()
    return sum(storages.values())


@dataclass(slots=True, kw_only=True)
class MemoryReading:
    """What `PeakMemory` measured, filled in when its block ends.

    Args:
        host_bytes: Peak resident memory of this process.
        device_bytes: Peak memory that torch allocated on the CUDA device; None without one.
        method: "reset" (the kernel's high-water mark, reset before), "sampled" (every 5 ms), or "lifetime"
            (the high-water mark since the process began: an upper bound).
    """

    host_bytes: int = 0
    device_bytes: int | None = None
    method: str = ""


class PeakMemory:
    """Context manager: peak memory of this process within the block.

    ``with PeakMemory() as peak: ...`` and then ``peak.host_bytes``. Absolute, not an increase: what was
    resident before counts.

    Args:
        device: Its CUDA peak is measured too when it is a CUDA device.
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self._device = torch.device(device)
        self._reading = MemoryReading()
        self._sampler: _Sampler | None = None

    def __enter__(self) -> MemoryReading:
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
        if _reset_high_water():
            self._reading.method = "reset"
        elif _status_bytes("VmRSS") is not None:
            self._reading.method = "sampled"
            self._sampler = _Sampler()
            self._sampler.start()
        else:
            self._reading.method = "lifetime"
        return self._reading

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._sampler is not None:
            self._reading.host_bytes = self._sampler.stop()
        elif self._reading.method == "reset":
            self._reading.host_bytes = _status_bytes("VmHWM") or 0
        else:
            self._reading.host_bytes = _lifetime_peak()
        if self._device.type == "cuda":
            self._reading.device_bytes = torch.cuda.max_memory_allocated(self._device)


class _Sampler(threading.Thread):
    """Reads the resident size every 5 ms, for kernels that do not let us reset the high-water mark."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self._done = threading.Event()
        self._peak = _status_bytes("VmRSS") or 0

    def run(self) -> None:
        while not self._done.wait(0.005):
            self._peak = max(self._peak, _status_bytes("VmRSS") or 0)

    def stop(self) -> int:
        self._done.set()
        self.join()
        return max(self._peak, _status_bytes("VmRSS") or 0)


def _status_bytes(field: str) -> int | None:
    """One field of /proc/self/status in bytes; None where there is none (not Linux, or a sandbox)."""
    if not _STATUS.is_file():
        return None
    for line in _STATUS.read_text(encoding="ascii", errors="replace").splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    return None


def resident_now() -> int | None:
    """Resident memory of this process in bytes; None where the system does not say (no /proc)."""
    return _status_bytes("VmRSS")


def _reset_high_water() -> bool:
    try:
        _CLEAR_REFS.write_text("5", encoding="ascii")
    except OSError:  # not Linux, or not permitted here
        return False
    high, now = _status_bytes("VmHWM"), _status_bytes("VmRSS")
    # Some sandboxes accept the write and ignore it, or have no high-water mark.
    return high is not None and now is not None and high <= now + (1 << 20)


def _lifetime_peak() -> int:
    if sys.platform == "win32":
        return _windows_peak()
    import resource  # not on Windows

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _windows_peak() -> int:
    import ctypes

    size_t = ctypes.c_size_t

    class Counters(ctypes.Structure):  # PROCESS_MEMORY_COUNTERS
        _fields_ = (
            ("cb", ctypes.c_uint32),
            ("page_faults", ctypes.c_uint32),
            ("peak_working_set", size_t),
            *((f"other_{i}", size_t) for i in range(7)),
        )

    counters = Counters()
    counters.cb = ctypes.sizeof(counters)
    windll: Any = ctypes.__dict__["windll"]
    process = ctypes.c_void_p(-1)  # the pseudo handle of the current process
    if not windll.kernel32.K32GetProcessMemoryInfo(process, ctypes.byref(counters), counters.cb):
        return 0
    return int(counters.peak_working_set)
