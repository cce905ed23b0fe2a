"""``compress eval A B C``: any models side by side, without a workspace."""

from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from compress.adapters.attach import attach_lora, save_adapter
from compress.data.sources import load_text
from compress.errors import CompressError, UsageError
from compress.evaluate.saturation import saturation
from compress.model.architecture import architecture_of
from compress.model.checkpoint import Checkpoint
from compress.model.load import load_model
from compress.pipelines import eval_row, eval_run
from compress.pipelines.dispatch import run_verb
from compress.pipelines.identity import TEXT
from compress.pipelines.settings import Common
from tests.fresh import ForkServer
from tests.integration.common import PRUNING, TRAINING, run
from tests.integration.test_cli import cli
from tests.tiny import tiny_checkpoint, tiny_model, tiny_tokenizer

EVAL = {"sequence": 32, "windows": 4, "kl_windows": 2, "speed": "none"}


@pytest.fixture(autouse=True)
def _plain(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("COMPRESS_RUN", "FORCE_COLOR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("NO_COLOR", "1")


def pair_tokenizer() -> PreTrainedTokenizerFast:
    """Another vocabulary of 128 tokens: the bytes of plain text, and pairs of a space and a letter."""
    letters = ["Ċ", "Ġ", *map(chr, range(33, 123))]
    pairs = [("Ġ", letter) for letter in "abcdefghijklmnopqrstuvwxyzTCEM"]
    vocab = {t: i for i, t in enumerate(["<unk>", "<s>", *letters, *(a + b for a, b in pairs)])}
    assert len(vocab) <= 128
    backend = Tokenizer(models.BPE(vocab=vocab, merges=pairs, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", bos_token="<s>")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models ``a``, ``b`` and ``pairs`` (another tokenizer), and ``lora``, an adapter of ``a`` beside it."""
    root = tmp_path_factory.mktemp("models")
    a = tiny_checkpoint("llama_gqa", root / "a")
    tiny_checkpoint("llama_gqa", root / "b", seed=1)
    tiny_model("llama_gqa", seed=2).save_pretrained(root / "pairs")
    pair_tokenizer().save_pretrained(root / "pairs")
    adapted = attach_lora(load_model(a), architecture_of(Checkpoint(a).config), rank=2)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.fill_(0.02)
    save_adapter(adapted, root / "lora", base_name="../a")
    return root


@pytest.fixture
def common(tmp_path: Path, text_file: Path) -> Common:
    return Common(run=tmp_path / "run", data=str(text_file), dtype="float32", threads=1, effort="quick")


def evaluate(common: Common, *names: Path | str, **given: Any) -> dict[str, Any]:
    return run_verb("eval", common, {**EVAL, **given, "models": [str(n) for n in names]}, quiet=True)


def direct(model: Any, text_file: Path) -> float:
    """Mean loss in float64 over the first four windows of 32 bytes of the test split."""
    joined = load_text(str(text_file), "test").joined
    ids = torch.tensor(tiny_tokenizer()(joined, add_special_tokens=False)["input_ids"])[:128].view(4, 32)
    with torch.no_grad():
        log_p = model.double()(input_ids=ids).logits.log_softmax(-1)
    return float(-log_p[:, :-1].gather(2, ids[:, 1:, None]).mean())


def test_models_and_adapters_in_one_table(folder: Path, common: Common, text_file: Path) -> None:
    record = evaluate(common, folder / "a", folder / "b", folder / "lora")
    rows = {row["name"]: row for row in record["metrics"]["rows"]}
    assert list(rows) == ["a", "b", "lora"]
    assert not common.run.exists()
    plain = AutoModelForCausalLM.from_pretrained(folder / "a", dtype=torch.float32)
    adapted = AutoModelForCausalLM.from_pretrained(folder / "a", dtype=torch.float32)
    factors = load_file(folder / "lora" / "adapter_model.safetensors")
    for name, weight in adapted.state_dict().items():  # merged by hand, alpha 16 over rank 2
        if name.endswith("proj.weight"):
            module = f"base_model.model.{name.removesuffix('.weight')}"
            weight += 8 * factors[f"{module}.lora_B.weight"] @ factors[f"{module}.lora_A.weight"]
    for name, model in (("a", plain), ("lora", adapted)):
        nll = direct(model, text_file)
        assert rows[name]["perplexity"] == pytest.approx(float(torch.tensor(nll).exp()), rel=1e-4)
        low, high = rows[name]["perplexity_interval"]
        assert low < rows[name]["perplexity"] < high
        # a byte a token: bits per byte are those of the tokens
        assert rows[name]["bits_per_byte"] == pytest.approx(nll / 0.6931471805599453, rel=1e-5)
    assert rows["lora"]["parameters"] == rows["a"]["parameters"] == plain.num_parameters()
    assert rows["lora"]["bytes"] > rows["a"]["bytes"]
    held = [*tiny_model("llama_gqa").parameters(), *tiny_model("llama_gqa").buffers()]
    assert rows["a"]["resident_bytes"] == sum(tensor.numel() * 4 for tensor in held)
    assert rows["a"].get("divergence") is None
    assert rows["b"]["divergence"]["windows"] == 2
    assert 0 < rows["lora"]["divergence"]["kl"] < rows["b"]["divergence"]["kl"]
    assert record["metrics"]["notes"] == []
    assert "held_out_loss" not in rows["a"]
    line = rows["b"]["protocol_line"]
    assert "made_up.txt test, sha256" in line
    assert "no BOS, length 32, stride 32, 4 windows, 124 tokens scored, float32 on cpu" in line


def test_a_copy_is_the_same_model_and_reference_may_be_another(
    folder: Path, common: Common, tmp_path: Path
) -> None:
    shutil.copytree(folder / "a", tmp_path / "copy")
    record = evaluate(common, folder / "b", tmp_path / "copy", reference=str(folder / "a"))
    rows = {row["name"]: row["divergence"] for row in record["metrics"]["rows"]}
    assert (rows["copy"]["kl"], rows["copy"]["agreement"]) == (0.0, 1.0)
    assert rows["b"]["kl"] > 0.1
    assert record["metrics"]["reference"] == "a"
    assert set(record["inputs"]) == {"b", "copy", "reference", TEXT}
    named = evaluate(common, folder / "b", folder / "a", reference=str(folder / "a"))
    assert named["metrics"]["rows"][0]["divergence"]["kl"] == rows["b"]["kl"]
    assert set(named["inputs"]) == {"a", "b", TEXT}
    other = evaluate(common, folder / "b", reference=str(folder / "pairs"))["metrics"]
    assert other["rows"][0]["protocol_line"] == record["metrics"]["rows"][0]["protocol_line"]
    assert other["rows"][0]["divergence"] is None
    assert other["notes"] == ["b is not compared with the reference: their tokenizers differ."]
    without = evaluate(common, folder / "b", folder / "a", kl_windows=0)
    assert not any(row.get("divergence") for row in without["metrics"]["rows"])


def test_other_tokenizers_read_the_same_text_and_are_told_apart(
    folder: Path, common: Common, text_file: Path
) -> None:
    record = evaluate(common, folder / "a", folder / "pairs")
    ours, other = record["metrics"]["rows"]
    tokenizer, joined = pair_tokenizer(), load_text(str(text_file), "test").joined
    characters = 4 * 32  # of the tokenizer that gets less far: one byte a token
    assert f"the first {characters} characters" in ours["protocol_line"]
    assert f"the first {characters} characters" in other["protocol_line"]
    # every window of the other one lacks its first token, and the last is cut at the limit
    found = tokenizer(joined, add_special_tokens=False, return_offsets_mapping=True)
    scored = [
        (start, end)
        for at, (start, end) in enumerate(found["offset_mapping"])
        if at % 32 and end <= characters
    ]
    assert f"{len(scored)} tokens scored" in other["protocol_line"]
    ids = torch.tensor(found["input_ids"][: 32 * (-(-len(scored) // 31))]).view(-1, 32)
    with torch.no_grad():
        model = tiny_model("llama_gqa", seed=2).double()
        log_p = model(input_ids=ids).logits.log_softmax(-1)[:, :-1].gather(2, ids[:, 1:, None])
    nats = -float(log_p.flatten()[: len(scored)].sum())
    assert other["perplexity"] == pytest.approx(float(torch.tensor(nats / len(scored)).exp()), rel=1e-4)
    assert other["bits_per_byte"] == pytest.approx(
        nats / 0.6931471805599453 / other["bytes_scored"], rel=1e-4
    )
    assert 0 < other["words_scored"] <= len(joined[:characters].split())
    assert other["divergence"] is None
    notes = " ".join(record["metrics"]["notes"])
    assert "The tokenizers differ (a; pairs)" in notes
    assert "compare word-level perplexity or bits per byte" in notes
    assert "pairs is not compared with the reference: their tokenizers differ." in notes


def test_a_bos_is_measured_where_it_is_asked_and_named_where_it_is_missing(
    folder: Path, common: Common, text_file: Path, tmp_path: Path
) -> None:
    shutil.copytree(folder / "a", tmp_path / "begins")
    tokenizer = tiny_tokenizer()
    start = tokenizer.bos_token_id
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", start)]
    )
    tokenizer.save_pretrained(tmp_path / "begins")
    bare = evaluate(common, tmp_path / "begins", folder / "a")
    assert bare["metrics"]["rows"][0]["perplexity"] == bare["metrics"]["rows"][1]["perplexity"]
    (note,) = bare["metrics"]["notes"]
    assert note == (
        "The tokenizer of begins begins plain text with a BOS, and nothing is measured with one here: --bos does."
    )
    record = evaluate(common, tmp_path / "begins", folder / "a", bos=True)
    assert record["metrics"]["notes"] == []
    begun, row = record["metrics"]["rows"]
    assert "BOS, length 32, stride 31, 4 windows, 124 tokens scored" in row["protocol_line"]
    assert "no BOS" not in row["protocol_line"]
    assert begun["perplexity"] == row["perplexity"] != bare["metrics"]["rows"][1]["perplexity"]
    joined = load_text(str(text_file), "test").joined
    ids = torch.tensor(tiny_tokenizer()(joined, add_special_tokens=False)["input_ids"])[: 4 * 31].view(4, 31)
    ids = torch.cat((torch.full((4, 1), start), ids), dim=1)
    with torch.no_grad():
        log_p = tiny_model("llama_gqa").double()(input_ids=ids).logits.log_softmax(-1)
    nll = float(-log_p[:, :-1].gather(2, ids[:, 1:, None]).mean())
    assert row["perplexity"] == pytest.approx(float(torch.tensor(nll).exp()), rel=1e-4)
    assert row["divergence"]["kl"] == 0.0  # the same weights, and the same BOS before the same tokens
    assert row["bytes_scored"] == len(joined[: 4 * 31].encode())
    assert record["id"] != bare["id"]


def test_another_vocabulary_is_left_blank_with_a_note(folder: Path, common: Common, tmp_path: Path) -> None:
    wide = tiny_model("llama_gqa", seed=3)
    wide.resize_token_embeddings(136)
    wide.save_pretrained(tmp_path / "wide")
    tiny_tokenizer().save_pretrained(tmp_path / "wide")
    record = evaluate(common, folder / "a", tmp_path / "wide")
    assert record["metrics"]["rows"][1]["divergence"] is None
    assert record["metrics"]["notes"] == [
        "wide is not compared with the reference: it predicts 136 tokens, the reference 128."
    ]


def test_stages_of_a_chain_and_uneven_models(
    folder: Path, common: Common, tmp_path: Path, fork_server: ForkServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("compress.pipelines.reopen.run_fresh", fork_server.run)
    full = str(folder / "a")
    chain = Common(run=common.run, model=full, data=common.data, dtype="float32", threads=1, effort="quick")
    run("prune", chain, ratio=0.4, shape="global", **{**PRUNING, "repair_steps": 0})
    run("quantize", chain, budget="4.5bit")
    run("train", chain, **TRAINING)
    run("recover", chain)
    quiz, out = tmp_path / "quiz.jsonl", tmp_path / "out.json"
    quiz.write_text('{"query": "Which?", "choices": ["one", "two"], "gold": 0}\n' * 3)
    evaluated = run("eval", chain, **EVAL, task=[str(quiz)], out=out)
    in_chain = evaluated["metrics"]
    assert json.loads(out.read_text()) == {k: v for k, v in evaluated.items() if k != "path"}
    assert all(row["tasks"][0]["rows"] == 3 for row in in_chain["rows"])
    quiz.write_text('{"query": "Which?", "choices": ["one", "two"], "gold": 1}\n' * 3)
    other = run(
        "eval", chain, **EVAL, task=[str(quiz)], out=out
    )  # the file has changed, so it is measured again
    assert other["id"] != evaluated["id"]
    shares = [[row["tasks"][0]["accuracy"] for row in each["metrics"]["rows"]] for each in (evaluated, other)]
    assert [a + b for a, b in zip(*shares, strict=True)] == [1.0] * 5
    assert run("verify", chain)["counts"].get("differs", 0) == 0
    page = Path(run("report", chain)["report"]).read_text(encoding="utf-8")
    assert "Distance from original" in page
    assert "Task quiz" in page
    stages = [common.run / n for n in ("01-prune", "02-quantize", "03-train", "04-recover")]
    named = evaluate(common, full, *stages)["metrics"]
    assert [row["name"] for row in named["rows"]] == [
        "a",
        "01-prune",
        "02-quantize",
        "03-train",
        "04-recover",
    ]
    same = (
        "parameters", "bytes", "bits_per_weight", "perplexity", "perplexity_interval", "word_perplexity",
        "bits_per_byte", "resident_bytes",
    )  # fmt: skip
    for ours, theirs in zip(in_chain["rows"], named["rows"], strict=True):
        assert {key: ours[key] for key in same} == {key: theirs[key] for key in same}
        assert ours.get("divergence") == theirs.get("divergence")
    assert in_chain["reference"] == "original"
    assert in_chain["rows"][2]["divergence"]["kl"] > 0
    assert all(row["held_out_loss"] > 0 for row in in_chain["rows"])


@pytest.fixture
def interrupted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the models that are measured; the second one is interrupted, once."""
    measured: list[str] = []
    true = eval_run.measure

    def measure(bench: Any, entry: Any, *rest: Any) -> dict[str, Any]:
        measured.append(entry.name)
        if len(measured) == 2:
            raise KeyboardInterrupt
        return true(bench, entry, *rest)

    monkeypatch.setattr(eval_run, "measure", measure)
    return measured


def test_with_out_an_interrupted_evaluation_goes_on(
    folder: Path, common: Common, tmp_path: Path, interrupted: list[str]
) -> None:
    out = tmp_path / "found.json"
    names = (folder / "a", folder / "b")
    with pytest.raises(KeyboardInterrupt):
        evaluate(common, *names, out=out)
    assert not out.exists()
    with pytest.raises(UsageError, match="An unfinished evaluation with other settings"):
        evaluate(common, *names, out=out, windows=3)
    record = evaluate(common, *names, out=out)
    assert interrupted == ["a", "b", "b"]
    assert [p.name for p in tmp_path.iterdir()] == ["found.json"]
    assert json.loads(out.read_text()) == json.loads(json.dumps(record))
    again = evaluate(common, *names, out=out)
    assert again["created"] == record["created"]
    assert interrupted == ["a", "b", "b"]
    with pytest.raises(UsageError, match="holds an evaluation with other settings"):
        evaluate(common, folder / "b", out=out)
    redone = run_verb(
        "eval",
        Common(run=common.run, data=common.data, dtype="float32", effort="quick", redo=True),
        {**EVAL, "models": [str(folder / "b")], "out": out},
        quiet=True,
    )
    assert json.loads(out.read_text())["id"] == redone["id"] != record["id"]


def test_distances_that_are_known_are_not_measured_again(
    folder: Path, common: Common, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names, out = [folder / n for n in ("a", "b", "lora")], tmp_path / "found.json"
    compared: list[str] = []
    true = eval_run.compare

    def compare(bench: Any, entry: Any, *rest: Any) -> dict[str, Any]:
        compared.append(entry.name)
        if len(compared) == 2:
            raise KeyboardInterrupt
        return true(bench, entry, *rest)

    monkeypatch.setattr(eval_run, "compare", compare)
    with pytest.raises(KeyboardInterrupt):
        evaluate(common, *names, out=out)
    monkeypatch.setattr(eval_run, "measure", None)  # every model has been measured
    record = evaluate(common, *names, out=out)
    assert compared == ["b", "lora", "lora"]
    monkeypatch.undo()
    rows = evaluate(common, *names)["metrics"]["rows"]
    assert [r.get("divergence") for r in record["metrics"]["rows"]] == [r.get("divergence") for r in rows]


def test_the_command_line(
    folder: Path, tmp_path: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(eval_row, "saturation", partial(saturation, limit=2))  # a batch of 256 takes a minute
    quiz = tmp_path / "quiz.jsonl"
    quiz.write_text('{"query": "Which?", "choices": ["one", "two"], "gold": 0}\n' * 3)
    cloze = tmp_path / "cloze.jsonl"
    cloze.write_text('{"context": "The river", "continuation": "runs"}\n')
    options = (
        "--sequence",
        "32",
        "--windows",
        "2",
        "--data",
        text_file,
        "--effort",
        "quick",
        "--dtype",
        "float32",
    )
    out = tmp_path / "out.json"
    ran = cli(
        "eval", folder / "a", folder / "lora", *options, "--task", quiz, "--task", cloze, "--task-rows", "2",
        "--task-delimiter", "\\nAnswer: ", "--speed", "full", "--out", out, "--run", tmp_path / "run",
    )  # fmt: skip
    assert ran.code == 0, ran.err
    assert max(map(len, ran.out.splitlines())) <= 80
    for title in (
        "quality (perplexity per token", "distance from a (KL in nats", "quiz, 2 rows", "cloze, 1 rows",
        "size and memory", "speed (tokens per second)", "saturated", 'delimiter "\\nAnswer: "',
    ):  # fmt: skip
        assert title in ran.out
    assert sorted(p.name for p in tmp_path.iterdir()) == ["cloze.jsonl", "out.json", "quiz.jsonl"]
    record = json.loads(out.read_text())
    assert record["config"]["task_delimiter"] == "\nAnswer: "
    row = record["metrics"]["rows"][1]
    assert row["tasks"][0]["accuracy_error"] is not None
    assert row["saturation"]["steps"][0][0] == 1
    assert row["speed_protocol"]["repeats"] == 5
    assert row["speed_protocol_line"].endswith("8 decoded, median of 5 runs, 1 threads, float32 on cpu")
    as_json = cli("eval", folder / "a", *options, "--speed", "none", "--json")
    assert (as_json.code, as_json.err) == (0, "")
    assert json.loads(as_json.out)["metrics"]["rows"][0]["name"] == "a"
    dry = cli("eval", folder / "a", *options, "--dry-run", "--json", "--out", tmp_path / "dry.json")
    assert json.loads(dry.out)["config"]["windows"] == 2
    assert not (tmp_path / "dry.json").exists()


def test_what_is_refused_leaves_nothing(folder: Path, tmp_path: Path, text_file: Path) -> None:
    (tmp_path / "other.json").write_text("{}")
    (tmp_path / "bad.jsonl").write_text('{"query": "q"}\n')
    bare = shutil.copytree(folder / "lora", tmp_path / "bare")
    config = json.loads((bare / "adapter_config.json").read_text())
    (bare / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": None}))
    lost = shutil.copytree(bare, tmp_path / "lost")
    (lost / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": "./gone"}))
    wrong = shutil.copytree(bare, tmp_path / "wrong")
    tiny_checkpoint("llama_mha", tmp_path / "mha")
    (wrong / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": "../mha"}))
    elsewhere = shutil.copytree(bare, tmp_path / "elsewhere")  # PEFT alone would measure the bare base
    (elsewhere / "adapter_config.json").write_text(
        json.dumps({**config, "base_model_name_or_path": str(folder / "a")})
    )
    renamed = {f"wrapped.{name}": t for name, t in load_file(bare / "adapter_model.safetensors").items()}
    save_file(renamed, elsewhere / "adapter_model.safetensors", metadata={"format": "pt"})
    before = sorted(tmp_path.rglob("*"))
    a = folder / "a"
    for arguments, code, cause in (
        ((a, a), 2, "is named 2 times"),
        ((a, "--model", "x"), 2, "--model begins a chain"),
        ((a, "--data", "self"), 2, "The text self"),
        ((a, "--sequence", "300"), 2, "300 tokens are longer than a's 256 positions"),
        ((a, "--task", "absent.jsonl"), 1, "no task file"),
        ((a, "--task", tmp_path / "bad.jsonl"), 1, "bad.jsonl, line 1"),
        ((a, "--task", tmp_path / "bad.jsonl", "--task-rows", "0"), 2, "--task-rows 0"),
        ((a, "--speed", "light"), 2, "no speed 'light'"),
        ((a, "--kl-windows", "-1"), 2, "--kl-windows -1"),
        ((a, "--lm-eval-tasks", str(tmp_path)), 2, "--lm-eval-tasks names a folder"),
        ((a, "--lm-eval", ","), 2, "names no task"),
        ((a, "--reference", tmp_path / "absent"), 1, "no model"),
        ((a, tmp_path / "absent"), 1, "no model"),
        ((a, "--out", tmp_path / "other.json"), 2, "is no evaluation"),
        ((a, "--out", tmp_path / "no" / "out.json"), 2, "cannot be written"),
        ((a, bare), 1, "names no base model"),
        ((a, lost), 1, "The base './gone' of the adapter"),
        ((wrong, "--sequence", "32"), 1, "does not fit the model"),
        ((elsewhere, "--sequence", "32"), 1, "that the model has no place for"),
        ((wrong, "--sequence", "32", "--out", tmp_path / "out.json"), 1, "does not fit the model"),
    ):
        data = () if "--data" in arguments else ("--data", text_file)
        ran = cli("eval", *arguments, *data, "--dtype", "float32", "--run", tmp_path / "run")
        assert ran.code == code, (arguments, ran.err)
        assert cause in ran.complaint[0]
        assert ran.out == ""
        assert sorted(tmp_path.rglob("*")) == before


def test_an_interrupted_comparison_without_out_says_that_nothing_is_kept(
    folder: Path, text_file: Path, tmp_path: Path, interrupted: list[str]
) -> None:
    options = (
        "--sequence",
        "32",
        "--windows",
        "2",
        "--data",
        text_file,
        "--dtype",
        "float32",
        "--speed",
        "none",
    )
    ran = cli("eval", folder / "a", folder / "b", *options)
    assert ran.code == 130
    assert ran.complaint == ("Interrupted.", "Nothing is kept: with --out it would be.")


def test_an_adapter_whose_config_is_no_json(folder: Path, common: Common, tmp_path: Path) -> None:
    broken = shutil.copytree(folder / "lora", tmp_path / "broken")
    (broken / "adapter_config.json").write_text("{")
    with pytest.raises(CompressError, match="does not say which model"):
        evaluate(common, broken)
