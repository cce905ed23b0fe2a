"""Write docs/results.md: every record of benchmarks/results as tables, each with its protocol, host and versions.

``python -m compress.benchmarks.results_page [--records DIR] [--page FILE] [--images DIR] [--check]``

Some records are drawn too; see `results_pictures`.

A benchmark with a layout in `results_layouts.py` shows the figures that are named there. Any other record is shown by
what it holds: rows that hold the same kind of figures share a table, and never two protocols.
"""

from __future__ import annotations

import argparse
import ast
import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from compress.benchmarks.results_layouts import LAYOUTS, Column, Layout
from compress.benchmarks.results_pictures import IMAGES, pictures
from compress.errors import CompressError
from compress.pipelines.reporter import human_bytes
from compress.pipelines.workspace import read_json

RECORDS, PAGE = Path("benchmarks", "results"), Path("docs", "results.md")
MOST_COLUMNS = 10
"""A table with more is turned on its side if it has few rows; nested figures are left out of one with twice as many."""
HEAD = """# Results

Figures of the benchmarks, written by `python -m compress.benchmarks.results_page` from the records in
`benchmarks/results/`, which hold more than is shown here. Two figures compare when their protocol, model and host are
the same. Times of a busy machine compare with nothing but what was timed in turns beside them.
"""
_ORDER = ("smoke", "pruning", "quantization", "loram", "solver", "error_table", "importance", "kernels_cpu")
_HEAD = {"identity", "versions", "host", "format_version"}
_KNOWN = {*_HEAD, "rows"}
_LEFT_OUT = {"protocol", "protocol_line", "format_version", "name"}


def rows_of(record: Mapping[str, Any], key: str) -> dict[str, dict[str, Any]]:
    """The rows under a key by name: of a list in its order, stored by name in that of names, 8 before 64."""
    found = record.get(key, {})
    if isinstance(found, Mapping):
        named = sorted(found.items(), key=lambda item: _natural(str(item[0])))
    elif isinstance(found, list):
        named = [(row["name"], row) for row in found if isinstance(row, Mapping) and "name" in row]
    else:
        return {}
    return {str(name): dict(row) for name, row in named if isinstance(row, Mapping)}


def _natural(name: str) -> list[tuple[int, float, str]]:
    parts = re.findall(r"\d+(?:\.\d+)?|\D+", name)
    return [(0, float(part), "") if part[0].isdigit() else (1, 0.0, part) for part in parts]


