"""Many small jobs on a device, those of equal shapes as one, with reading, copies and products at the same time.

Jobs are taken in order, as many at a time as fit into a window of bytes. Within a window those that are alike become a
batch: their inputs are stacked and computed by one call. Two windows are under way: while one is computed, the next is
read by a second thread and the one before is handed out. So six things overlap: reading, the copy in, the products, the
copy back, and what the caller does with results.

```
 reader     read 0 │ read 1      │ read 2        │ read 3
 copy in           │ 0a 0b       │ 1a 1b         │ 2a 2b
 compute           │    0a 0b    │    1a 1b      │    2a 2b
 copy out          │       0a 0b │       1a 1b   │       2a 2b
 caller            │             │ results of 0  │ results of 1
```
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import Any, Protocol

import torch
from torch import Tensor

from compress.adapters.lanes import Lanes, lacking

LIMIT = 64 << 20
"""Bytes of a window; a larger job is a window of its own."""
ALIGNED = 256
"""Every stack of tensors begins at a multiple of so many bytes."""


@dataclass(frozen=True, slots=True)
class Spec:
    """Shape and type of a tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Its bytes."""
        return prod(self.shape) * self.dtype.itemsize


class Operation(Protocol):
    """What is computed. Hashable: jobs with equal operations and equal shapes are computed together."""

    @property
    def in_place(self) -> bool:
        """Whether the results lie where the inputs lay."""
        ...

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Stacked inputs [n, ...] to stacked results [n, ...]; may overwrite its inputs."""
        ...

    def workspace(self, inputs: Sequence[Spec]) -> int:
        """Bytes that one job needs on the device beside its inputs and results."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One computation.

    Attributes:
        operation: What is computed.
        inputs: Of what.
        outputs: What comes of it.
        fill: Writes the inputs into host memory; called from another thread.
    """

    operation: Operation
    inputs: tuple[Spec, ...]
    outputs: tuple[Spec, ...]
    fill: Callable[[Sequence[Tensor]], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """Jobs of a window that are computed by one call: their numbers, and where their stacks lie in the buffers."""

    jobs: tuple[int, ...]
    inputs: tuple[int, ...]
    inputs_end: int
    outputs: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Window:
    """Consecutive jobs under way together, and the bytes of their inputs and of their results."""

    jobs: range
    batches: tuple[Batch, ...]
    input_bytes: int
    output_bytes: int


def windows_of(jobs: Sequence[Job], limit: int) -> tuple[Window, ...]:
    """Consecutive jobs of at most ``limit`` bytes (inputs or results, whichever is more), at least one each."""
    found, start, size = [], 0, 0
    for index, job in enumerate(jobs):
        own = max(_padded(job.inputs), _padded(job.outputs))
        if index > start and size + own > limit:
            found.append(_window(jobs, range(start, index)))
            start, size = index, 0
        size += own
    return (*found, _window(jobs, range(start, len(jobs)))) if jobs else ()


def device_bytes(jobs: Sequence[Job], windows: Sequence[Window]) -> int:
    """Bytes of the device's memory that :func:`run_batched` takes for these windows."""
    inputs = min(2, len(windows)) * max(window.input_bytes for window in windows)
    kept, work = [], 0
    for window in windows:
        new = 0
        for batch in window.batches:
            job, count = jobs[batch.jobs[0]], len(batch.jobs)
            work = max(work, count * job.operation.workspace(job.inputs))
            new += 0 if job.operation.in_place else count * sum(spec.nbytes for spec in job.outputs)
        kept.append(new)
    return inputs + sum(sorted(kept)[-2:]) + work


def fitting_windows(
    jobs: Sequence[Job], *, limit: int, free: int | None, device: str = "the device"
) -> tuple[Window, ...]:
    """The largest windows up to ``limit`` bytes, halved until they fit into ``free`` bytes of the device.

    Raises:
        CompressError: Not even one job at a time fits.
    """
    while True:
        windows = windows_of(jobs, limit)
        if free is None or not windows or (needs := device_bytes(jobs, windows)) <= free:
            return windows
        if all(len(window.jobs) == 1 for window in windows):
            raise lacking(device, needs, free)
        limit //= 2


def run_batched(jobs: Sequence[Job], lanes: Lanes, *, limit: int = LIMIT) -> Generator[tuple[Tensor, ...]]:
    """The results of jobs in their order, on the host; valid until the next ones are asked for.

    Holds two buffers for inputs and two for results of a window on the host, two for inputs on the device.

    Args:
        jobs: What to compute.
        lanes: Where.
        limit: Bytes of a window.

    Raises:
        CompressError: The device has no room for one job at a time.
    """
    windows = fitting_windows(
        jobs, limit=limit, free=lanes.free_bytes(), device=str(getattr(lanes, "device", "the device"))
    )
    if not windows:
        return
    inputs, outputs = (max(getattr(window, kind) for window in windows) for kind in _SIZES)
    slots = [
        _Slot(staged=lanes.host(inputs), there=lanes.memory(inputs), back=lanes.host(outputs))
        for _ in windows[:2]
    ]
    before: _UnderWay | None = None
    try:
        with ThreadPoolExecutor(1, thread_name_prefix="read ahead") as reader:
            reading = reader.submit(_fill, jobs, windows[0], slots[0])
            for index, window in enumerate(windows):
                reading.result()
                launched = _launch(jobs, window, slots[index % 2], lanes)
                if index + 1 < len(windows):
                    if before is not None:
                        lanes.wait(before.copied_in)  # what is read next goes where that was read
                    reading = reader.submit(_fill, jobs, windows[index + 1], slots[(index + 1) % 2])
                if before is not None:
                    yield from _results(before, lanes)
                before = launched
            if before is not None:
                yield from _results(before, lanes)
    finally:
        lanes.finish()  # nothing may still write into buffers that are about to be freed


_SIZES = ("input_bytes", "output_bytes")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Slot:
    """Buffers of a window: read into on the host, on the device, results on the host."""

    staged: Tensor
    there: Tensor
    back: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class _UnderWay:
    """A window whose work was queued: when its inputs have left the host, and each job's results with their mark."""

    copied_in: Any
    results: Sequence[tuple[Any, tuple[Tensor, ...]]]
    held: Sequence[list[Tensor]]


def _padded(specs: Sequence[Spec]) -> int:
    return sum(-(-spec.nbytes // ALIGNED) * ALIGNED for spec in specs)


def _window(jobs: Sequence[Job], among: range) -> Window:
    alike: dict[Any, list[int]] = {}
    for index in among:
        job = jobs[index]
        alike.setdefault((job.operation, job.inputs, job.outputs), []).append(index)
    batches, ends = [], [0, 0]
    for members in alike.values():
        job = jobs[members[0]]
        starts: list[list[int]] = [[], []]
        for side, specs in enumerate((job.inputs, job.outputs)):
            for spec in specs:
                starts[side].append(ends[side])
                ends[side] += -(-len(members) * spec.nbytes // ALIGNED) * ALIGNED
        batches.append(
            Batch(jobs=tuple(members), inputs=tuple(starts[0]), inputs_end=ends[0], outputs=tuple(starts[1]))
        )
    return Window(jobs=among, batches=tuple(batches), input_bytes=ends[0], output_bytes=ends[1])


def _stacks(buffer: Tensor, starts: Sequence[int], specs: Sequence[Spec], count: int) -> tuple[Tensor, ...]:
    return tuple(
        buffer[start : start + count * spec.nbytes].view(spec.dtype).view(count, *spec.shape)
        for start, spec in zip(starts, specs, strict=True)
    )


def _fill(jobs: Sequence[Job], window: Window, slot: _Slot) -> None:
    places: dict[int, tuple[Tensor, ...]] = {}
    for batch in window.batches:
        stacks = _stacks(slot.staged, batch.inputs, jobs[batch.jobs[0]].inputs, len(batch.jobs))
        for at, index in enumerate(batch.jobs):
            places[index] = tuple(stack[at] for stack in stacks)
    for index in window.jobs:  # in the order in which they lie on disk
        jobs[index].fill(places[index])


def _launch(jobs: Sequence[Job], window: Window, slot: _Slot, lanes: Lanes) -> _UnderWay:
    found: dict[int, tuple[Any, tuple[Tensor, ...]]] = {}
    held = []
    copied = None
    for batch in window.batches:
        job, count = jobs[batch.jobs[0]], len(batch.jobs)
        span = slice(batch.inputs[0], batch.inputs_end)
        copied = lanes.run("in", partial(_copy, [slot.there[span]], [slot.staged[span]]))
        made: list[Tensor] = []
        stacks = _stacks(slot.there, batch.inputs, job.inputs, count)
        computed = lanes.run("compute", partial(_compute, job.operation, stacks, made), (copied,))
        back = _stacks(slot.back, batch.outputs, job.outputs, count)
        mark = lanes.run("out", partial(_copy, back, made), (computed,))
        held.append(made)
        for at, index in enumerate(batch.jobs):
            found[index] = (mark, tuple(stack[at] for stack in back))
    return _UnderWay(copied_in=copied, results=[found[index] for index in window.jobs], held=held)


def _copy(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    for target, source in zip(targets, sources, strict=True):
        target.copy_(source, non_blocking=True)


def _compute(operation: Operation, inputs: tuple[Tensor, ...], made: list[Tensor]) -> None:
    with torch.no_grad():
        made.extend(operation(*inputs))


def _results(window: _UnderWay, lanes: Lanes) -> Iterator[tuple[Tensor, ...]]:
    for mark, tensors in window.results:
        lanes.wait(mark)
        yield tensors
