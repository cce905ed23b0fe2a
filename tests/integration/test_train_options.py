"""``compress train`` with its starts, scales and targets, through to the recovered model; and what it refuses."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from compress.errors import CompressError, UsageError
from compress.pipelines.dispatch import run_verb
from compress.pipelines.settings import Common
from tests.integration.common import PRUNING, TRAINING, assert_recorded, run
from tests.tiny import tiny_checkpoint

FAST: dict[str, Any] = {"criterion": "magnitude", "repair": "none", "repair_steps": 0, "trials": 1}
SHORT: dict[str, Any] = PRUNING | FAST | {"ratio": 0.4}
pytestmark = pytest.mark.usefixtures("forked_reopen")


@pytest.mark.parametrize(
    ("kind", "given", "modules"),
    [
        ("llama_tied", {"adapter_targets": "all,lm_head", "rslora": True}, 3 * 7 + 1),
        ("llama_gqa", {"method": "pissa", "adapter_targets": "q,v,down"}, 2 * 3),
    ],
)
def test_the_adapter_goes_all_the_way(
    kind: str, given: dict[str, Any], modules: int, tmp_path: Path, text_file: Path
) -> None:
    full = tiny_checkpoint(kind, tmp_path / "full")
    common = Common(
        run=tmp_path / "run", model=str(full), data=str(text_file), dtype="float32", effort="quick"
    )
    run("prune", common, **SHORT)
    run("train", common, **TRAINING, **given)
    recovered = run("recover", common, merge=True)
    metrics, folder = recovered["metrics"], Path(recovered["path"])
    pissa = given.get("method") == "pissa"
    assert metrics["modules"] == modules
    assert metrics["differences"] == (modules if pissa else 0)
    assert metrics["rank"] == TRAINING["rank"] * (2 if pissa else 1)
    merged = AutoModelForCausalLM.from_pretrained(folder / "merged", dtype=torch.float32)
    assert_recorded(merged, folder)
    assert merged.config.tie_word_embeddings is False
    whole = AutoModelForCausalLM.from_pretrained(full, dtype=torch.float32)
    with (
        pytest.warns(UserWarning, match="tie_word_embeddings")
        if kind == "llama_tied"
        else contextlib.nullcontext()
    ):
        assert_recorded(PeftModel.from_pretrained(whole, folder).eval(), folder)
    verified = run_verb("verify", common, {}, quiet=True)
    assert verified["ok"], [check for check in verified["checks"] if check["result"] == "differs"]


def test_what_adapters_cannot_have_is_refused(tmp_path: Path, text_file: Path) -> None:
    full = tiny_checkpoint("llama_tied", tmp_path / "full")
    common = Common(
        run=tmp_path / "run", model=str(full), data=str(text_file), dtype="float32", effort="quick"
    )
    for given, message in (
        ({"adapter_targets": "q,qkv"}, r"no adapter target qkv\."),
        ({"adapter_targets": ","}, "no adapter target at all"),
        ({"method": "pissa", "adapter_targets": "all,lm_head"}, "tied to the embedding"),
        ({"method": "lq"}, "is not quantized"),
    ):
        with pytest.raises(UsageError, match=message):
            run("train", common, **TRAINING, **given)
    run("quantize", common, budget="8bit", rank="0", objective="frobenius", iterations=1)
    with pytest.raises(UsageError, match="its weights are quantized"):
        run("train", common, method="pissa", **TRAINING)
    assert [path.name for path in (tmp_path / "run").iterdir() if path.is_dir()] == ["01-quantize"]


def test_a_tied_head_in_codes_carries_no_adapter(tmp_path: Path, text_file: Path) -> None:
    full = tiny_checkpoint("llama_tied", tmp_path / "full")
    common = Common(
        run=tmp_path / "run", model=str(full), data=str(text_file), dtype="float32", effort="quick"
    )
    run("quantize", common, budget="4.5bit", objective="frobenius", embeddings="8bit")
    with pytest.raises(CompressError, match="reads the codes of the embedding") as caught:
        run("train", common, **TRAINING, adapter_targets="all,lm_head")
    assert "--embeddings keep" in caught.value.remedy
    assert not list((tmp_path / "run").glob("*train*"))