def leaves(value: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Every figure in nested mappings with the keys that lead to it; lists and long texts are none."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            if key not in _LEFT_OUT:
                yield from leaves(inner, (*path, str(key)))
    elif isinstance(value, bool | int | float) or (isinstance(value, str) and len(value) <= 60):
        yield path, value


def written(value: Any, unit: str) -> str:
    """A figure as text; nothing for one that is not there."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, str):
        return value.replace("|", "\\|")
    if unit == "bytes":
        return human_bytes(value)
    if unit == "percent":
        return f"{100 * value:#.4g} %"
    if unit == "ms":
        return f"{1000 * value:.2f}"
    if unit == "us":
        return f"{1e6 * value:.1f}"
    if isinstance(value, int) or unit == "count":
        return f"{value:,}"
    if unit == "setting" or value == 0:
        return f"{value:g}"
    return f"{value:#.4g}" if abs(value) < 1e3 else f"{value:,.0f}"


def table(rows: Mapping[str, Mapping[str, Any]], columns: Sequence[Column]) -> str:
    """A Markdown table: a line for every row, or for every column where there are many; empty columns are left out."""

    def cell(row: Mapping[str, Any], column: Column) -> str:
        value: Any = row
        for key in column.path:
            value = value.get(key) if isinstance(value, Mapping) else None
        return written(None if isinstance(value, Mapping | list) else value, column.unit)

    cells = [[written(name, "text"), *(cell(row, c) for c in columns)] for name, row in rows.items()]
    used = [0, *(i for i in range(1, len(columns) + 1) if any(line[i] for line in cells))]
    grid = [["", *(written(c.header, "text") for c in columns)], *cells]
    grid = [[line[i] for i in used] for line in grid]
    if len(used) > MOST_COLUMNS + 1 and len(rows) <= MOST_COLUMNS:
        grid = [list(line) for line in zip(*grid, strict=True)]
    lines = [f"| {' | '.join(line)} |" for line in grid]
    return "\n".join([lines[0], "|" + "---|" * len(grid[0]), *lines[1:]])


def generic_columns(rows: Mapping[str, Mapping[str, Any]]) -> list[Column]:
    """A column for every figure that any of the rows has, in the order they come in; of very many the outermost."""
    paths = list(dict.fromkeys(path for row in rows.values() for path, _ in leaves(row)))
    outer: list[tuple[str, ...]] = [path for path in paths if len(path) == 1]
    if len(paths) > 2 * MOST_COLUMNS and outer:
        paths = outer
    return [
        Column(
            header=" ".join(path).replace("_", " "),
            path=path,
            unit="bytes"
            if path[-1] != "ratio" and any(re.search(r"(^|_)bytes$", key) for key in path)
            else "number",
        )
        for path in paths
    ]


def alike(rows: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Mapping[str, Any]]]:
    """Groups of rows that share half of their keys or more with the first of the group."""
    groups: list[dict[str, Mapping[str, Any]]] = []
    for name, row in rows.items():
        for group in groups:
            first = set(next(iter(group.values())))
            if 2 * len(first & set(row)) >= len(first | set(row)):
                group[name] = row
                break
        else:
            groups.append({name: row})
    return groups


def by_protocol(
    rows: Mapping[str, Mapping[str, Any]], otherwise: str
) -> list[tuple[str, dict[str, Mapping[str, Any]]]]:
    """The rows of each protocol, in order of appearance."""
    groups: dict[str, dict[str, Mapping[str, Any]]] = {}
    for name, row in rows.items():
        groups.setdefault(str(row.get("protocol_line", otherwise)), {})[name] = row
    return list(groups.items())


def tables(record: Mapping[str, Any], layouts: Sequence[Layout]) -> Iterator[str]:
    """All tables of a record, each after its protocol; what no layout shows comes last."""
    shown: set[tuple[str, str]] = set()
    for layout in layouts:
        chosen = {k: r for k, r in rows_of(record, layout.of).items() if re.fullmatch(layout.rows, k)}
        shown |= {(layout.of, name) for name in chosen}
        for protocol, rows in by_protocol(chosen, record.get(layout.protocol, "")):
            yield _with_protocol(protocol, layout.note, table(rows, layout.columns))
    sections = ["rows"] if layouts else ["rows", *(key for key in record if key not in _KNOWN)]
    for key in sections:
        rest = {n: r for n, r in rows_of(record, key).items() if (key, n) not in shown}
        for protocol, rows in by_protocol(rest, record.get("protocol_line", "")):
            for group in alike(rows):
                columns = generic_columns(group)
                if columns:
                    yield _with_protocol(
                        protocol, "" if key == "rows" else f"`{key}`:", table(group, columns)
                    )


def _with_protocol(protocol: str, note: str, text: str) -> str:
    line = f"Protocol: {protocol}." if protocol else "Protocol: the settings above."
    return "\n\n".join(part for part in (line, note, text) if part)


def module_of(stem: str, folder: Path) -> Path | None:
    """The benchmark that made a record, by the longest name that the file's begins with."""
    fitting = [f for f in folder.glob("*.py") if f"{stem}-".startswith(f"{f.stem.replace('_', '-')}-")]
    return max(fitting, key=lambda f: len(f.stem), default=None)


def settings_line(identity: Mapping[str, Any]) -> str:
    """What all rows of a record have in common, in words; hashes in short."""
    parts = []
    for path, value in leaves({k: v for k, v in identity.items() if k != "benchmark"}):
        parts.append(f"{' '.join(path).replace('_', ' ')} {written(value, 'setting')}")
    for key, value in identity.items():
        if isinstance(value, str) and re.fullmatch(r"[0-9a-f]{64}", value):
            parts.append(f"{key.replace('_', ' ')} {value[:12]}")
        elif isinstance(value, list):
            parts.append(f"{key.replace('_', ' ')} {', '.join(map(str, value))}")
    return "; ".join(parts)


def section(file: Path, benchmarks: Path, page: Path) -> str:
    """One record as a section of the page.

    Raises:
        CompressError: The file is no record of a benchmark.
    """
    record = read_json(file)
    if "host" not in record or not any(rows_of(record, key) for key in {*record, "rows"} - _HEAD):
        raise CompressError(
            f"{file} is no record of a benchmark: it has no host or no rows.",
            "Write it with the benchmark's --out.",
        )
    module = module_of(file.stem, benchmarks)
    identity = record.get("identity", {})
    name = str(identity.get("benchmark", module.stem if module else file.stem))
    host, versions = dict(record["host"]), record.get("versions", {})
    threads = host.pop("threads", None)
    facts = [f"Record: [{file.name}]({_link(file, page)})"]
    if module is not None:
        doc = ast.get_docstring(ast.parse(module.read_text(encoding="utf-8"))) or ""
        facts.insert(0, f"{doc.splitlines()[0] if doc else ''}")
        facts.append(f"Made by `python -m compress.benchmarks.{module.stem}`")
    facts.append(
        f"Host: {', '.join(map(str, host.values()))}" + ("" if threads is None else f", threads: {threads}")
    )
    facts.append("Versions: " + ", ".join(f"{k} {v}" for k, v in versions.items()))
    settings = settings_line({**identity, **{k: record[k] for k in ("effort",) if k in record}})
    if settings:
        facts.append(f"Settings: {settings}")
    listed = "\n".join(f"- {fact}" for fact in facts)
    return "\n\n".join([f"## {file.stem}", listed, *tables(record, LAYOUTS.get(name, ()))])


def _link(file: Path, page: Path) -> str:
    return Path(os.path.relpath(file.resolve(), page.resolve().parent)).as_posix()


def build(records: Path, page: Path) -> str:
    """The whole page, as text.

    Raises:
        CompressError: There is no record, or one of them cannot be read.
    """
    files = sorted(records.rglob("*.json"))
    if not files:
        raise CompressError(f"There is no record in {records}.", "Run this in a checkout, or give --records.")
    benchmarks = Path(__file__).resolve().parent

    def place(file: Path) -> tuple[int, str]:
        module = module_of(file.stem, benchmarks)
        known = module is not None and module.stem in _ORDER
        return (_ORDER.index(module.stem) if module is not None and known else len(_ORDER), file.name)

    parts = [section(file, benchmarks, page) for file in sorted(files, key=place)]
    return "\n\n".join([HEAD.strip(), *parts]) + "\n"


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(
        prog="python -m compress.benchmarks.results_page", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--records", type=Path, default=RECORDS, help="folder of the JSON files")
    parser.add_argument("--page", type=Path, default=PAGE, help="the page to write")
    parser.add_argument("--images", type=Path, default=IMAGES, help="folder of the pictures")
    parser.add_argument(
        "--check", action="store_true", help="write nothing; exit with 1 where a file is not this"
    )
    arguments = parser.parse_args()
    try:
        text = build(arguments.records, arguments.page)
        wanted = {arguments.images / name: drawn for name, drawn in pictures(arguments.records).items()}
    except CompressError as error:
        print(f"error: {error.cause}\n{error.remedy}", file=sys.stderr)
        return error.exit_code
    wanted[arguments.page] = text
    if arguments.check:
        old = [file for file, new in wanted.items() if not file.is_file() or file.read_text("utf-8") != new]
        for file in wanted:
            print(f"{file} is {'out of date' if file in old else 'up to date'}")
        return int(bool(old))
    for file, new in wanted.items():
        file.write_text(new, encoding="utf-8")
        print(f"{file}: {len(new.splitlines())} lines")
    return 0


if __name__ == "__main__":
    sys.exit(main())
