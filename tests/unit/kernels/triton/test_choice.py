"""The table of kernels: every product has a rule, splits fill a device, own tables go before the default."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from compress.errors import CompressError
from compress.kernels.packed import Geometry
from compress.kernels.triton import choice
from compress.kernels.triton.choice import (
    Slices,
    Tiles,
    choose,
    explain,
    forget_tables,
    read_table,
    slug,
    table_of,
)

CPU = torch.device("cpu")


def geometry(rows: int = 11008, columns: int = 4096, bits: int = 4) -> Geometry:
    return Geometry(rows=rows, columns=columns, bits=bits, scale_bits=8, block_size=64, group_size=256)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("transposed", [False, True])
def test_the_default_table_has_a_rule_for_everything(bits: int, transposed: bool) -> None:
    sizes = []
    for tokens in (0, 1, 16, 17, 64, 65, 256, 257, 10**6):
        chosen, why = explain(CPU, geometry(bits=bits), tokens, torch.bfloat16, transposed=transposed)
        assert "with the limits in tokens that one measured" in why
        sizes.append(chosen.tokens if isinstance(chosen, Tiles) else None)
    assert sizes[:5] == [16, 16, 16, 32, 64]
    assert sizes[-1] is None


def test_few_rows_are_split_until_the_device_is_full() -> None:
    small = choose(CPU, geometry(64, 4096), 1, torch.bfloat16)
    large = choose(CPU, geometry(11008, 4096), 1, torch.bfloat16)
    assert isinstance(small, Tiles)
    assert isinstance(large, Tiles)
    assert small.splits == 8  # four programs on each of the interpreter's two processors
    assert large.splits == 1
    thin = choose(CPU, geometry(64, 64), 1, torch.bfloat16)
    assert isinstance(thin, Tiles)
    assert thin.splits == 1  # never more than there are steps
    back = choose(CPU, geometry(4096, 64), 1, torch.bfloat16, transposed=True)
    assert isinstance(back, Tiles)
    assert back.splits == 8


def test_float32_takes_smaller_tiles() -> None:
    narrow, wide = (choose(CPU, geometry(), 1, dtype) for dtype in (torch.bfloat16, torch.float32))
    assert isinstance(narrow, Tiles)
    assert isinstance(wide, Tiles)
    assert (narrow.rows, wide.rows) == (128, 32)


def write(path: Path, rules: list[dict[str, object]], version: int = 1) -> None:
    content = {"format_version": version, "origin": "a test", "measured": True, "rules": rules}
    path.write_text(json.dumps(content), encoding="utf-8")


def test_a_table_of_the_device_goes_before_the_default(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(choice, "TABLES", tmp_path)
    forget_tables()
    either = {"bits": [4], "transposed": False, "most_tokens": None}
    write(tmp_path / "default.json", [{**either, "slices": {"nbytes": 1}}])
    write(tmp_path / "one-gpu-80gb.json", [{**either, "shape": [8, 8], "tiles": {"rows": 16}}])
    try:
        assert slug("One GPU (80GB)") == "one-gpu-80gb"
        assert table_of("One GPU (80GB)").measured
        assert table_of("Another").rules[0].choice == Slices(nbytes=1)
        monkeypatch.setattr(choice, "_device", lambda index: ("One GPU (80GB)", 100))
        found, why = explain(torch.device("cuda", 0), geometry(8, 8), 5, torch.bfloat16)
        assert (found, why) == (Tiles(rows=16), "a test: any number of tokens, 8 x 8")
        with pytest.raises(CompressError, match="no rule for this product"):
            choose(torch.device("cuda", 0), geometry(8, 16), 5, torch.bfloat16)
    finally:
        forget_tables()


def test_tables_that_cannot_be_read(tmp_path: Path) -> None:
    for text in ("nonsense", "[]", json.dumps({"format_version": 2})):
        (tmp_path / "t.json").write_text(text, encoding="utf-8")
        with pytest.raises(CompressError, match="cannot be read"):
            read_table(tmp_path / "t.json")
    write(tmp_path / "t.json", [{"bits": [4], "transposed": False, "most_tokens": 1, "wheels": {}}])
    with pytest.raises(CompressError, match="cannot be read"):
        read_table(tmp_path / "t.json")
