"""What ``prune`` really has on disk at its peak, round after round, and what it asks for beforehand."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from compress.model.checkpoint import Checkpoint, checkpoint_architecture
from compress.pipelines.disk import RECORDS, prune_disk
from compress.pipelines.model_input import ModelInput
from compress.pipelines.prune_goal import default_multiple, goal_of, parse_targets
from compress.pipelines.reporter import Reporter
from compress.pipelines.settings import Common, PruneSettings, resolve
from tests.integration.common import PRUNING, run
from tests.tiny import tiny_checkpoint

pytestmark = pytest.mark.usefixtures("forked_reopen")


def bytes_below(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize(
    "given",
    [
        {"criterion": "magnitude", "repair": "none", "repair_steps": 0, "rounds": 4},
        {"criterion": "obs", "repair": "refit", "repair_steps": 3, "rounds": 3},
    ],
)
def test_what_is_asked_for_is_what_lies_there(
    given: dict[str, Any], tmp_path: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = PRUNING | {"trials": 1, "ratio": 0.5} | given
    folder = tiny_checkpoint("llama_gqa", tmp_path / "full")
    checkpoint = Checkpoint(folder)
    model = ModelInput(
        name="m",
        path=folder,
        id="",
        checkpoint=checkpoint,
        architecture=checkpoint_architecture(checkpoint),
    )
    settings = resolve(PruneSettings, given, "quick")
    goal = goal_of(
        model, settings, parse_targets(settings.targets), default_multiple(model.architecture.channels)
    )
    asked = prune_disk(goal, torch.float32, "quick")
    seen: list[int] = []
    own = Reporter.bar

    @contextmanager
    def bar(self: Reporter, label: str) -> Iterator[Callable[[int, int, str], None]]:
        seen.append(bytes_below(tmp_path / "run"))
        with own(self, label) as progress:

            def looked(done: int, total: int, text: str) -> None:
                seen.append(bytes_below(tmp_path / "run"))
                progress(done, total, text)

            yield looked
        seen.append(bytes_below(tmp_path / "run"))

    monkeypatch.setattr(Reporter, "bar", bar)
    common = Common(
        run=tmp_path / "run",
        model=str(folder),
        data=str(text_file),
        dtype="float32",
        threads=1,
        effort="quick",
    )
    run("prune", common, **given)
    counted = asked - RECORDS
    assert max(seen) <= 1.05 * counted  # the records are for headers, configs and the like
    assert max(seen) >= 0.5 * counted
