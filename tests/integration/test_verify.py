"""``compress verify``: an intact chain passes; whatever is changed in it is found and named, and nothing is written."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from compress.__main__ import app
from compress.pipelines.identity import record_digest
from compress.pipelines.settings import Common
from tests.fresh import ForkServer
from tests.integration.common import PRUNING, TRAINING, run
from tests.tiny import tiny_checkpoint

MATRIX = "model.layers.1.mlp.down_proj"
SHORT: dict[str, Any] = PRUNING | {"calibration_tokens": 512, "repair_steps": 2}
STAGES = ("01-prune", "02-quantize", "03-train", "04-recover", "05-eval")


@pytest.fixture(scope="module")
def finished(
    tmp_path_factory: pytest.TempPathFactory, text_file: Path, fork_server: ForkServer
) -> Iterator[Path]:
    """A folder with ``full`` and the finished chain ``run``; it must not be changed."""
    place = tmp_path_factory.mktemp("verify")
    full = tiny_checkpoint("llama_gqa", place / "full")
    common = Common(run=place / "run", model=str(full), data=str(text_file), dtype="float32", effort="quick")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("compress.pipelines.reopen.run_fresh", fork_server.run)
        run("prune", common, ratio=0.4, **SHORT)
        run("quantize", common, budget="5bit", rank="4", calibration_tokens=512)
        run("train", common, **TRAINING)
        run("recover", common, merge=True)
        run("eval", common, sequence=32, windows=2)
    before = contents(place)
    yield place
    assert contents(place) == before


@pytest.fixture
def chain(finished: Path, tmp_path: Path) -> Path:
    """A copy of the finished chain, whose original stays where it is."""
    shutil.copytree(finished / "run", tmp_path / "run")
    return tmp_path / "run"


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def verify(*arguments: object) -> tuple[int, list[dict[str, str]]]:
    """Exit code and checks."""
    result = CliRunner().invoke(app, ["verify", "--json", *(str(a) for a in arguments)])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    assert result.stderr == ""
    answer = json.loads(result.stdout)
    assert answer["ok"] == (result.exit_code == 0)
    assert sum(answer["counts"].values()) == len(answer["checks"])
    return result.exit_code, answer["checks"]


def failures(*arguments: object) -> list[dict[str, str]]:
    code, checks = verify(*arguments)
    wrong = [check for check in checks if check["result"] == "differs"]
    assert (code == 1) == bool(wrong)
    assert all(check["remedy"].endswith(".") and check["remedy"][0].isupper() for check in wrong)
    return wrong


def named(found: list[dict[str, str]], stage: str, check: str, *words: str) -> bool:
    """Whether a failure of this check of this stage has all of the words."""
    return any(
        f["stage"] == stage and f["check"] == check and all(w in f["detail"] for w in words) for f in found
    )


def change_json(path: Path, change: Callable[[Any], None]) -> None:
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n")


def forget(run_: Path) -> None:
    """Make the stages those of a version that recorded no hashes."""
    for name in STAGES:
        change_json(run_ / name / "stage.json", lambda r: (r.pop("files"), r.pop("record_sha256")))


def change_tensors(file: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Write a safetensors file again with other tensors and the same metadata."""
    with safe_open(str(file), framework="pt") as opened:
        metadata = opened.metadata()
    tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}
    change(tensors)
    save_file(tensors, file, metadata=metadata)


def flip(tensor: torch.Tensor, bit: int = 3, at: int = 0) -> None:
    """Flip one bit of one byte."""
    tensor.view(torch.uint8).view(-1)[at] ^= 1 << bit


def test_an_intact_chain_passes_and_nothing_is_written(chain: Path) -> None:
    before = contents(chain)
    code, checks = verify("--run", chain)
    assert code == 0, [c for c in checks if c["result"] == "differs"]
    assert contents(chain) == before
    assert {c["check"] for c in checks if c["result"] != "ok"} == {"output errors"}
    found = {stage: [c["check"] for c in checks if c["stage"] == stage] for stage in ("original", *STAGES)}
    shared = ["record", "files", "inputs"]
    assert found == {
        "original": ["fingerprint"],
        "01-prune": [*shared, "tensors", "shapes", "sizes", "structure", "logits"],
        "02-quantize": [
            *shared, "tensors", "shapes", "sizes", "structure", "stored bits", "allocation", "errors", "dense tensors",
            "logits", "output errors",
        ],
        "03-train": [*shared, "tensors", "factors", "base"],
        "04-recover": [*shared, "tensors", "factors", "base", "slices"],
        "05-eval": [*shared, "sizes"],
    }  # fmt: skip
    assert [c["check"] for c in checks if c["stage"] == "04-recover/merged"] == ["shapes"]


