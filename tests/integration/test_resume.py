"""Ctrl-C anywhere: the work is kept, the same command goes on, and ends where an uninterrupted run ends."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
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
PRUNE = {"ratio": 0.5, "repair_steps": 8, "calibration_tokens": 512, **TRAINING}
GIVEN: dict[str, dict[str, Any]] = {
    "prune": PRUNE,
    "quantize": {"budget": "8bit", "rank": "4"},
    "train": {"steps": 8, **TRAINING},
    "recover": {},
    "eval": {"sequence": 32, "windows": 4},
}


OTHERS: dict[str, dict[str, Any]] = {
    "lora": {"prune": {**PRUNE, "criterion": "lora", "steps": 8}},
    "rounds": {"prune": {**PRUNE, "rounds": 2}},
    "thin": {
        "prune": {"shape": "unstructured", "criterion": "wanda", "ratio": 0.3, "calibration_tokens": 512}
    },
    "fisher": {
        "quantize": {"budget": "8bit", "rank": "4", "objective": "fisher", "calibration_tokens": 2048}
    },
}
"""Other ways to prune and to quantize, each the first and only stage of a chain of its own."""


@pytest.fixture(scope="module")
def chains(
    tmp_path_factory: pytest.TempPathFactory, text_file: Path, fork_server: ForkServer
) -> dict[str, Common]:
    """Common options of chains that nothing interrupted."""
    folder = tmp_path_factory.mktemp("reference")
    full = tiny_checkpoint("llama_tied", folder / "full")
    found = {}
    verbs = {"chain": GIVEN, **OTHERS}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("compress.pipelines.reopen.run_fresh", fork_server.run)
        for chain, stages in verbs.items():
            found[chain] = Common(
                run=folder / chain,
                model=str(full),
                data=str(text_file),
                dtype="float32",
                threads=1,
                effort="quick",
            )
            for verb, given in stages.items():
                run_verb(verb, found[chain], given, quiet=True)
    return found


@pytest.fixture(scope="module")
def reference(chains: dict[str, Common]) -> Common:
    """The chain of all verbs."""
    return chains["chain"]


class Bars:
    """Stands in for ``Reporter.bar``: notes the labels, and interrupts the ``call``-th report of one of them.

    Of a label that is opened several times, the ``opening``-th is interrupted.
    """

    def __init__(self, label: str, call: int, opening: int = 1) -> None:
        self.label, self.call, self.opening = label, call, opening
        self.opened: list[str] = []

    @contextlib.contextmanager
    def bar(self, label: str) -> Iterator[Callable[[int, int, str], None]]:
        self.opened.append(label)
        due = label == self.label and self.opened.count(label) == self.opening
        left = self.call if due else 0

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
        found[STRUCTURE] = StructureMap.load(folder / STRUCTURE)
    return found


FOUND = ("score (obs)", "try shapes", "refit o and down", "cut")
ROUND = ("score (obs)", "refit o and down", "cut")  # a round has one shape
FISHER = "Fisher information, layers 0-2"
TRAINED = ("score and mask", "refit o and down", "cut")
CASES = [
    # chain, verb, label, call, opening, labels that the resumed run does not open; None: nothing to go on from
    ("chain", "prune", "score (obs)", 1, 1, None),
    ("chain", "prune", "score (obs)", 3, 1, ()),
    ("chain", "prune", "try shapes", 1, 1, ()),
    ("chain", "prune", "refit o and down", 1, 1, ()),
    ("chain", "prune", "cut", 5, 1, ()),
    ("chain", "prune", "repair", 5, 1, FOUND),
    ("chain", "prune", "perplexity of the model", 1, 1, FOUND),
    ("chain", "prune", "perplexity of the pruned model", 1, 1, FOUND),
    ("lora", "prune", "score and mask", 4, 1, ()),
    ("lora", "prune", "refit o and down", 2, 1, ()),
    ("lora", "prune", "cut", 5, 1, ()),
    ("lora", "prune", "repair", 5, 1, TRAINED),
    ("thin", "prune", "thin", 12, 1, ("score (wanda)",)),
    ("thin", "prune", "perplexity of the thinned model", 1, 1, ("score (wanda)", "perplexity of the model")),
    ("rounds", "prune", "score (obs)", 3, 2, ()),
    ("rounds", "prune", "repair", 2, 2, ROUND),
    ("chain", "quantize", "error tables", 2, 1, ()),
    ("chain", "quantize", "decompose", 2, 1, ()),
    ("chain", "quantize", "perplexity of the quantized model", 1, 1, ()),
    ("fisher", "quantize", FISHER, 3, 1, None),
    ("fisher", "quantize", "error tables", 1, 1, (FISHER,)),
    ("fisher", "quantize", "decompose", 1, 1, (FISHER,)),
    ("fisher", "quantize", "perplexity of the quantized model", 1, 1, (FISHER,)),
    ("chain", "train", "train", 5, 1, ()),
    ("chain", "recover", "recover", 3, 1, None),
    ("chain", "eval", "eval quantized", 1, 1, ("eval original", "eval pruned")),
]
LONG = [
    # measuring after another search than the default's: what is kept of the search, its "repair" above shows; that
    # measuring goes on, those of "chain"
    ("lora", "prune", "perplexity of the model", 1, 1, TRAINED),
    ("lora", "prune", "perplexity of the pruned model", 1, 1, TRAINED),
    ("rounds", "prune", "perplexity of the pruned model", 1, 1, ROUND),
]


@pytest.mark.usefixtures("forked_reopen")
@pytest.mark.parametrize(
    ("chain", "verb", "label", "call", "opening", "kept"),
    [*CASES, *(pytest.param(*case, marks=pytest.mark.slow) for case in LONG)],
    ids=[f"{c[0]}: {c[1]}: {c[2]} {c[3]}" for c in (*CASES, *LONG)],
)
def test_interrupted_and_resumed(
    chain: str,
    verb: str,
    label: str,
    call: int,
    opening: int,
    kept: tuple[str, ...] | None,
    chains: dict[str, Common],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    reference, given = chains[chain], OTHERS.get(chain, GIVEN)[verb]
    shutil.copytree(reference.run, tmp_path / "run")
    common = replace(reference, run=tmp_path / "run")
    (name,) = [stage.path.name for stage in Workspace(common.run).stages if stage.verb == verb]
    Workspace(common.run).drop_from(verb)
    before = sorted(path.name for path in common.run.iterdir())

    bars = Bars(label, call, opening)
    monkeypatch.setattr(Reporter, "bar", lambda self, text: bars.bar(text))
    with pytest.raises(KeyboardInterrupt):
        run_verb(verb, common, given, quiet=True)
    assert set(kept or ()) <= set(bars.opened)
    partial = common.run / f"{name}.partial"
    if kept is not None:
        assert sorted(path.name for path in common.run.iterdir()) == sorted([*before, partial.name])
    elif name.startswith("01-"):  # the first stage of a chain takes the empty folder with it
        assert not common.run.exists()
    else:
        assert sorted(path.name for path in common.run.iterdir()) == before

    bars = Bars("", 0)
    resumed = run_verb(verb, common, given, quiet=True)
    assert label in bars.opened
    assert not set(kept or ()) & set(bars.opened)
    assert not partial.exists()
    assert resumed["path"] == str(common.run / name)
    assert weights(common.run / name) == weights(reference.run / name)
    expected = json.loads((reference.run / name / "stage.json").read_text())
    assert resumed["id"] == expected["id"]
    if verb in ("prune", "quantize"):
        assert resumed["metrics"]["after"] == expected["metrics"]["after"]
    if verb == "prune":
        assert resumed["metrics"]["kept"] == expected["metrics"]["kept"]
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
