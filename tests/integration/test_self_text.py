"""``--data self``: the original model writes the text once, and every stage reads that."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from compress.data.sources import load_text
from compress.data.text import Split, Text
from compress.pipelines.dispatch import run_verb
from compress.pipelines.settings import Common
from tests.tiny import tiny_checkpoint

pytestmark = pytest.mark.usefixtures("forked_reopen")


def test_every_stage_reads_the_text_the_original_model_wrote(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def less(source: str, split: Split, **given: Any) -> Text:
        return load_text(source, split, tokens=4096, **given)

    monkeypatch.setattr("compress.pipelines.text.load_text", less)
    full = tiny_checkpoint("llama_mqa", tmp_path / "full")
    common = Common(
        run=tmp_path / "run", model=str(full), data="self", dtype="float32", threads=1, effort="quick"
    )
    training = {"steps": 2, "micro_batch": 2, "accumulation": 1, "sequence": 32}
    pruning = {"ratio": 0.3, "repair_steps": 0, "calibration_tokens": 1024, **training}
    pruned = run_verb("prune", common, pruning, quiet=True)["metrics"]
    trained = run_verb("train", common, training, quiet=True)["metrics"]
    evaluated = run_verb("eval", common, {"sequence": 32, "windows": 2}, quiet=True)["metrics"]

    assert pruned["data_protocol"]["sha256"] == trained["data_protocol"]["sha256"]
    held_out = pruned["after"]["protocol"]["sha256"]
    assert held_out == trained["validation_protocol"]["sha256"] == evaluated["held_out_protocol"]["sha256"]
    texts = {
        name: json.loads((tmp_path / "run" / "text" / f"self-{name}-0.json").read_text())["documents"]
        for name in ("train", "validation", "test")
    }
    assert sum(len(set(t)) for t in texts.values()) == len(set().union(*texts.values()))
