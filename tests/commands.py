"""The command line inside a test: run it, or only have it read a line and check every value."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from typer.testing import CliRunner

from compress.__main__ import app
from compress.pipelines.recipe import shipped
from compress.pipelines.settings import VERBS, Common, PlanSettings, resolve
from compress.pipelines.tool_settings import ExportSettings, GenerateSettings, InitSettings


class Ran(NamedTuple):
    code: int
    out: str
    err: str

    @property
    def complaint(self) -> tuple[str, str]:
        """Cause and remedy; fails unless they are two lines and nothing else follows."""
        lines = self.err.partition("error: ")[2].splitlines()
        assert len(lines) == 2, self.err
        assert "Traceback" not in self.err
        assert all(line[-1] in ".?" for line in lines), lines
        assert lines[1][0].isupper(), lines
        return lines[0], lines[1]


def cli(*arguments: str | Path, stdin: str | None = None) -> Ran:
    """Run one command in this process."""
    result = CliRunner().invoke(app, [str(a) for a in arguments], input=stdin)
    return Ran(result.exit_code, result.stdout, result.stderr)


class Parsed(NamedTuple):
    verb: str
    common: Common
    given: dict[str, Any]


def parsed(line: str) -> Parsed:
    """Have the real command line read ``line`` up to a redirection, and check its settings; nothing runs.

    Raises:
        AssertionError: It is refused; the message is what a user would read.
        UsageError: A value is refused.
    """
    words = shlex.split(line, comments=True)
    words = words[: next((i for i, word in enumerate(words) if word in ("<", ">", "|")), len(words))]
    assert words[0] == "compress", line
    seen: list[Parsed] = []

    def record(verb: str, common: Common, given: dict[str, Any], **_: Any) -> dict[str, Any]:
        seen.append(Parsed(verb, common, given))
        return {}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("compress.pipelines.dispatch.run_verb", record)
        ran = cli(*words[1:])
    assert ran.code == 0, f"{line}: {ran.err}"
    (found,) = seen
    beside = ("models", "out") if found.verb == "eval" else ("meanings",)  # what settings do not hold
    given = {name: value for name, value in found.given.items() if name not in beside}
    kinds = {
        **VERBS,
        "plan": PlanSettings,
        "generate": GenerateSettings,
        "init": InitSettings,
        "export": ExportSettings,
    }
    if found.verb in kinds:
        resolve(kinds[found.verb], given, found.common.effort or "quick")
    if found.verb == "run" and given["recipe"].islower() and "." not in given["recipe"]:
        assert given["recipe"] in shipped(), line
    return found
