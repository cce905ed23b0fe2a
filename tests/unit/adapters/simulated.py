"""A device that does what was queued as late, as early or in as strange an order as its marks allow."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from compress.adapters.lanes import LANES, CudaLanes, HostLanes, Lane, Lanes


class SimulatedLanes:
    """Three queues. A work runs when it is the first of its lane and everything that it is after has run.

    Args:
        seed: Of the order in which lanes go on; None: a lane goes on only when the host waits for it.
        free: Bytes of the device.
    """

    def __init__(self, seed: int | None = None, *, free: int | None = None) -> None:
        self._random = None if seed is None else random.Random(seed)
        self._free = free
        self._queues: dict[Lane, list[int]] = {lane: [] for lane in LANES}
        self._works: list[tuple[Callable[[], None], frozenset[int]]] = []
        self.done: set[int] = set()
        self.events: list[tuple[str, str]] = []
        self.host_bytes = self.device_bytes = 0

    def host(self, nbytes: int) -> Tensor:
        self.host_bytes += nbytes
        return torch.full((nbytes,), 255, dtype=torch.uint8)

    def memory(self, nbytes: int) -> Tensor:
        self.device_bytes += nbytes
        return torch.full((nbytes,), 255, dtype=torch.uint8)

    def free_bytes(self) -> int | None:
        return self._free

    def run(self, lane: Lane, work: Callable[[], None], after: Iterable[Any] = ()) -> int:
        mark = len(self._works)
        self._works.append((work, frozenset(after)))
        self._queues[lane].append(mark)
        self.events.append(("queued", lane))
        while self._random is not None and self._random.random() < 0.5 and self._step(self._random):
            pass
        return mark

    def wait(self, mark: int) -> None:
        if self._random is None:
            self._reach(mark)
        else:
            while mark not in self.done:
                assert self._step(self._random), "it waits for what can never happen"

    def finish(self) -> None:
        for lane in LANES:
            for mark in list(self._queues[lane]):
                self._reach(mark)
        self.events.append(("finished", ""))

    def _ready(self) -> list[Lane]:
        return [
            lane for lane, queue in self._queues.items() if queue and self._works[queue[0]][1] <= self.done
        ]

    def _step(self, source: random.Random) -> bool:
        ready = self._ready()
        if ready:
            self._do(source.choice(ready))
        return bool(ready)

    def _reach(self, mark: int) -> None:
        """Run what a mark needs and no more: the works before it in its lane, and what those are after."""
        while mark not in self.done:
            lane = next(lane for lane, queue in self._queues.items() if mark in queue)
            first = self._queues[lane][0]
            for needed in self._works[first][1]:
                self._reach(needed)
            self._do(lane)

    def _do(self, lane: Lane) -> None:
        mark = self._queues[lane].pop(0)
        self._works[mark][0]()
        self.done.add(mark)
        self.events.append(("done", lane))


def every_lanes() -> dict[str, Callable[[], Lanes]]:
    """Makers of lanes by name: the host's, simulated ones, and those of the GPU where there is one."""
    found: dict[str, Callable[[], Lanes]] = {"host": HostLanes, "late": SimulatedLanes}
    for seed in range(4):
        found[f"seed {seed}"] = lambda seed=seed: SimulatedLanes(seed)  # type: ignore[misc]
    if torch.cuda.is_available():
        found["cuda"] = lambda: CudaLanes(torch.device("cuda", 0))
    return found
