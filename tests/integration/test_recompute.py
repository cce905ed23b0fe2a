"""``--recompute`` from the command line: every verb runs layers again, makes the same files, and says so."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import GPT2LMHeadModel
from transformers.models.llama.modeling_llama import LlamaMLP

from compress.pipelines.recipe import read_recipe
from compress.pipelines.settings import Common
from tests.commands import Ran, cli
from tests.integration.common import run
from tests.ranks import RankForks, Request
from tests.tiny import tiny_checkpoint

LOOP = ("--steps", "4", "--micro-batch", "2", "--accumulation", "1", "--sequence", "32", "--lr", "1e-3")
BARE: dict[str, Any] = {"repair": "none", "repair_steps": 0, "trials": 1, "calibration_tokens": 512}
FEW = ("--calibration-tokens", "2048", "--trials", "1")
pytestmark = pytest.mark.usefixtures("forked_reopen")


class Place:
    """The same commands in two workspaces."""

    def __init__(self, folder: Path, text: Path, kind: str = "llama_gqa") -> None:
        self.folder, self.text = folder, text
        self.full = tiny_checkpoint(kind, folder / "full")

    def words(self, run_name: str, *arguments: str) -> list[str]:
        verb, *more = arguments
        shared = {"--run": self.folder / run_name, "--data": self.text, "--model": self.full}
        given = [str(word) for pair in shared.items() for word in pair]
        return [verb, *given, "--dtype", "float32", "--device", "cpu", "--effort", "quick", *more]

    def give(self, run_name: str, *arguments: str) -> Ran:
        return cli(*self.words(run_name, *arguments))

    def common(self, run_name: str) -> Common:
        return Common(
            run=self.folder / run_name,
            model=str(self.full),
            data=str(self.text),
            dtype="float32",
            effort="quick",
        )

    def record(self, stage: str) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.folder / stage / "stage.json").read_text(encoding="utf-8"))
        return found


@pytest.fixture
def place(tmp_path: Path, text_file: Path) -> Place:
    return Place(tmp_path, text_file)


@pytest.fixture
def again(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Every forward pass of an MLP inside a backward pass, as True, in order."""
    seen: list[bool] = []
    forward = LlamaMLP.forward

    def watched(self: Any, hidden: torch.Tensor) -> torch.Tensor:
        if torch._C._current_graph_task_id() != -1:
            seen.append(True)
        return forward(self, hidden)

    monkeypatch.setattr(LlamaMLP, "forward", watched)
    return seen


def files(folder: Path) -> dict[str, bytes]:
    """Weights and structures of a stage."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*.safetensors")}


@pytest.mark.parametrize(
    "words",
    [
        ("prune", "--criterion", "taylor", "--repair-steps", "0", *FEW),
        ("prune", "--criterion", "obs", "--repair-steps", "4", "--repair-features", "0.1", *FEW),
        ("prune", "--criterion", "lora", "--dropout", "0.1", "--int8", "--repair-steps", "0", *FEW),
        ("prune", "--criterion", "magnitude", "--repair", "lora", "--repair-steps", "0", *FEW),
        ("prune", "--criterion", "magnitude", "--shape", "allocated", "--repair-steps", "0", *FEW),
    ],
    ids=["taylor", "obs and repair", "lora in 8 bit", "repair lora", "costs"],
)
def test_pruning_is_the_same(words: tuple[str, ...], place: Place, again: list[bool]) -> None:
    for name, more in (("plain", ()), ("again", ("--recompute",))):
        ran = place.give(name, *words, *LOOP, "--ratio", "0.4", *more)
        assert ran.code == 0, ran.err
        assert bool(again) is bool(more)
    assert files(place.folder / "again" / "01-prune") == files(place.folder / "plain" / "01-prune")
    plain, other = place.record("plain/01-prune"), place.record("again/01-prune")
    assert (plain["aside"], other["aside"]) == ({"recompute": False}, {"recompute": True})
    assert plain["id"] == other["id"]
    for key in ("losses", "after", "repair"):
        assert plain["metrics"].get(key) is None or _settled(plain["metrics"][key]) == _settled(
            other["metrics"][key]
        )


def _settled(value: Any) -> Any:
    return {k: v for k, v in value.items() if k != "train_seconds"} if isinstance(value, dict) else value


@pytest.mark.parametrize("loss", ["text", "both"])
def test_alignment_and_an_adapter_are_the_same(
    loss: str, place: Place, again: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []
    monkeypatch.setattr("compress.pipelines.ways.keep_nothing", lambda: told.append("back"))
    for name, more in (("plain", ()), ("again", ("--recompute",))):
        run("prune", place.common(name), ratio=0.4, criterion="magnitude", **BARE)
        for words in (("align", "--loss", loss), ("train", "--rank", "4", "--dropout", "0.2")):
            ran = place.give(name, *words, *LOOP, *more)
            assert ran.code == 0, ran.err
            assert bool(again) is bool(more)
            again.clear()
    assert len(told) == 2  # the C library would keep what is freed
    for stage in ("02-align", "03-train"):
        assert files(place.folder / "again" / stage) == files(place.folder / "plain" / stage)
        assert place.record(f"again/{stage}")["aside"] == {"recompute": True}
    config = json.loads((place.folder / "again" / "02-align" / "config.json").read_text(encoding="utf-8"))
    assert config == json.loads(
        (place.folder / "plain" / "02-align" / "config.json").read_text(encoding="utf-8")
    )


def test_a_finished_stage_stays_and_an_unfinished_one_goes_on(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As after a run that died for want of memory."""
    words = ("train", "--rank", "4", "--dropout", "0.2", *LOOP)
    assert place.give("whole", *words).code == 0
    done = place.give("whole", *words, "--recompute")
    assert (done.code, "nothing to do" in done.out + done.err) == (0, True)
    assert place.record("whole/01-train")["aside"] == {"recompute": False}

    from compress.adapters.run import Run

    compute, steps = Run.gradients, iter(range(100))

    def dying(self: Any, *given: Any) -> float:
        if next(steps) == 2:
            raise torch.OutOfMemoryError("no")
        return compute(self, *given)

    with monkeypatch.context() as patch:
        patch.setattr(Run, "gradients", dying)
        died = place.give("broken", *words)
    assert died.code == 1
    assert "--recompute" in died.complaint[1]
    went_on = place.give("broken", *words, "--recompute")
    assert went_on.code == 0, went_on.err
    assert "going on with the interrupted run" in went_on.out + went_on.err
    assert files(place.folder / "broken" / "01-train") == files(place.folder / "whole" / "01-train")


