"""Pieces of work on a Ray cluster: the one that is running or named by RAY_ADDRESS, else this machine's processors.

Ray finds workers, moves what they need, and gives the pieces of a lost worker to another. A piece is computed exactly
as in `LocalEngine`, by one thread, so the bytes are the same, given the same libraries; that is looked at before
anything is computed.
"""

from __future__ import annotations

import logging
import math
import os
import signal
import socket
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from compress.engine import Engine, Handle, in_turns
from compress.errors import CompressError
from compress.machine import processor_name
from compress.pipelines.stage import versions
from compress.stopping import SIGNALS

J = TypeVar("J")
R = TypeVar("R")

RETRIES = 5
"""How often a piece is given to another worker when the one that computed it is lost."""
CONNECT_SECONDS = 10.0
AHEAD = 0.5
"""Pieces that wait beside those that are computed, for each worker."""


@dataclass(frozen=True, slots=True)
class There:
    """A handle of a value in the cluster's memory."""

    reference: Any

    def get(self) -> object:
        """The value, fetched by whoever asks."""
        import ray

        return ray.get(self.reference)


@dataclass(frozen=True, slots=True)
class Node:
    """What decides bytes on one machine of the cluster."""

    versions: tuple[tuple[str, str], ...]
    processor: str


class RayEngine:
    """See the module's text; made by :func:`opened`.

    Args:
        workers: Processors of the cluster.
    """

    def __init__(self, workers: int) -> None:
        self.workers = workers

    def share(self, value: object) -> Handle:
        """A handle of the value in the cluster's memory."""
        import ray

        return There(ray.put(value))

    def at_most(self, jobs: int) -> Engine:
        """This engine: no job is computed in this process."""
        return self

    def run(self, work: Callable[[J], R], jobs: Iterable[J], keep: Callable[[J, R], None]) -> None:
        """See :meth:`Engine.run`.

        Raises:
            CompressError: Workers were lost more often than pieces are given away again.
        """
        import ray

        remote = ray.remote(num_cpus=1, max_retries=RETRIES)(_alone)

        def ended(running: Collection[Any]) -> list[Any]:
            done: list[Any] = ray.wait(list(running), num_returns=1)[0]
            return done

        in_turns(
            jobs,
            keep,
            most=self.workers + math.ceil(AHEAD * self.workers),
            begin=lambda job: remote.remote(work, job),
            ended=ended,
            result=_result,
        )


def _alone(work: Callable[[J], R], job: J) -> R:
    """In a worker."""
    torch.set_num_threads(1)
    return work(job)


def _result(reference: Any) -> Any:
    import ray

    try:
        return ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        raise error.cause from None
    except ray.exceptions.RayError as error:
        raise CompressError(
            f"The cluster lost a piece of work ({type(error).__name__}).",
            "See what became of its machines, and run the same command again: what is finished is kept.",
        ) from error


@contextmanager
def opened(say: Callable[[str], None]) -> Iterator[RayEngine]:
    """Connect to the cluster, or start one here; it is left, or ended, when the block is.

    Args:
        say: Takes lines for the user.

    Raises:
        CompressError: Ray is not installed, the cluster cannot be reached, or a machine of it has other libraries.
    """
    try:
        import ray
    except ImportError as error:
        raise CompressError(
            "--engine ray needs Ray, which is not installed.", "Run: pip install 'compress-llm[cluster]'"
        ) from error
    handlers = {number: signal.getsignal(number) for number in SIGNALS}
    try:
        _knock(os.environ.get("RAY_ADDRESS", ""))
        ray.init(
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.ERROR,
            configure_logging=False,
        )
    except (ConnectionError, OSError, ValueError, RuntimeError) as error:
        raise CompressError(
            f"The cluster cannot be reached ({str(error).splitlines()[0]}).",
            "Check RAY_ADDRESS and `ray status`, or unset it to use this machine alone.",
        ) from error
    try:
        for number, handler in handlers.items():  # Ray takes SIGTERM; ours finishes the current layer first
            if handler is not None:
                signal.signal(number, handler)
        workers = max(1, int(ray.cluster_resources().get("CPU", 1)))
        nodes = _nodes()
        _check(nodes)
        say(f"Ray: {workers} workers on {len(nodes)} {'machine' if len(nodes) == 1 else 'machines'}.")
        if len({node.processor for node in nodes.values()} | {processor_name()}) > 1:
            say("Their processors differ, and so may the last bits of what they compute.")
        yield RayEngine(workers)
    finally:
        ray.shutdown()


def _knock(address: str) -> None:
    """See that somebody answers where a cluster should be: Ray itself would try for minutes.

    Raises:
        OSError: Nobody does.
    """
    host, separator, port = address.removeprefix("ray://").rpartition(":")
    if separator and port.isdigit():
        socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_SECONDS).close()


def _nodes() -> dict[str, Node]:
    """What decides bytes, by the name of each machine that has processors."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    asked = {}
    for node in ray.nodes():
        if node["Alive"] and node["Resources"].get("CPU", 0) >= 1:
            there = NodeAffinitySchedulingStrategy(node_id=node["NodeID"], soft=False)
            remote = ray.remote(num_cpus=1, scheduling_strategy=there)(this_node)
            asked[f"{node['NodeManagerAddress']} ({node['NodeID'][:8]})"] = remote.remote()
    try:
        return {name: ray.get(reference) for name, reference in asked.items()}
    except ray.exceptions.RayTaskError as error:
        raise CompressError(
            f"A machine of the cluster cannot run this package ({error.cause}).",
            "Install the same version of compress there.",
        ) from error


def this_node() -> Node:
    """What decides bytes here."""
    return Node(
        versions=tuple(sorted(versions().items())),
        processor=processor_name(),
    )


def _check(nodes: dict[str, Node]) -> None:
    own = dict(this_node().versions)
    for name, node in nodes.items():
        for library, version in node.versions:
            if version != own[library]:
                raise CompressError(
                    f"{name} of the cluster has {library} {version}, this machine has {own[library]}.",
                    "Install the same versions on all machines; others can give other bytes.",
                )
