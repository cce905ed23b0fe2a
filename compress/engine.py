"""Who computes independent pieces of work: the threads of this process, or the workers of a cluster.

Whoever does, a piece is computed by one thread. Factorizations and sums round differently when threads divide them, so
only this gives the same bytes for any number of threads, workers and machines; and several pieces side by side keep
more cores busy than one piece whose small steps are divided.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol, TypeVar

J = TypeVar("J")
R = TypeVar("R")
T = TypeVar("T")


class Handle(Protocol):
    """A value that many pieces of work read."""

    def get(self) -> object:
        """The value, wherever the piece is computed."""


class Engine(Protocol):
    """Computes pieces of work that do not need one another."""

    def share(self, value: object) -> Handle:
        """Make a value known to whoever computes, once for all the pieces that hold the handle."""

    def at_most(self, jobs: int) -> Engine:
        """The same engine with at most so many jobs at once in this process."""

    def run(self, work: Callable[[J], R], jobs: Iterable[J], keep: Callable[[J, R], None]) -> None:
        """Compute ``work(job)`` for every job, and hand each result to ``keep`` as soon as it is there.

        Jobs are taken in their order, only when one can begin soon, so that they may be made one by one; give the
        larger ones first. Jobs are made and ``keep`` is called in this thread, in the order in which results come. When
        making a job raises, because somebody asked to stop, or a job fails, those under way are finished and kept
        first.

        Args:
            work: A function of a module, which another process can import.
            jobs: What it is called with.
            keep: Takes a job and its result.

        Raises:
            Exception: What the first job, or ``keep``, raised.
        """


@dataclass(frozen=True, slots=True)
class Here:
    """A handle of a value in this process."""

    value: object

    def get(self) -> object:
        """The value."""
        return self.value


@dataclass(frozen=True, slots=True)
class LocalEngine:
    """As many threads as torch has, each with a piece of its own.

    Attributes:
        most: At most so many; None: no fewer than torch has.
    """

    most: int | None = None

    def share(self, value: object) -> Handle:
        """A handle of the value itself."""
        return Here(value)

    def at_most(self, jobs: int) -> Engine:
        """See :meth:`Engine.at_most`."""
        return LocalEngine(jobs if self.most is None else min(jobs, self.most))

    def run(self, work: Callable[[J], R], jobs: Iterable[J], keep: Callable[[J, R], None]) -> None:
        """See :meth:`Engine.run`."""
        import torch

        threads = torch.get_num_threads()
        workers = threads if self.most is None else min(threads, self.most)
        with single_thread():
            if workers == 1:
                for job in jobs:
                    keep(job, work(job))
                return
            with ThreadPoolExecutor(workers) as pool:

                def begin(job: J) -> Future[R]:
                    return pool.submit(work, job)

                in_turns(jobs, keep, most=workers, begin=begin, ended=_ended, result=Future.result)


LOCAL = LocalEngine()
"""The threads of this process."""


def in_turns(
    jobs: Iterable[J],
    keep: Callable[[J, R], None],
    *,
    most: int,
    begin: Callable[[J], T],
    ended: Callable[[Collection[T]], Iterable[T]],
    result: Callable[[T], R],
) -> None:
    """What every engine with several workers does: see :meth:`Engine.run`.

    Args:
        jobs: In the order in which they begin.
        keep: Takes a job and its result.
        most: Jobs that are under way at once.
        begin: Has a job computed, and returns a ticket for it.
        ended: Waits until one of the tickets' jobs has ended, and returns the tickets of all that have.
        result: What a job came to, once it has ended; raises what it raised.
    """
    running: dict[T, J] = {}
    waiting = iter(jobs)

    def fill() -> None:
        while len(running) < most:
            try:
                job = next(waiting)
            except StopIteration:
                return
            running[begin(job)] = job

    try:
        fill()
        while running:
            for ticket in ended(running.keys()):
                job, found = running.pop(ticket), result(ticket)
                try:
                    fill()
                finally:
                    keep(job, found)
    except BaseException:
        for ticket, job in running.items():
            try:
                found = result(ticket)
            except Exception:
                continue
            keep(job, found)
        raise


def _ended(running: Collection[Future[R]]) -> Iterable[Future[R]]:
    return wait(running, return_when=FIRST_COMPLETED).done


@contextmanager
def single_thread() -> Iterator[None]:
    """Torch's operations are not divided among threads meanwhile, in this thread and in those that it starts."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def largest_first(jobs: Iterable[J], size: Callable[[J], int]) -> list[J]:
    """In the order that leaves workers idle for the least time at the end; equal ones as they came."""
    return sorted(jobs, key=size, reverse=True)