@pytest.mark.parametrize("verb", ["prune", "align", "train"])
def test_an_architecture_that_cannot_is_refused_before_any_work(
    verb: str, tmp_path: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = Place(tmp_path, text_file, "gpt2")
    if verb == "align":
        run("prune", place.common("run"), ratio=0.4, criterion="magnitude", **BARE)
    monkeypatch.setattr(GPT2LMHeadModel, "supports_gradient_checkpointing", False)
    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", None)
    ran = place.give("run", verb, *LOOP, "--recompute")
    assert ran.code == 2
    assert ran.complaint[0].startswith(
        "GPT2LMHeadModel of transformers does not support gradient checkpointing"
    )
    assert not list(place.folder.glob("run/*.partial"))


@pytest.mark.parametrize(
    "words",
    [
        ("--criterion", "wanda", "--repair-steps", "0"),
        ("--shape", "unstructured", "--criterion", "magnitude"),
    ],
)
def test_it_is_refused_where_nothing_goes_backwards(words: tuple[str, ...], place: Place) -> None:
    ran = place.give("run", "prune", *words, "--recompute")
    assert ran.code == 2
    assert "--recompute is about backward passes" in ran.complaint[0]
    assert not (place.folder / "run").exists()


def test_recipes_and_dry_runs_take_it(place: Place) -> None:
    recipe = place.folder / "mine.yaml"
    recipe.write_text("steps: [{train: {recompute: true, steps: 1}}, report]", encoding="utf-8")
    assert read_recipe(str(recipe)).steps[0] == ("train", {"recompute": True, "steps": 1})
    ran = place.give("run", "train", "--recompute", "--dry-run", "--json")
    assert json.loads(ran.out)["config"]["recompute"] is True
    assert not (place.folder / "run").exists()


@pytest.mark.parametrize(
    ("words", "stage"),
    [
        (("train", "--rank", "4", "--dropout", "0.2"), "01-train"),
        (("align", "--loss", "both"), "02-align"),
    ],
)
def test_several_processes_compute_the_same(
    words: tuple[str, ...], stage: str, place: Place, rank_forks: RankForks
) -> None:
    """Shares of different sizes; align cuts the weights, which layers that run again need once more."""
    words = (
        *words,
        "--steps",
        "4",
        "--sequence",
        "32",
        "--lr",
        "1e-3",
        "--micro-batch",
        "3",
        "--accumulation",
        "3",
    )
    for name, more in (("plain", ()), ("again", ("--recompute",))):
        if words[0] == "align":
            run("prune", place.common(name), ratio=0.4, criterion="magnitude", **BARE)
        answer = rank_forks.run(Request(size=2, arguments=place.words(name, *words, *more)))
        assert list(answer.codes) == [0, 0], answer.err
    assert files(place.folder / "again" / stage) == files(place.folder / "plain" / stage)
    assert place.record(f"again/{stage}")["aside"] == {"recompute": True}
