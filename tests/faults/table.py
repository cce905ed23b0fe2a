"""docs/faults.md, from what happens.

``python -m tests.faults.table`` in the project's folder lets every fault happen and writes the page.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from unittest.mock import patch

from tests.faults.cases import FAULTS, text_file
from tests.faults.scene import Calm, Outcome, Scene, meet, write_model
from tests.fresh import ForkServer
from tests.sources import ROOT

PAGE = ROOT / "docs" / "faults.md"
_HEAD = """# Faults

What goes wrong, what the command then says, and what is left. Every line happened: `python -m tests.faults.table`
writes this page, and a test compares it. `MODEL` is the model's folder, `RUN` the workspace; `.lock` is not listed.
"The same" in the last column: the same command, given again when the fault was over, ended with the bytes of an
undisturbed run.

| fault | command | exit | what it says | left in `RUN` | given again |
|---|---|---|---|---|---|
"""


def page(outcomes: Mapping[str, Outcome]) -> str:
    """The page of these outcomes, in the order of the faults."""
    return _HEAD + "".join(_line(outcomes[fault.name]) for fault in FAULTS)


def _line(outcome: Outcome) -> str:
    said = "nothing: it succeeds" if outcome.code == 0 else f"{outcome.cause} {outcome.remedy}".rstrip()
    left = ", ".join(f"`{name}`" for name in outcome.left) or "nothing"
    again = {None: "", True: "the same", False: "differs"}[outcome.healed]
    cells = (outcome.fault.name, f"`{outcome.fault.verb[0]}`", str(outcome.code), said, left, again)
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |\n"


def main() -> int:
    """Write the page."""
    server = ForkServer()
    found, calm = {}, Calm()
    with (
        tempfile.TemporaryDirectory() as name,
        patch("compress.pipelines.reopen.run_fresh", server.run),
    ):
        folder = Path(name)
        write_model(folder / "model", folder / "whole")
        text = text_file(folder)
        for number, fault in enumerate(FAULTS):
            place = folder / str(number)
            shutil.copytree(folder / "model", place / "model")
            found[fault.name] = meet(fault, Scene(folder=place, text=text), calm)
            print(fault.name, file=sys.stderr)
    server.close()
    PAGE.write_text(page(found), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
