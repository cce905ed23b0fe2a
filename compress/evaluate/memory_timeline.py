"""Memory over time: one sample a second while a block runs, thinned to a bounded number."""

from __future__ import annotations

import sys
import threading
from types import TracebackType

from compress.evaluate.memory import resident_now

INTERVAL = 1.0
"""Seconds between two samples."""
LIMIT = 240
"""Most values that are kept of one block: a stage of a week records as much as one of eight minutes."""


class Thinned:
    """A series of any length in at most ``limit`` values, each the largest of as many neighbours.

    When it is full, every two neighbours become the larger of them, so no peak is lost.

    Args:
        limit: Most values; even.
    """

    def __init__(self, limit: int = LIMIT) -> None:
        if limit < 2 or limit % 2:
            raise ValueError(f"limit must be even and at least 2, not {limit}")
        self._limit = limit
        self._values: list[int] = []
        self._last = 0  # how many samples the last value stands for
        self.stride = 1

    def add(self, value: int) -> None:
        """Append one sample."""
        if self._values and self._last < self.stride:
            self._values[-1] = max(self._values[-1], value)
            self._last += 1
            return
        if len(self._values) == self._limit:
            pairs = zip(self._values[::2], self._values[1::2], strict=True)
            self._values = [max(pair) for pair in pairs]
            self.stride *= 2
        self._values.append(value)
        self._last = 1

    @property
    def values(self) -> list[int]:
        """The values, each the largest of ``stride`` samples; the last one perhaps of fewer."""
        return list(self._values)


class MemoryTimeline:
    """Context manager: the resident memory of this process, and what torch holds on a GPU, over a block's time.

    ``with MemoryTimeline() as timeline: ...`` and then ``timeline.record()``. A thread reads one line of /proc each
    second. Where there is no /proc nothing is recorded.

    Args:
        interval: Seconds between two samples.
        limit: Most values that are kept.
        device: The GPU that is looked at, such as "cuda:1"; else the current one.
    """

    def __init__(self, *, interval: float = INTERVAL, limit: int = LIMIT, device: str | None = None) -> None:
        self._interval, self._gpu = interval, device
        self._host, self._device = Thinned(limit), Thinned(limit)
        self._device_seen = False
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._run, name="memory timeline", daemon=True)

    def __enter__(self) -> MemoryTimeline:
        if self._sample():
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._done.set()
        if self._thread.is_alive():
            self._thread.join()

    @property
    def host_peak(self) -> int:
        """The largest sample of resident memory in bytes; 0 without any."""
        return max(self._host.values, default=0)

    @property
    def device_peak(self) -> int:
        """The largest sample of what torch held on the GPU in bytes; 0 without any."""
        return max(self._device.values, default=0)

    def record(self) -> dict[str, float | list[int]] | None:
        """JSON values: ``interval_seconds``, ``host_bytes`` and, where a GPU was used, ``device_bytes``.

        None without any sample. A value stands for ``interval_seconds`` from its place on, and is the largest sample
        in them.
        """
        if not self._host.values:
            return None
        found: dict[str, float | list[int]] = {
            "interval_seconds": self._interval * self._host.stride,
            "host_bytes": self._host.values,
        }
        return found | ({"device_bytes": self._device.values} if self._device_seen else {})

    def _run(self) -> None:
        while not self._done.wait(self._interval):
            self._sample()

    def _sample(self) -> bool:
        resident = resident_now()
        if resident is None:
            return False
        held = _device_bytes(self._gpu)
        self._host.add(resident)
        self._device.add(held or 0)
        self._device_seen |= held is not None
        return True


def _device_bytes(device: str | None) -> int | None:
    """Bytes that torch has allocated on a GPU (None: the current one); None before anything used one."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return None
    return int(torch.cuda.memory_allocated(device))
