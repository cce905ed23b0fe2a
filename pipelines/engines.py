"""Which engine computes, by name."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from compress.engine import Engine, LocalEngine
from compress.errors import UsageError, choose
from compress.pipelines.settings import Common

ENGINES = ("local", "ray")


@contextmanager
def opened_engine(common: Common, say: Callable[[str], None]) -> Iterator[Engine]:
    """The engine that ``--engine`` names, until the block ends.

    Args:
        common: Names it.
        say: Takes lines for the user.

    Raises:
        UsageError: There is no such engine, or ``--memory-limit`` is given for one of many processes.
        CompressError: Its library is missing, or its cluster cannot be used.
    """
    if common.engine not in ENGINES:
        raise UsageError(f"There is no engine {common.engine!r}.", choose(common.engine, ENGINES))
    if common.engine == "local" or common.dry_run:
        yield LocalEngine()
        return
    if common.memory_limit is not None:
        raise UsageError(
            "--memory-limit counts what this machine's processes hold, not those of a cluster.",
            "Leave it out, or give --engine local.",
        )
    from compress.pipelines.engine_ray import opened

    with opened(say) as engine:
        yield engine


def require_processors(common: Common, device: str) -> None:
    """Refuse a cluster where this machine computes on a GPU: its workers compute on processors, with other last bits.

    Raises:
        UsageError: Both are asked for.
    """
    if common.engine != "local" and device != "cpu":
        raise UsageError(
            f"--engine {common.engine} computes matrices on processors, and this machine on {device}.",
            "Give --device cpu, or leave --engine out.",
        )
