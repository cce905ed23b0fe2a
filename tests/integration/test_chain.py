"""The whole chain, verb by verb, on a tiny model of every declared architecture."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import compress  # noqa: F401  (registers the LQ format)
from compress.errors import CompressError, UsageError
from compress.pipelines import recover as recover_module
from compress.pipelines.reopen import run_fresh
from compress.pipelines.settings import Common
from compress.structure import StructureMap
from tests.fresh import ForkServer
from tests.integration.common import PRUNING, TRAINING, assert_recorded, logits, run
from tests.tiny import DENSE, tiny_checkpoint


@pytest.mark.parametrize("kind", DENSE)
def test_chain(
    kind: str, tmp_path: Path, text_file: Path, fork_server: ForkServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fresh(script: str) -> subprocess.CompletedProcess[str]:
        """One family pays for a real process, for the recovered adapter (test_reopen.py has one for a model)."""
        real = kind == DENSE[0] and "04-recover" in script
        return run_fresh(script) if real else fork_server.run(script)

    monkeypatch.setattr("compress.pipelines.reopen.run_fresh", fresh)
    full = tiny_checkpoint(kind, tmp_path / "full")
    common = Common(
        run=tmp_path / "run", model=str(full), data=str(text_file), dtype="float32", threads=1, effort="quick"
    )
    pruned = run("prune", common, ratio=0.4, **PRUNING)
    quantized = run("quantize", common, budget="4.5bit")
    trained = run("train", common, **TRAINING)
    recovered = run("recover", common)
    evaluated = run("eval", common, sequence=32, windows=4)
    page = Path(run("report", common)["report"])

    assert [p.name for p in sorted((tmp_path / "run").iterdir()) if p.is_dir()] == [
        "01-prune", "02-quantize", "03-train", "04-recover", "05-eval",
    ]  # fmt: skip
    assert_recorded(
        AutoModelForCausalLM.from_pretrained(pruned["path"], dtype=torch.float32), Path(pruned["path"])
    )
    assert_recorded(
        AutoModelForCausalLM.from_pretrained(quantized["path"], dtype=torch.float32), Path(quantized["path"])
    )
    whole = AutoModelForCausalLM.from_pretrained(full, dtype=torch.float32)
    plain = logits(whole, load_file(Path(recovered["path"]) / "logits.safetensors")["input_ids"])
    adapted = PeftModel.from_pretrained(whole, recovered["path"]).eval()
    assert_recorded(adapted, Path(recovered["path"]))
    assert not torch.allclose(plain, load_file(Path(recovered["path"]) / "logits.safetensors")["logits"])

    structure = StructureMap.load(Path(pruned["path"]) / "structure.safetensors")
    assert structure.uniform is not None
    assert not structure.is_identity
    metrics = quantized["metrics"]
    assert metrics["stored_bits_per_weight"] <= 4.5
    assert metrics["after"]["bytes"] < metrics["before"]["bytes"]
    assert trained["metrics"]["tokens"] > 0
    names = [row["name"] for row in evaluated["metrics"]["rows"]]
    assert names == ["original", "pruned", "quantized", "small + adapter", "full + recovered"]
    assert "<html" in page.read_text(encoding="utf-8")

    again = run("quantize", common, budget="4.5bit")
    assert again["created"] == quantized["created"]
    with pytest.raises(UsageError, match=r"budget: 4\.5bit -> 5bit"):
        run("quantize", common, budget="5bit")


@pytest.mark.usefixtures("forked_reopen")
def test_recover_trains_first_and_merges(
    tmp_path: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = tiny_checkpoint("llama_gqa", tmp_path / "full")
    common = Common(
        run=tmp_path / "run", model=str(full), data=str(text_file), dtype="float32", effort="quick"
    )
    run("prune", common, ratio=0.4, **PRUNING)
    whole, broken = recover_module.merge_adapter, []

    def spoilt(*given: Any, **options: Any) -> Path:
        folder = Path(whole(*given, **options))
        tensors = load_file(folder / "model.safetensors")
        tensors["model.layers.1.mlp.up_proj.weight"] += 1e-2
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        broken.append(folder)
        return folder

    monkeypatch.setattr(recover_module, "merge_adapter", spoilt)
    with pytest.raises(CompressError, match="merged model gives other logits than its adapter"):
        run("recover", common, merge=True)
    assert len(broken) == 1
    monkeypatch.setattr(recover_module, "merge_adapter", whole)
    recovered = run("recover", common, merge=True)
    stages = json.loads((tmp_path / "run" / "run.json").read_text())["stages"]
    assert stages == ["01-prune", "02-train", "03-recover"]
    folder = Path(recovered["path"])
    merged = AutoModelForCausalLM.from_pretrained(folder / "merged", dtype=torch.float32)
    assert_recorded(merged, folder)
    assert_recorded(merged, folder / "merged")
    metrics = recovered["metrics"]
    assert 0 <= metrics["merged_reopened_relative_error"] <= 1e-4
    assert 0 <= metrics["merged_relative_error"] <= 1e-4


@pytest.mark.usefixtures("forked_reopen")
def test_a_merged_model_in_16_bits_is_rounded_and_opens(tmp_path: Path, text_file: Path) -> None:
    full = tiny_checkpoint("llama_gqa", tmp_path / "full", dtype=torch.bfloat16)
    common = Common(
        run=tmp_path / "run", model=str(full), data=str(text_file), dtype="float32", effort="quick"
    )
    fast = {"criterion": "magnitude", "repair": "none", "repair_steps": 0, "trials": 1}
    run("prune", common, **{**PRUNING, **fast}, ratio=0.4)
    recovered = run("recover", common, merge=True)
    folder = Path(recovered["path"])
    merged = AutoModelForCausalLM.from_pretrained(folder / "merged", dtype=torch.float32)
    assert_recorded(merged, folder / "merged")
    ours, beside = (load_file(each / "logits.safetensors")["logits"] for each in (folder / "merged", folder))
    distance = float((ours - beside).abs().max() / beside.abs().max())
    assert recovered["metrics"]["merged_relative_error"] == pytest.approx(distance)
    assert 1e-4 < distance < 0.1


@pytest.mark.usefixtures("forked_reopen")
def test_lq_factors_are_not_added_twice(tmp_path: Path, text_file: Path) -> None:
    full = tiny_checkpoint("llama_gqa", tmp_path / "full")
    common = Common(
        run=tmp_path / "run", model=str(full), data=str(text_file), dtype="float32", effort="quick"
    )
    run("prune", common, ratio=0.4, **PRUNING)
    run("quantize", common, budget="5bit", rank="4")
    run("train", common, method="lq", **(TRAINING | {"lr": 1e-12}))
    recovered = Path(run("recover", common)["path"])
    ids = load_file(recovered / "logits.safetensors")["input_ids"]
    whole = AutoModelForCausalLM.from_pretrained(full, dtype=torch.float32)
    plain = logits(whole, ids)
    adapted = logits(PeftModel.from_pretrained(whole, recovered).eval(), ids)
    torch.testing.assert_close(adapted, plain, rtol=1e-3, atol=1e-3)
