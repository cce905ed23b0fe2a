"""Processes that torchrun launched to do one command together: how each learns of the others."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from compress.errors import CompressError

if TYPE_CHECKING:
    from compress.adapters.ranks import Ranks

NEEDED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""What a launcher says to each process; without one of them it was launched alone."""
_PREFIXES = ("TORCHELASTIC_", "GROUP_", "ROLE_", "LOCAL_")
CONNECT = timedelta(minutes=5)
"""For a process to begin."""
TOGETHER = timedelta(days=30)
"""For a process to wait in the midst of training: the first one may be choosing shapes. One that is gone is noticed
by its closed connection, or by the launcher, long before."""
POLL = 0.1
"""Seconds between two looks for something to do."""


def launched() -> bool:
    """Whether a launcher made this process one of several; imports nothing."""
    return all(os.environ.get(name) for name in NEEDED) and os.environ["WORLD_SIZE"] != "1"


@dataclass(slots=True, kw_only=True)
class Launch:
    """One of several processes, and the board on which they leave each other notes.

    Attributes:
        rank: Its number; 0 is the one that does what the command says.
        size: How many there are.
        local_rank: Its number on its machine.
        local_size: How many there are on that machine.
        hosted: Whether the launcher keeps the board, or else the first process.
        board: Keeps texts by name where all can read them (torch's store).
    """

    rank: int
    size: int
    local_rank: int
    local_size: int
    hosted: bool
    board: Any
    _ranks: Ranks | None = field(default=None)

    def post(self, name: str, value: Mapping[str, Any]) -> None:
        """Leave a note for all processes."""
        self.board.set(name, json.dumps(value))

    def post_first(self, name: str, value: Mapping[str, Any]) -> None:
        """Leave a note unless there is one of that name."""
        self.board.compare_set(name, "", json.dumps(value))

    def note(self, name: str) -> dict[str, Any] | None:
        """A note, if it was left."""
        if not self.board.check([name]):
            return None
        found: dict[str, Any] = json.loads(self.board.get(name))
        return found

    def wait(self, names: tuple[str, ...], seconds: float) -> dict[str, Any] | None:
        """The first note of these names that is left within some seconds."""
        until = time.monotonic() + seconds
        while True:
            for name in names:
                note = self.note(name)
                if note is not None:
                    return note
            if time.monotonic() > until:
                return None
            time.sleep(POLL)

    def wait_all(self, names: list[str], seconds: float) -> bool:
        """Whether all notes of these names are left within some seconds."""
        until = time.monotonic() + seconds
        while not self.board.check(names):
            if time.monotonic() > until:
                return False
            time.sleep(POLL)
        return True

    def ranks(self, device: str) -> Ranks:
        """The process group, made when it is first needed, which all processes do at the same time.

        Args:
            device: "cpu" (gloo) or "cuda" (NCCL, each process the GPU of its local rank).
        """
        if self._ranks is None:
            import torch
            import torch.distributed as dist
            from torch.distributed.distributed_c10d import PrefixStore

            from compress.adapters.ranks import Ranks

            place = torch.device("cpu")
            if device != "cpu":
                place = torch.device("cuda", self.local_rank)
                torch.cuda.set_device(place)
            dist.init_process_group(
                "gloo" if device == "cpu" else "nccl",
                store=PrefixStore("group", self.board),
                rank=self.rank,
                world_size=self.size,
                timeout=TOGETHER,
            )
            self._ranks = Ranks(place)
        return self._ranks

    @property
    def gloo(self) -> bool:
        """Whether the processes talk over gloo: a process that ends is noticed at once by those who wait for it."""
        return self._ranks is not None and self._ranks.device.type == "cpu"

    def leave(self) -> None:
        """Close the connections, when nobody waits for this process any more."""
        import torch.distributed as dist

        if self._ranks is not None:
            self._ranks = None
            dist.destroy_process_group()


def join() -> Launch:
    """This process as the launcher made it; what the launcher said is then forgotten.

    No process started from here takes itself for one of those launched, and neither does a library in here.

    Raises:
        CompressError: The others cannot be reached.
    """
    from torch.distributed.distributed_c10d import PrefixStore
    from torch.distributed.rendezvous import rendezvous

    said = {name: value for name, value in os.environ.items() if name in NEEDED or name.startswith(_PREFIXES)}
    try:
        store, rank, size = next(iter(rendezvous("env://", timeout=CONNECT)))
    except (RuntimeError, ValueError) as error:
        raise CompressError(
            f"The process that launched this one cannot be reached ({str(error).splitlines()[0].rstrip('.')}).",
            "Launch it with torchrun, or unset RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT.",
        ) from error
    for name in said:
        del os.environ[name]
    attempt = f"{said.get('TORCHELASTIC_RUN_ID', '')}/{said.get('TORCHELASTIC_RESTART_COUNT', '0')}"
    return Launch(
        rank=rank,
        size=size,
        local_rank=int(said.get("LOCAL_RANK", rank)),
        local_size=int(said.get("LOCAL_WORLD_SIZE", size)),
        hosted=said.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
        board=PrefixStore(f"compress/{attempt}", store),
    )
