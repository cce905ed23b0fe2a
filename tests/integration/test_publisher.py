"""Publisher and user: one makes a small model, the other has only that and the full one, in another workspace."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from compress.errors import CompressError, UsageError
from compress.model.base_record import BaseRecord
from compress.model.checkpoint import Checkpoint
from compress.pipelines.dispatch import run_verb
from compress.pipelines.settings import Common
from tests.fresh import ForkServer
from tests.integration.common import PRUNING, TRAINING, assert_recorded, run
from tests.tiny import tiny_checkpoint

FAST: dict[str, Any] = {"criterion": "magnitude", "repair": "none", "repair_steps": 0, "trials": 1}
SHORT: dict[str, Any] = PRUNING | FAST | {"ratio": 0.4}
UP = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def published(
    tmp_path_factory: pytest.TempPathFactory, text_file: Path, fork_server: ForkServer
) -> dict[str, Path]:
    """The full model, and the small one as its publisher gives it away: a folder outside of any workspace."""
    place = tmp_path_factory.mktemp("publisher")
    full = tiny_checkpoint("llama_gqa", place / "full")
    common = Common(run=place / "run", model=str(full), data=str(text_file), dtype="float32", effort="quick")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("compress.pipelines.reopen.run_fresh", fork_server.run)
        run("prune", common, **SHORT)
        quantized = run("quantize", common, budget="6bit", rank="0", objective="frobenius", iterations=1)
        shutil.copytree(quantized["path"], place / "small")
        shutil.copytree(place / "run" / "01-prune", place / "dense")
    (place / "small" / "stage.json").unlink()
    (place / "dense" / "stage.json").unlink()
    return {"full": full, "small": place / "small", "dense": place / "dense"}


@pytest.fixture
def user(published: dict[str, Path], tmp_path: Path, text_file: Path, forked_reopen: None) -> Common:
    return Common(
        run=tmp_path / "user",
        model=str(published["small"]),
        data=str(text_file),
        dtype="float32",
        effort="quick",
    )


def test_a_user_trains_on_the_small_model_and_recovers_onto_the_full_one(
    published: dict[str, Path], user: Common
) -> None:
    trained = run("train", user, **TRAINING)
    assert trained["metrics"]["base"] == "small"
    with pytest.raises(UsageError, match=r"starts from the small model .*, which was cut from full\."):
        run("recover", user)
    recovered = run("recover", user, onto=str(published["full"]))
    folder = Path(recovered["path"])
    whole = AutoModelForCausalLM.from_pretrained(published["full"], dtype=torch.float32)
    assert_recorded(PeftModel.from_pretrained(whole, folder).eval(), folder)
    rows = run("eval", user, sequence=32, windows=2)["metrics"]["rows"]
    assert [row["name"] for row in rows] == ["original", "small + adapter", "full + recovered"]
    assert rows[2]["parameters"] > rows[0]["parameters"]
    verified = run_verb("verify", user, {}, quiet=True)
    assert verified["ok"], [check for check in verified["checks"] if check["result"] == "differs"]
    assert any(c["check"] == "slices" and c["result"] == "ok" for c in verified["checks"])


def changed(source: Path, target: Path, name: str = UP) -> Path:
    """A copy of the full model in which one tensor was trained on, or merged into."""
    shutil.copytree(source, target)
    tensors = load_file(target / "model.safetensors")
    tensors[name] = tensors[name] + 1e-3
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return target


def test_another_full_model_is_refused_by_its_first_tensor(
    published: dict[str, Path], user: Common, tmp_path: Path
) -> None:
    run("train", user, **TRAINING)
    other = changed(published["full"], tmp_path / "other")
    with pytest.raises(CompressError, match=rf"its tensor {UP} has other values") as refused:
        run("recover", user, onto=str(other))
    assert "the model that was pruned (full)" in refused.value.remedy
    smaller = tiny_checkpoint("llama_mha", tmp_path / "mha")
    with pytest.raises(CompressError, match="was not cut from"):
        run("recover", user, onto=str(smaller))
    assert [p.name for p in user.run.iterdir() if p.is_dir()] == ["01-train"]


def test_without_the_record_the_fingerprint_decides(
    published: dict[str, Path], user: Common, tmp_path: Path
) -> None:
    small = tmp_path / "bare"
    shutil.copytree(published["dense"], small)
    (small / "base.json").unlink()
    user = replace(user, model=str(small))
    run("train", user, **TRAINING)
    with pytest.raises(CompressError, match="its weights have another fingerprint"):
        run("recover", user, onto=str(changed(published["full"], tmp_path / "other")))
    assert run("recover", user, onto=str(published["full"]))["metrics"]["modules"] > 0


def peft_adapter(base: Path, folder: Path, **options: Any) -> Path:
    """A LoRA that its user trained with PEFT alone."""
    settings: dict[str, Any] = {"r": 2, "target_modules": ["q_proj", "down_proj", "lm_head"]} | options
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32),
        LoraConfig(task_type="CAUSAL_LM", **settings),
    )
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.1)
    model.save_pretrained(str(folder), save_embedding_layers=False)
    return folder


def test_an_adapter_that_was_trained_with_peft_alone(
    published: dict[str, Path], user: Common, tmp_path: Path
) -> None:
    user = replace(user, model=str(published["dense"]))
    adapter = peft_adapter(published["dense"], tmp_path / "mine", use_rslora=True)
    recovered = run("recover", user, adapter=str(adapter), onto=str(published["full"]), merge=True)
    folder = Path(recovered["path"])
    merged = AutoModelForCausalLM.from_pretrained(folder / "merged", dtype=torch.float32)
    assert_recorded(merged, folder)
    verified = run_verb("verify", user, {}, quiet=True)
    assert verified["ok"], [check for check in verified["checks"] if check["result"] == "differs"]
    with pytest.raises(CompressError, match=r"its tensor lm_head\.weight has other values"):
        run(
            "recover",
            replace(user, run=tmp_path / "again"),
            adapter=str(adapter),
            onto=str(folder / "merged"),
        )
    assert not (tmp_path / "again").exists()


def config_of(adapter: Path, change: dict[str, Any]) -> None:
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))


def damaged(kind: str, published: dict[str, Path], folder: Path, text_file: Path) -> Path:
    """Adapters that cannot be recovered."""
    if kind == "full":
        return peft_adapter(published["full"], folder)
    adapter = peft_adapter(published["dense"], folder)
    weights = load_file(adapter / "adapter_model.safetensors")
    if kind == "rank":
        config_of(adapter, {"r": 3})
    elif kind == "start":
        config_of(adapter, {"init_lora_weights": "pissa"})
    elif kind == "dora":
        return peft_adapter(published["dense"], folder / "dora", use_dora=True)
    elif kind == "half":
        weights.pop("base_model.model.model.layers.0.mlp.down_proj.lora_B.weight")
    elif kind == "target":
        weights = {name.replace("lm_head", "lm_tail"): tensor for name, tensor in weights.items()}
    if kind in ("base", "structure"):
        entry = {"base": "base_fingerprint", "structure": "structure"}[kind]
        (adapter / "trained_on.json").write_text(json.dumps({entry: "0" * 64}))
    elif kind == "origin":
        (adapter / "trained_on.json").write_text("[]")
    save_file(weights, adapter / "adapter_model.safetensors", metadata={"format": "pt"})
    return adapter


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("full", "where the structure keeps"),
        ("rank", "names the rank 3"),
        ("start", "were not kept"),
        ("dora", "DoRA magnitude"),
        ("half", "has no base_model.model.model.layers.0.mlp.down_proj.lora_B.weight"),
        ("target", "no linear lm_tail"),
        ("base", "a model made of another full model"),
        ("structure", "keeps other groups or channels"),
        ("origin", "is no JSON object"),
    ],
)
def test_adapters_that_do_not_belong_are_refused_and_nothing_is_written(
    kind: str, message: str, published: dict[str, Path], user: Common, tmp_path: Path, text_file: Path
) -> None:
    user = replace(user, model=str(published["dense"]))
    adapter = damaged(kind, published, tmp_path / "adapter", text_file)
    with pytest.raises(CompressError, match=message) as refused:
        run("recover", user, adapter=str(adapter), onto=str(published["full"]))
    assert refused.value.remedy
    assert not user.run.exists()


def test_an_adapter_that_peft_saved_is_held_to_the_folder_it_names(
    published: dict[str, Path], user: Common, tmp_path: Path
) -> None:
    """Two small models of one shape that keep other channels: the factors of one fit the other."""
    one, other = (
        replace(user, run=tmp_path / name, model=str(published["full"])) for name in ("one", "other")
    )
    run("prune", one, **SHORT | {"targets": "mlp"})
    small = Path(run("prune", other, **SHORT | {"targets": "mlp", "criterion": "random"})["path"])
    adapter = peft_adapter(small, tmp_path / "mine")
    with pytest.raises(CompressError, match="keeps other groups or channels"):
        run("recover", one, adapter=str(adapter))
    assert run("recover", other, adapter=str(adapter))["metrics"]["origin_known"] is True
    config_of(adapter, {"base_model_name_or_path": "a/model-elsewhere"})
    assert run("recover", one, adapter=str(adapter))["metrics"]["origin_known"] is False


def test_the_adapter_says_what_it_was_trained_on(published: dict[str, Path], user: Common) -> None:
    """An adapter of ours, offered to a chain whose small model keeps something else."""
    trained = Path(run("train", user, **TRAINING)["path"])
    other = replace(user, run=user.run / ".." / "other", model=str(published["full"]))
    run("prune", other, **SHORT | {"ratio": 0.3})
    with pytest.raises(CompressError, match="keeps other groups or channels"):
        run("recover", other, adapter=str(trained))
    with pytest.raises(UsageError, match="no adapter folder"):
        run("recover", other, adapter=str(trained / "nothing"))


def test_a_quantized_model_alone_goes_back_onto_its_own_base(
    published: dict[str, Path], user: Common, tmp_path: Path
) -> None:
    user = replace(user, model=str(published["full"]))
    run("quantize", user, budget="6bit", rank="0", objective="frobenius", iterations=1)
    run("train", user, **TRAINING)
    with pytest.raises(CompressError, match=rf"not made of .*: its tensor {UP} has other values"):
        run("recover", user, onto=str(changed(published["full"], tmp_path / "other")))
    assert run("recover", user)["metrics"]["modules"] > 0


def test_an_adapter_of_another_quantized_model_is_refused_by_its_first_tensor(
    published: dict[str, Path], user: Common, tmp_path: Path
) -> None:
    """Both models have the same shapes and nothing was pruned: only the record beside the adapter tells them apart."""
    bits: dict[str, Any] = {"budget": "6bit", "rank": "0", "objective": "frobenius", "iterations": 1}
    user = replace(user, model=str(published["full"]))
    run("quantize", user, **bits)
    trained = Path(run("train", user, **TRAINING)["path"])
    other = replace(user, run=tmp_path / "two", model=str(changed(published["full"], tmp_path / "other")))
    run("quantize", other, **bits)
    with pytest.raises(
        CompressError, match=rf"another full model, full: of ours its tensor {UP} has other values"
    ):
        run("recover", other, adapter=str(trained))
    (trained / "base.json").unlink()
    with pytest.raises(CompressError, match=r"a model made of another full model\."):
        run("recover", other, adapter=str(trained))
    assert not (tmp_path / "two" / "02-recover").exists()
    same = replace(user, run=tmp_path / "three")
    run("quantize", same, **bits)
    assert run("recover", same, adapter=str(trained))["metrics"]["modules"] > 0


def test_the_adapter_takes_the_record_of_its_full_model_along(
    published: dict[str, Path], user: Common, tmp_path: Path
) -> None:
    trained = Path(run("train", user, **TRAINING)["path"])
    assert (trained / "base.json").read_bytes() == (published["small"] / "base.json").read_bytes()
    other = replace(user, run=tmp_path / "two", model=str(changed(published["full"], tmp_path / "other")))
    run("prune", other, **SHORT)
    with pytest.raises(
        CompressError, match=rf"another full model, full: of ours its tensor {UP} has other values"
    ):
        run("recover", other, adapter=str(trained))


def test_a_recovered_adapter_says_which_full_model_it_belongs_to(
    published: dict[str, Path], user: Common, tmp_path: Path
) -> None:
    """In the chain, where that model has changed since, and in a folder of its own, on another model."""
    full = tmp_path / "whole"
    shutil.copytree(published["full"], full)
    run("train", user, **TRAINING)
    folder = Path(run("recover", user, onto=str(full))["path"])
    record = BaseRecord.load(folder / "base.json")
    assert (record.name, record.tensors) == ("whole", Checkpoint(published["full"]).digests())
    exported = Path(run("export", user, what="recovered")["path"])
    assert (exported / "base.json").read_bytes() == (folder / "base.json").read_bytes()

    alone = tmp_path / "alone"
    shutil.copytree(exported, alone)
    named = replace(user, model=None)
    config_of(alone, {"base_model_name_or_path": str(full)})
    (row,) = run("eval", named, models=[str(alone)], sequence=32, windows=2)["metrics"]["rows"]
    assert row["parameters"] == Checkpoint(full).parameters
    other = changed(full, tmp_path / "other")
    config_of(alone, {"base_model_name_or_path": str(other)})
    message = (
        rf"alone belongs to whole, and the model in .*other is another: its tensor {UP} has other values"
    )
    with pytest.raises(CompressError, match=message) as refused:
        run("eval", named, models=[str(alone)], sequence=32, windows=2)
    assert "byte for byte" in refused.value.remedy
    (alone / "base.json").unlink()
    assert run("eval", named, models=[str(alone)], sequence=32, windows=2)["metrics"]["rows"]

    shutil.rmtree(full)
    other.rename(full)
    for verb, given in (
        ("eval", {"sequence": 32, "windows": 2}),
        ("export", {"what": "recovered", "format": "dense"}),
        ("generate", {"prompt": "a", "models": "recovered", "tokens": 2}),
    ):
        with pytest.raises(CompressError, match=rf"belongs to whole, .* its tensor {UP} has other values"):
            run(verb, user, **given)


def test_a_trained_adapter_is_not_put_on_another_small_model(
    published: dict[str, Path], user: Common, tmp_path: Path
) -> None:
    """Of the same full model and of the same sizes, but with other channels."""
    runs = {}
    for name, criterion in (("one", "magnitude"), ("two", "random")):
        chain = replace(user, run=tmp_path / name, model=str(published["full"]))
        runs[name] = Path(run("prune", chain, **SHORT | {"targets": "mlp", "criterion": criterion})["path"])
    trained = Path(
        run("train", replace(user, run=tmp_path / "one", model=str(published["full"])), **TRAINING)["path"]
    )
    adapter = tmp_path / "adapter"
    shutil.copytree(trained, adapter)
    (adapter / "stage.json").unlink()
    for name, expected in (("one", None), ("two", "it keeps other groups or channels")):
        config_of(adapter, {"base_model_name_or_path": str(runs[name])})
        given = {"models": [str(adapter)], "sequence": 32, "windows": 2}
        if expected is None:
            assert run("eval", replace(user, model=None), **given)["metrics"]["rows"]
            continue
        with pytest.raises(CompressError, match=expected):
            run("eval", replace(user, model=None), **given)
