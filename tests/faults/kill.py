"""Kill every stage at any moment, give the same command again, and compare what comes of it with a calm run.

``python -m tests.faults.kill --moments 30`` does it for every stage, half of the moments drawn in time and half in
front of a drawn change to the files, and prints one line for each. It takes minutes.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import signal
import sys
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tests.faults.cases import text_file
from tests.faults.forks import Answer, Forks, Request
from tests.tiny import tiny_checkpoint

LOOP = ("--micro-batch", "2", "--accumulation", "1", "--sequence", "32", "--lr", "1e-2")
ADAPTER = ("--rank", "4", "--alpha", "8")
SAVED = 2
"""Steps between two saved states, of eight."""
STAGES: dict[str, tuple[str, ...]] = {
    "prune": (
        "prune", "--ratio", "0.5", "--calibration-tokens", "512", "--repair-steps", "8", "--trials", "2",
        *LOOP, *ADAPTER,
    ),
    "align": ("align", "--steps", "8", *LOOP),
    "quantize": ("quantize", "--budget", "8bit", "--rank", "4", "--calibration-tokens", "512"),
    "train": ("train", "--steps", "8", *LOOP, *ADAPTER),
    "recover": ("recover",),
    "recover --merge": ("recover", "--merge"),
}  # fmt: skip
"""The chain's commands; the last is another form of the one before it."""
AGAIN = {
    "backward passes": 1,
    "scored layer": 1,
    "trial": 1,
    "refitted matrix": 6,
    "training step": SAVED,
    "sensitivities": 1,
    "error table": 7,
    "decomposed matrix": 7,
    "perplexity": 1,
}
"""How many of a unit one kill may cost: those of a layer, of one trial of a shape, or the steps since a saved state.

What writes a stage's result (``recovered module``, ``merged matrix``) is one pass over it, which starts again.
"""
TIMED = (
    "created",
    "command",
    "host",
    "memory_timeline",
    "peak_memory_bytes",
    "peak_host_bytes",
    "peak_device_bytes",
    "record_sha256",
    "seconds",
)
"""Members of ``stage.json`` that are another's in every run."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Made:
    """What a stage left: digests of its files and its record, and what it computed."""

    files: Mapping[str, bytes]
    record: Mapping[str, Any]
    work: Counter[str]
    answer: Answer


class Scene:
    """A model, a text, and a chain of all stages that nothing disturbed.

    Args:
        folder: Where it all lies.
        forks: Runs the commands.
    """

    def __init__(self, folder: Path, forks: Forks) -> None:
        self.folder, self.forks, self.runs = folder, forks, 0
        self.model = tiny_checkpoint("llama_tied", folder / "model")
        self.text = text_file(folder)
        self.calm: dict[str, Made] = {}
        self.before: dict[str, Path] = {}

    def request(self, stage: str, run: Path, **more: Any) -> Request:
        """The command of a stage in the workspace ``run``."""
        common = {"--run": run, "--model": self.model, "--data": self.text, "--dtype": "float32"}
        options = [str(part) for pair in common.items() for part in pair]
        return Request(
            arguments=(*STAGES[stage], *options, "--effort", "quick"),
            root=str(run),
            log=f"{run}.{stage}.log",
            **more,
        )

    def prepare(self) -> None:
        """Run the chain, and keep what it looked like in front of every stage."""
        run = self.folder / "calm"
        for stage in STAGES:
            if stage == "recover --merge":
                run = self._copy(self.before["recover"])
            elif run.is_dir():
                self.before[stage] = self._copy(run)
            self.before.setdefault(stage, self.before.get("recover", run))
            self.calm[stage] = self.finish(self.request(stage, run), run)
        empty = self.folder / "nothing"
        self.before["prune"] = empty

    def _copy(self, source: Path) -> Path:
        self.runs += 1
        target = self.folder / f"run-{self.runs}"
        if source.is_dir():
            shutil.copytree(source, target)
        return target

    def start(self, stage: str) -> Path:
        """A workspace of its own in front of a stage."""
        return self._copy(self.before[stage])

    def finish(self, request: Request, run: Path) -> Made:
        """Run a command undisturbed; what it made.

        Raises:
            AssertionError: It fails, or something is left that should not be.
        """
        answer = self.forks.run(replace(request, kill_before=0, kill_after=0.0))
        assert answer.code == 0, answer.err
        names = json.loads((run / "run.json").read_text(encoding="utf-8"))["stages"]
        found = sorted(path.name for path in run.iterdir() if path.name not in (".lock", "run.json"))
        assert found == sorted(names), f"left in the workspace: {found}"
        return Made(
            files=contents(run / names[-1]),
            record=untimed(json.loads((run / names[-1] / "stage.json").read_text(encoding="utf-8"))),
            work=worked(request),
            answer=answer,
        )

    def remove(self, run: Path) -> None:
        """Make room."""
        shutil.rmtree(run, ignore_errors=True)


def worked(request: Request) -> Counter[str]:
    """How often every unit of work was completed for this workspace."""
    log = Path(request.log)
    return Counter(log.read_text(encoding="utf-8").splitlines() if log.is_file() else ())


def contents(folder: Path) -> dict[str, bytes]:
    """Bytes of every file of a stage but its record."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path != folder / "stage.json"
    }


