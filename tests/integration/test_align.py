"""``compress align`` in a chain: what it writes, refuses and carries on, and that an interrupted run goes on."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from compress.errors import CompressError, UsageError
from compress.model.base_record import BaseRecord
from compress.model.checkpoint import Checkpoint
from compress.pipelines.dispatch import run_verb
from compress.pipelines.settings import Common
from tests.integration.common import PRUNING, TRAINING, assert_recorded, run
from tests.tiny import tiny_checkpoint
from tests.unit.adapters.test_align import hide_galore

LOOP = {key: TRAINING[key] for key in ("steps", "micro_batch", "accumulation", "sequence", "lr")}
SHORT: dict[str, Any] = PRUNING | {"criterion": "magnitude", "repair": "none", "repair_steps": 0, "trials": 1}
pytestmark = pytest.mark.usefixtures("forked_reopen")


def chain(tmp_path: Path, text_file: Path, kind: str = "llama_gqa", **changes: Any) -> Common:
    full = tiny_checkpoint(kind, tmp_path / "full", dtype=torch.bfloat16)
    common = Common(
        run=tmp_path / "run", model=str(full), data=str(text_file), dtype="float32", effort="quick", **changes
    )
    run("prune", common, ratio=0.4, **SHORT)
    return common


@pytest.mark.parametrize("kind", ["llama_gqa", "llama_tied"])
def test_alignment_changes_the_small_base_and_is_never_recovered(
    kind: str, tmp_path: Path, text_file: Path
) -> None:
    common = chain(tmp_path, text_file, kind)
    aligned = run("align", common, **LOOP)
    pruned, folder = Checkpoint(tmp_path / "run" / "01-prune"), Path(aligned["path"])
    out = Checkpoint(folder)
    changed = {name for name in out.names if not torch.equal(out.read(name), pruned.read(name))}
    frozen = "model.embed_tokens.weight" if kind == "llama_tied" else "lm_head.weight"
    assert changed == set(out.names) - {frozen}
    assert {out.dtype(name) for name in out.names} == {torch.bfloat16}
    metrics = aligned["metrics"]
    assert metrics["frozen_parameters"] == out.read(frozen).numel()
    assert metrics["trainable_parameters"] + metrics["frozen_parameters"] == out.parameters
    assert metrics["tokens"] == LOOP["steps"] * LOOP["micro_batch"] * (LOOP["sequence"] - 1)
    assert_recorded(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), folder)
    for name in ("structure.safetensors", "base.json"):
        assert (folder / name).read_bytes() == (pruned.path / name).read_bytes()
    assert not (folder / "training").exists()

    rows = ["original", "pruned", "aligned", "small + adapter", "full + recovered"]
    if kind == "llama_tied":
        rows.insert(3, "quantized")
        folder = Path(run("quantize", common, budget="8bit", rank="0", calibration_tokens=512)["path"])
        assert BaseRecord.load(folder / "base.json").tensors == Checkpoint(tmp_path / "full").digests()
        other = replace(common, run=tmp_path / "other", model=str(folder))
        with pytest.raises(CompressError, match="quantized"):
            run("align", other, **LOOP)
    trained = run("train", common, **(TRAINING | {"lr": 1e-30}))  # an adapter that stays where it began
    assert trained["metrics"]["base"] == folder.name
    recovered = Path(run("recover", common, merge=True)["path"])
    full, merged = Checkpoint(tmp_path / "full"), Checkpoint(recovered / "merged")
    assert all(torch.equal(full.read(name), merged.read(name)) for name in full.names)
    evaluated = run("eval", common, sequence=32, windows=2)
    assert [row["name"] for row in evaluated["metrics"]["rows"]] == rows
    verified = run_verb("verify", common, {}, quiet=True)
    assert verified["ok"], [check for check in verified["checks"] if check["result"] == "differs"]
    page = Path(run("report", common)["report"]).read_text(encoding="utf-8")
    assert "Loss of alignment" in page


def test_a_small_model_whose_base_record_was_changed_is_found(tmp_path: Path, text_file: Path) -> None:
    common = chain(tmp_path, text_file)
    run("align", common, **LOOP)
    file = tmp_path / "run" / "02-align" / "base.json"
    other = json.loads(file.read_text())
    other["tensors"]["lm_head.weight"]["sha256"] = "0" * 64
    file.write_text(json.dumps(other))
    verified = run_verb("verify", common, {}, quiet=True)
    assert {c["check"] for c in verified["checks"] if c["result"] == "differs"} == {"files", "model"}


@pytest.mark.parametrize("loss", [pytest.param("distill", marks=pytest.mark.slow), "both"])
def test_alignment_can_be_distilled(loss: str, tmp_path: Path, text_file: Path) -> None:
    common = chain(tmp_path, text_file)
    aligned = run("align", common, loss=loss, **(LOOP | {"steps": 20}))
    metrics = aligned["metrics"]
    assert aligned["inputs"]["teacher"] == Checkpoint(tmp_path / "full").fingerprint()
    first, last = (sum(part) / 5 for part in (metrics["losses"][:5], metrics["losses"][-5:]))
    assert last < first
    assert run_verb("verify", common, {}, quiet=True)["ok"]


def test_layers_of_different_sizes_are_aligned(tmp_path: Path, text_file: Path) -> None:
    full = tiny_checkpoint("llama_gqa", tmp_path / "full")
    common = Common(
        run=tmp_path / "run", model=str(full), data=str(text_file), dtype="float32", effort="quick"
    )
    run("prune", common, ratio=0.4, shape="global", **SHORT)
    folder = Path(run("align", common, **LOOP)["path"])
    out, before = Checkpoint(folder), Checkpoint(tmp_path / "run" / "01-prune")
    assert sum(not torch.equal(out.read(n), before.read(n)) for n in out.names) == len(out.names) - 1


def test_interrupted_alignment_goes_on_where_it_was(tmp_path: Path, text_file: Path) -> None:
    common = chain(tmp_path, text_file)
    broken = replace(common, run=tmp_path / "broken")
    shutil.copytree(common.run, broken.run)
    steps = LOOP | {"steps": 8}
    whole = Path(run("align", common, **steps)["path"])
    seen: list[int] = []

    def stopping(*arguments: Any) -> None:
        seen.append(arguments[0])
        if len(seen) == 4:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("compress.adapters.run.trained_tokens", _counting(stopping))
        with pytest.raises(KeyboardInterrupt):
            run("align", broken, **steps)
    state = next((tmp_path / "broken").glob("02-align.partial/training/*.safetensors"))
    moments = [name for name in load_file(state) if name.startswith("exp_avg_sq.")]
    assert len(moments) == len(Checkpoint(tmp_path / "full").names) - 1
    again = run("align", broken, **steps)
    assert again["metrics"]["losses"] == json.loads((whole / "stage.json").read_text())["metrics"]["losses"]
    left, right = Checkpoint(Path(again["path"])), Checkpoint(whole)
    assert left.fingerprint() == right.fingerprint()


def test_what_follows_an_interrupted_alignment_says_that_it_does_without(
    tmp_path: Path, text_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    common = chain(tmp_path, text_file)
    trained = {"steps": 1, "micro_batch": 1, "accumulation": 1, "sequence": 32, "rank": 1}
    note = r"02-align\.partial is the unfinished work of an interrupted align\. train .* works on 01-prune:"

    def said(verb: str, options: Common, **given: Any) -> str:
        run_verb(verb, options, given)
        return " ".join(capsys.readouterr().err.split())

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("compress.adapters.run.trained_tokens", _counting(_interrupting))
        with pytest.raises(KeyboardInterrupt):
            run("align", common, **LOOP)
    assert (common.run / "02-align.partial").is_dir()
    quantize = {"budget": "6bit", "rank": "0", "objective": "frobenius", "iterations": 1}
    dry = replace(common, dry_run=True)
    assert re.search(note, said("train", dry, **trained))
    assert "quantize does without it and works on 01-prune" in said("quantize", dry, **quantize)
    assert "unfinished" not in said("align", dry, **LOOP)
    other = replace(common, run=tmp_path / "other")
    shutil.copytree(common.run, other.run)
    assert re.search(note, said("train", other, **trained))
    assert json.loads((other.run / "02-train" / "stage.json").read_text())["metrics"]["base"] == "01-prune"
    assert "unfinished" not in said("train", other, **trained)  # it is there
    said("align", common, **LOOP)
    assert "unfinished" not in said("train", common, **trained)
    assert json.loads((common.run / "03-train" / "stage.json").read_text())["metrics"]["base"] == "02-align"


def _interrupting(*_: Any) -> None:
    raise KeyboardInterrupt


def _counting(stop: Any) -> Any:
    from compress.adapters.loss import trained_tokens

    def counted(labels: torch.Tensor) -> int:
        stop(labels)
        return trained_tokens(labels)

    return counted


def test_what_cannot_be_aligned_is_refused(
    tmp_path: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = tiny_checkpoint("llama_gqa", tmp_path / "full")
    common = Common(
        run=tmp_path / "run", model=str(full), data=str(text_file), dtype="float32", effort="quick"
    )
    with pytest.raises(UsageError, match="was not pruned"):
        run("align", common, **LOOP)
    assert not (tmp_path / "run").exists()
    run("prune", common, ratio=0.4, **SHORT)
    small = replace(common, run=tmp_path / "user", model=str(tmp_path / "run" / "01-prune"))
    with pytest.raises(UsageError, match="no full model to distil from"):
        run("align", small, loss="distill", **LOOP)
    hide_galore(monkeypatch)
    with pytest.raises(CompressError, match="galore-torch, which is not installed"):
        run("align", common, optimizer="galore", **LOOP)
    with pytest.raises(UsageError, match="longer than the model's 256 positions"):
        run("align", common, **(LOOP | {"sequence": 512}))
    assert not list((tmp_path / "run").glob("*align*"))
