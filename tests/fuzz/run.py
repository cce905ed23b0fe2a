"""Fuzz what is read from strangers: ``python -m tests.fuzz.run --executions 200000``.

With atheris (CPython 3.11 to 3.13 on Linux) coverage leads the way, in a process for every target; elsewhere inputs are
changed blindly. Prints how many executions every target had; the exit code is 1 if one of them failed, and the input
that did it is printed.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import random
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from tests.sources import ROOT

SHARES = {"header": 0.45, "index": 0.4, "config": 0.1, "recipe": 0.05}
"""Of the executions."""
LONGEST = 4096
"""Bytes of an input."""
HANG = 20
"""Seconds after which an execution counts as hung."""
SEEN = (
    "compress.model.tensor_file",
    "compress.model.checkpoint",
    "compress.pipelines.recipe",
    "json.decoder",
)
"""Modules whose branches lead."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Fuzz every target, or one of them in this process."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--executions", type=int, default=200_000, help="Of all targets together.")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--blind", action="store_true", help="Change inputs without looking at coverage.")
    parser.add_argument("--only", choices=tuple(SHARES), help="One target, in this process.")
    given = parser.parse_args(arguments)
    if given.only:
        fuzz = _blind if given.blind else _led
        return fuzz(given.only, given.executions, given.seed)
    blind = given.blind or importlib.util.find_spec("atheris") is None
    done, failed = 0, 0
    for name, share in SHARES.items():
        count, fault = _in_a_process(name, max(1, round(share * given.executions)), given.seed, blind=blind)
        done += count
        failed += bool(fault)
        print(f"{name}: {count} executions, {'FAILED' if fault else 'no crash, no hang'}", flush=True)
        if fault:
            print(fault, flush=True)
    print(
        f"fuzz: {done} executions{' without coverage' if blind else ''}, {failed} of {len(SHARES)} targets failed"
    )
    return 1 if failed else 0


def _in_a_process(name: str, executions: int, seed: int, *, blind: bool) -> tuple[int, str]:
    """How many executions there were, and what went wrong."""
    command = [
        sys.executable,
        "-m",
        "tests.fuzz.run",
        "--only",
        name,
        "--executions",
        str(executions),
        "--seed",
        str(seed),
    ]
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(
        prefix="compress-fuzz-", dir=memory if memory.is_dir() else None
    ) as folder:
        done = subprocess.run(
            [*command, *(["--blind"] if blind else [])],
            cwd=ROOT,
            env=os.environ | {"TMPDIR": folder},  # of a process that a fuzzer ends without cleaning up
            capture_output=True,
            text=True,
            check=False,
            errors="replace",
        )
    counts = re.findall(r"(?:number_of_executed_units: |executed: )(\d+)", done.stderr + done.stdout)
    count = int(counts[-1]) if counts else 0
    if done.returncode != 0 or count < executions:
        return count, (done.stdout + done.stderr)[-6000:]
    return count, ""


# The targets come with torch, which takes seconds, and who only starts a process for each of them needs none of it.
def _led(name: str, executions: int, seed: int) -> int:
    import atheris

    from tests.fuzz.targets import TARGETS, WORDS

    target, corpus = TARGETS[name]
    for module in SEEN:
        found = sys.modules.get(module)
        for function in vars(found).values() if found is not None else ():
            if (
                callable(function)
                and getattr(function, "__module__", "") == module
                and hasattr(function, "__code__")
            ):
                atheris.instrument_func(function)
    with tempfile.TemporaryDirectory(prefix="compress-corpus-") as folder:
        seeds, words = Path(folder) / "corpus", Path(folder) / "words"
        seeds.mkdir()
        for number, data in enumerate(corpus):
            (seeds / f"seed-{number}").write_bytes(data)
        words.write_text(
            "".join('"' + word.replace("\\", "\\\\").replace('"', '\\"') + '"\n' for word in WORDS)
        )
        options = [
            f"-runs={executions}",
            f"-seed={seed}",
            f"-timeout={HANG}",
            f"-max_len={LONGEST}",
            f"-dict={words}",
            f"-artifact_prefix={folder}/",
            "-rss_limit_mb=3000",
            "-print_final_stats=1",
            str(seeds),
        ]
        atheris.Setup([sys.argv[0], *options], target)
        atheris.Fuzz()  # ends the process
    return 0


def _blind(name: str, executions: int, seed: int) -> int:
    from tests.fuzz.targets import TARGETS, WORDS

    target, corpus = TARGETS[name]
    rng = random.Random(seed)
    for number in range(executions):
        data = _changed(rng, corpus, WORDS)
        begun = time.monotonic()
        try:
            target(data)
        except BaseException:
            print(f"input: {data!r}", file=sys.stderr)
            raise
        if time.monotonic() - begun > HANG:
            print(f"executed: {number + 1}\nhung: {data!r}", file=sys.stderr)
            return 1
    print(f"executed: {executions}")
    return 0


def _changed(rng: random.Random, corpus: Sequence[bytes], words: Sequence[str]) -> bytes:
    """A seed with bytes changed, pieces cut, doubled or swapped in from another, and words put in."""
    data = bytearray(rng.choice(corpus))
    for _ in range(rng.randint(0, 6)):
        at = rng.randint(0, len(data))
        end = min(len(data), at + rng.randint(1, 16))
        match rng.randrange(5):
            case 0 if at < len(data):
                data[at] = rng.randrange(256)
            case 1:
                del data[at:end]
            case 2:
                data[at:at] = data[at:end]
            case 3:
                data[at:end] = rng.choice(words).encode()
            case _:
                other = rng.choice(corpus)
                data[at:] = other[rng.randint(0, len(other)) :]
    return bytes(data[:LONGEST])


if __name__ == "__main__":
    sys.exit(main())