def untimed(value: Any) -> Any:
    """A record without what no two runs have in common."""
    if isinstance(value, dict):
        return {
            key: untimed(item)
            for key, item in value.items()
            if key not in TIMED and not key.endswith("_seconds") and key != "files"
        }
    return [untimed(item) for item in value] if isinstance(value, list) else value


def differences(made: Made, calm: Made) -> list[str]:
    """What is not as it should be, in words."""
    found = [f"{name} is missing" for name in sorted(set(calm.files) - set(made.files))]
    found += [f"{name} is left over" for name in sorted(set(made.files) - set(calm.files))]
    found += [
        f"{name} differs"
        for name in sorted(set(made.files) & set(calm.files))
        if made.files[name] != calm.files[name]
    ]
    if made.record != calm.record:
        found.append("stage.json differs")
    return found


def again(made: Made, calm: Made) -> Counter[str]:
    """What was done more often than in a calm run."""
    return Counter(
        {name: count - calm.work[name] for name, count in made.work.items() if count > calm.work[name]}
    )


def too_often(repeated: Mapping[str, int], kills: int) -> list[str]:
    """What was done again beyond a layer for each kill."""
    return [
        f"{name} {count} times again after {kills} kills"
        for name, count in repeated.items()
        if name in AGAIN and count > AGAIN[name] * kills
    ]


def kill_until_done(
    scene: Scene, stage: str, moments: Sequence[Mapping[str, Any]]
) -> tuple[list[str], int, Counter[str]]:
    """Give one command again and again, killed at every one of ``moments`` that it reaches, then undisturbed.

    Returns:
        What differs from a calm run, how many kills there were, and what was done again.
    """
    run = scene.start(stage)
    kills = 0
    for moment in moments:
        answer = scene.forks.run(scene.request(stage, run, **moment))
        if answer.code == 0:
            break
        assert answer.code == -signal.SIGKILL, f"exit {answer.code}: {answer.err}"
        kills += 1
    made = scene.finish(scene.request(stage, run), run)
    repeated = again(made, scene.calm[stage])
    faults = differences(made, scene.calm[stage]) + too_often(repeated, kills)
    scene.remove(run)
    return faults, kills, repeated


def main() -> int:
    """Kill, and print what came of it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--moments", type=int, default=30, help="Kills of every stage.")
    parser.add_argument("--seed", type=int, default=0, help="Of the moments.")
    parser.add_argument("--stages", default=",".join(STAGES), help="Which, separated by commas.")
    given = parser.parse_args()
    forks, failed = Forks(), 0
    with tempfile.TemporaryDirectory() as name:
        scene = Scene(Path(name), forks)
        scene.prepare()
        for stage in given.stages.split(","):
            rng = random.Random(f"{given.seed}/{stage}")
            calm, kills, repeated = scene.calm[stage].answer, 0, Counter[str]()
            bad: list[str] = []
            for number in range(given.moments):
                moment: dict[str, Any] = (
                    {"kill_after": rng.uniform(0, calm.seconds)}
                    if number % 2
                    else {"kill_before": rng.randint(1, calm.changes)}
                )
                faults, killed, more = kill_until_done(scene, stage, [moment])
                kills, repeated = kills + killed, repeated + more
                bad += [f"{moment}: {fault}" for fault in faults]
            failed += len(bad)
            redone = ", ".join(f"{name} {count}" for name, count in sorted(repeated.items())) or "nothing"
            print(
                f"{stage}: {given.moments} moments in {calm.seconds:.1f} s and {calm.changes} changes, {kills} kills, "
                f"{len(bad)} differences; done again in all: {redone}",
                flush=True,
            )
            for fault in bad:
                print(f"  {fault}", flush=True)
    forks.close()
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
