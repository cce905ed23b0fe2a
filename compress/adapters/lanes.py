"""Three lanes that work is queued on: copies to a device, products on it, copies back; on the host all at once.

What is queued on one lane happens in that order; between lanes the order is only what marks demand.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING, Any, Literal, Protocol

import torch
from torch import Tensor

from compress.errors import CompressError

if TYPE_CHECKING:
    from collections.abc import Iterator

Lane = Literal["in", "compute", "out"]
LANES: tuple[Lane, ...] = ("in", "compute", "out")
SHARE = 0.9
"""Of a device's free memory, what is taken at most: the rest is for what libraries allocate beside torch."""


class Lanes(Protocol):
    """Where work is queued. Only one thread queues and waits."""

    def host(self, nbytes: int) -> Tensor:
        """Bytes of the host's memory, uint8 [nbytes], that copies to and from the device can run beside."""
        ...

    def memory(self, nbytes: int) -> Tensor:
        """Bytes of the device's memory, uint8 [nbytes]."""
        ...

    def free_bytes(self) -> int | None:
        """Bytes of the device's memory that may be taken; None: no limit to keep to."""
        ...

    def run(self, lane: Lane, work: Callable[[], None], after: Iterable[Any] = ()) -> Any:
        """Queue ``work`` on a lane, after what the marks ``after`` stand for; returns its own mark."""
        ...

    def wait(self, mark: Any) -> None:
        """Hold the host until what a mark stands for has happened."""
        ...

    def finish(self) -> None:
        """Hold the host until everything queued has happened."""
        ...


class HostLanes:
    """The host's own memory; what is queued happens at once."""

    def host(self, nbytes: int) -> Tensor:
        """See `Lanes`."""
        return torch.empty(nbytes, dtype=torch.uint8)

    def memory(self, nbytes: int) -> Tensor:
        """See `Lanes`."""
        return torch.empty(nbytes, dtype=torch.uint8)

    def free_bytes(self) -> int | None:
        """See `Lanes`."""
        return None

    def run(self, lane: Lane, work: Callable[[], None], after: Iterable[Any] = ()) -> Any:
        """See `Lanes`."""
        work()

    def wait(self, mark: Any) -> None:
        """See `Lanes`."""

    def finish(self) -> None:
        """See `Lanes`."""


@cache
def _streams(index: int) -> dict[Lane, Any]:
    """A device's streams, the same for everybody: cuBLAS keeps some 32 MB for every stream that it has met."""
    return {lane: torch.cuda.Stream(torch.device("cuda", index)) for lane in LANES}


class CudaLanes:
    """Three CUDA streams with events between them, and pinned memory on the host.

    float32 products are float32 throughout, whatever the program allows elsewhere (TF32).

    Args:
        device: A CUDA device.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._streams = _streams(torch.cuda.current_device() if device.index is None else device.index)

    def host(self, nbytes: int) -> Tensor:
        """See `Lanes`. torch rounds pinned memory up to a power of two bytes."""
        return torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)

    def memory(self, nbytes: int) -> Tensor:
        """See `Lanes`.

        Raises:
            CompressError: The device lacks it.
        """
        with _refusing(self.device):
            found = torch.empty(nbytes, dtype=torch.uint8, device=self.device)
        for stream in self._streams.values():  # whoever had this memory before may still be at work on it
            stream.wait_stream(torch.cuda.current_stream(self.device))
        return found

    def free_bytes(self) -> int | None:
        """See `Lanes`; what torch's allocator keeps for later is free."""
        free, _ = torch.cuda.mem_get_info(self.device)
        kept = torch.cuda.memory_reserved(self.device) - torch.cuda.memory_allocated(self.device)
        return int(SHARE * (free + kept))

    def run(self, lane: Lane, work: Callable[[], None], after: Iterable[Any] = ()) -> Any:
        """See `Lanes`.

        Raises:
            CompressError: The device lacks memory for what the work allocates.
        """
        stream = self._streams[lane]
        for mark in after:
            stream.wait_event(mark)
        with torch.cuda.stream(stream), _float32_products(), _refusing(self.device):
            work()
        event = torch.cuda.Event()
        event.record(stream)
        return event

    def wait(self, mark: Any) -> None:
        """See `Lanes`."""
        mark.synchronize()

    def finish(self) -> None:
        """See `Lanes`."""
        for stream in self._streams.values():
            stream.synchronize()


def device_lanes(device: torch.device | str) -> Lanes | None:
    """The lanes of a CUDA device; None for the host, which computes what it has just read."""
    device = torch.device(device)
    return CudaLanes(device) if device.type == "cuda" else None


def lacking(device: str, needs: int, free: int | None) -> CompressError:
    """The error of a device without the memory for what is to be computed on it."""
    there = "" if free is None else f", and {free / 1e9:.2f} GB of it can be had"
    return CompressError(
        f"The largest adapted matrix needs {needs / 1e9:.2f} GB of memory on {device}{there}.",
        "Close what else uses the device, or compute on the host with --device cpu.",
    )


@contextmanager
def _float32_products() -> Iterator[None]:
    settings = torch.backends.cuda.matmul
    before = settings.fp32_precision
    settings.fp32_precision = "ieee"
    try:
        yield
    finally:
        settings.fp32_precision = before


@contextmanager
def _refusing(device: torch.device) -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise CompressError(
            f"There is not enough memory on {device} to change the weights there ({error}).",
            "Close what else uses the device, or compute on the host with --device cpu.",
        ) from error
