"""One fault at a time: a small model, a verb that meets the fault, what it says and what it leaves behind."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path

from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from compress.__main__ import app
from tests.tiny import tiny_checkpoint

PRUNE = (
    "prune",
    "--ratio",
    "0.5",
    "--criterion",
    "magnitude",
    "--repair",
    "none",
    "--repair-steps",
    "0",
    "--trials",
    "1",
)
QUANTIZE = ("quantize", "--budget", "4.5bit", "--rank", "0", "--objective", "frobenius", "--menu", "quick")
TRAIN = ("train", "--steps", "2", "--sequence", "32", "--micro-batch", "2")
RECOVER = ("recover",)
MERGE = ("recover", "--merge")
VERIFY = ("verify",)


@dataclass(frozen=True, slots=True, kw_only=True)
class Scene:
    """Where a fault happens: a model of two shards and an empty place for a run, both of its own."""

    folder: Path
    text: Path

    @property
    def model(self) -> Path:
        """The model's folder."""
        return self.folder / "model"

    @property
    def run(self) -> Path:
        """The workspace."""
        return self.folder / "run"

    def shards(self) -> list[Path]:
        """The model's weight files."""
        return sorted(self.model.glob("*.safetensors"))

    def options(self, run: Path | None = None) -> tuple[str, ...]:
        """What every verb of the scene is given."""
        given = {"--run": run or self.run, "--model": self.model, "--data": self.text, "--dtype": "float32"}
        return tuple(str(part) for pair in given.items() for part in pair)

    def call(self, arguments: tuple[str, ...], run: Path | None = None) -> Ended:
        """Run a verb in this process."""
        common = ("--run", str(run or self.run)) if arguments == VERIFY else self.options(run)
        result = CliRunner().invoke(app, [*arguments, *common])
        return Ended(code=result.exit_code, said=result.stderr)

    def left(self) -> list[str]:
        """What lies in the workspace, folders with a stroke at the end; the lock does not count."""
        if not self.run.is_dir():
            return []
        found = [path for path in self.run.iterdir() if path.name != ".lock"]
        return sorted(path.name + "/" * path.is_dir() for path in found)


@dataclass(frozen=True, slots=True, kw_only=True)
class Ended:
    """How a verb ended."""

    code: int
    said: str

    @property
    def complaint(self) -> tuple[str, str]:
        """Cause and remedy; fails unless there are these two lines after everything else (verify: its last line)."""
        if "error: " not in self.said:
            last = self.said.splitlines()[-1]
            assert last.startswith("verify:"), self.said
            return last, ""
        lines = self.said.partition("error: ")[2].splitlines()
        assert len(lines) == 2, self.said
        assert "Traceback" not in self.said
        assert all(line[-1] in ".?" for line in lines), lines
        return lines[0], lines[1]


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """Something that goes wrong.

    Attributes:
        name: In words, for the table.
        verb: The command that meets it.
        before: Commands that run undisturbed first.
        harm: Does it to the files before ``verb`` runs.
        during: What holds while ``verb`` runs.
        heals: Whether the same command succeeds once ``during`` is over, with the bytes of an undisturbed run.
        accepted: The command is meant to succeed.
    """

    name: str
    verb: tuple[str, ...] = PRUNE
    before: tuple[tuple[str, ...], ...] = ()
    harm: Callable[[Scene], object] = field(default=lambda scene: None)
    during: Callable[[Scene], AbstractContextManager[object]] = field(default=lambda scene: nullcontext())
    heals: bool = False
    accepted: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What came of a fault, with ``MODEL`` and ``RUN`` for the scene's folders."""

    fault: Fault
    code: int
    cause: str
    remedy: str
    left: tuple[str, ...]
    healed: bool | None


def write_model(folder: Path, scratch: Path) -> None:
    """A small Llama in several shards."""
    whole = tiny_checkpoint("llama_gqa", scratch)
    shutil.copytree(whole, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    AutoModelForCausalLM.from_pretrained(whole).save_pretrained(folder, max_shard_size="60KB")
    assert len(list(folder.glob("*.safetensors"))) > 1


Calm = dict[tuple[tuple[str, ...], ...], dict[str, str]]
"""Commands and the artifacts of a run of them that nothing disturbed: the same in every scene."""


def meet(fault: Fault, scene: Scene, calm: Calm) -> Outcome:
    """Let ``fault`` happen in a scene of its own; ``calm`` holds undisturbed runs, and gets those it lacks."""
    for command in fault.before:
        done = scene.call(command)
        assert done.code == 0, done.said
    fault.harm(scene)
    with fault.during(scene):
        ended = scene.call(fault.verb)
        left = scene.left()
    cause, remedy = ("", "") if ended.code == 0 else ended.complaint
    return Outcome(
        fault=fault,
        code=ended.code,
        cause=_anonymous(cause, scene),
        remedy=_anonymous(remedy, scene),
        left=tuple(left),
        healed=_healed(fault, scene, calm) if fault.heals else None,
    )


def _healed(fault: Fault, scene: Scene, calm: Calm) -> bool:
    again = scene.call(fault.verb)
    assert again.code == 0, again.said
    commands = (*fault.before, fault.verb)
    if commands not in calm:
        run = scene.folder / "calm"
        for command in commands:
            assert scene.call(command, run).code == 0
        calm[commands] = artifacts(run)
    return artifacts(scene.run) == calm[commands]


def artifacts(run: Path) -> dict[str, str]:
    """Digest of every weight file and of every tensor's bytes below a workspace."""
    found = {}
    for path in sorted(run.rglob("*.safetensors")):
        found[str(path.relative_to(run))] = hashlib.sha256(path.read_bytes()).hexdigest()
        assert load_file(path)
    return found


def _anonymous(text: str, scene: Scene) -> str:
    return (
        text.replace(str(scene.model), "MODEL")
        .replace(str(scene.run), "RUN")
        .replace(str(scene.folder), "HERE")
    )


@contextmanager
def patched(target: object, name: str, value: object) -> Iterator[None]:
    """``value`` as an attribute for a while."""
    before = getattr(target, name)
    setattr(target, name, value)
    try:
        yield
    finally:
        setattr(target, name, before)
