"""The command line in several processes (gloo): what one process makes, and no process that hangs."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from compress.model.checkpoint import Checkpoint
from compress.pipelines.settings import Common
from compress.pipelines.team import VERBS
from tests.commands import Ran, cli, parsed
from tests.integration.common import run
from tests.ranks import Answer, RankForks, Request
from tests.sources import ROOT
from tests.tiny import tiny_checkpoint

LOOP = ("--steps", "6", "--sequence", "32", "--lr", "1e-3")
ODD = ("--micro-batch", "3", "--accumulation", "3")
"""Nine windows a step: neither two nor four processes get the same number."""
SHORT: dict[str, Any] = {
    "ratio": 0.4,
    "criterion": "magnitude",
    "repair": "none",
    "repair_steps": 0,
    "trials": 1,
}

pytestmark = pytest.mark.usefixtures("forked_reopen")


class Place:
    """A model, a text, and the same command in one process and in several."""

    def __init__(self, folder: Path, text: Path, forks: RankForks, kind: str = "llama_gqa") -> None:
        self.folder, self.text, self.forks = folder, text, forks
        self.full = tiny_checkpoint(kind, folder / "full")

    def words(self, run: str, *arguments: str) -> list[str]:
        verb, *more = arguments
        shared = {"--run": self.folder / run, "--data": self.text, "--model": self.full}
        given = [str(word) for pair in shared.items() for word in pair]
        return [verb, *given, "--dtype", "float32", "--device", "cpu", "--effort", "quick", *more]

    def one(self, run: str, *arguments: str) -> Ran:
        return cli(*self.words(run, *arguments))

    def several(self, size: int, run: str, *arguments: str, faults: Sequence[Sequence[Any]] = ()) -> Answer:
        return self.forks.run(Request(size=size, arguments=self.words(run, *arguments), faults=faults))

    def pruned(self, run_name: str) -> None:
        common = Common(
            run=self.folder / run_name,
            model=str(self.full),
            data=str(self.text),
            dtype="float32",
            effort="quick",
        )
        run("prune", common, calibration_tokens=512, **SHORT)

    def metrics(self, stage: str) -> dict[str, Any]:
        record = json.loads((self.folder / stage / "stage.json").read_text(encoding="utf-8"))
        found: dict[str, Any] = record["metrics"]
        return found


@pytest.fixture
def place(tmp_path: Path, text_file: Path, rank_forks: RankForks) -> Place:
    return Place(tmp_path, text_file, rank_forks)


def assert_well(answer: Answer) -> None:
    assert list(answer.codes) == [0] * len(answer.codes), answer.err
    assert [text for text in (*answer.out[1:], *answer.err[1:]) if text] == []


def assert_one_complaint(answer: Answer, code: int) -> tuple[str, str]:
    """Every process ends with the code, and the first alone says why."""
    assert set(answer.codes) == {code}, (answer.codes, answer.err)
    assert [text for text in (*answer.out[1:], *answer.err[1:]) if text] == []
    return Ran(code, answer.out[0], answer.err[0]).complaint


def assert_same_curve(left: dict[str, Any], right: dict[str, Any]) -> None:
    for key in ("losses", "validation_loss_before", "validation_loss_after"):
        assert left[key] == pytest.approx(right[key], rel=1e-5), key
    assert left["tokens"] == right["tokens"]


def assert_same_numbers(left: Path, right: Path, start: Path | None = None) -> None:
    """Equal within what AdamW makes of float32 rounding: a small share of what training has changed."""
    ours, theirs = load_file(left), load_file(right)
    before = {} if start is None else load_file(start)
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        moved = (value - before.get(name, torch.zeros_like(value))).norm()
        assert (ours[name] - value).norm() <= 1e-3 * moved, name


ADAPTER = "adapter_model.safetensors"
WEIGHTS = "model.safetensors"


def test_an_adapter_is_the_one_of_one_process(place: Place) -> None:
    """Dropout included, with shares of different sizes."""
    words = ("train", *LOOP, *ODD, "--rank", "4", "--alpha", "8", "--dropout", "0.2")
    assert place.one("one", *words).code == 0
    answer = place.several(2, "two", *words)
    assert_well(answer)
    assert "held-out loss" in answer.out[0]
    assert_same_curve(place.metrics("two/01-train"), place.metrics("one/01-train"))
    left, right = (place.folder / name / "01-train" / ADAPTER for name in ("two", "one"))
    assert_same_numbers(left, right)
    assert load_file(left).keys() == load_file(right).keys()


@pytest.mark.parametrize(
    ("kind", "size", "loss"),
    [
        ("llama_gqa", 2, "both"),
        pytest.param("llama_tied", 4, "text", marks=pytest.mark.slow),
        pytest.param("gemma2", 3, "distill", marks=pytest.mark.slow),
        pytest.param("qwen3", 2, "text", marks=pytest.mark.slow),
    ],
)
def test_aligned_weights_are_those_of_one_process(
    kind: str, size: int, loss: str, tmp_path: Path, text_file: Path, rank_forks: RankForks
) -> None:
    place = Place(tmp_path, text_file, rank_forks, kind)
    words = ("align", *LOOP, *ODD, "--loss", loss)
    for name in ("one", "several"):
        place.pruned(name)
    assert place.one("one", *words).code == 0
    assert_well(place.several(size, "several", *words))
    left, right = (place.folder / name / "02-align" for name in ("several", "one"))
    ours, theirs = place.metrics("several/02-align"), place.metrics("one/02-align")
    assert ours["losses"] == pytest.approx(theirs["losses"], rel=1e-5)
    assert ours["trainable_parameters"] == theirs["trainable_parameters"]
    assert ours["after"]["perplexity"] == pytest.approx(theirs["after"]["perplexity"], rel=1e-4)
    assert_same_numbers(left / WEIGHTS, right / WEIGHTS, place.folder / "one" / "01-prune" / WEIGHTS)
    assert Checkpoint(left).names == Checkpoint(right).names
    assert not (left / "training").exists()


TRAIN = ("train", *LOOP, *ODD, "--rank", "4", "--alpha", "8", "--dropout", "0.2")


def saved_steps(place: Place, run_name: str, stage: str) -> int:
    """Steps in the state that an interrupted run left."""
    state = place.folder / run_name / f"{stage}.partial" / "training" / "fit-state.safetensors"
    return len(load_file(state)["losses"])


def go_on(place: Place, size: int, *words: str) -> None:
    """Give the command again, in so many processes."""
    if size == 1:
        assert place.one("broken", *words).code == 0
    else:
        assert_well(place.several(size, "broken", *words))


@pytest.mark.parametrize(("first", "second"), [(2, 1), pytest.param(3, 2, marks=pytest.mark.slow)])
def test_a_killed_training_goes_on_with_another_number_of_processes(
    first: int, second: int, place: Place
) -> None:
    assert place.one("whole", *TRAIN).code == 0
    answer = place.several(first, "broken", *TRAIN, faults=[(None, 4, "SIGKILL")])
    assert set(answer.codes) == {-9}
    assert 0 < saved_steps(place, "broken", "01-train") <= 4
    go_on(place, second, *TRAIN)
    assert_same_curve(place.metrics("broken/01-train"), place.metrics("whole/01-train"))
    left, right = (place.folder / name / "01-train" / ADAPTER for name in ("broken", "whole"))
    assert_same_numbers(left, right)


@pytest.mark.slow
@pytest.mark.parametrize(("first", "second"), [(2, 3), (3, 1)])
def test_a_stopped_alignment_goes_on_with_another_number_of_processes(
    first: int, second: int, place: Place
) -> None:
    """A request to end, to all of them at once: the step is finished, the state saved once, and all end."""
    words = ("align", *LOOP, *ODD)
    for name in ("whole", "broken"):
        place.pruned(name)
    assert place.one("whole", *words).code == 0
    answer = place.several(first, "broken", *words, faults=[(None, 2, "SIGTERM")])
    assert set(answer.codes) == {128 + 15}, (answer.codes, answer.err)
    assert "Finished work is kept" in answer.err[0]
    assert [text for text in (*answer.out[1:], *answer.err[1:]) if text] == []
    assert saved_steps(place, "broken", "02-align") == 3
    go_on(place, second, *words)
    ours, theirs = place.metrics("broken/02-align"), place.metrics("whole/02-align")
    assert ours["losses"] == pytest.approx(theirs["losses"], rel=1e-5)
    left, right = (place.folder / name / "02-align" / WEIGHTS for name in ("broken", "whole"))
    assert_same_numbers(left, right, place.folder / "whole" / "01-prune" / WEIGHTS)


@pytest.mark.parametrize("verb", ["train", pytest.param("align", marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", ["fail", pytest.param("bug", marks=pytest.mark.slow)])
def test_what_fails_in_another_process_ends_all(verb: str, kind: str, place: Place) -> None:
    words = TRAIN if verb == "train" else ("align", *LOOP, *ODD)
    if verb == "align":
        place.pruned("run")
    answer = place.several(2, "run", *words, faults=[(1, 3, kind)])
    cause, remedy = assert_one_complaint(answer, 1)
    told = "The lamp is out." if kind == "fail" else "ValueError: the lamp."
    assert cause == f"Process 1 of 2 failed: {told}"
    assert remedy == "Light it." if kind == "fail" else "--debug" in remedy


@pytest.mark.parametrize("verb", ["train", pytest.param("align", marks=pytest.mark.slow)])
def test_a_process_that_is_killed_ends_the_others(verb: str, place: Place) -> None:
    words = TRAIN if verb == "train" else ("align", *LOOP, *ODD)
    if verb == "align":
        place.pruned("run")
    answer = place.several(3, "run", *words, faults=[(1, 3, "SIGKILL")])
    assert list(answer.codes) == [1, -9, 1], answer.err
    cause, remedy = Ran(1, answer.out[0], answer.err[0]).complaint
    assert "broke off" in cause
    assert "last saved state" in remedy
    assert not answer.err[2]


def test_what_the_first_process_fails_with_ends_all(place: Place) -> None:
    answer = place.several(2, "run", *TRAIN, faults=[(0, 3, "fail")])
    assert assert_one_complaint(answer, 1) == ("The lamp is out.", "Light it.")
    answer = place.several(2, "other", *TRAIN, "--lr", "1e30")
    assert "5 training steps in a row" in assert_one_complaint(answer, 1)[0]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("quantize", "--budget", "4bit"), "compress quantize is done by one"),
        (("doctor",), "compress doctor is done by one"),
        (("prune", "--criterion", "magnitude", "--repair-steps", "0"), "nothing is trained here"),
        (("run", "RECIPE"), "nothing is trained here"),
        (("align", "--optimizer", "galore"), "GaLore projects whole matrices"),
        (("train", "--memory-limit", "4GiB"), "counted for one process"),
        (("train", "--device", "cuda:0"), "is one GPU"),
        (("train", "--micro-batch", "1", "--accumulation", "1"), "a step trains 1 windows"),
    ],
)
def test_what_several_processes_cannot_do_is_refused_before_anything_is_touched(
    words: tuple[str, ...], told: str, place: Place
) -> None:
    recipe = place.folder / "chain.yaml"
    recipe.write_text(
        "steps: [{prune: {criterion: magnitude, repair_steps: 0}}, {quantize: {budget: 4bit}}]",
        encoding="utf-8",
    )
    given = [str(recipe) if word == "RECIPE" else word for word in words]
    arguments = given if words[0] == "doctor" else place.words("run", *given)
    answer = place.forks.run(Request(size=2, arguments=arguments))
    assert told in assert_one_complaint(answer, 2)[0]
    assert not (place.folder / "run").exists()


def test_a_thinned_model_is_aligned_by_one_process(place: Place) -> None:
    common = Common(run=place.folder / "run", model=str(place.full), data=str(place.text), dtype="float32")
    run("prune", common, ratio=0.4, criterion="magnitude", shape="unstructured")
    answer = place.several(2, "run", "align", *LOOP, *ODD)
    assert "is thinned" in assert_one_complaint(answer, 2)[0]
    assert not (place.folder / "run" / "02-align.partial").exists()


@pytest.mark.slow
@pytest.mark.parametrize("size", [2])
def test_a_recipe_is_done_by_all_of_them_where_it_trains(size: int, place: Place) -> None:
    """Scores and masks of the criterion lora, repair, alignment and an adapter; the rest by the first alone."""
    recipe = place.folder / "chain.yaml"
    loop = "steps: 6, micro_batch: 3, accumulation: 2, sequence: 32, lr: 0.001"
    recipe.write_text(
        f"""steps:
  - prune: {{ratio: 0.4, criterion: lora, calibration_tokens: 512, repair_steps: 4, repair_features: 0.1, {loop}}}
  - align: {{{loop}}}
  - quantize: {{budget: 8bit, rank: "0", calibration_tokens: 512}}
  - recover: {{}}
