"""SIGKILL in front of changes all over a stage, and the same command again: the bytes of a calm run, nothing lost.

``python -m tests.faults.kill`` draws many more moments, in time too; ``-m slow`` runs it.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator

import pytest

from tests.faults.forks import Forks
from tests.faults.kill import STAGES, Scene, kill_until_done
from tests.sources import ROOT


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    forks = Forks()
    found = Scene(tmp_path_factory.mktemp("kill"), forks)
    found.prepare()
    yield found
    forks.close()


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_killed_again_and_again_ends_as_a_calm_one_does(stage: str, scene: Scene) -> None:
    changes, spread = scene.calm[stage].answer.changes, (0.06, 0.3, 0.45, 0.9)
    moments = [{"kill_before": max(1, round(share * changes))} for share in spread]
    faults, kills, _ = kill_until_done(scene, stage, moments)
    assert not faults
    assert kills >= 2, "later runs have less to do, but two moments at least are reached"


@pytest.mark.parametrize("back", range(8))
def test_the_last_changes_of_a_stage_lose_nothing(back: int, scene: Scene) -> None:
    """From the record on, what is left is to drop scratch, rename and list: the work is not done again."""
    calm = scene.calm["train"].answer
    faults, kills, repeated = kill_until_done(scene, "train", [{"kill_before": calm.changes - back}])
    assert not faults
    assert kills == 1
    assert not repeated


@pytest.mark.slow
def test_random_moments() -> None:
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "tests.faults.kill",
            "--moments",
            os.environ.get("COMPRESS_KILLS", "6"),
            "--seed",
            "1",
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 kills" not in done.stdout
