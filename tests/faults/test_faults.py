"""Every fault of the table: what is said, what is left, and whether the same command goes on from there.

``python -m tests.faults.table`` writes docs/faults.md anew.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.faults.cases import FAULTS, text_file
from tests.faults.scene import Calm, Fault, Outcome, Scene, meet, write_model
from tests.faults.table import PAGE, page

pytestmark = pytest.mark.usefixtures("forked_reopen")


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model that every scene gets a copy of."""
    folder = tmp_path_factory.mktemp("faults")
    write_model(folder / "model", folder / "whole")
    return folder / "model"


@pytest.fixture(scope="module")
def outcomes() -> dict[str, Outcome]:
    """What the tests before the last one found."""
    return {}


@pytest.fixture(scope="module")
def calm() -> Calm:
    """What undisturbed runs made."""
    return Calm()


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_a_fault_is_named_and_harms_nothing_else(
    fault: Fault, template: Path, tmp_path: Path, outcomes: dict[str, Outcome], calm: Calm
) -> None:
    shutil.copytree(template, tmp_path / "model")
    found = meet(fault, Scene(folder=tmp_path, text=text_file(template.parent)), calm)
    outcomes[fault.name] = found
    assert (found.code == 0) == fault.accepted
    assert "Unexpected" not in found.cause
    assert found.healed is (True if fault.heals else None)
    finished = [name for name in found.left if not name.endswith((".partial/", "run.json"))]
    assert len([name for name in finished if name[:2].isdecimal()]) == len(fault.before) + fault.accepted


def test_the_page_says_what_happens(outcomes: dict[str, Outcome]) -> None:
    if len(outcomes) < len(FAULTS):
        pytest.skip("only some of the faults happened")
    assert PAGE.read_text(encoding="utf-8") == page(outcomes), "python -m tests.faults.table writes it anew"