""",
        encoding="utf-8",
    )
    assert place.one("one", "run", str(recipe)).code == 0
    assert_well(place.several(size, "several", "run", str(recipe)))
    for stage in ("01-prune", "02-align", "04-train"):
        ours, theirs = place.metrics(f"several/{stage}"), place.metrics(f"one/{stage}")
        assert ours["losses"] == pytest.approx(theirs["losses"], rel=1e-4), stage
    ours, theirs = place.metrics("several/01-prune"), place.metrics("one/01-prune")
    assert ours["repair"]["losses"] == pytest.approx(theirs["repair"]["losses"], rel=1e-4)
    assert ours["achieved_ratio"] == theirs["achieved_ratio"]
    left, right = (
        load_file(place.folder / name / "01-prune" / "structure.safetensors") for name in ("several", "one")
    )
    assert all(torch.equal(left[name], right[name]) for name in right)
    assert (place.folder / "several" / "05-recover" / "stage.json").is_file()


PAGE = (ROOT / "docs" / "how-to" / "several-devices.md").read_text(encoding="utf-8")
COMMANDS = re.findall(r"^torchrun --nproc-per-node \d+ -m -- (compress .+)$", PAGE, re.MULTILINE)


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_of_the_page_are_taken(command: str) -> None:
    assert parsed(command).verb in VERBS


def test_the_page_shows_every_verb_that_several_processes_do() -> None:
    assert {command.split()[1] for command in COMMANDS} == set(VERBS)


@pytest.mark.slow
def test_torchrun_makes_the_adapter_of_one_process(place: Place) -> None:
    """The launcher itself, and a fresh process that opens what was written, which none of the launched ones is."""
    assert place.one("one", *TRAIN).code == 0
    launcher = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "-m",
        "--",
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    ran = subprocess.run(
        [*launcher, "compress", *place.words("two", *TRAIN)], env=environment, capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.count("held-out loss") == 1
    assert_same_curve(place.metrics("two/01-train"), place.metrics("one/01-train"))
    again = subprocess.run(
        [*launcher, "compress", *place.words("two", "quantize", "--budget", "4bit")],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert again.returncode == 1  # torchrun's own
    assert again.stderr.count("compress quantize is done by one") == 1


@pytest.mark.slow
def test_torchrun_ends_all_when_it_is_asked_to(place: Place) -> None:
    words = place.words("run", *TRAIN, "--steps", "100000")
    launcher = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "-m",
        "--",
    ]
    process = subprocess.Popen(
        [*launcher, "compress", *words],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    state = place.folder / "run" / "01-train.partial" / "training" / "fit-state.safetensors"
    until = time.monotonic() + 240
    while not state.exists() and time.monotonic() < until:
        time.sleep(0.5)
    assert state.exists()
    before = saved_steps(place, "run", "01-train")
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=120)
    assert process.returncode != 0
    assert err.count("Finished work is kept") == 1
    assert saved_steps(place, "run", "01-train") > before
