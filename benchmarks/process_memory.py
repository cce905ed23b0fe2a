"""Peak memory of a command and of every process it starts, sampled from /proc."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

EVERY = 0.02
"""Seconds between two samples."""


@dataclass(slots=True, kw_only=True)
class Peak:
    """Largest sums over the command's processes at one time, in bytes.

    Attributes:
        resident: Everything resident, pages of mapped files included: those are given back when memory is short.
        anonymous: What only they have: heaps and stacks, which cannot be given back.
        processes: Most processes at once.
    """

    resident: int = 0
    anonymous: int = 0
    processes: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """A command that has ended."""

    returncode: int
    seconds: float
    cpu_seconds: float
    peak: Peak
    output: str
    errors: str

    def to_dict(self) -> dict[str, Any]:
        """JSON values without what it printed."""
        return {
            "returncode": self.returncode,
            "seconds": round(self.seconds, 1),
            "cpu_seconds": round(self.cpu_seconds, 1),
            "peak": asdict(self.peak),
        }


def measure(command: Sequence[str], *, env: dict[str, str] | None = None) -> Measured:
    """Run ``command`` and sample what it and its descendants hold (Linux).

    Peaks shorter than `EVERY` may be missed; the sums count memory that several processes share several times.
    """
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        started = time.monotonic()
        process = subprocess.Popen(command, stdout=out, stderr=err, env=env)
        peak, done = Peak(), threading.Event()
        sampler = threading.Thread(target=_sample, args=(process.pid, peak, done), daemon=True)
        sampler.start()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        done.set()
        sampler.join()
        seconds = time.monotonic() - started
        out.seek(0)
        err.seek(0)
        return Measured(
            returncode=process.returncode,
            seconds=seconds,
            cpu_seconds=usage.ru_utime + usage.ru_stime,
            peak=peak,
            output=out.read().decode(errors="replace"),
            errors=err.read().decode(errors="replace"),
        )


def _sample(root: int, peak: Peak, done: threading.Event) -> None:
    while not done.wait(EVERY):
        resident = anonymous = 0
        family = _family(root)
        for pid in family:
            own = memory_of(pid)
            resident += own[0]
            anonymous += own[1]
        peak.resident = max(peak.resident, resident)
        peak.anonymous = max(peak.anonymous, anonymous)
        peak.processes = max(peak.processes, len(family))


def _family(root: int) -> list[int]:
    """A process and its descendants."""
    found, queue = [], [root]
    while queue:
        pid = queue.pop()
        found.append(pid)
        for task in _listed(Path(f"/proc/{pid}/task")):
            queue += [int(child) for child in _text(task / "children").split()]
    return found


def memory_of(pid: int) -> tuple[int, int]:
    """Resident and anonymous bytes; zeros for a process that has ended."""
    fields = dict(
        line.split(":", 1) for line in _text(Path(f"/proc/{pid}/status")).splitlines() if ":" in line
    )
    resident, anonymous = (int(fields.get(name, "0 kB").split()[0]) * 1024 for name in ("VmRSS", "RssAnon"))
    return resident, anonymous


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="ascii", errors="replace")
    except OSError:  # it has ended
        return ""


def _listed(folder: Path) -> list[Path]:
    try:
        return list(folder.iterdir())
    except OSError:
        return []


def compress_command(verb: str, options: Sequence[str]) -> list[str]:
    """``compress VERB`` with this interpreter; no file of the current folder can pose as a library."""
    return [sys.executable, "-P", "-m", "compress", verb, *options]
