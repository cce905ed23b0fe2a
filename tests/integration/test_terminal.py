"""How the command line looks and complains: widths, colours, and what was probably meant."""

from __future__ import annotations

import os
import pty
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer
from rich.cells import cell_len

from compress.__main__ import app
from tests.commands import cli
from tests.tiny import tiny_checkpoint

GROUP: Any = typer.main.get_command(app)
ESCAPE = "\x1b"
COLOUR = re.compile(r"\x1b\[(?:\d+;)*(?:3[0-8]|4[0-8]|9[0-7]|10[0-7])(?:;\d+)*m")


@pytest.fixture(autouse=True)
def _narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("COMPRESS_RUN", "FORCE_COLOR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("COLUMNS", "60")
    monkeypatch.setenv("NO_COLOR", "1")


def fits(text: str) -> bool:
    assert text.strip()
    return ESCAPE not in text and all(cell_len(line) <= 60 for line in text.splitlines())


@pytest.mark.parametrize("verb", ["", *sorted(GROUP.commands)])
def test_help_keeps_to_the_terminal(verb: str) -> None:
    ran = cli(*([verb] if verb else []), "--help")
    assert ran.code == 0
    assert fits(ran.out)


def test_tables_keep_to_the_terminal(tmp_path: Path, text_file: Path) -> None:
    model = tiny_checkpoint("llama_gqa", tmp_path / "model")
    common = ("--model", model, "--run", tmp_path / "run", "--data", text_file)
    for command in (
        ("doctor",),
        ("plan", model, "--loram", "--skip-first", "0", "--skip-last", "0", "--ratios", "0.5"),
        ("prune", "--dry-run", *common),
        ("run", "chain", "--dry-run", *common),
        ("generate", "Hello", "--tokens", "4", *common[:4]),
    ):
        ran = cli(*command)
        assert ran.code == 0, ran.err
        assert fits(ran.out), command
        assert ESCAPE not in ran.err


def on_a_terminal(*arguments: str, **environment: str) -> str:
    """What a real process writes to a terminal."""
    ours, theirs = pty.openpty()
    plain = {k: v for k, v in os.environ.items() if k not in ("NO_COLOR", "FORCE_COLOR")}
    with subprocess.Popen(
        [sys.executable, "-m", "compress", *arguments],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        env=plain | {"TERM": "xterm-256color"} | environment,
    ):
        os.close(theirs)
        written = b""
        while True:
            try:
                part = os.read(ours, 4096)
            except OSError:  # Linux's way of saying that the other end is closed
                break
            if not part:
                break
            written += part
    os.close(ours)
    return written.decode()


def test_no_color_is_obeyed_on_a_terminal() -> None:
    assert COLOUR.search(on_a_terminal("report", "--help"))
    assert not COLOUR.search(on_a_terminal("report", "--help", NO_COLOR="1"))


@pytest.mark.parametrize(
    ("arguments", "cause", "remedy"),
    [
        (("prun",), "There is no command 'prun'.", "Did you mean 'prune'"),
        (("frobnicate",), "There is no command 'frobnicate'.", "Choose one of: plan, init, prune"),
        (("prune", "--rato", "0.5"), "compress prune has no option '--rato'.", "Did you mean '--ratio'?"),
        (("prune", "--zzz"), "compress prune has no option '--zzz'.", "compress prune --help"),
        (("prune", "--criterion", "lroa"), "There is no criterion 'lroa'.", "Did you mean 'lora'"),
        (("prune", "--criterion", "WANDA"), "There is no criterion 'WANDA'.", "Did you mean 'wanda'"),
        (("prune", "--shape", "unifrom"), "There is no shape 'unifrom'.", "Did you mean 'uniform'"),
        (("quantize", "--solver", "hihgs"), "There is no solver 'hihgs'.", "Did you mean 'highs'"),
        (("eval", "--effort", "standrad"), "There is no effort 'standrad'.", "Did you mean 'standard'"),
        (("train", "--dtype", "bfloat"), "There is no dtype 'bfloat'.", "Did you mean 'bfloat16'"),
        (("prune", "--data", "wikitext"), "There is no text source 'wikitext'.", "Did you mean 'wikitext2'?"),
        (("run", "lorapurne"), "There is no recipe 'lorapurne'.", "Did you mean 'loraprune'?"),
        (("prune", "--ratio", "half"), "Invalid value for '--ratio'", "compress prune --help"),
        (("run",), "Missing argument 'recipe'.", "compress run --help"),
        (("plan", "a", "b"), "unexpected extra argument", "compress plan --help"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_what_is_not_known_is_answered_with_what_was_meant(
    arguments: tuple[str, ...], cause: str, remedy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_checkpoint("llama_gqa", tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    staged = arguments[0] in GROUP.commands and any(
        "--model" in parameter.opts for parameter in GROUP.commands[arguments[0]].params
    )
    ran = cli(*arguments, *(("--model", model) if staged else ()))
    assert (ran.code, ran.out) == (2, "")
    assert cause in ran.complaint[0]
    assert remedy in ran.complaint[1]
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_recipe_nearby_is_meant(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine.yaml").write_text("steps: [eval]\n")
    monkeypatch.chdir(tmp_path)
    assert cli("run", "mien.yaml").complaint[1] == "Did you mean 'mine.yaml'?"


def test_without_a_verb_it_is_the_help() -> None:
    ran = cli()
    assert ran.code == 2
    assert "Usage: " in ran.out + ran.err
    assert "error" not in ran.err
