"""Ctrl-C anywhere: the work is kept, the same command goes on, and ends where an uninterrupted run ends."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from compress.pipelines.dispatch import run_verb
from compress.pipelines.reporter import Reporter
from compress.pipelines.settings import Common
from compress.pipelines.workspace import Workspace
from compress.structure import FILE_NAME as STRUCTURE
from compress.structure import StructureMap
from tests.fresh import ForkServer
from tests.tiny import tiny_checkpoint

TRAINING = {"micro_batch": 2, "accumulation": 1, "sequence": 32, "lr": 1e-2, "rank": 4, "alpha": 8}
GIVEN: dict[str, dict[str, Any]] = {
    "prune": {"ratio": 0.4, "steps": 8, "repair_steps": 8, "calibration_tokens": 512, **TRAINING},
    "quantize": {"budget": "7bit", "rank": "4"},
    "train": {"steps": 8, **TRAINING},
    "recover": {},
    "eval": {"sequence": 32, "windows": 4},
}


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory, text_file: Path, fork_server: ForkServer) -> Common:
    """Common options of a chain that nothing interrupted."""
    folder = tmp_path_factory.mktemp("reference")
    full = tiny_checkpoint("llama_tied", folder / "full")
    common = Common(
        run=folder / "run", model=str(full), data=str(text_file), dtype="float32", threads=1, effort="quick"
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("compress.pipelines.reopen.run_fresh", fork_server.run)
        for verb, given in GIVEN.items():
            run_verb(verb, common, given, quiet=True)
    return common


class Bars:
    """Stands in for ``Reporter.bar``: notes the labels, and interrupts the ``call``-th report of one of them."""

    def __init__(self, label: str, call: int) -> None:
        self.label, self.call, self.opened = label, call, []  # type: ignore[var-annotated]

    @contextlib.contextmanager
    def bar(self, label: str) -> Iterator[Callable[[int, int, str], None]]:
        self.opened.append(label)
        left = self.call if label == self.label else 0

        def progress(done: int, total: int, text: str) -> None:
            nonlocal left
            left -= 1
            if left == 0:
                raise KeyboardInterrupt

        yield progress


def weights(folder: Path) -> dict[str, Any]:
    """Bytes of every weight file and config; the structure as its content, as its header has no fixed order."""
    found: dict[str, Any] = {
        p.name: p.read_bytes()
        for p in folder.iterdir()
        if p.name == "config.json" or (p.suffix == ".safetensors" and p.name != STRUCTURE)
    }
    if (folder / STRUCTURE).is_file():
        kept = StructureMap.load(folder / STRUCTURE).layers
        found[STRUCTURE] = [(layer.kv_groups.tolist(), layer.channels.tolist()) for layer in kept]
    return found


CASES = [
    ("prune", "score and mask", 4, ()),
    ("prune", "refit o and down", 1, ()),
    ("prune", "cut", 5, ()),
    ("prune", "repair", 5, ("score and mask", "refit o and down", "cut")),
    ("prune", "perplexity of the pruned model", 1, ("score and mask", "refit o and down", "cut")),
    ("quantize", "error tables", 2, ()),
    ("quantize", "decompose", 2, ()),
    ("quantize", "perplexity of the quantized model", 1, ()),
    ("train", "train", 5, ()),
    ("recover", "recover", 3, ()),
    ("eval", "eval quantized", 1, ("eval original", "eval pruned")),
]


@pytest.mark.usefixtures("forked_reopen")
@pytest.mark.parametrize(("verb", "label", "call", "kept"), CASES, ids=[f"{c[0]}: {c[1]}" for c in CASES])
def test_interrupted_and_resumed(
    verb: str,
    label: str,
    call: int,
    kept: tuple[str, ...],
    reference: Common,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shutil.copytree(reference.run, tmp_path / "run")
    common = Common(run=tmp_path / "run", data=reference.data, dtype="float32", threads=1, effort="quick")
    (name,) = [stage.path.name for stage in Workspace(common.run).stages if stage.verb == verb]
    Workspace(common.run).drop_from(verb)
    before = sorted(path.name for path in common.run.iterdir())

    bars = Bars(label, call)
    monkeypatch.setattr(Reporter, "bar", lambda self, text: bars.bar(text))
    with pytest.raises(KeyboardInterrupt):
        run_verb(verb, common, GIVEN[verb], quiet=True)
    partial = common.run / f"{name}.partial"
    left = [] if verb == "recover" else [partial.name]  # recovery is one step: there is nothing to keep
    assert sorted(path.name for path in common.run.iterdir()) == sorted([*before, *left])

    bars = Bars("", 0)
    resumed = run_verb(verb, common, GIVEN[verb], quiet=True)
    assert not set(kept) & set(bars.opened)
    assert not partial.exists()
    assert resumed["path"] == str(common.run / name)
    assert weights(common.run / name) == weights(reference.run / name)
    expected = json.loads((reference.run / name / "stage.json").read_text())
    assert resumed["id"] == expected["id"]
    if verb in ("prune", "quantize"):
        assert resumed["metrics"]["after"] == expected["metrics"]["after"]
    assert sorted(p.name for p in (common.run / name).iterdir()) == sorted(
        p.name for p in (reference.run / name).iterdir()
    )


@pytest.mark.usefixtures("forked_reopen")
def test_layers_made_for_another_allocation_are_not_kept(
    reference: Common, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(reference.run, tmp_path / "run")
    common = Common(run=tmp_path / "run", data=reference.data, dtype="float32", threads=1, effort="quick")
    Workspace(common.run).drop_from("quantize")
    bars = Bars("decompose", 2)
    monkeypatch.setattr(Reporter, "bar", lambda self, text: bars.bar(text))
    with pytest.raises(KeyboardInterrupt):
        run_verb("quantize", common, GIVEN["quantize"], quiet=True)
    path = common.run / "02-quantize.partial" / "layers" / "allocation.json"
    allocation = json.loads(path.read_text())
    allocation["matrices"][0]["bits"] = 99
    path.write_text(json.dumps(allocation))
    layer = path.parent / "0000.safetensors"
    layer.write_bytes(b"of another allocation")

    bars = Bars("", 0)
    run_verb("quantize", common, GIVEN["quantize"], quiet=True)
    assert weights(common.run / "02-quantize") == weights(reference.run / "02-quantize")
