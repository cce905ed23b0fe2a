"""SIGKILL in front of changes all over a stage, and the same command again: the bytes of a calm run, nothing lost.

``python -m tests.faults.kill`` draws many more moments, in time too; ``-m slow`` runs it.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator

import pytest

from tests.faults.forks import Forks
from tests.faults.kill import AGAIN, STAGES, Scene, again, differences, kill_until_done
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
    changes, spread = scene.calm[stage].answer.changes, (0.1, 0.4, 0.8)
    moments = [{"kill_before": max(1, round(share * changes))} for share in spread]
    faults, kills, _ = kill_until_done(scene, stage, moments)
    assert not faults
    assert kills >= 2, "later runs have less to do, but two moments at least are reached"


@pytest.mark.parametrize(
    ("stage", "share", "number"),
    [
        ("prune", 0.25, signal.SIGTERM),
        ("prune", 0.6, signal.SIGINT),
        ("quantize", 0.2, signal.SIGINT),
        ("quantize", 0.5, signal.SIGTERM),
        ("train", 0.4, signal.SIGTERM),
        ("align", 0.4, signal.SIGINT),
    ],
)
def test_a_stopped_stage_finishes_its_layer(
    stage: str, share: float, number: signal.Signals, scene: Scene
) -> None:
    calm = scene.calm[stage]
    run = scene.start(stage)
    request = scene.request(stage, run, kill_before=round(share * calm.answer.changes), signal=int(number))
    stopped = scene.forks.run(request)
    assert stopped.code == 128 + number, stopped.err
    lines = stopped.err.splitlines()
    assert lines[-2:] == ["error: Interrupted.", "Finished work is kept: the same command goes on from here."]
    made = scene.finish(request, run)
    assert not differences(made, calm)
    assert not {name: count for name, count in again(made, calm).items() if name in AGAIN}


@pytest.mark.parametrize("back", [1, 3, 5, 7])
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
