"""The benchmark of LoRAM on a tiny model: its rows, that it goes on, and what its table says."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from compress.benchmarks import loram
from compress.benchmarks.loram import PARTS, main, table
from compress.benchmarks.loram_recover import (
    WAYS,
    measure,
    structure_of,
    write_hollow_model,
    write_small_adapter,
)
from compress.benchmarks.loram_rows import Bench, shared_row, small_model, train
from compress.benchmarks.model_shapes import architecture
from compress.benchmarks.protocol import Rows
from compress.errors import UsageError
from compress.pipelines.dispatch import run_verb
from compress.pipelines.settings import Common
from compress.structure import StructureMap
from tests.integration.conftest import text_file  # noqa: F401  (a fixture)
from tests.integration.test_loram_recipe import eight_layers


@pytest.fixture
def place(tmp_path: Path, text_file: Path) -> dict[str, Path]:  # noqa: F811
    sentences = text_file.read_text(encoding="utf-8").split("\n\n")
    rows = [{"instruction": s[:40], "output": s[40:90]} for s in sentences]
    data = tmp_path / "instructions.jsonl"
    data.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    return {
        "model": eight_layers(tmp_path / "model"),
        "data": data,
        "corpus": text_file,
        "work": tmp_path / "work",
        "out": tmp_path / "rows.json",
    }


def here(verb: str, common: Common, given: Mapping[str, Any]) -> dict[str, Any]:
    return run_verb(verb, common, dict(given), quiet=True)


def run(monkeypatch: pytest.MonkeyPatch, place: dict[str, Path], *more: str) -> int:
    options = [part for name, path in place.items() for part in (f"--{name}", str(path))]
    monkeypatch.setattr(sys, "argv", ["loram", "--quick", "--ratio", "0.15", *options, *more])
    monkeypatch.setattr(loram, "Bench", partial(Bench, runner=here))
    return main()


@pytest.mark.slow
@pytest.mark.usefixtures("forked_reopen")
def test_rows_of_both_parts(
    place: dict[str, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, place, "--only", "stru, aligned, nf4") == 0
    first = json.loads(place["out"].read_text())
    assert set(first["rows"]) == {"untuned", "full 0", "stru, aligned, nf4 0"}
    row = first["rows"]["stru, aligned, nf4 0"]
    assert min(row[key] for key in ("base", "small", "recovered", "windows_per_second")) > 0
    assert row["tokens"] == first["rows"]["full 0"]["tokens"]
    assert "stru, aligned, nf4" in capsys.readouterr().out
    assert run(monkeypatch, place, "--only", "stru, aligned, nf4") == 0  # nothing is measured twice
    assert json.loads(place["out"].read_text()) == first
    place["out"] = place["out"].with_name(
        "other.json"
    )  # other steps of alignment: what they leave as it was is known
    known = {path: path.read_bytes() for path in (place["work"] / "rows").iterdir()}
    assert run(monkeypatch, place, "--only", "stru, aligned, nf4", "--ratio", "0.2") == 0
    other = json.loads(place["out"].read_text())["rows"]
    assert {key: other[key] for key in ("untuned", "full 0")} == {
        key: first["rows"][key] for key in ("untuned", "full 0")
    }
    assert other["stru, aligned, nf4 0"]["bytes"] < row["bytes"]
    assert all(path.read_bytes() == content for path, content in known.items())
    place["out"] = place["out"].with_name("masks.json")
    assert run(monkeypatch, place, "--part", "masks", "--only", "semi 2:4") == 0
    assert json.loads(place["out"].read_text())["rows"]["semi 2:4 0"]["masked"] > 0
    with pytest.raises(UsageError, match="has no 'stru'"):
        run(monkeypatch, place, "--part", "masks", "--only", "stru")


def test_the_table_says_what_is_kept(tmp_path: Path) -> None:
    rows = Rows(tmp_path / "rows.json", {"benchmark": "test"})
    assert table(rows, PARTS["table"], [0]) == "nothing measured yet"
    rows.put("untuned", {"recovered": 3.0})
    rows.put("full 0", {"recovered": 2.0, "windows_per_second": 2.0})
    half: dict[str, Any] = {
        "base": 5.0,
        "small": 4.0,
        "recovered": 2.25,
        "windows_per_second": 3.0,
        "bytes": 5e7,
    }
    rows.put("stru 0", half)
    line = table(rows, PARTS["table"], [0]).splitlines()[-1].split()
    assert line == ["stru", "0", "5.0000", "4.0000", "2.2500", "75%", "1.50x", "50.0"]


def test_recovery_at_the_shapes_of_a_70b_model(tmp_path: Path) -> None:
    arch = architecture("LLaMA-2-70B")
    structure = structure_of(arch)
    assert [s.channels for s in structure.shapes[3:6]] == [28672, 4300, 4300]
    structure.save(tmp_path / "structure.safetensors")
    assert StructureMap.load(tmp_path / "structure.safetensors") == structure
    write_small_adapter(arch, structure, 1, tmp_path)
    write_hollow_model(arch, tmp_path / "full")
    found = {way: measure(tmp_path, way, 1) for way in WAYS}
    assert [row["rank"] for row in found.values()] == [1, 2, 1]
    assert all((row["modules"], row["scattered"]) == (561, 74 * 7) for row in found.values())
    sides = sum(sum(arch.linear_shape(spec)) for spec in arch.linears) * 80 + arch.vocab + arch.hidden
    assert found["plain"]["full_bytes"] == pytest.approx(2 * sides, rel=0.01)
    assert 0 < found["difference, cut"]["truncation"] < 1


def bench_in(place: dict[str, Path], **options: Any) -> Bench:
    settings: dict[str, Any] = {
        "full": place["model"],
        "work": place["work"],
        "data": str(place["data"]),
        "corpus": str(place["corpus"]),
        "ratio": 0.15,
        "calibration": {"calibration_tokens": 512},
        "align": {},
        "train": {},
        "windows": 1,
        "length": 32,
    }
    return Bench(**{**settings, **options})


def test_what_a_row_depends_on(place: dict[str, Path]) -> None:
    """A row that is known is not measured again, unless something that it depends on has changed."""
    asked: list[str] = []

    def measure() -> dict[str, Any]:
        asked.append("measured")
        return {"recovered": float(len(asked))}

    def measured(name: str, **options: Any) -> bool:
        before = len(asked)
        shared_row(bench_in(place, **options), name, f"{name} 0", measure)
        return len(asked) > before

    loop = {"steps": 3}
    names = ("untuned", "full", "rand", "rand, aligned", "semi 4:8", "stru, nf4")
    assert all(measured(name) for name in names)
    assert not any(measured(name) for name in names)
    assert [name for name in names if measured(name, ratio=0.5)] == ["rand", "rand, aligned", "stru, nf4"]
    assert [name for name in names if measured(name, align=loop)] == ["rand, aligned"]
    assert [name for name in names if measured(name, train=loop)] == list(names[1:])
    assert [name for name in names if measured(name, windows=2)] == list(names)


def test_throughput_counts_every_window(place: dict[str, Path]) -> None:
    """Micro-batch times accumulation windows a step, and the memory that the stage's own process took."""

    def runner(verb: str, common: Common, given: Mapping[str, Any]) -> dict[str, Any]:
        assert (verb, dict(given), common.seed) == ("train", {"micro_batch": 4, "accumulation": 3}, 7)
        metrics = {"steps": 10, "train_seconds": 5.0, "tokens": 1, "trainable_parameters": 2}
        return {"path": "somewhere", "metrics": metrics, "peak_memory_bytes": 99}

    bench = bench_in(place, train={"micro_batch": 4, "accumulation": 3}, runner=runner)
    adapter, facts = train(bench, bench.full, place["work"] / "user", 7)
    assert adapter == Path("somewhere")
    assert facts["windows_per_second"] == 10 * 4 * 3 / 5.0
    assert facts["peak_memory_bytes"] == 99


@pytest.mark.slow
def test_small_models_are_made_once(place: dict[str, Path]) -> None:
    bench = bench_in(place)
    folder = small_model(bench, "rand")
    before = (folder / "stage.json").read_bytes()
    assert small_model(bench, "rand") == folder
    assert (folder / "stage.json").read_bytes() == before
    assert (folder / "base.json").is_file()
