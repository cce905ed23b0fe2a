"""docs/first-ten-minutes.md, from what happens: a first user's way through a fresh clone.

``python -m tests.first_user`` clones the last commit into an empty folder, runs every command of the page there, with
nothing installed beforehand, and writes the page. It needs some ten minutes of a machine that has nothing else to do,
and ``COMPRESS_DATA`` for a model and a text that are not the default ones.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from tests.sources import ROOT

PAGE = ROOT / "docs" / "first-ten-minutes.md"
WIDTH = 100
"""Columns of the terminal."""
NOTES = 800
"""Questions and answers in the text that stands for a user's own."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One command of the page.

    Attributes:
        title: Heading; empty: it goes on under the one before.
        prose: What is said before it.
        command: For a shell in the clone, after the commands of ``HIDDEN``.
        code: The exit code it must have.
    """

    title: str = ""
    prose: str
    command: str
    code: int = 0


STEPS = (
    Step(
        title="Install, and see it work",
        prose="One command installs everything into `.venv` and runs a short form of the chain on the default model: "
        "half of the decoder goes, the rest is quantized, an adapter is trained and put back onto the full model.",
        command="make demo",
    ),
    Step(
        prose="The last line names the report. What lies beside it:",
        command="ls demo/compress-run demo/compress-run/*/ | head -40",
    ),
    Step(
        title="What would it take?",
        prose="Before anything is touched, `plan` counts. Here for a folder with a model of one's own:",
        command="compress plan my-model --ratio 0.25 --budget 4bit",
    ),
    Step(
        title="A model of one's own",
        prose="The same commands as in the demo, with a text of one's own.",
        command="compress prune --model my-model --data notes.txt --run mine --ratio 0.25",
    ),
    Step(
        prose="Without `--data` a stage reads the default text, and says so:",
        command="compress quantize --run mine --budget 4bit --dry-run",
    ),
    Step(prose="With it:", command="compress quantize --run mine --budget 4bit --data notes.txt"),
    Step(prose="", command="compress recover --run mine --data notes.txt"),
    Step(prose="", command="compress eval --run mine --data notes.txt --windows 20"),
    Step(
        title="Mistakes",
        prose="An option with a typing error; fewer bits than there are; other settings for a stage that is finished:",
        command="compress prune --rato 0.5",
        code=2,
    ),
    Step(prose="", command="compress quantize --run mine --budget 0.5bit --redo", code=1),
    Step(prose="", command="compress prune --run mine --data notes.txt --ratio 0.4", code=2),
    Step(
        title="The report",
        prose="One page about the chain, and a check of everything that lies on the disk:",
        command="compress report --run mine",
    ),
    Step(prose="", command="compress verify mine"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Happened:
    """A step with what it printed, and how long it took."""

    step: Step
    output: str
    seconds: float


def walk(clone: Path, steps: Sequence[Step] = STEPS) -> list[Happened]:
    """Run the steps in ``clone``.

    Raises:
        RuntimeError: A step ended with another code than it should.
    """
    kept = {key: os.environ[key] for key in ("HOME", "LANG", "PATH", "COMPRESS_CACHE") if key in os.environ}
    kept |= {"COLUMNS": str(WIDTH), "NO_COLOR": "1", "TERM": "dumb"}
    kept["PATH"] = f"{clone / '.venv' / 'bin'}:{kept['PATH']}"
    found = []
    for step in steps:
        began = time.monotonic()
        ran = subprocess.run(
            ["bash", "-c", step.command],
            cwd=clone,
            env=kept,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        if ran.returncode != step.code:
            raise RuntimeError(f"{step.command} ended with {ran.returncode}:\n{ran.stdout}")
        found.append(Happened(step=step, output=ran.stdout, seconds=time.monotonic() - began))
        print(f"{found[-1].seconds:6.1f} s  {step.command}", file=sys.stderr)
    return found


def page(happened: Sequence[Happened], clone: Path, commit: str) -> str:
    """The page; the clone's folder is shown as ``~/compress``."""
    total = sum(each.seconds for each in happened)
    parts = [
        "# The first ten minutes\n",
        _wrapped(
            "What a first user types and sees, from an empty folder on. Nothing is edited but the folder's name: "
            f"`python -m tests.first_user` ran all of it on {os.cpu_count()} cores without a GPU and wrote this page "
            f"(commit {commit}, {total / 60:.1f} minutes in all). `my-model` is a Llama of 260 thousand parameters "
            f"that writes children's stories, `notes.txt` {NOTES} questions with their answers."
        ),
        "```text\n$ git clone COMPRESS ~/compress && cd ~/compress && export PATH=$PWD/.venv/bin:$PATH\n```\n",
    ]
    for each in happened:
        if each.step.title:
            parts.append(f"## {each.step.title}\n")
        if each.step.prose:
            parts.append(_wrapped(each.step.prose))
        language = "console" if each.step.code == 0 else "text"
        lines = [line.rstrip() for line in each.output.replace(str(clone), "~/compress").splitlines()]
        text = "\n".join(lines).strip("\n")
        parts.append(f"```{language}\n$ {each.step.command}\n{text}\n```\n")
        parts.append(
            f"({each.seconds:.1f} s" + (f", exit code {each.step.code})\n" if each.step.code else ")\n")
        )
    return "\n".join(parts)


def _wrapped(text: str) -> str:
    return textwrap.fill(text, 120, break_on_hyphens=False) + "\n"


def _own(clone: Path, data: Path) -> None:
    """What stands for a user's own model and text."""
    shutil.copytree(data / "stories260k-hf", clone / "my-model")
    with (data / "dolly" / "dolly_3k.jsonl").open(encoding="utf-8") as file:
        rows = [json.loads(line) for line in islice(file, NOTES)]
    text = "\n\n".join(f"{row['instruction']}\n{row['output']}" for row in rows)
    (clone / "notes.txt").write_text(text, encoding="utf-8")


def main() -> int:
    """Write the page."""
    data = os.environ.get("COMPRESS_DATA")
    if data is None:
        sys.stderr.write("COMPRESS_DATA is not set: there is no model and no text to stand for one's own.\n")
        return 2
    commit = subprocess.run(
        ["git", "rev-parse", "--short=7", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.strip()
    with tempfile.TemporaryDirectory() as name:
        clone = Path(name) / "compress"
        subprocess.run(["git", "clone", "-q", ROOT, clone], check=True)
        _own(clone, Path(data))
        PAGE.write_text(page(walk(clone), clone, commit), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
