"""Chain after chain in one process: does memory grow, do files stay open, is anything left in the temporary folder?

``python -m tests.faults.soak --chains 50`` runs small chains (prune, quantize, train, recover), each in a workspace of
its own that is removed afterwards, and prints what the process holds after every tenth.
"""

from __future__ import annotations

import argparse
import gc
import os
import shutil
import sys
import tempfile
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

import numpy as np
import psutil

from compress.pipelines.dispatch import run_verb
from compress.pipelines.settings import Common
from tests.faults.cases import text_file
from tests.fresh import ForkServer
from tests.tiny import tiny_checkpoint

CHAIN: tuple[tuple[str, dict[str, object]], ...] = (
    (
        "prune",
        {
            "ratio": 0.5,
            "criterion": "magnitude",
            "repair": "none",
            "repair_steps": 2,
            "trials": 1,
            "sequence": 32,
        },
    ),
    ("quantize", {"budget": "8bit", "rank": "4", "objective": "frobenius", "menu": "quick"}),
    ("train", {"steps": 2, "sequence": 32, "micro_batch": 2}),
    ("recover", {}),
)
WARM = 10
"""Chains before growth counts: caches and pools fill."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Held:
    """What the process holds between two chains.

    Attributes:
        memory: Resident bytes.
        files: Open file descriptors.
        threads: Threads of Python.
        left: Entries of the temporary folder.
    """

    memory: int
    files: int
    threads: int
    left: tuple[str, ...]


def held(temporary: Path) -> Held:
    """What this process holds now."""
    gc.collect()
    return Held(
        memory=psutil.Process().memory_info().rss,
        files=len(os.listdir("/proc/self/fd")),
        threads=threading.active_count(),
        left=tuple(sorted(path.name for path in temporary.iterdir())),
    )


def growth(found: Sequence[Held]) -> float:
    """Bytes a chain by which memory grows once warm, by least squares."""
    warm = [each.memory for each in found[WARM:]]
    return float(np.polyfit(np.arange(len(warm)), np.array(warm, dtype=float), 1)[0])


def soak(chains: int, folder: Path, *, tell: bool = False) -> list[Held]:
    """Run so many chains in this process."""
    model, text, temporary = tiny_checkpoint("llama_gqa", folder / "model"), text_file(folder), folder / "tmp"
    temporary.mkdir()
    server, found = ForkServer(), []
    with (
        patch("compress.pipelines.reopen.run_fresh", server.run),
        patch.object(tempfile, "tempdir", str(temporary)),
        patch.dict(os.environ, {"TMPDIR": str(temporary)}),
    ):
        for number in range(1, chains + 1):
            run = folder / f"run-{number}"
            common = Common(
                run=run, model=str(model), data=str(text), dtype="float32", threads=1, effort="quick"
            )
            for verb, given in CHAIN:
                run_verb(verb, common, given, quiet=True)
            shutil.rmtree(run)
            found.append(held(temporary))
            if tell and number % 10 == 0:
                now = found[-1]
                print(
                    f"after {number} chains: {now.memory / 1e6:.1f} MB resident, {now.files} open files, "
                    f"{now.threads} threads, {len(now.left)} temporary files",
                    flush=True,
                )
    server.close()
    return found


def main() -> int:
    """Run it and print what is held."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--chains", type=int, default=50)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        found = soak(given.chains, Path(name), tell=True)
    first, last = found[min(WARM, len(found) - 1)], found[-1]
    if len(found) > WARM + 1:
        print(
            f"soak: {len(found)} chains; after {WARM} of them memory grows by {growth(found) / 1e3:.1f} kB a chain, "
            f"open files {first.files} -> {last.files}, threads {first.threads} -> {last.threads}, "
            f"temporary files {len(first.left)} -> {len(last.left)}"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
