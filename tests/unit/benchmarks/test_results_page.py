"""The results page: every figure of a record that is shown is the record's, and no table mixes two protocols."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from compress.benchmarks.results_layouts import LAYOUTS, Column
from compress.benchmarks.results_page import (
    RECORDS,
    alike,
    build,
    generic_columns,
    leaves,
    main,
    module_of,
    rows_of,
    settings_line,
    table,
    written,
)
from compress.errors import CompressError
from tests.sources import ROOT

HOST = {"device": "cpu", "machine": "x86_64", "system": "Linux", "threads": 1}


def record(folder: Path, name: str, **content: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    path.write_text(json.dumps({"format_version": 1, "host": HOST, "versions": {"python": "3"}, **content}))
    return path


def cells(text: str) -> list[list[str]]:
    return [
        [c.strip() for c in line.strip("|").split("|")] for line in text.splitlines() if "---" not in line
    ]


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (None, "number", ""),
        (True, "number", "yes"),
        (0.5, "percent", "50.00 %"),
        (0.00321, "ms", "3.21"),
        (134515008, "count", "134,515,008"),
        (2.99991, "number", "3.000"),
        (0.0, "number", "0"),
        (1234.5, "number", "1,234"),
        (1e-5, "setting", "1e-05"),
        (269060592, "bytes", "269.1 MB"),
        ("a|b", "text", "a\\|b"),
    ],
)
def test_figures_are_written_with_their_unit(value: Any, unit: str, text: str) -> None:
    assert written(value, unit) == text


def test_rows_keep_a_list_s_order_and_count_upwards_by_name() -> None:
    named = {"64 tokens": {"x": 1}, "8 tokens": {"x": 2}, "256 tokens": {"x": 3}, "all": {"x": 4}}
    assert list(rows_of({"rows": named}, "rows")) == ["8 tokens", "64 tokens", "256 tokens", "all"]
    listed = [{"name": "b", "x": 1}, {"name": "a", "x": 2}, {"x": 3}, "text"]
    assert list(rows_of({"rows": listed}, "rows")) == ["b", "a"]
    assert rows_of({}, "rows") == {}


@given(
    st.recursive(
        st.one_of(st.integers(), st.booleans(), st.text(max_size=5), st.lists(st.integers(), max_size=2)),
        lambda inner: st.dictionaries(st.sampled_from("abcdef"), inner, max_size=4),
        max_leaves=12,
    )
)
def test_leaves_are_every_figure_at_its_path(value: Any) -> None:
    found = dict(leaves(value))
    for path, figure in found.items():
        at = value
        for key in path:
            at = at[key]
        assert at == figure

    def count(node: Any) -> int:
        return sum(map(count, node.values())) if isinstance(node, dict) else int(not isinstance(node, list))

    assert len(found) == count(value)


def test_a_table_has_the_figures_that_are_there_and_no_empty_column() -> None:
    rows = {"one": {"a": {"median": 0.25}, "n": 3}, "two": {"n": 4}}
    columns = [
        Column(header="median", path=("a", "median")),
        Column(header="gone", path=("b", "median")),
        Column(header="whole", path=("a",)),
        Column(header="n", path=("n",)),
    ]
    assert cells(table(rows, columns)) == [
        ["", "median", "n"],
        ["one", "0.2500", "3"],
        ["two", "", "4"],
    ]


def test_a_wide_table_of_few_rows_is_turned_on_its_side() -> None:
    row = {f"figure_{i}": i for i in range(12)}
    turned = cells(table({"only": row}, generic_columns({"only": row})))
    assert turned == [["", "only"], *([f"figure {i}", str(i)] for i in range(12))]


def test_of_very_many_figures_the_outermost_are_shown() -> None:
    few = {"a": 1, "parts": {f"p{i}": i for i in range(5)}}
    many = {"a": 1, "b": 2, "parts": {f"p{i}": i for i in range(30)}}
    assert [c.path for c in generic_columns({"x": few})] == [("a",), *(("parts", f"p{i}") for i in range(5))]
    assert [c.path for c in generic_columns({"x": many})] == [("a",), ("b",)]
    assert len(generic_columns({"x": {"parts": many["parts"]}})) == 30


def test_rows_of_one_kind_share_a_table() -> None:
    rows: dict[str, dict[str, Any]] = {"a": {"x": 1, "y": 2}, "b": {"x": 1, "y": 2, "z": 3}, "c": {"q": 1}}
    assert [list(group) for group in alike(rows)] == [["a", "b"], ["c"]]


def test_an_unknown_record_is_shown_by_protocol(tmp_path: Path) -> None:
    rows = {
        "a window of 128": {"perplexity": 12.5, "protocol_line": "text A", "protocol": {"length": 128}},
        "long": {"perplexity": 5.75, "protocol_line": "text B", "protocol": {"length": 2048}},
        "long too": {"perplexity": 6.25, "protocol_line": "text B", "file_bytes": 2_000_000},
    }
    identity = {"benchmark": "new", "model": "ab" * 32, "ratio": 0.5, "lr": 1e-5, "ranks": [0, 8]}
    record(
        tmp_path / "records", "brand-new", rows=rows, identity=identity, checks=[{"name": "c", "value": 1}]
    )
    page = build(tmp_path / "records", tmp_path / "docs" / "results.md")
    assert "[brand-new.json](../records/brand-new.json)" in page
    assert "- Host: cpu, x86_64, Linux, threads: 1" in page
    assert f"- Settings: ratio 0.5; lr 1e-05; model {'ab' * 6}; ranks 0, 8" in page
    parts = page.split("Protocol: ")[1:]
    assert [part.split(".\n")[0] for part in parts] == [
        "text A",
        "text B",
        "the settings above",
    ]
    assert "12.50" in parts[0]
    assert "5.750" not in parts[0]
    assert cells(parts[1].split("\n\n")[1])[1:] == [["long", "5.750", ""], ["long too", "6.250", "2.0 MB"]]
    assert "`checks`:" in parts[2]


@pytest.mark.parametrize("file", sorted((ROOT / RECORDS).rglob("*.json")), ids=lambda f: f.stem)
def test_every_row_of_every_record_is_on_the_page(file: Path) -> None:
    page = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
    section = re.split(r"^## ", page, flags=re.MULTILINE)
    (mine,) = (part for part in section if part.startswith(f"{file.stem}\n"))
    content = json.loads(file.read_text(encoding="utf-8"))
    for name in rows_of(content, "rows"):
        assert f"| {name} |" in mine
    for figure in {row.get("perplexity") for row in rows_of(content, "rows").values()} - {None}:
        assert f"| {written(figure, 'number')} |" in mine
    for line in {row["protocol_line"] for row in rows_of(content, "rows").values() if "protocol_line" in row}:
        assert line in mine


def test_layouts_are_of_benchmarks_that_exist() -> None:
    known = {file.stem for file in (ROOT / "benchmarks").glob("*.py")}
    said = {
        json.loads(file.read_text(encoding="utf-8")).get("identity", {}).get("benchmark")
        for file in (ROOT / RECORDS).rglob("*.json")
    }
    assert {name for name in LAYOUTS if name.replace(" ", "_") not in known} - said == set()


def test_a_record_is_traced_to_the_longest_name(tmp_path: Path) -> None:
    for name in ("loram", "loram_recover", "solver"):
        (tmp_path / f"{name}.py").touch()
    for stem, expected in (
        ("loram-recover-cpu", "loram_recover"),
        ("loram-cpu", "loram"),
        ("loramatic", None),
    ):
        found = module_of(stem, tmp_path)
        assert (found and found.stem) == expected


def test_what_is_no_record_is_refused_and_nothing_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "page.md"
    command = ["results_page", "--records", str(tmp_path / "none"), "--page", str(page)]
    monkeypatch.setattr(sys, "argv", command)
    assert main() == 1
    assert len(capsys.readouterr().err.splitlines()) == 2
    record(tmp_path / "none", "x", rows={})
    with pytest.raises(CompressError, match="no record of a benchmark"):
        build(tmp_path / "none", page)
    assert not page.exists()


def test_check_tells_whether_the_page_is_current(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record(tmp_path / "records", "x", rows={"a": {"n": 1}})
    command = ["results_page", "--records", str(tmp_path / "records"), "--page", str(tmp_path / "page.md")]
    monkeypatch.setattr(sys, "argv", [*command, "--check"])
    assert main() == 1
    monkeypatch.setattr(sys, "argv", command)
    assert main() == 0
    monkeypatch.setattr(sys, "argv", [*command, "--check"])
    assert main() == 0
    record(tmp_path / "records", "x", rows={"a": {"n": 2}})
    assert main() == 1


def test_settings_leave_the_benchmark_s_name_out() -> None:
    assert (
        settings_line({"benchmark": "x", "goals": {"tau": 0.99}, "quick": False})
        == "goals tau 0.99; quick no"
    )
