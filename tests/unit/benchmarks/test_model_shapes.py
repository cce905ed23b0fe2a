from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from compress.benchmarks.model_shapes import CASES, CONFIGS, Case, architecture, main, row_of, table


@pytest.mark.parametrize(
    ("model", "parameters"),
    [
        ("LLaMA-2-7B", 6_738_415_616),
        ("LLaMA-2-70B", 68_976_648_192),
        ("LLaMA-3.1-70B", 70_553_706_496),
    ],
)
def test_an_unpruned_model_has_its_published_size(model: str, parameters: int) -> None:
    row = row_of(Case(model=model, ratio=0.0, published=parameters))
    assert row.agrees
    assert row.parameters == row.parameters_before == parameters
    assert (row.linear_ratio, row.reduction) == (0, 1)
    assert row.quantized_reduction == 4


@pytest.mark.parametrize(
    ("model", "ratio", "kept", "reduction", "quantized"),
    [
        ("LLaMA-2-70B", 0.65, (3, 10035), 2.45, 9.82),
        ("LLaMA-2-70B", 0.75, (2, 7168), 3.21, 12.84),
        ("LLaMA-2-70B", 0.85, (2, 4300), 4.24, 16.95),
        ("LLaMA-2-70B", 0.95, (1, 1433), 7.14, 28.56),
        ("LLaMA-3.1-70B", 0.85, (2, 4300), 3.95, 15.81),
    ],
)
def test_published_rows(
    model: str, ratio: float, kept: tuple[int, int], reduction: float, quantized: float
) -> None:
    (case,) = (case for case in CASES if (case.model, case.ratio) == (model, ratio))
    row = row_of(case)
    assert case.published is not None
    assert row.agrees
    assert (row.kv_heads, row.channels) == kept
    assert (row.heads, row.whole_layers) == (8 * row.kv_heads, 6)
    assert (round(row.reduction, 2), round(row.quantized_reduction, 2)) == (reduction, quantized)


@pytest.mark.parametrize(("ratio", "heads", "channels"), [(0.2, 26, 8806), (0.5, 16, 5504)])
def test_7b_rows_by_hand(ratio: float, heads: int, channels: int) -> None:
    (case,) = (case for case in CASES if (case.model, case.ratio) == ("LLaMA-2-7B", ratio))
    row = row_of(case)
    layer = 4 * 4096 * heads * 128 + 3 * 4096 * channels
    assert (row.heads, row.kv_heads, row.channels, row.whole_layers) == (heads, heads, channels, 0)
    assert row.linear_parameters == 32 * layer
    assert row.parameters == 32 * (layer + 2 * 4096) + 2 * 32000 * 4096 + 4096
    assert row.linear_ratio == pytest.approx(1 - layer / (4 * 4096 * 4096 + 3 * 4096 * 11008))
    stored = 4.127 * row.linear_parameters + 16 * (row.parameters - row.linear_parameters)
    assert row.stored_reduction == pytest.approx(16 * row.parameters_before / stored, rel=1e-4)
    assert row.bf16_bytes == 2 * row.parameters


def test_a_wrong_count_is_noticed() -> None:
    (case,) = (case for case in CASES if (case.model, case.ratio) == ("LLaMA-2-70B", 0.95))
    row = row_of(replace(case, published=9_662_226_431))
    assert not row.agrees
    assert "9,662,226,431" in table([row])


def test_the_models_have_grouped_queries_as_published() -> None:
    groups = {name: architecture(name).queries_per_group for name in CONFIGS}
    assert groups == {"LLaMA-2-7B": 1, "LLaMA-2-13B": 1, "LLaMA-2-70B": 8, "LLaMA-3.1-70B": 8}


def test_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "shapes.json"
    monkeypatch.setattr(sys, "argv", ["model_shapes", "--quick", "--out", str(out)])
    assert main() == 0
    rows = json.loads(out.read_text())["rows"]
    assert sorted(rows) == ["LLaMA-2-7B 0.20", "LLaMA-2-7B 0.50"]
    assert rows["LLaMA-2-7B 0.50"]["parameters"] == 3_500_412_928
    head, *printed = capsys.readouterr().out.splitlines()
    assert "linears removed" in head
    assert [line.split()[0] for line in printed] == ["LLaMA-2-7B"] * 2
