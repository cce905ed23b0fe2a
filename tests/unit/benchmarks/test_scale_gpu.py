"""The benchmark of a 7B-shaped model, on a tiny one: every stage does its work."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from compress.benchmarks import scale_gpu
from compress.benchmarks.scale_gpu import TINY, random_model, recover, report, scale, training_step
from compress.structure import full_layer, structure_map

STAGES = [
    "make",
    "lora step",
    "importance",
    "prune",
    "error table",
    "allocation",
    "decomposition",
    "quantize small",
    "qloram step",
    "recover",
]
CPU = torch.device("cpu")


def test_every_stage_runs_and_is_recorded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "scale.json"
    assert scale_gpu.main(["--quick", "--menu", "quick", "--out", str(out)]) == 0
    rows = json.loads(out.read_text(encoding="utf-8"))["rows"]
    assert sorted(rows) == sorted(STAGES)
    assert all(row["seconds"] > 0 for row in rows.values())
    text = capsys.readouterr().out
    assert [line[:16].strip() for line in text.splitlines()[: len(STAGES)]] == STAGES


def test_the_steps_work_on_a_smaller_quantized_model(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = {}

    def recorded(
        full: object, arch: object, adapted: torch.nn.Module, small_arch: object, structure: object
    ) -> None:
        seen["layers"] = [type(m.base_layer).__name__ for m in adapted.modules() if hasattr(m, "base_layer")]
        seen["structure"] = structure
        seen["gradients"] = all(p.grad is not None for p in adapted.parameters() if p.requires_grad)

    monkeypatch.setattr(scale_gpu, "recover", recorded)
    scale(TINY, CPU, effort="quick", ranks=(0,), window=8)
    assert set(seen["layers"]) == {"LQLinear"}
    assert len(seen["layers"]) == 14
    assert seen["gradients"]
    shape = seen["structure"].shapes[0]
    assert shape.channels < 192 or shape.kv_heads < 4


def test_recovery_adds_the_adapters_to_the_weights() -> None:
    model, arch = random_model(TINY, CPU)
    other, other_arch = random_model(TINY, CPU)
    adapted = training_step(other, other_arch, CPU, 8)
    adapted.base_model.model.model.layers[0].mlp.up_proj.lora_B["default"].weight.data.fill_(0.5)
    before = model.model.layers[0].mlp.up_proj.weight.detach().clone()
    layer = adapted.base_model.model.model.layers[0].mlp.up_proj
    with torch.no_grad():
        recover(
            model, arch, adapted, other_arch, structure_map(arch, [full_layer(arch)] * 2, base_fingerprint="")
        )
    delta = layer.get_delta_weight("default").detach().double()
    found = model.model.layers[0].mlp.up_proj.weight.detach().double()
    torch.testing.assert_close(found, before.double() + delta, rtol=2**-7, atol=1e-6)
    assert float(delta.abs().max()) > 0


def test_without_a_gpu_only_the_quick_form_runs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert scale_gpu.main([]) == 2
    assert "needs a CUDA device" in capsys.readouterr().err


def test_the_report_sets_the_steps_against_each_other() -> None:
    row = {"seconds": 1.0, "bytes_before": 0.0, "peak_bytes": 2e9}
    text = report({"lora step": row, "qloram step": {**row, "peak_bytes": 0.9e9}})
    assert "at most    2.00 GB" in text
    assert "45% of the memory" in text
