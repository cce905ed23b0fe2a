from __future__ import annotations

import io
import time

import pytest
from rich.console import Console

from compress.pipelines.reporter import Reporter
from compress.pipelines.side_by_side import Column, SideBySide


def view_on(width: int, titles: list[str], *, terminal: bool) -> tuple[SideBySide, io.StringIO]:
    reporter, written = Reporter(), io.StringIO()
    reporter.out = Console(file=written, width=width, force_terminal=terminal, color_system=None)
    return SideBySide(reporter, titles), written


@pytest.mark.parametrize("width", [100, 50])
def test_a_terminal_shows_a_text_while_it_grows(width: int) -> None:
    view, written = view_on(width, ["one", "two"], terminal=True)
    with view.writing(0) as show:
        show("half a sent")
        deadline = time.monotonic() + 30
        while "half a sent" not in written.getvalue() and time.monotonic() < deadline:
            time.sleep(0.01)
        assert "half a sent" in written.getvalue()
        assert "entence" not in written.getvalue()
    view.finish(0, Column(text="half a sentence", note="3 tokens"))
    with view.writing(1) as show:
        show("other")
    view.finish(1, Column(text="other", note="1 token"))
    view.end()
    assert "half a sentence" in written.getvalue()


def test_elsewhere_texts_below_each_other_come_when_they_are_whole() -> None:
    view, written = view_on(50, ["one", "two"], terminal=False)
    with view.writing(0) as show:
        show("half")
    assert written.getvalue() == ""
    view.finish(0, Column(text="half a sentence", note="3 tokens"))
    assert [line.rstrip() for line in written.getvalue().splitlines()] == [
        "one",
        "half a sentence",
        "3 tokens",
        "",
    ]
    view.finish(1, Column(text="other", note="1 token"))
    view.end()
    assert written.getvalue().count("other") == 1


def test_columns_hold_long_texts_whole_and_apart() -> None:
    texts = ["alpha " * 30, "omega " * 17]
    view, written = view_on(80, ["one", "two"], terminal=False)
    for place, text in enumerate(texts):
        view.finish(place, Column(text=text, note=f"note {place}"))
    assert written.getvalue() == ""
    view.end()
    lines = written.getvalue().splitlines()
    assert all(len(line) <= 80 for line in lines)
    left, right = zip(*(line.split("│") for line in lines if "│" in line), strict=True)
    assert "".join(left).count("alpha") == 30
    assert "".join(right).count("omega") == 17
    assert "omega" not in "".join(left)


def test_a_quiet_reporter_gets_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    view = SideBySide(Reporter(quiet=True), ["one"])
    with view.writing(0) as show:
        show("text")
    view.finish(0, Column(text="text"))
    view.end()
    assert capsys.readouterr() == ("", "")
