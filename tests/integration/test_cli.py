"""The command line: what it refuses and how it says so, what it prints, and what it leaves on disk."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from compress.__main__ import app
from compress.errors import UsageError
from tests.commands import cli
from tests.fresh import ForkServer
from tests.tiny import tiny_checkpoint

VERBS = ("prune", "quantize", "train", "recover", "eval", "report", "verify", "run")
SHORT = ("--steps", "2", "--micro-batch", "2", "--sequence", "32", "--rank", "4", "--alpha", "8")
PRUNE = ("prune", "--ratio", "0.4", "--repair-steps", "2", "--calibration-tokens", "256", *SHORT)
QUANTIZE = ("quantize", "--budget", "4.5bit")
TRAIN = ("train", *SHORT)
EVAL = ("eval", "--sequence", "32", "--windows", "2")


def snapshot(folder: Path, *, lock: bool = True) -> dict[str, tuple[int, int]]:
    """Size and time of every file below ``folder``."""
    return {
        str(path.relative_to(folder)): (path.stat().st_size, path.stat().st_mtime_ns)
        for path in folder.rglob("*")
        if path.is_file() and (lock or path.name != ".lock")
    }


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint("llama_gqa", tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(autouse=True)
def _fast(forked_reopen: None, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("COMPRESS_RUN", "FORCE_COLOR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("COLUMNS", "160")
    monkeypatch.setenv("NO_COLOR", "1")


@pytest.fixture(scope="module")
def finished(
    tmp_path_factory: pytest.TempPathFactory, model: Path, text_file: Path, fork_server: ForkServer
) -> Iterator[tuple[str, ...]]:
    """Common options of a finished chain; its workspace must not be changed."""
    run = tmp_path_factory.mktemp("chain") / "run"
    common = ("--run", str(run), "--data", str(text_file), "--dtype", "float32", "--effort", "quick")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("compress.pipelines.reopen.run_fresh", fork_server.run)
        for command in ((*PRUNE, "--model", str(model)), QUANTIZE, TRAIN, ("recover",)):
            ran = cli(*command, *common)
            assert ran.code == 0, ran.err
    before = snapshot(run, lock=False)
    yield common
    assert snapshot(run, lock=False) == before


@pytest.fixture
def chain(finished: tuple[str, ...], tmp_path: Path) -> tuple[str, ...]:
    """Common options of a copy of the finished chain."""
    shutil.copytree(finished[1], tmp_path / "run")
    return ("--run", str(tmp_path / "run"), *finished[2:])


REFUSED: list[tuple[tuple[str, ...], int, str]] = [
    *(
        (("prune", f"--ratio={ratio}"), 2, "is not between 0 and 1")
        for ratio in ("0", "1", "-0.5", "1.5", "nan")
    ),
    (("prune", "--ratio", "0.999"), 1, "%"),
    (("prune", "--criterion", "prayer"), 2, "no criterion 'prayer'"),
    (("prune", "--criterion-options", "momentum"), 2, "'momentum' is not understood"),
    (("prune", "--criterion-options", "momentum=0.9"), 2, "'obs' has no option 'momentum'"),
    (("prune", "--criterion-options", "damping=0"), 2, "The damping is 0"),
    (("prune", "--criterion-options", "damping=small"), 2, "damping is 'small'"),
    (("prune", "--criterion-options", "damping=inf"), 2, "damping is inf"),
    (("prune", "--criterion-options", "parts=1.5"), 2, "parts is 1.5"),
    (("prune", "--criterion=lora", "--criterion-options=momentum=high"), 2, "momentum is 'high'"),
    (("prune", "--criterion=lora", "--criterion-options=normalize=off"), 2, "normalize is 'off'"),
    (("prune", "--criterion=flap", "--criterion-options=standardize=1"), 2, "standardize is 1"),
    (
        ("prune", "--shape=semi", "--criterion=wanda", "--criterion-options=linears=all"),
        2,
        "--criterion-options are about the scores of groups",
    ),
    (("prune", "--ratio", "0.4", "--params", "60K"), 2, "--ratio and --params are given together"),
    (("prune", "--params", "some"), 2, "'some' is not understood"),
    (("prune", "--params", "1K"), 1, "can bring this model of"),
    (("prune", "--size", "3bit"), 2, "--size 3bit is no file size"),
    (("prune", "--size", "0.2"), 2, "--size 0.2 is no file size"),
    (("prune", "--size", "1kB"), 1, "can bring this model of"),
    (("prune", "--head-unit", "toe"), 2, "no head-unit 'toe'"),
    (("prune", "--shape", "pear"), 2, "no shape 'pear'"),
    (("prune", "--shape", "local", "--skip-first", "2"), 2, "no layer can be pruned"),
    (("prune", "--shape", "allocated", "--solver", "gurobi"), 2, "no solver 'gurobi'"),
    (("prune", "--shape", "local", "--ratio-of", "layers", "--size", "200kB"), 2, "about the whole model"),
    (
        ("prune", "--shape", "local", "--ratio-of", "parts", "--params", "80k"),
        2,
        "--ratio-of parts about each",
    ),
    (("prune", "--ratio-of", "parts"), 2, "--shape uniform does not"),
    (("prune", "--shape", "global", "--ratio-of", "parts"), 2, "--shape global does not"),
    (("prune", "--shape", "local", "--ratio-of", "parts", "--head-unit", "query"), 2, "whole KV groups"),
    (("prune", "--shape", "semi", "--criterion", "wanda", "--ratio-of", "parts"), 2, "drops single weights"),
    (("prune", "--repair", "lora", "--steps", "0"), 2, "--steps is 0"),
    (("prune", "--one-shot"), 2, "--one-shot is about training with masks"),
    (("prune", "--int8", "--criterion", "wanda"), 2, "--int8 is about training with masks"),
    (("prune", "--trials", "0"), 2, "--trials 0"),
    (("prune", "--rounds", "2", "--shape", "global"), 2, "2 rounds needs plain models"),
    (("prune", "--repair-loss", "text", "--repair-features", "1"), 2, "--repair-loss text does not"),
    (("prune", "--targets", "heads,norms"), 2, "heads,norms"),
    (("prune", "--repair", "magic"), 2, "no repair 'magic'"),
    (("prune", "--multiple", "0"), 2, "--multiple 0"),
    (("prune", "--criterion", "lora", "--steps", "0"), 2, "--steps is 0"),
    (("prune", "--steps", "-1"), 2, "--steps -1"),
    (("prune", "--rank", "0"), 2, "--rank 0"),
    (("prune", "--lr", "0"), 2, "--lr 0.0"),
    (("prune", "--dropout", "1"), 2, "--dropout 1.0"),
    (("prune", "--sequence", "1"), 2, "--sequence 1"),
    (("prune", "--sequence", "100000"), 2, "positions"),
    (("prune", "--repair-rank", "0"), 2, "--repair-rank 0"),
    (("quantize", "--budget", "0.5bit"), 1, "below the smallest"),
    (("quantize", "--budget", "10kB"), 1, "below the smallest"),
    (("quantize", "--budget", "32bit"), 2, "not below what the model takes now (32bit)"),
    (("quantize", "--budget", "1GB"), 2, "not below what the model takes now"),
    (("quantize", "--budget", "3"), 2, "'3' is not understood"),
    (("quantize", "--budget", "-1bit"), 2, "not above zero"),
    (("quantize", "--solver", "gurobi"), 2, "no solver 'gurobi'"),
    (("quantize", "--menu", "lavish"), 2, "no menu 'lavish'"),
    (("quantize", "--rank", "some"), 2, "'some'"),
    (("quantize", "--rank", "-4"), 2, "'-4'"),
    (("quantize", "--budget-includes", "all"), 2, "no budget-includes 'all'"),
    (("quantize", "--iterations", "0"), 2, "--iterations 0"),
    (("train", "--method", "dora"), 2, "no method 'dora'"),
    (("train", "--method", "lq"), 2, "is not quantized"),
    (("train", "--steps", "0"), 2, "--steps 0"),
    (("recover",), 2, "no small model"),
    (("recover", "--compress-rank", "0"), 2, "--compress-rank 0"),
    (("eval", "--windows", "0"), 2, "--windows 0"),
    (("eval", "--sequence", "1"), 2, "--sequence 1"),
    (("prune", "--dtype", "int8"), 2, "no dtype 'int8'"),
    (("prune", "--device", "abacus"), 2, "no device 'abacus'"),
    (("prune", "--device", "cuda:99"), 2, "no CUDA device 'cuda:99'"),
    (("prune", "--threads", "0"), 2, "--threads 0"),
    (("prune", "--seed", "-1"), 2, "--seed -1"),
    (("prune", "--effort", "heroic"), 2, "no effort 'heroic'"),
    (("recover", "--dtype", "int8"), 2, "no dtype 'int8'"),
    (("prune", "--data", "wiki"), 2, "no text source 'wiki'"),
    (("prune", "--data", "no/such.txt"), 1, "no text file"),
    (("run", "no-such-recipe"), 2, "no recipe 'no-such-recipe'"),
]


@pytest.mark.parametrize(("arguments", "code", "cause"), REFUSED, ids=[" ".join(r[0]) for r in REFUSED])
def test_refusals_leave_nothing(
    arguments: tuple[str, ...], code: int, cause: str, tmp_path: Path, model: Path, text_file: Path
) -> None:
    data = () if "--data" in arguments else ("--data", text_file)
    ran = cli(*arguments, "--run", tmp_path / "run", "--model", model, *data)
    assert ran.code == code, ran.err
    assert cause in ran.complaint[0]
    assert ran.out == ""
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("build", "cause", "remedy"),
    [
        ("missing", "There is no model", "Give a folder"),
        ("hub", "hub", "network"),
        ("pickle", "pickled weights only", "safetensors"),
        ("empty", "no config.json", "save_pretrained"),
        ("experts", "expert", ""),
        ("file", "is no model", "Hugging Face folder"),
    ],
)
def test_a_model_that_cannot_be_had(
    build: str, cause: str, remedy: str, tmp_path: Path, model: Path, text_file: Path
) -> None:
    place = tmp_path / "given"
    if build == "pickle":
        shutil.copytree(model, place)
        (place / "model.safetensors").rename(place / "pytorch_model.bin")
    elif build == "empty":
        place.mkdir()
    elif build == "experts":
        tiny_checkpoint("mixtral", place)
    elif build == "file":
        place.write_text("weights")
    name = "someone/something" if build == "hub" else str(place)
    for verb in ("prune", "quantize", "train", "eval"):
        ran = cli(verb, "--run", tmp_path / "run", "--model", name, "--data", text_file)
        assert ran.code == 1, ran.err
        assert cause in ran.complaint[0]
        assert remedy in ran.complaint[1]
        assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("command", [PRUNE, QUANTIZE, TRAIN, EVAL], ids=lambda c: c[0])
@pytest.mark.parametrize(("text", "cause"), [("", "is empty"), ("One line only, and a short one.\n", "")])
def test_text_that_is_too_little(
    command: tuple[str, ...], text: str, cause: str, tmp_path: Path, model: Path
) -> None:
    (tmp_path / "little.txt").write_text(text)
    ran = cli(*command, "--run", tmp_path / "run", "--model", model, "--data", tmp_path / "little.txt")
    assert ran.code == 1, ran.err
    assert cause in ran.complaint[0]
    assert [p.name for p in tmp_path.iterdir()] == ["little.txt"]


def test_unknown_options_and_values_of_another_type_are_wrong_usage(tmp_path: Path) -> None:
    for arguments in (
        ("prune", "--rato", "0.5"),
        ("prune", "--ratio", "half"),
        ("prun",),
        ("train", "--steps", "2.5"),
    ):
        ran = cli(*arguments)
        assert ran.code == 2
        assert "Traceback" not in ran.err
        assert ran.out == ""


def test_report_needs_a_chain_and_a_folder(tmp_path: Path, chain: tuple[str, ...]) -> None:
    ran = cli("report", "--run", tmp_path / "other")
    assert (ran.code, (tmp_path / "other").exists()) == (2, False)
    assert "nothing to report" in ran.complaint[0]
    ran = cli("report", *chain[:2], "--output", tmp_path / "no" / "page.html")
    assert ran.code == 2
    assert "cannot be written" in ran.complaint[0]


def test_a_folder_of_something_else_is_not_touched(tmp_path: Path, model: Path) -> None:
    (tmp_path / "thesis.tex").write_text("x")
    ran = cli("prune", "--run", tmp_path, "--model", model)
    assert ran.code == 2
    assert "not a workspace" in ran.complaint[0]
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


def test_the_same_command_again_does_nothing(finished: tuple[str, ...]) -> None:
    before = snapshot(Path(finished[1]), lock=False)
    for command in (PRUNE, QUANTIZE, TRAIN, ("recover",)):
        ran = cli(*command, *finished)
        assert ran.code == 0, ran.err
        assert f"{command[0]}: already done in" in ran.err
        assert "nothing to do" in ran.err
    assert snapshot(Path(finished[1]), lock=False) == before


@pytest.mark.parametrize(
    ("command", "difference"),
    [
        ((*PRUNE, "--ratio", "0.3"), "ratio: 0.4 -> 0.3"),
        ((*PRUNE, "--seed", "1"), "seed: 0 -> 1"),
        (("quantize", "--budget", "5bit"), "budget: 4.5bit -> 5bit"),
        ((*TRAIN, "--lr", "0.5"), "lr: 0.0003 -> 0.5"),
        (("recover", "--merge"), "merge: False -> True"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_other_settings_are_refused_by_name(
    command: tuple[str, ...], difference: str, finished: tuple[str, ...]
) -> None:
    ran = cli(*command, *finished)
    assert ran.code == 2
    cause, remedy = ran.complaint
    assert f"({difference})" in cause
    assert "--redo" in remedy
    assert "--run" in remedy


def test_another_model_is_refused(finished: tuple[str, ...], tmp_path: Path) -> None:
    other = tiny_checkpoint("llama_gqa", tmp_path / "other", seed=1)
    ran = cli("eval", *finished, "--model", other)
    assert (ran.code, "starts from" in ran.complaint[0]) == (2, True)
    ran = cli("recover", *finished, "--onto", other)
    assert (ran.code, "has other values" in ran.complaint[0]) == (1, True)


def test_prune_after_quantize_is_refused(tmp_path: Path, model: Path, text_file: Path) -> None:
    common = ("--run", tmp_path / "run", "--model", model, "--data", text_file)
    assert cli(*QUANTIZE, *common).code == 0
    before = snapshot(tmp_path / "run", lock=False)
    ran = cli(*PRUNE, *common)
    assert ran.code == 1
    assert "already quantized" in ran.complaint[0]
    assert snapshot(tmp_path / "run", lock=False) == before


def test_an_adapter_older_than_the_small_model_is_not_recovered(
    tmp_path: Path, model: Path, text_file: Path
) -> None:
    common = ("--run", tmp_path / "run", "--model", model, "--data", text_file)
    assert cli(*TRAIN, *common).code == 0
    assert cli(*QUANTIZE, *common).code == 0
    ran = cli("recover", *common)
    assert (ran.code, "before there was a small model" in ran.complaint[0]) == (2, True)


def test_redo_replaces_a_stage_and_drops_the_later_ones(chain: tuple[str, ...]) -> None:
    run = Path(chain[1])
    ran = cli("quantize", "--budget", "5bit", "--redo", *chain)
    assert ran.code == 0, ran.err
    assert "--redo dropped 02-quantize, 03-train, 04-recover" in ran.err
    assert sorted(p.name for p in run.iterdir() if p.is_dir()) == ["01-prune", "02-quantize"]
    assert json.loads((run / "run.json").read_text())["stages"] == ["01-prune", "02-quantize"]
    assert json.loads((run / "02-quantize" / "stage.json").read_text())["config"]["budget"] == "5bit"


def test_a_redo_that_fails_keeps_what_was_there(chain: tuple[str, ...], tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("")
    before = snapshot(Path(chain[1]), lock=False)
    ran = cli(*PRUNE, "--redo", *chain, "--data", tmp_path / "empty.txt")
    assert ran.code == 1
    after = snapshot(Path(chain[1]), lock=False)
    assert {k: v[0] for k, v in after.items()} == {k: v[0] for k, v in before.items()}


@pytest.mark.parametrize(
    "command", [PRUNE, QUANTIZE, TRAIN, ("recover",), EVAL, ("run", "chain")], ids=lambda c: c[0]
)
def test_dry_run_writes_nothing(
    command: tuple[str, ...], tmp_path: Path, model: Path, text_file: Path, chain: tuple[str, ...]
) -> None:
    before = snapshot(tmp_path)
    ran = cli(*command, "--dry-run", "--redo", *chain)
    assert ran.code == 0, ran.err
    assert f"{'prune' if command[0] == 'run' else command[0]} would run with" in ran.out
    assert snapshot(tmp_path) == before
    if command[0] != "recover":  # it needs a small model
        ran = cli(*command, "--dry-run", "--run", tmp_path / "new", "--model", model, "--data", text_file)
        assert ran.code == 0, ran.err
        assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    "command",
    [
        PRUNE,
        QUANTIZE,
        TRAIN,
        ("train", "--method", "lora"),
        EVAL,
        ("run", "chain"),
        ("eval", "org/small", "--sequence", "32"),
    ],
)
def test_dry_run_of_a_hub_model_fetches_no_weights(
    command: tuple[str, ...], tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    known = tmp_path / "snapshot"
    known.mkdir()
    shutil.copyfile(model / "config.json", known / "config.json")

    def download(name: str, *, allow_patterns: list[str]) -> str:
        asked.extend(allow_patterns)
        return str(known)

    monkeypatch.setattr("compress.model.load.snapshot_download", download)
    of = () if "org/small" in command else ("--model", "org/small")
    limited = ("--memory-limit", "64GiB")
    ran = cli(*command, *of, *limited, "--dry-run", "--run", tmp_path / "new", "--data", "wikitext2")
    assert ran.code == 0, ran.err
    assert "would run with" in ran.out
    assert asked
    assert {name for name in asked if "*" in name or not name.endswith(".json")} == set()
    assert not (tmp_path / "new").exists()


def test_dry_run_of_recover_shows_the_training_it_would_begin_with(
    tmp_path: Path, model: Path, text_file: Path
) -> None:
    common = ("--run", tmp_path / "run", "--model", model, "--data", text_file)
    assert cli(*QUANTIZE, *common).code == 0
    before = snapshot(tmp_path)
    ran = cli("recover", "--dry-run", "--json", *common)
    assert ran.code == 0, ran.err
    assert json.loads(ran.out)["verb"] == "train"
    assert snapshot(tmp_path) == before


def test_json_prints_json_and_nothing_else(chain: tuple[str, ...], tmp_path: Path) -> None:
    made = cli(*EVAL, "--json", *chain)
    assert (made.code, made.err) == (0, "")
    assert [row["name"] for row in json.loads(made.out)["metrics"]["rows"]][-1] == "full + recovered"
    assert json.loads(cli(*QUANTIZE, "--json", *chain).out)["verb"] == "quantize"
    page = json.loads(cli("report", "--json", *chain[:2]).out)["report"]
    assert Path(page).is_file()
    plan = json.loads(cli(*PRUNE, "--seed", "7", "--redo", "--dry-run", "--json", *chain).out)
    assert (plan["verb"], plan["config"]["seed"]) == ("prune", 7)
    refused = cli("quantize", "--budget", "5bit", "--json", *chain)
    assert (refused.code, refused.out) == (2, "")
    assert "budget" in refused.complaint[0]


def test_a_stage_records_what_the_effort_chose(finished: tuple[str, ...]) -> None:
    record = json.loads((Path(finished[1]) / "01-prune" / "stage.json").read_text())
    assert record["effort"] == "quick"
    assert record["config"]["repair_lr"] == 2e-3
    assert {"seconds", "peak_memory_bytes", "versions", "host", "command", "created"} <= set(record)


def test_stages_hold_their_artifacts_and_no_scratch(finished: tuple[str, ...]) -> None:
    model = {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    model |= {"chat_template.jinja", "stage.json", "logits.safetensors"}
    adapter = {"adapter_config.json", "adapter_model.safetensors", "stage.json", "logits.safetensors"}
    expected = {
        "01-prune": model | {"structure.safetensors", "base.json"},
        "02-quantize": model | {"structure.safetensors", "base.json", "allocation.json"},
        "03-train": adapter | {"trained_on.json", "base.json"},
        "04-recover": adapter | {"base.json"},
    }
    for name, files in expected.items():
        assert {p.name for p in (Path(finished[1]) / name).iterdir()} - {"README.md"} == files


def test_eval_leaves_only_its_record(chain: tuple[str, ...]) -> None:
    assert cli(*EVAL, *chain).code == 0
    assert [p.name for p in (Path(chain[1]) / "05-eval").iterdir()] == ["stage.json"]


RECIPES = [
    ("steps:\n  - prune: {rato: 0.5}\n", "no setting 'rato'"),
    ("steps:\n  - distil\n", "no verb: 'distil'"),
    ("modle: x\nsteps: [prune]\n", "no setting 'modle'"),
    ("steps:\n  - quantize: {menu: lavish}\n", "no menu 'lavish'"),
    ("steps:\n  - prune: {steps: many}\n", "steps cannot be 'many'"),
    ("steps:\n  - prune: {ratio: 1.5}\n", "not between 0 and 1"),
    ("steps: [prune\n", "is not YAML"),
    ("effort: heroic\nsteps: [prune]\n", "no effort 'heroic'"),
    ("steps: [prune, prune]\n", "prune twice"),
]


@pytest.mark.parametrize(("text", "cause"), RECIPES, ids=[r[1] for r in RECIPES])
def test_a_wrong_recipe_begins_nothing(text: str, cause: str, tmp_path: Path, model: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(text)
    ran = cli("run", tmp_path / "recipe.yaml", "--run", tmp_path / "run", "--model", model)
    assert ran.code == 2, ran.err
    assert cause in ran.complaint[0]
    assert [p.name for p in tmp_path.iterdir()] == ["recipe.yaml"]


def test_a_recipe_runs_its_steps_and_goes_on_where_it_was(
    tmp_path: Path, model: Path, text_file: Path
) -> None:
    short = "{steps: 2, micro_batch: 2, sequence: 32, rank: 4, lr: 1e-3}"
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(
        f"model: {model}\ndata: {text_file}\neffort: quick\ndtype: float32\nsteps:\n"
        f"  - quantize: {{budget: 5bit, rank: 4}}\n  - train: {short}\n  - recover\n  - report\n"
    )
    ran = cli("run", recipe, "--run", tmp_path / "run", "--json")
    assert ran.code == 0, ran.err
    stages = json.loads(ran.out)["stages"]
    assert [stage["verb"] for stage in stages] == ["quantize", "train", "recover", "report"]
    assert stages[1]["config"]["lr"] == 1e-3
    again = json.loads(cli("run", recipe, "--run", tmp_path / "run", "--json").out)["stages"]
    assert [s["created"] for s in again[:3]] == [s["created"] for s in stages[:3]]


@pytest.mark.parametrize("verb", VERBS)
def test_help_of_every_verb(verb: str) -> None:
    ran = cli(verb, "--help")
    assert ran.code == 0
    assert {"--run", "--json", "--debug"} <= set(ran.out.replace("│", " ").split())


def test_debug_lets_the_error_through(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["prune", "--ratio", "2", "--run", str(tmp_path / "run"), "--debug"])
    assert isinstance(result.exception, UsageError)
    assert not (tmp_path / "run").exists()


def test_an_unforeseen_error_is_one_sentence_too(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise ZeroDivisionError("a\nb")

    monkeypatch.setattr("compress.pipelines.dispatch.run_verb", broken)
    ran = cli("eval", "--run", tmp_path / "run")
    assert ran.code == 1
    assert ran.complaint == (
        "Unexpected ZeroDivisionError: a b.",
        "Run it again with --debug and report what that shows.",
    )


def test_the_command_line_starts_without_torch() -> None:
    code = "import sys, compress.__main__; print(sorted({'torch', 'transformers', 'numpy', 'yaml'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_real_process_refuses_and_says_why(tmp_path: Path) -> None:
    """By a command that needs no torch: whose refusal it is makes no difference to the process."""
    done = subprocess.run(
        [sys.executable, "-m", "compress", "report"],
        capture_output=True, text=True, check=False, cwd=tmp_path,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        "error: There is nothing to report in compress-run.\nRun a stage first: compress prune.\n"
    )
    assert list(tmp_path.iterdir()) == []


def listen_to_ctrl_c() -> None:
    """What a terminal's children do; those of a job in the background are born deaf to it."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def test_ctrl_c_leaves_a_run_that_can_go_on(tmp_path: Path, model: Path, text_file: Path) -> None:
    command = [sys.executable, "-m", "compress", *TRAIN, "--steps", "100000", "--model", str(model)]
    command += ["--data", str(text_file), "--dtype", "float32", "--effort", "quick"]
    environment = os.environ | {"PYTHONUNBUFFERED": "1"}
    partial = tmp_path / "compress-run" / "01-train.partial"
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=tmp_path,
        env=environment,
        preexec_fn=listen_to_ctrl_c,
    ) as process:
        try:
            deadline = time.monotonic() + 120
            while (
                not list(partial.glob("training/*"))
                and process.poll() is None
                and time.monotonic() < deadline
            ):
                time.sleep(0.05)
            process.send_signal(signal.SIGINT)
            _, err = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == 130, err
    assert err.endswith("error: Interrupted.\nFinished work is kept: the same command goes on from here.\n")
    assert list(partial.glob("training/*"))
