"""``compress plan`` against what the stages then do, on a tiny model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from compress.evaluate.memory import resident_bytes
from compress.model.load import load_model
from compress.pipelines.plan_models import quantized
from compress.pipelines.settings import Common, QuantizeSettings, resolve
from compress.quantize.hf import register
from tests.integration.common import run
from tests.tiny import tiny_checkpoint
from tests.unit.pipelines.test_plan import model_of, planned, row

pytestmark = pytest.mark.usefixtures("forked_reopen")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint("llama_gqa", tmp_path_factory.mktemp("plan") / "tiny", dtype=torch.bfloat16)


def test_the_planned_cut_is_the_cut_that_prune_makes(tiny: Path, text_file: Path, tmp_path: Path) -> None:
    """With the MLP as the only target one shape is nearest, whatever the scores."""
    plan = planned(tiny, ratio=0.3, targets="mlp", multiple=8)
    asked = {"ratio": 0.3, "targets": "mlp", "multiple": 8, "criterion": "magnitude", "repair": "none"}
    common = Common(run=tmp_path / "run", model=str(tiny), data=str(text_file), effort="quick")
    done = run("prune", common, **asked, repair_steps=0)
    metrics = done["metrics"]
    assert metrics["shape"] == plan["rounding"]["shape"]
    assert metrics["achieved_ratio"] == pytest.approx(plan["rounding"]["achieved"])
    assert metrics["after"]["parameters"] == row(plan, "pruned")["parameters"]
    size = (Path(done["path"]) / "model.safetensors").stat().st_size
    assert row(plan, "pruned")["bytes"] == pytest.approx(size, abs=64)


def test_loaded_bytes_are_those_of_loaded_models(tiny: Path, text_file: Path, tmp_path: Path) -> None:
    """Dense, and quantized with codes as they are; buffers such as rotary frequencies are not counted."""
    register()
    full = model_of(tiny)
    for dtype in (torch.float32, torch.bfloat16):
        network = load_model(tiny, dtype=dtype)
        assert full.loaded(dtype.itemsize) == pytest.approx(resident_bytes(network), rel=0.01)
    common = Common(run=tmp_path / "run", model=str(tiny), data=str(text_file), effort="quick")
    done = run("quantize", common, budget="4bit", objective="frobenius", iterations=1)
    small = quantized(full, resolve(QuantizeSettings, {"budget": "4bit"}, "quick"))
    network = load_model(Path(done["path"]), dtype=torch.float32)
    assert small.loaded(4) == pytest.approx(resident_bytes(network), rel=0.02)
    stored = done["metrics"]["stored_bits_per_weight"]
    assert 0.9 * stored <= small.bits_per_weight <= 4  # the solver spends what it may, but not all
    size = (Path(done["path"]) / "model.safetensors").stat().st_size
    assert size <= small.file_bytes
