"""The page of the first ten minutes is what its commands printed."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.first_user import STEPS, Step, page, walk


def test_the_page_shows_what_was_printed_and_hides_where(tmp_path: Path) -> None:
    steps = (
        Step(title="Where", prose="Here:", command="pwd; echo $COLUMNS"),
        Step(prose="Wrong:", command="echo no >&2; exit 3", code=3),
    )
    text = page(walk(tmp_path, steps), tmp_path, "abc1234")
    assert "## Where\n\nHere:\n\n```console\n$ pwd; echo $COLUMNS\n~/compress\n100\n```\n" in text
    assert "Wrong:\n\n```text\n$ echo no >&2; exit 3\nno\n```\n" in text
    assert "exit code 3)" in text
    assert str(tmp_path) not in text


def test_a_step_that_ends_otherwise_ends_the_walk(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="false ended with 1"):
        walk(tmp_path, (Step(prose="", command="false"),))


def test_mistakes_are_among_the_steps() -> None:
    assert {step.code for step in STEPS} > {0, 2}
