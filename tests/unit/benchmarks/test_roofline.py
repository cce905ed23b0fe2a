"""The roofline's arithmetic, its table of kernels, and the document that shows it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from compress.benchmarks import roofline
from compress.benchmarks.roofline import (
    DEVICES,
    INSTRUCTIONS,
    TOKENS,
    WIDTHS,
    Device,
    bits_per_weight,
    last_of_tiles,
    report,
    row,
)
from compress.kernels.triton.choice import TABLES
from tests.sources import ROOT


def test_floors_are_bytes_and_operations_over_peaks() -> None:
    found = row(Device(name="one", bandwidth=1e9, products=1e9, instructions=1e9), 4, 1, (100, 100))
    assert bits_per_weight(4) == 4 + 8 / 64 + 32 / 64 / 256
    assert found.memory == pytest.approx(1e-3 * (10_000 * bits_per_weight(4) / 8 + 400))
    assert found.products == found.floor == pytest.approx(20.0)
    assert found.dense == pytest.approx(20.4)
    assert found.tiles == pytest.approx(10 * INSTRUCTIONS[4] + 20.0)


def test_tiles_end_where_slices_come_out_faster() -> None:
    for bits in WIDTHS:
        last = last_of_tiles(DEVICES[0], bits)
        here, beyond = (row(DEVICES[0], bits, tokens) for tokens in (last, 2 * last))
        assert here.tiles <= here.slices
        assert beyond.tiles > beyond.slices


def test_the_default_table_is_what_the_arithmetic_gives() -> None:
    text = (TABLES / "default.json").read_text(encoding="utf-8")
    assert text == roofline.table_text(roofline.default_table())


def test_the_document_shows_the_arithmetic() -> None:
    rows = [row(device, bits, tokens) for device in DEVICES for tokens in TOKENS for bits in WIDTHS]
    assert report(rows, markdown=True) in (ROOT / "docs" / "gpu-kernels.md").read_text(encoding="utf-8")


def test_the_command_prints_and_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(roofline, "TABLES", tmp_path / "tables")
    out = tmp_path / "rows.json"
    monkeypatch.setattr("sys.argv", ["roofline", "--quick", "--write-table", "--out", str(out)])
    assert roofline.main() == 0
    assert len(capsys.readouterr().out.splitlines()) == 1 + 2 * len(DEVICES) * len(WIDTHS)
    assert json.loads(out.read_text(encoding="utf-8"))["measured"] is False
    assert (tmp_path / "tables" / "default.json").is_file()
