"""Every command that the help or a document shows is one that the command line takes."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer

from compress.__main__ import app
from compress.cli.examples import EXAMPLES
from compress.errors import UsageError
from tests.commands import cli, parsed
from tests.sources import ROOT

PAGES = [ROOT / "README.md", *sorted(ROOT.glob("docs/**/*.md"))]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
SHELL = ("", "sh", "bash", "console")


def group() -> Any:
    return typer.main.get_command(app)


def quoted(page: Path) -> list[str]:
    """Commands of a page: lines of its shell blocks, and spans of code in its prose."""
    text = page.read_text(encoding="utf-8")
    launched = re.compile(r"^torchrun .*? -m -- (?=compress )")
    lines = [
        line.removeprefix("$ ").strip()
        for language, block in FENCE.findall(text)
        if language in SHELL
        for line in block.splitlines()
    ]
    spans = [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", FENCE.sub("", text))]
    found = [launched.sub("", command) for command in (*lines, *spans)]
    return [command for command in found if command.startswith("compress ")]


def concrete(command: str) -> str:
    """A command with something in the place of its placeholders."""
    command = command.replace("VERB [options]", "eval").replace("PATH...", "PATH")
    return re.sub(r"\[([A-Z]+)\]", r"\1", command)


COMMANDS = [
    (page.relative_to(ROOT).as_posix(), command) for page in PAGES for command in dict.fromkeys(quoted(page))
]


def test_the_documents_are_searched_as_they_are_written() -> None:
    found = {command for _, command in COMMANDS}
    assert {
        "compress prune --ratio 0.5",  # a block
        "compress run FILE --dry-run",  # a span over two lines
        "compress verify [PATH...]",
    } <= found
    assert ("docs/how-to/several-devices.md", "compress align --steps 400") in COMMANDS  # behind torchrun
    assert ("docs/tutorials/lq-lora.md", "compress train --run lq --method lq") in COMMANDS
    assert len(COMMANDS) > 90


@pytest.mark.parametrize(("page", "command"), COMMANDS, ids=[f"{p}: {c}" for p, c in COMMANDS])
def test_commands_of_the_documents_are_taken(page: str, command: str) -> None:
    words = concrete(command).split()
    if words[1].startswith("--"):
        assert words[1] in {option for parameter in group().params for option in parameter.opts}
    else:
        assert parsed(concrete(command)).verb == words[1]


@pytest.mark.parametrize("verb", sorted(group().commands))
def test_every_help_ends_with_examples_that_are_taken(verb: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    assert len(EXAMPLES[verb]) >= 2
    for example in EXAMPLES[verb]:
        assert parsed(example).verb == verb
    lines = [line.strip() for line in cli(verb, "--help").out.splitlines() if line.strip()]
    assert lines[-len(EXAMPLES[verb]) - 1 :] == ["Examples:", *EXAMPLES[verb]]


@pytest.mark.parametrize("option", ["-h", "--help"])
def test_the_short_way_to_a_help_says_what_the_long_way_says(
    option: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "90")
    group().main(["eval", option], prog_name="compress", standalone_mode=False)
    long_way = capsys.readouterr().out
    for line in (["eval", option], ["eval", "model-a", "--json", option, "--windows"]):
        with pytest.raises(SystemExit) as end:
            group().main(line, prog_name="compress")
        assert end.value.code == 0
        assert capsys.readouterr().out == long_way
    assert "Usage: compress eval" in long_way


def test_a_help_loads_nothing_that_reads_values() -> None:
    code = (
        "import atexit, sys\nfrom compress.__main__ import main\nsys.argv = ['compress', 'prune', '--help']\n"
        "loaded = lambda: sorted({'torch', 'transformers', 'pydantic'} & set(sys.modules))\n"
        "atexit.register(lambda: print(loaded(), file=sys.stderr))\nmain()"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stderr.splitlines()[-1] == "[]"
    assert "Usage: compress prune" in ran.stdout


@pytest.mark.parametrize(("words", "code"), [(["prun"], 2), (["init", "--help"], 0)])
def test_the_quick_end_keeps_exit_codes_and_what_waits_for_the_exit(words: list[str], code: int) -> None:
    start = (
        "import atexit, sys\nfrom compress.__main__ import main\n"
        f"atexit.register(print, 'last words')\nsys.argv = ['compress', *{words!r}]\nmain()"
    )
    ran = subprocess.run([sys.executable, "-c", start], capture_output=True, text=True, check=False)
    assert ran.returncode == code
    assert ran.stdout.endswith("last words\n")
    assert ("There is no command 'prun'." in ran.stderr) == (code == 2)


def test_what_only_looks_like_asking_for_help_is_no_help() -> None:
    ran = cli("generate", "--", "--help", "--max-tokens")
    assert "Usage:" not in ran.out


def test_examples_are_of_verbs_that_exist() -> None:
    assert set(EXAMPLES) == set(group().commands)


@pytest.mark.parametrize(
    "line", ["compress prune --rato 0.5", "compress prun", "compress run", "compress prune --steps 2.5"]
)
def test_the_parser_would_notice(line: str) -> None:
    with pytest.raises(AssertionError):
        parsed(line)


@pytest.mark.parametrize("line", ["compress prune --shape pear", "compress generate x --temperature -1"])
def test_values_would_be_noticed(line: str) -> None:
    with pytest.raises(UsageError):
        parsed(line)


@pytest.mark.parametrize("verb", ["plan", "init"])
def test_a_model_is_given_as_argument_or_option(verb: str) -> None:
    for line in ("a/model", "--model a/model", "a/model --model a/model"):
        assert parsed(f"compress {verb} {line}").common.model == "a/model"
    assert parsed(f"compress {verb}").common.model is None
    refused = cli(verb, "a/model", "--model", "another")
    assert refused.code == 2
    assert "a/model and another" in refused.err
