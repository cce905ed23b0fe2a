"""``compress generate``: true to the models, one in memory at a time, nothing on disk, laid out for the terminal."""

from __future__ import annotations

import gc
import json
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

import compress  # noqa: F401  (teaches transformers the format)
from compress.pipelines import generate as pipeline
from compress.pipelines.chain_models import ChainModel
from compress.pipelines.side_by_side import printable
from tests.commands import cli
from tests.fresh import ForkServer
from tests.tiny import tiny_checkpoint

QUESTION = "Who measures the ledger of engines?"
TOKENS = 12


@pytest.fixture(autouse=True)
def _plain(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("COMPRESS_RUN", "FORCE_COLOR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setenv("NO_COLOR", "1")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint("llama_gqa", tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def run(
    tmp_path_factory: pytest.TempPathFactory, model: Path, text_file: Path, fork_server: ForkServer
) -> Iterator[Path]:
    """A workspace with a quantized model, an adapter and its recovery; nothing in it may change."""
    place = tmp_path_factory.mktemp("chain") / "run"
    common = ("--run", place, "--data", text_file, "--dtype", "float32", "--effort", "quick")
    short = ("--steps", "2", "--micro-batch", "2", "--sequence", "32", "--rank", "4", "--lr", "0.05")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("compress.pipelines.reopen.run_fresh", fork_server.run)
        for command in (
            ("quantize", "--budget", "4.5bit", "--model", model),
            ("train", *short),
            ("recover",),
        ):
            ran = cli(*command, *common)
            assert ran.code == 0, ran.err
    before = snapshot(place)
    yield place
    assert snapshot(place) == before


def snapshot(folder: Path) -> dict[str, tuple[int, int]]:
    return {
        str(path.relative_to(folder)): (path.stat().st_size, path.stat().st_mtime_ns)
        for path in folder.rglob("*")
        if path.is_file() and path.name != ".lock"
    }


def asked(run: Path, *more: str | Path, prompt: str = QUESTION, stdin: str | None = None) -> dict[str, Any]:
    ran = cli(
        "generate",
        prompt,
        "--run",
        run,
        "--dtype",
        "float32",
        "--tokens",
        str(TOKENS),
        "--json",
        *more,
        stdin=stdin,
    )
    assert (ran.code, ran.err) == (0, ""), ran.err
    found: dict[str, Any] = json.loads(ran.out)
    return found


@torch.inference_mode()
def reference(network: Any, folder: Path, text: str, *, special: bool = False) -> str:
    """Greedy text of stock libraries, everything read again for every token."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(text, add_special_tokens=special)["input_ids"]
    new: list[int] = []
    while len(new) < TOKENS and 2 not in new:
        new.append(int(network(input_ids=torch.tensor([ids + new]), use_cache=False).logits[0, -1].argmax()))
    return str(tokenizer.decode(new, skip_special_tokens=True)).rstrip("\ufffd")


def test_every_model_writes_what_it_writes(run: Path, model: Path) -> None:
    found = asked(run, "--models", "all")
    rows = {row["name"]: row for row in found["models"]}
    assert list(rows) == ["original", "quantized", "trained", "recovered"]
    asked_as = f"<s>user: {QUESTION}</s>\n<s>assistant: "
    small, full = run / "01-quantize", AutoModelForCausalLM.from_pretrained(model)
    expected = {
        "original": reference(full.eval(), model, asked_as),
        "quantized": reference(AutoModelForCausalLM.from_pretrained(small).eval(), model, asked_as),
        "trained": reference(
            PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(small), run / "02-train").eval(),
            model,
            asked_as,
        ),
        "recovered": reference(
            PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model), run / "03-recover").eval(),
            model,
            asked_as,
        ),
    }
    assert {name: row["text"] for name, row in rows.items()} == expected
    assert len(set(expected.values())) > 1
    assert found["chat"] is True
    assert found["prompt_tokens"] == len(
        AutoTokenizer.from_pretrained(model)(asked_as, add_special_tokens=False)["input_ids"]
    )
    for row in rows.values():
        assert row["tokens"] <= TOKENS
        assert row["stopped"] in ("end", "length")
        assert row["prefill_seconds"] > 0


def test_by_default_the_original_and_the_last(run: Path) -> None:
    assert [row["name"] for row in asked(run)["models"]] == ["original", "recovered"]


def test_a_prompt_to_go_on_from_and_standard_input(run: Path, model: Path) -> None:
    found = asked(run, "--no-chat", "--models", "original", prompt="-", stdin=f"{QUESTION}\n")
    network = AutoModelForCausalLM.from_pretrained(model).eval()
    assert found["models"][0]["text"] == reference(network, model, QUESTION, special=True)
    assert found["chat"] is False


def test_without_a_chain_it_is_the_original_and_no_folder_comes_to_be(tmp_path: Path, model: Path) -> None:
    found = asked(tmp_path / "none", "--model", model)
    assert [row["name"] for row in found["models"]] == ["original"]
    assert list(tmp_path.iterdir()) == []


def test_one_model_is_in_memory_at_a_time(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[weakref.ref[Any]] = []
    alive: list[int] = []
    plain = ChainModel.open

    def load(*arguments: Any) -> Any:
        gc.collect()
        alive.append(sum(reference() is not None for reference in opened))
        network = plain(*arguments)
        opened.append(weakref.ref(network))
        return network

    monkeypatch.setattr(ChainModel, "open", load)
    asked(run, "--models", "all")
    assert alive == [0, 0, 0, 0]


def test_nothing_is_written(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = tmp_path / "cache"
    monkeypatch.setenv("COMPRESS_CACHE", str(cache))
    monkeypatch.chdir(tmp_path)
    assert cli("generate", QUESTION, "--run", run, "--tokens", "2").code == 0
    assert list(tmp_path.iterdir()) == []
    assert not any(QUESTION.encode() in path.read_bytes() for path in run.rglob("*") if path.is_file())


@pytest.mark.parametrize(("columns", "beside"), [("100", True), ("72", True), ("71", False), ("40", False)])
def test_texts_stand_side_by_side_where_there_is_room(
    columns: str, beside: bool, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    ran = cli("generate", QUESTION, "--run", run, "--tokens", "3")
    assert ran.code == 0, ran.err
    together = [line for line in ran.out.splitlines() if "original" in line and "full + recovered" in line]
    assert bool(together) is beside
    assert max(map(len, ran.out.splitlines())) <= int(columns)
    assert ran.out.count("tokens/s") + ran.out.count("tokens, ") >= 2


def test_what_a_terminal_would_obey_is_not_written_to_it() -> None:
    assert printable("a\x1b[2Jb\x07\r\n\tc") == "a\ufffd[2Jb\ufffd\ufffd\n\tc"


@given(st.text())
def test_printable_text_is_left_as_it_is(text: str) -> None:
    shown = printable(text)
    assert len(shown) == len(text)
    assert printable(shown) == shown
    assert all(a == b for a, b in zip(text, shown, strict=True) if a.isprintable() or a in "\n\t")
    assert not any(ord(c) < 32 and c not in "\n\t" for c in shown)


@pytest.mark.parametrize(
    ("more", "cause", "remedy"),
    [
        (("--models", "recovred"), "no model 'recovred'", "Did you mean 'recovered'"),
        (("--models", "pruned"), "has no pruned model", "compress prune"),
        (("--tokens", "0"), "--tokens 0", "1 or more"),
        (("--tokens", "250"), "more than the model's 256 positions", "--tokens "),
        (("--temperature", "-1"), "is no temperature", "0 for the likeliest"),
        (("--device", "abacus"), "no device", "Choose"),
    ],
)
def test_refusals(more: tuple[str, ...], cause: str, remedy: str, run: Path) -> None:
    ran = cli("generate", QUESTION, "--run", run, *more)
    assert (ran.code, ran.out) == (2, "")
    assert cause in ran.complaint[0]
    assert remedy in ran.complaint[1]


def test_a_workspace_that_is_not_there_is_refused(run: Path) -> None:
    ran = cli("generate", QUESTION, "--run", run.with_name("rnu"))
    assert (ran.code, ran.complaint) == (
        2,
        (f"There is no chain in {run.with_name('rnu')}.", f"Did you mean --run {run}?"),
    )
    ran = cli("report", "--run", run.with_name("rum"))
    assert (ran.code, ran.complaint[1]) == (2, f"Did you mean --run {run}?")
    assert not run.with_name("rum").exists()


@pytest.mark.parametrize("prompt", ["", "  \n"])
def test_an_empty_prompt_is_refused(prompt: str, run: Path) -> None:
    for argument, stdin in ((prompt, None), ("-", prompt)):
        ran = cli("generate", argument, "--run", run, stdin=stdin)
        assert (ran.code, ran.complaint[0]) == (2, "The prompt is empty.")


def test_a_template_that_is_not_there(tmp_path: Path) -> None:
    place = tiny_checkpoint("llama_mha", tmp_path / "base")
    (place / "chat_template.jinja").unlink()
    common = ("--model", place, "--run", tmp_path / "run", "--tokens", "2")
    ran = cli("generate", QUESTION, "--chat", *common)
    assert (ran.code, "has no chat template" in ran.complaint[0]) == (2, True)
    assert json.loads(cli("generate", QUESTION, "--json", *common).out)["chat"] is False


def test_ctrl_c_says_that_nothing_is_left(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any, **__: Any) -> NoReturn:
        raise KeyboardInterrupt

    monkeypatch.setattr(pipeline, "generate", interrupted)
    ran = cli("generate", QUESTION, "--run", run)
    assert (ran.code, ran.complaint) == (130, ("Interrupted.", "Nothing was left behind."))
