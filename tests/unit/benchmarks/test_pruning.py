from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from compress.benchmarks.protocol import Rows
from compress.benchmarks.pruning import Bench, bench_of, best_two, run_method, table
from compress.benchmarks.pruning_methods import METHODS, PEER, PEER_MLP
from compress.errors import UsageError
from compress.pipelines.prune import check_settings
from tests.tiny import tiny_checkpoint
from tests.unit.benchmarks.test_protocol import needs_wikitext

TOKENS = 100_352


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint("llama_gqa", tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture
def bench(model: Path, tmp_path: Path) -> Bench:
    return bench_of(
        model,
        "pydoc",
        0,
        tmp_path / "workspace",
        calibration_tokens=1024,
        recovery_tokens=1024,
        test_length=128,
        test_tokens=1024,
    )


@pytest.mark.parametrize("name", METHODS)
def test_every_method_has_settings_that_prune_takes(name: str, bench: Bench) -> None:
    method = METHODS[name]
    for given in (method.prune, method.recovery, method.trained or {}):
        settings = bench.settings(0.5, steps=3, **given)
        check_settings(settings)
        assert (settings.ratio, settings.repair_steps, settings.steps) == (0.5, 0, 3)
        assert settings.calibration_tokens == 1024
        assert (settings.micro_batch, settings.sequence) == (4, 128)
        for key, value in given.items():
            assert getattr(settings, key) == value
    assert bench.steps == 2
    peer = name in (PEER, PEER_MLP)
    assert bool(method.prune) != peer


def made_up(path: Path, suffix: str = "") -> Rows:
    rows = Rows(path, {"benchmark": "pruning"})
    for name, before, after in (
        ("magnitude", 4321.987, 321.5),
        ("ours", 61.234, 38.756),
        ("ours, distilled", 61.234, 30.0),
        ("flap", 99.0, 38.9),
    ):
        rows.put(f"0.5 {name} 0{suffix}", {"perplexity": before})
        rows.put(f"0.5 {name} {TOKENS}{suffix}", {"perplexity": after})
    rows.put(f"0.2 ours 0{suffix}", {"perplexity": 33.0})
    rows.put("dense", {"perplexity": 29.185, "protocol_line": "some text, length 512"})
    return rows


def test_the_table_has_a_line_a_method_and_a_dash_for_what_is_missing(tmp_path: Path) -> None:
    lines = table(made_up(tmp_path / "rows.json"), [0.5, 0.2], TOKENS).splitlines()
    assert lines[0].split() == ["method", "0.5", "(0)", "0.5", "(100k)", "0.2", "(0)", "0.2", "(100k)"]
    cells = {line[:28].strip(): line[28:].split() for line in lines[1:-1]}
    assert cells == {
        "magnitude": ["4321.99", "321.50", "-", "-"],
        "flap": ["99.00", "38.90", "-", "-"],
        "ours": ["61.23", "38.76", "33.00", "-"],
        "ours, distilled": ["61.23", "30.00", "-", "-"],
    }
    assert list(cells) == [name for name in METHODS if name in cells]
    assert lines[-1] == "dense 29.18; some text, length 512"
    assert len({len(line) for line in lines[1:-1]}) == 1


def test_the_table_of_one_seed(tmp_path: Path) -> None:
    rows = made_up(tmp_path / "rows.json", " seed 2")
    assert "38.76" in table(rows, [0.5], TOKENS, " seed 2")
    assert len(table(rows, [0.5], TOKENS, " seed 1").splitlines()) == 2


def test_the_two_best_go_to_the_headline(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    made_up(path)
    assert best_two(path, [0.5, 0.2], TOKENS) == ["ours", "flap"]  # variants of ours count once
    with pytest.raises(UsageError, match="does not hold two methods after recovery"):
        best_two(path, [0.2], TOKENS)


@pytest.mark.parametrize("name", METHODS)
def test_rows_that_are_there_are_not_measured_again(name: str, tmp_path: Path, bench: Bench) -> None:
    path = tmp_path / "rows.json"
    rows = Rows(path, {})
    for count in (0, bench.recovery_tokens):
        rows.put(f"0.5 {name} {count} seed 1", {"perplexity": 1.0})
    before = path.read_bytes()
    missing = Bench(
        place=bench.place, model=tmp_path / "no-model", calibration_tokens=1024, recovery_tokens=1024
    )
    run_method(missing, rows, name, 0.5, tmp_path / "no-folder", timed=True, recovery=True, suffix=" seed 1")
    assert path.read_bytes() == before
    assert not (tmp_path / "no-folder").exists()


@needs_wikitext
@pytest.mark.parametrize(
    ("name", "counts"),
    [
        ("ours", (0, 1024)),
        ("loraprune", (0, 1024)),
        ("ours without refit", (0,)),
        ("ours, two rounds", (0, 1024)),
    ],
)
def test_a_method_is_measured_before_and_after_training(
    name: str, counts: tuple[int, ...], tmp_path: Path, bench: Bench
) -> None:
    rows = Rows(tmp_path / "rows.json", {})
    (tmp_path / "method").mkdir()
    run_method(bench, rows, name, 0.4, tmp_path / "method", timed=False, recovery=True)
    found: dict[str, dict[str, Any]] = Rows(tmp_path / "rows.json", {}).rows
    assert set(found) == {f"0.4 {name} {count}" for count in counts}
    for row in found.values():
        assert row["achieved_ratio"] == pytest.approx(0.4, abs=0.02)
        assert 0 < row["perplexity"] < 1000
        assert row["protocol"]["length"] == 128
        apart = 0.05 if "rounds" in METHODS[name].prune else 0  # the second round chooses after training
        assert row["parameters"] == pytest.approx(found[f"0.4 {name} 0"]["parameters"], rel=apart, abs=0)
    if len(counts) == 2:
        before, after = (found[f"0.4 {name} {count}"]["perplexity"] for count in counts)
        assert before != after