def test_other_kinds_of_stages_pass(tmp_path: Path, text_file: Path, forked_reopen: None) -> None:
    """Layers that differ, the data-free objective, an adapter from the model's factors, a cut recovered rank."""
    full = tiny_checkpoint("llama_mha", tmp_path / "full")
    common = Common(
        run=tmp_path / "run", model=str(full), data=str(text_file), dtype="float32", effort="quick"
    )
    run("prune", common, ratio=0.4, shape="allocated", **SHORT | {"repair": "none", "repair_steps": 0})
    run("quantize", common, budget="6bit", budget_includes="none", rank="4", objective="frobenius")
    run("train", common, method="lq", **TRAINING)
    metrics = run("recover", common, compress_rank=2)["metrics"]
    assert metrics["truncation_error"] > 0.01
    assert metrics["differences"] > 0
    code, checks = verify("--run", tmp_path / "run")
    assert code == 0, [c for c in checks if c["result"] == "differs"]
    assert {c["result"] for c in checks} == {"ok"}
    change_json(
        tmp_path / "run" / "04-recover" / "stage.json", scaled("metrics", "truncation_error", by=1.01)
    )
    assert named(failures("--run", tmp_path / "run"), "04-recover", "slices", "truncation_error")


def test_a_chain_without_hashes_is_no_failure(chain: Path) -> None:
    forget(chain)
    code, checks = verify("--run", chain)
    assert code == 0, [c for c in checks if c["result"] == "differs"]
    unknown = [(c["stage"], c["check"]) for c in checks if c["result"] == "not recorded"]
    assert unknown == [(name, check) for name in STAGES for check in ("record", "files")]


