from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from compress.benchmarks import importance
from compress.benchmarks.importance import LiveTensors, benchmark, measure_pass, measure_speed, report
from compress.benchmarks.protocol import Rows
from compress.model.checkpoint import Checkpoint, checkpoint_architecture
from tests.tiny import tiny_checkpoint


@pytest.fixture(autouse=True)
def pydoc_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COMPRESS_DATA", raising=False)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint("llama_gqa", tmp_path_factory.mktemp("model"), dtype=torch.bfloat16)


def test_live_tensors_are_counted_once_and_until_they_go() -> None:
    linear = nn.Linear(64, 64)
    account = LiveTensors()
    account.ignore(linear)
    with account:
        first = torch.zeros(1000)
        view = first.view(10, 100)[2:]
        first.add_(1)
        assert account.bytes == 4000
        del first
        assert account.bytes == 4000  # the view still holds it
        second = torch.ones(500, dtype=torch.float64)
        assert account.bytes == 8000
        del view
        assert account.bytes == 4000
        linear.weight.detach().mul_(2)
        linear(torch.ones(1, 64)).sum().backward()
        del second
    gradients = sum(p.grad.nbytes for p in linear.parameters() if p.grad is not None)
    assert gradients == 4 * (64 * 64 + 64)
    assert account.bytes == gradients
    assert account.peak >= 4000 + gradients
    assert account.peak >= 8000


@pytest.mark.parametrize("recompute", [False, True])
def test_gradients_and_weights_are_those_of_the_decoder_linears(checkpoint: Path, recompute: bool) -> None:
    arch = checkpoint_architecture(Checkpoint(checkpoint))
    taylor = measure_pass(checkpoint, "taylor", 2, 16, recompute=recompute)
    lora = measure_pass(checkpoint, "lora", 2, 16, recompute=recompute)
    sizes = [arch.linear_shape(spec) for spec in arch.linears]
    width = taylor["weights"] // arch.decoder_linear_parameters()
    assert taylor["weights"] == lora["weights"] == taylor["gradients"]
    assert width in (2, 4)  # bfloat16 where this machine computes in it
    assert lora["gradients"] == 4 * arch.layers * 8 * sum(out + into for out, into in sizes)
    for found in (taylor, lora):
        assert found["tensors"] >= found["gradients"] + found["reduction"]
        assert found["reduction"] > 0


@pytest.mark.parametrize("kind", importance.PASSES)
def test_recomputing_needs_less(checkpoint: Path, kind: str) -> None:
    plain = measure_pass(checkpoint, kind, 4, 128)
    recomputed = measure_pass(checkpoint, kind, 4, 128, recompute=True)
    assert recomputed["tensors"] < plain["tensors"]


def test_both_formulas_of_the_speed_test_agree() -> None:
    found = measure_speed((96, 160), rounds=5)
    assert found["relative_difference"] < 1e-5
    assert set(found["seconds"]) == {"ours", "dense", "dense, merged"}
    assert set(found["speedup"]) == {"dense", "dense, merged"}
    for spread in (*found["seconds"].values(), *found["speedup"].values()):
        assert 0 < spread["least"] <= spread["median"]
        assert spread["quartile_low"] <= spread["median"] <= spread["quartile_high"]


def test_passes_are_compared_with_taylor_and_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    requests = []

    def answer(request: dict[str, Any], threads: int) -> dict[str, Any]:
        requests.append((request, threads))
        if request["measure"] == "speed":
            return {"speedup": {"dense": {"median": 7.0, "quartile_low": 6.5, "quartile_high": 8.0}}}
        tensors = 400 if request["kind"] == "taylor" else 100 if request["kind"] == "lora" else 200
        return {"tensors": tensors, "resident": 2 * tensors, "gradients": 1, "reduction": 3, "weights": 600}

    monkeypatch.setattr(importance, "in_fresh_process", answer)
    rows = Rows(tmp_path / "importance.json", {"quick": True})
    benchmark(rows, Path("model"), quick=True, threads=2)
    row = rows.get("memory, 1 x 128, recomputed: lora")
    assert (row["tensors_of_taylor"], row["resident_of_taylor"]) == (0.25, 0.25)
    assert row["reduction_of_weights"] == 0.005
    memory = [(r["kind"], r["recompute"]) for r, _ in requests if r["measure"] == "memory"]
    assert memory == [(kind, recompute) for recompute in (False, True) for kind in importance.PASSES]
    assert [threads for request, threads in requests if request["measure"] == "speed"] == [1, 2]
    text = report(rows.rows)
    assert "recomputed: lora: 0.0 MB of tensors (25.0% of Taylor's)" in text
    assert "speed, 2 threads, against dense: 7.0x (quartiles 6.5 to 8.0)" in text
    count = len(requests)
    benchmark(Rows(tmp_path / "importance.json", {"quick": True}), Path("model"), quick=True, threads=2)
    assert len(requests) == count


def test_a_measurement_runs_in_a_process_of_its_own() -> None:
    request = {"measure": "speed", "rows": 32, "columns": 48, "rounds": 2}
    found = importance.in_fresh_process(request, threads=1)
    assert (found["shape"], found["rounds"], found["threads"]) == ([32, 48], 2, 1)
