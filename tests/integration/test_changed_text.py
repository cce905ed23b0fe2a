"""A text file whose content changes under a chain: no verb takes the old result for the new one, or goes on with it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from compress.errors import UsageError
from compress.pipelines.reporter import Reporter
from compress.pipelines.settings import Common
from tests.integration.common import PRUNING, TRAINING, run
from tests.tiny import tiny_checkpoint

pytestmark = pytest.mark.usefixtures("forked_reopen")

GIVEN: dict[str, dict[str, Any]] = {
    "prune": PRUNING | {"criterion": "magnitude", "repair": "none", "repair_steps": 0, "trials": 1},
    "quantize": {"budget": "4.5bit", "objective": "frobenius"},
    "train": TRAINING,
}
EVAL: dict[str, Any] = {"windows": 2, "sequence": 32, "speed": "none"}


@pytest.fixture
def common(tmp_path: Path, text_file: Path) -> Common:
    own = tmp_path / "own.txt"
    own.write_bytes(text_file.read_bytes())
    full = tiny_checkpoint("llama_gqa", tmp_path / "full")
    return Common(
        run=tmp_path / "run", model=str(full), data=str(own), dtype="float32", threads=1, effort="quick"
    )


def append(common: Common) -> None:
    with Path(str(common.data)).open("a") as file:
        file.write("\n\nThe river measures the harbour of engines, and no document said so before.\n")


def test_every_verb_notices_and_nothing_unchanged_is_done_again(common: Common) -> None:
    made = {verb: run(verb, common, **given) for verb, given in GIVEN.items()}
    measured = run("eval", common, **EVAL)
    for verb, given in GIVEN.items():
        assert run(verb, common, **given)["created"] == made[verb]["created"]
    assert run("eval", common, **EVAL)["created"] == measured["created"]
    content = Path(str(common.data)).read_bytes()
    append(common)
    for verb, given in GIVEN.items():
        with pytest.raises(UsageError, match="the content of its text changed"):
            run(verb, common, **given)
    assert run("eval", common, **EVAL)["id"] != measured["id"]
    Path(str(common.data)).write_bytes(content)
    for verb, given in GIVEN.items():
        assert run(verb, common, **given)["id"] == made[verb]["id"]


def test_an_interrupted_prune_does_not_mix_two_texts(common: Common, monkeypatch: pytest.MonkeyPatch) -> None:
    given = GIVEN["prune"] | {"criterion": "obs", "repair": "refit"}

    @contextmanager
    def bar(self: Reporter, label: str) -> Iterator[Callable[[int, int, str], None]]:
        def progress(done: int, total: int, text: str) -> None:
            if label == "refit o and down":
                raise KeyboardInterrupt

        yield progress

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):  # noqa: PT012
        patch.setattr(Reporter, "bar", bar)
        run("prune", common, **given)
    append(common)
    with pytest.raises(UsageError, match=r"unfinished prune .*the content of its text changed"):
        run("prune", common, **given)
    mixed = run("prune", replace(common, redo=True), **given)
    fresh = run("prune", replace(common, run=common.run.parent / "fresh"), **given)
    for name in ("model.safetensors", "structure.safetensors"):
        assert (Path(mixed["path"]) / name).read_bytes() == (Path(fresh["path"]) / name).read_bytes()
