"""What ``recover`` says of the rank of an adapter whose start was subtracted, and of a rank that cuts nothing."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from compress.pipelines.dispatch import run_verb
from compress.pipelines.settings import Common
from tests.integration.common import PRUNING, TRAINING, run
from tests.tiny import tiny_checkpoint

PRUNE: dict[str, Any] = PRUNING | {"criterion": "magnitude", "repair": "none", "repair_steps": 0, "trials": 1}


def lost(folder: Path, rank: int) -> float:
    """What the best adapter of a rank loses of all deltas in a folder, from the singular values of the deltas."""
    tensors, config = (
        load_file(folder / "adapter_model.safetensors"),
        json.loads((folder / "adapter_config.json").read_text()),
    )
    assert not config["alpha_pattern"]  # one scale in all modules
    tail = whole = 0.0
    for name in tensors:
        if name.endswith("lora_A.weight"):
            delta = tensors[name.replace("lora_A", "lora_B")].double() @ tensors[name].double()
            values = torch.linalg.svdvals(delta).square()
            tail, whole = tail + float(values[rank:].sum()), whole + float(values.sum())
    return math.sqrt(tail / whole)


@pytest.mark.usefixtures("forked_reopen")
def test_a_difference_says_what_its_trained_rank_would_lose(
    tmp_path: Path, text_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    full = tiny_checkpoint("llama_gqa", tmp_path / "full")
    common = Common(
        run=tmp_path / "run", model=str(full), data=str(text_file), dtype="float32", effort="quick"
    )
    run("prune", common, ratio=0.4, **PRUNE)
    run("train", common, **(TRAINING | {"lr": 0.02}), method="pissa", adapter_targets="q,v,down")

    def said(**given: Any) -> tuple[dict[str, Any], str]:
        capsys.readouterr()
        record = run_verb("recover", replace(common, redo=True), given)
        return record, " ".join(capsys.readouterr().err.split())

    record, text = said()
    metrics, folder = record["metrics"], Path(record["path"])
    assert (metrics["rank"], metrics["uncut_rank"], metrics["truncation_error"]) == (8, 8, 0)
    wanted = lost(folder, 4)
    assert 0.01 < wanted < 1
    assert metrics["shorter"] == {"rank": 4, "truncation_error": pytest.approx(wanted, rel=1e-4)}
    hint = re.search(
        r"ranks up to 8, as its start was subtracted\. --compress-rank 4 brings .* truncation error of (\S+)\.",
        text,
    )
    assert hint is not None
    assert float(hint[1]) == pytest.approx(wanted, rel=0.05)
    assert "nothing was cut" not in text

    record, text = said(compress_rank=4)
    assert record["metrics"]["truncation_error"] == pytest.approx(wanted, rel=1e-4)
    assert (record["metrics"]["rank"], record["metrics"]["uncut_rank"]) == (4, 8)
    assert record["metrics"]["shorter"] is None
    assert "compress-rank" not in text

    record, text = said(compress_rank=8)
    assert record["metrics"]["truncation_error"] == 0
    assert "nothing was cut: no module has a rank above 8, and --compress-rank is 8." in text


@pytest.mark.usefixtures("forked_reopen")
def test_a_plain_adapter_has_nothing_to_say(
    tmp_path: Path, text_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    full = tiny_checkpoint("llama_gqa", tmp_path / "full")
    common = Common(
        run=tmp_path / "run", model=str(full), data=str(text_file), dtype="float32", effort="quick"
    )
    run("prune", common, ratio=0.4, **PRUNE)
    run("train", common, **TRAINING, adapter_targets="q,v")
    capsys.readouterr()
    record = run_verb("recover", common, {})
    assert record["metrics"]["shorter"] is None
    assert "rank" not in capsys.readouterr().err