def test_the_table_says_what_differs_and_what_to_do(chain: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    (chain / "03-train" / "adapter_config.json").unlink()
    result = CliRunner().invoke(app, ["verify", "--run", str(chain)])
    assert result.exit_code == 1
    assert "adapter_config.json is missing" in result.stdout
    assert (
        "03-train, files: Restore the folder from a copy, or make it again with compress train --redo."
        in (result.stdout)
    )
    assert "differ." in result.stderr
    assert "error:" not in result.stderr


BITS = [
    (f"{MATRIX}.weight", 0),
    (f"{MATRIX}.weight_scale_codes", 0),
    (f"{MATRIX}.weight_scale_max", 1),
    (f"{MATRIX}.weight_offset", 3),
    (f"{MATRIX}.factor_out_codes", 5),
    (f"{MATRIX}.factor_in_scale_codes", 0),
]


@pytest.mark.parametrize(("tensor", "at"), BITS, ids=[name.rpartition(".")[2] for name, _ in BITS])
@pytest.mark.parametrize("hashes", [True, False], ids=["hashes", "no-hashes"])
def test_one_bit_of_a_quantized_matrix(hashes: bool, tensor: str, at: int, chain: Path) -> None:
    if not hashes:
        forget(chain)
    change_tensors(chain / "02-quantize" / "model.safetensors", lambda tensors: flip(tensors[tensor], at=at))
    found = failures("--run", chain)
    assert {f["stage"] for f in found} == {"02-quantize"}
    assert named(found, "02-quantize", "errors", f"squared_error of {MATRIX}:")
    others = [f["detail"] for f in found if f["check"] == "errors" and MATRIX not in f["detail"]]
    assert all(detail.startswith("squared_error of all matrices") for detail in others)
    assert named(found, "02-quantize", "files", "model.safetensors", "other content") == hashes


def test_one_bit_of_what_is_not_quantized(chain: Path) -> None:
    forget(chain)
    file = chain / "02-quantize" / "model.safetensors"
    change_tensors(file, lambda tensors: flip(tensors["model.norm.weight"], bit=0))
    found = failures("--run", chain)
    assert [(f["stage"], f["check"]) for f in found] == [("02-quantize", "dense tensors")]
    assert "model.norm.weight" in found[0]["detail"]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("stage", ["01-prune", "02-quantize", "04-recover/merged"])
def test_a_number_that_is_none(stage: str, value: float, chain: Path) -> None:
    forget(chain)
    change_tensors(
        chain / stage / "model.safetensors", lambda tensors: tensors["model.norm.weight"].fill_(value)
    )
    found = failures("--run", chain)
    where = "merged/model.safetensors" if "merged" in stage else "in model.safetensors"
    assert named(found, stage.partition("/")[0], "tensors", "model.norm.weight", where, "64 values")


LOST = [
    ("01-prune", "model.safetensors", "model.layers.0.input_layernorm.weight", "shapes"),
    ("01-prune", "model.safetensors", "model.layers.0.self_attn.q_proj.weight", "model"),
    ("01-prune", "structure.safetensors", "layers.1.channels", "structure"),
    ("02-quantize", "model.safetensors", f"{MATRIX}.weight_scale_max", "shapes"),
    ("02-quantize", "model.safetensors", f"{MATRIX}.factor_in_codes", "shapes"),
    ("02-quantize", "model.safetensors", "model.norm.weight", "shapes"),
    ("03-train", "adapter_model.safetensors", f"base_model.model.{MATRIX}.lora_A.weight", "factors"),
    ("04-recover", "adapter_model.safetensors", f"base_model.model.{MATRIX}.lora_B.weight", "factors"),
]


@pytest.mark.parametrize(("stage", "file", "tensor", "check"), LOST)
def test_a_lost_tensor(stage: str, file: str, tensor: str, check: str, chain: Path) -> None:
    forget(chain)
    change_tensors(chain / stage / file, lambda tensors: tensors.pop(tensor))
    found = failures("--run", chain)
    word = "incomplete" if check == "structure" else tensor
    assert any(f["stage"] == stage and word in f["detail"] for f in found), found


def set_in(*keys: str | int, to: Any) -> Callable[[Any], None]:
    def change(value: Any) -> None:
        for key in keys[:-1]:
            value = value[key]
        assert value[keys[-1]] != to
        value[keys[-1]] = to

    return change


def scaled(*keys: str | int, by: float) -> Callable[[Any], None]:
    def change(value: Any) -> None:
        for key in keys[:-1]:
            value = value[key]
        value[keys[-1]] *= by

    return change


NUMBERS: list[tuple[str, Callable[[Any], None], str, str]] = [
    ("01-prune/stage.json", scaled("metrics", "after", "parameters", by=2), "sizes", "parameters"),
    ("01-prune/stage.json", scaled("metrics", "after", "bytes", by=2), "sizes", "bytes"),
    ("01-prune/stage.json", scaled("metrics", "achieved_ratio", by=1.01), "sizes", "achieved_ratio"),
    ("01-prune/stage.json", scaled("metrics", "removed_bytes", by=1.01), "sizes", "removed_bytes"),
    ("01-prune/stage.json", set_in("metrics", "reopened_relative_error", to=0.01), "logits", "reopened_relative_error"),
    ("01-prune/stage.json", set_in("metrics", "kept", "kv_groups", 0, to=[0, 3]), "structure", "KV groups"),
    ("01-prune/stage.json", set_in("inputs", "model", to="0" * 64), "inputs", "another model"),
    ("01-prune/stage.json", set_in("config", "ratio", to=0.5), "record", "the id"),
    ("01-prune/config.json", set_in("intermediate_size", to=40), "model", "shape"),
    ("02-quantize/stage.json", scaled("metrics", "squared_error", by=1.0001), "errors", "all matrices"),
    ("02-quantize/stage.json", scaled("metrics", "matrices", 3, "squared_error", by=1.0001), "errors", "o_proj"),
    ("02-quantize/stage.json", scaled("metrics", "matrices", 0, "relative_error", by=1.001), "errors", "q_proj"),
    ("02-quantize/stage.json", scaled("metrics", "matrices", 1, "stored_bits", by=2), "stored bits", "k_proj"),
    ("02-quantize/stage.json", scaled("metrics", "stored_bits_per_weight", by=1.01), "stored bits", "per_weight"),
    ("02-quantize/stage.json", scaled("metrics", "allocation", "objective", by=0.9), "allocation", "certificate"),
    ("02-quantize/allocation.json", scaled("matrices", 2, "stored_bits", by=2), "stored bits", "v_proj"),
    ("02-quantize/allocation.json", scaled("certificate", "objective", by=1.01), "allocation", "objective"),
    ("02-quantize/allocation.json", scaled("certificate", "lower_bound", by=1.01), "allocation", "above the objective"),
    ("02-quantize/allocation.json", scaled("certificate", "lower_bound", by=0.9), "allocation", "gap"),
    ("02-quantize/allocation.json", scaled("certificate", "size", by=2), "allocation", "size of"),
    ("02-quantize/allocation.json", set_in("limit_bits", to=1000), "allocation", "above limit_bits"),
    ("02-quantize/allocation.json", scaled("limit_bits", by=2), "allocation", "limit_bits"),
    ("02-quantize/config.json", set_in("quantization_config", "matrices", MATRIX, "rank", to=3), "shapes", MATRIX),
    ("02-quantize/config.json", set_in("quantization_config", "matrices", MATRIX, "rank", to=0), "shapes", MATRIX),
    ("02-quantize/config.json", set_in("quantization_config", "matrices", MATRIX, "rank", to="4"), "model", "read"),
    ("02-quantize/config.json", set_in("quantization_config", "format_version", to=9), "model", "version"),
    ("03-train/stage.json", scaled("metrics", "trainable_parameters", by=2), "factors", "trainable"),
    ("03-train/adapter_config.json", set_in("base_model_name_or_path", to="01-prune"), "base", "01-prune"),
    ("03-train/adapter_config.json", set_in("r", to=5), "adapter", "rank 5"),
    ("04-recover/stage.json", scaled("metrics", "delta_norm", by=1.001), "factors", "delta_norm"),
    ("04-recover/stage.json", set_in("metrics", "truncation_error", to=0.1), "slices", "truncation"),
    ("04-recover/adapter_config.json", set_in("lora_alpha", to=32), "slices", "scale"),
    ("04-recover/adapter_config.json", set_in("base_model_name_or_path", to="02-quantize"), "base", "02"),
    ("04-recover/stage.json", set_in("inputs", "full", to="0" * 64), "base", "base.json"),
    ("05-eval/stage.json", scaled("metrics", "rows", 1, "bytes", by=2), "sizes", "pruned"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("file", "change", "check", "word"), NUMBERS, ids=[f"{n[0]}-{n[2]}-{n[3]}" for n in NUMBERS]
)
def test_a_changed_number(
    file: str, change: Callable[[Any], None], check: str, word: str, chain: Path
) -> None:
    forget(chain)
    change_json(chain / file, change)
    found = failures(chain / file.partition("/")[0])
    assert named(found, file.partition("/")[0], check, word), found


def test_hashes_find_numbers_that_nothing_else_can_check(chain: Path) -> None:
    change_json(chain / "02-quantize" / "stage.json", scaled("metrics", "after", "perplexity", by=0.5))
    change_json(chain / "02-quantize" / "generation_config.json", set_in("eos_token_id", to=5))
    found = failures("--run", chain)
    assert [(f["check"], f["detail"]) for f in found] == [
        ("record", "stage.json was changed after the stage was complete"),
        ("files", found[1]["detail"]),
    ]
    assert "generation_config.json" in found[1]["detail"]


def test_a_truncated_file(chain: Path) -> None:
    file = chain / "02-quantize" / "model.safetensors"
    size = file.stat().st_size
    with file.open("r+b") as opened:
        opened.truncate(size - 100)
    found = failures("--run", chain)
    assert named(found, "02-quantize", "files", f"{size - 100} bytes, {size} recorded")
    assert named(found, "02-quantize", "headers", "model.safetensors is broken")
    file.write_bytes(b"")
    found = failures(chain / "02-quantize")
    assert named(found, "02-quantize", "headers", "its header does not fit")


@pytest.mark.parametrize("hashes", [True, False], ids=["hashes", "no-hashes"])
def test_the_models_of_two_stages_swapped(hashes: bool, chain: Path) -> None:
    if not hashes:
        forget(chain)
    one, other = (chain / name / "model.safetensors" for name in STAGES[:2])
    shutil.move(one, chain / "held")
    shutil.move(other, one)
    shutil.move(chain / "held", other)
    found = failures("--run", chain)
    assert {"01-prune", "02-quantize"} <= {f["stage"] for f in found}
    if hashes:
        for name, from_ in (("01-prune", "02-quantize"), ("02-quantize", "01-prune")):
            own = [f["detail"] for f in found if (f["stage"], f["check"]) == (name, "files")]
            size = (chain / name / "model.safetensors").stat().st_size
            assert len(own) == 1
            assert f"it is model.safetensors of {from_}" in own[0] or f"has {size} bytes" in own[0]


def test_the_folders_of_two_stages_swapped(chain: Path) -> None:
    (chain / "01-prune").rename(chain / "held")
    (chain / "02-quantize").rename(chain / "01-prune")
    (chain / "held").rename(chain / "02-quantize")
    found = failures("--run", chain)
    assert named(found, "01-prune", "record", "a stage of quantize")
    assert named(found, "02-quantize", "record", "a stage of prune")


def test_a_stage_of_another_chain(chain: Path, finished: Path, text_file: Path, forked_reopen: None) -> None:
    other = Common(
        run=chain.parent / "other",
        model=str(finished / "full"),
        data=str(text_file),
        dtype="float32",
        effort="quick",
    )
    made = run("prune", other, ratio=0.3, **SHORT)
    shutil.rmtree(chain / "01-prune")
    shutil.copytree(made["path"], chain / "01-prune")
    found = failures("--run", chain)
    assert named(found, "02-quantize", "inputs", "another model")
    assert not any(f["stage"] == "01-prune" for f in found)


def test_another_original(chain: Path, tmp_path: Path) -> None:
    other = tiny_checkpoint("llama_gqa", tmp_path / "other", seed=1)
    change_json(chain / "run.json", lambda r: r["model"].update(path=str(other)))
    found = failures("--run", chain)
    assert [(f["stage"], f["check"]) for f in found] == [("original", "fingerprint")]


def test_a_broken_original(chain: Path, finished: Path, tmp_path: Path) -> None:
    shutil.copytree(finished / "full", tmp_path / "broken")
    (tmp_path / "broken" / "model.safetensors").write_bytes(b"{}")
    change_json(chain / "run.json", lambda r: r["model"].update(path=str(tmp_path / "broken")))
    assert named(failures("--run", chain), "original", "fingerprint", "model.safetensors is broken")


def test_a_model_that_is_gone_is_not_a_failure(chain: Path, tmp_path: Path) -> None:
    change_json(chain / "run.json", lambda r: r["model"].update(path=str(tmp_path / "gone")))
    code, checks = verify("--run", chain)
    assert code == 0
    assert [(c["stage"], c["check"]) for c in checks if c["result"] == "not checked"] == [
        ("original", "fingerprint"),
        ("02-quantize", "output errors"),
    ]


def test_a_stage_that_is_gone_or_has_no_record(chain: Path) -> None:
    shutil.rmtree(chain / "05-eval")
    change_json(chain / "04-recover" / "stage.json", lambda r: r.pop("inputs"))
    (chain / "01-prune" / "stage.json").write_text("{")
    found = failures("--run", chain)
    assert {f["stage"] for f in found if f["check"] == "record"} == {"01-prune", "04-recover", "05-eval"}
    shutil.copytree(chain / "04-recover", chain.parent / "alone")
    result = CliRunner().invoke(app, ["verify", str(chain.parent / "alone")])
    assert (result.exit_code, result.stdout) == (1, "")
    assert "stage.json lacks 'inputs'" in result.stderr


def test_a_missing_and_a_foreign_file(chain: Path) -> None:
    (chain / "01-prune" / "tokenizer.json").unlink()
    (chain / "01-prune" / "notes.txt").write_text("mine")
    found = failures(chain / "01-prune")
    assert [(f["check"], f["detail"]) for f in found] == [("files", "tokenizer.json is missing")]
    (chain / "03-train" / "notes.txt").write_text("mine")
    code, checks = verify(chain / "03-train")
    assert code == 0
    assert any("not part of the stage: notes.txt" in c["detail"] for c in checks)


def shifted(tensors: dict[str, torch.Tensor], name: str) -> None:
    """Give a row where something was pruned a weight."""
    tensor = tensors[name]
    empty = (tensor == 0).all(dim=1).nonzero().flatten()
    tensor[empty[0], 0] = 1e-3


RECOVERED: list[tuple[Callable[[dict[str, torch.Tensor]], object], str]] = [
    (
        lambda t: flip(t["base_model.model.model.layers.0.mlp.up_proj.lora_A.weight"], bit=0),
        "is not the trained",
    ),
    (lambda t: shifted(t, "base_model.model.model.layers.0.mlp.up_proj.lora_B.weight"), "is not zero"),
]


@pytest.mark.parametrize(("change", "word"), RECOVERED, ids=["value", "pruned-row"])
def test_a_recovered_adapter_that_is_not_the_trained_one(
    change: Callable[[dict[str, torch.Tensor]], object], word: str, chain: Path
) -> None:
    forget(chain)
    change_tensors(chain / "04-recover" / "adapter_model.safetensors", change)
    assert named(failures("--run", chain), "04-recover", "slices", "model.layers.0.mlp.up_proj", word)


def test_bare_folders_and_copies(chain: Path, finished: Path, tmp_path: Path) -> None:
    copied = tmp_path / "copied"
    shutil.copytree(chain / "02-quantize", copied)
    code, checks = verify(copied)
    assert code == 0
    outcome = {c["check"]: c["result"] for c in checks}
    assert (outcome["files"], outcome["stored bits"], outcome["allocation"]) == ("ok", "ok", "ok")
    assert (outcome["inputs"], outcome["errors"]) == ("not checked", "not checked")
    (copied / "stage.json").unlink()
    adapter = tmp_path / "adapter"
    shutil.copytree(chain / "04-recover", adapter)
    (adapter / "stage.json").unlink()
    code, checks = verify(finished / "full", copied, adapter, chain)
    assert code == 0, [check for check in checks if check["result"] == "differs"]
    bare = {(Path(c["stage"]).name, c["check"]): c["result"] for c in checks if "/" in c["stage"]}
    assert bare[("full", "shapes")] == bare[("copied", "allocation")] == bare[("adapter", "factors")] == "ok"
    assert bare[("copied", "errors")] == "not recorded"
    assert {c["stage"] for c in checks} >= set(STAGES)
    change_tensors(copied / "model.safetensors", lambda tensors: tensors.pop(f"{MATRIX}.weight_offset"))
    assert failures(copied)[0]["detail"] == f"the tensor {MATRIX}.weight_offset is missing"


def test_what_cannot_be_verified_is_wrong_usage(chain: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "05-eval.partial").mkdir()
    (tmp_path / "05-eval.partial" / "partial.json").write_text("{}")
    for arguments, cause in (
        (("--run", str(tmp_path / "no")), "nothing to verify"),
        (("--run", str(tmp_path / "empty")), "nothing to verify"),
        ((str(tmp_path / "empty"),), "is no stage"),
        ((str(tmp_path / "no"),), "is no stage"),
        ((str(tmp_path / "05-eval.partial"),), "unfinished work"),
    ):
        result = CliRunner().invoke(app, ["verify", *arguments])
        assert (result.exit_code, result.stdout) == (2, "")
        assert cause in result.stderr
    assert not (tmp_path / "no").exists()


def test_the_hash_of_a_record_survives_json(chain: Path) -> None:
    record = json.loads((chain / "01-prune" / "stage.json").read_text())
    assert record["record_sha256"] == record_digest(record)
    assert record_digest({"a": (1, 2), "b": Path("x"), "c": {2: 0.1, 10: 1e-300}}) == record_digest(
        json.loads(json.dumps({"a": [1, 2], "b": "x", "c": {"2": 0.1, "10": 1e-300}}))
    )
    assert record_digest({"a": 1}) != record_digest({"a": 2})
