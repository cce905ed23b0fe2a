"""The benchmark of scale: seeded checkpoints, memory of a family of processes, bars of what was measured."""

from __future__ import annotations

import json
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
import torch

from compress.benchmarks import scale
from compress.benchmarks.process_memory import measure
from compress.benchmarks.scale_chart import bar_chart
from compress.benchmarks.scale_model import write_random_adapter, write_random_model
from compress.model.checkpoint import Checkpoint, checkpoint_architecture
from compress.model.load import load_model, load_tokenizer

TINY = {
    **scale.SHAPES["small"],
    "hidden_size": 32,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "vocab_size": 512,
}


def test_a_random_model_is_seeded_sharded_and_opens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("compress.benchmarks.scale_model.SHARD_BYTES", 1 << 15)
    one, two, other = (
        Checkpoint(write_random_model(tmp_path / name, TINY, seed=seed))
        for name, seed in (("one", 0), ("two", 0), ("other", 1))
    )
    assert len(one.files) > 1
    assert one.fingerprint() == two.fingerprint() != other.fingerprint()
    assert {one.dtype(name) for name in one.names} == {torch.bfloat16}
    checkpoint_architecture(one)
    weight = one.read("model.layers.1.mlp.up_proj.weight").float()
    assert abs(float(weight.std()) - 0.02) < 0.002
    encoded = load_tokenizer(one.path).encode("aé b")
    assert encoded == [3 + byte for byte in "aé b".encode()]
    ids = torch.tensor([encoded])
    with torch.no_grad():
        assert bool(load_model(one.path, dtype=torch.float32)(ids).logits.isfinite().all())
    adapter = write_random_adapter(tmp_path / "adapter", one.path, rank=2)
    assert json.loads((adapter / "adapter_config.json").read_text())["r"] == 2


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_of_a_command_and_of_what_it_starts() -> None:
    own = "import sys, time; held = b'x' * (64 << 20); time.sleep(0.5)"
    both = (
        f"import subprocess, sys; held = b'y' * (64 << 20); subprocess.run([sys.executable, '-c', {own!r}])"
    )
    alone, family = (measure([sys.executable, "-c", code]) for code in (own, both))
    assert alone.returncode == family.returncode == 0
    assert (alone.peak.processes, family.peak.processes) == (1, 2)
    assert 64 << 20 <= alone.peak.anonymous <= 110 << 20
    assert 64 << 20 <= family.peak.anonymous - alone.peak.anonymous <= 110 << 20
    assert family.peak.resident >= family.peak.anonymous
    failed = measure([sys.executable, "-c", "import sys; print('out'); sys.exit(3)"])
    assert (failed.returncode, failed.output) == (3, "out\n")


def test_bars_are_as_long_as_what_they_stand_for() -> None:
    result = {
        "shape": "a<b",
        "model_bytes": 4e9,
        "stages": {
            "prune": {"peak": {"resident": 2e9, "anonymous": 1e9}, "limit_bytes": 3e9},
            "recover": {"peak": {"resident": 3e9, "anonymous": 3e9}, "limit_bytes": 3e9},
        },
    }
    root = ET.fromstring(bar_chart(result))
    space = "{http://www.w3.org/2000/svg}"
    widths = [float(bar.attrib["width"]) for bar in root.iter(f"{space}rect") if bar.attrib.get("x") == "110"]
    legend, *bars = widths
    longest = max(bars)
    assert legend == 10
    assert [round(width / longest, 3) for width in bars] == [0.5, 0.25, 0.75, 0.75, 1.0]
    texts = [text.text or "" for text in root.iter(f"{space}text")]
    assert any("a<b" in text for text in texts)
    assert {"prune", "recover", "2.00 GB", "4.00 GB"} <= set(texts)


def test_unknown_names_are_refused(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert scale.main(["--shape", "small", "--stages", "prun", "--work", str(tmp_path)]) == 2
    assert "There is no 'prun' here." in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_small_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(scale.SHAPES, "small", TINY)  # type: ignore[arg-type]
    out = tmp_path / "scale.json"
    assert scale.main(["--quick", "--work", str(tmp_path / "work"), "--out", str(out)]) == 0
    stages = json.loads(out.read_text())["stages"]
    assert list(stages) == sorted(scale.STAGES)  # as a JSON file of ours has them
    for stage in stages.values():
        assert stage["within_limit"]
        assert 0 < stage["peak"]["anonymous"] <= stage["peak"]["resident"]
    assert out.with_suffix(".svg").is_file()
